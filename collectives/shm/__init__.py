"""A c10d backend for ranks on one host: POSIX shared memory and Numba."""

from .group import CallMismatch, ShmGroup
from .register import register

__all__ = ["CallMismatch", "ShmGroup", "register"]
