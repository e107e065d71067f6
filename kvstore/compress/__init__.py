"""Fewer tokens, chosen: what a cache keeps when it may not keep all."""

from .choice import ModelFacts
from .choose import keep_best
from .compression import Compression, CompressionError
from .refresh import DenoisingBlock, Elastic, StepCache
from .registry import BUDGETS, SCORERS, find_budget, find_scorer
from .rotary import Rotary
from .sequence import KeptSequence, KeptStep
from .shard import Shard
from .store import CompressedStore
from .view import LayerView

__all__ = [
    "BUDGETS",
    "SCORERS",
    "CompressedStore",
    "Compression",
    "CompressionError",
    "DenoisingBlock",
    "Elastic",
    "KeptSequence",
    "KeptStep",
    "LayerView",
    "ModelFacts",
    "Rotary",
    "Shard",
    "StepCache",
    "find_budget",
    "find_scorer",
    "keep_best",
]
