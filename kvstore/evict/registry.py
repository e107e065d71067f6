"""The names of the eviction policies."""

from __future__ import annotations

from collections.abc import Callable

from .cost_aware import CostAware
from .lru import LRU
from .policy import EvictionPolicy
from .s3fifo import S3FIFO
from .tinylfu import TinyLFU

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "s3fifo": S3FIFO,
    "tinylfu": TinyLFU,
    "cost": CostAware,
}


def find_policy(evict: str | EvictionPolicy) -> EvictionPolicy:
    """Give the policy of a name, or the given object.

    Raises:
        ValueError: if no policy has the name.
        TypeError: if the object lacks a call of `EvictionPolicy`.
    """
    if isinstance(evict, str):
        if evict not in POLICIES:
            raise ValueError(
                f"evict={evict!r} is no eviction policy; known: {', '.join(POLICIES)}, or an object "
                "with the calls of plait.kvstore.evict.EvictionPolicy"
            )
        return POLICIES[evict]()
    calls = [name for name in vars(EvictionPolicy) if not name.startswith("_")]
    missing = [name for name in calls if not callable(getattr(evict, name, None))]
    if missing:
        raise TypeError(
            f"evict={evict!r} is no eviction policy: it lacks {', '.join(missing)}; see "
            "plait.kvstore.evict.EvictionPolicy"
        )
    return evict
