"""The `gloo` backend of torch, watched: a rank that is lost is named, and a call that cannot end ends."""

from .group import GlooGroup
from .register import NAME, register

__all__ = ["NAME", "GlooGroup", "register"]
