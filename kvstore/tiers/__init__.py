"""Where pages live besides the device: tiers, and the wrappers around them."""

from .choice import Choice, PrefillMeter, PrefillSpeed, fetch_or_recompute
from .disk import DiskTier
from .errors import (
    FormatTooNew,
    TierClosed,
    TierError,
    TierLocked,
    TierReadOnly,
    TierRefused,
)
from .folder import Folder
from .form import PageForm
from .memory import MemoryTier
from .moves import Move, Moves
from .order import EvictionOrder, Fifo, Lru
from .secret import directory_secret
from .stack import TierStack
from .tier import Page, Tier, byte_view
from .wrappers import CountTier, FailTier, LimitTier, LogTier, TierWrapper, VerifyTier

__all__ = [
    "Choice",
    "CountTier",
    "DiskTier",
    "EvictionOrder",
    "FailTier",
    "Fifo",
    "Folder",
    "FormatTooNew",
    "LimitTier",
    "LogTier",
    "Lru",
    "MemoryTier",
    "Move",
    "Moves",
    "Page",
    "PageForm",
    "PrefillMeter",
    "PrefillSpeed",
    "Tier",
    "TierClosed",
    "TierError",
    "TierLocked",
    "TierReadOnly",
    "TierRefused",
    "TierStack",
    "TierWrapper",
    "VerifyTier",
    "byte_view",
    "directory_secret",
    "fetch_or_recompute",
]
