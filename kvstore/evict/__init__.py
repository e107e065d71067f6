"""Eviction policies: which cached pages a full store loses."""

from .cost_aware import CostAware
from .lru import LRU
from .policy import Chain, EvictionPolicy
from .registry import POLICIES, find_policy
from .s3fifo import S3FIFO
from .tinylfu import TinyLFU

__all__ = [
    "LRU",
    "POLICIES",
    "S3FIFO",
    "Chain",
    "CostAware",
    "EvictionPolicy",
    "TinyLFU",
    "find_policy",
]
