"""A c10d backend for ranks on one host: POSIX shared memory and Numba."""

from ..errors import CallMismatch
from .group import ShmGroup
from .register import register
from .symmetric import symmetric_empty

__all__ = ["CallMismatch", "ShmGroup", "register", "symmetric_empty"]
