"""Which tokens matter: one method a file."""

from .critical import Critical
from .expected import ExpectedAttention
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .kvzip import KVzip
from .lagkv import LagKV
from .scorer import KEEP, Scorer
from .snapkv import SnapKV
from .streaming import Streaming
from .tova import Tova
from .triattention import QueryMeans, TriAttention

__all__ = [
    "H2O",
    "KEEP",
    "Critical",
    "ExpectedAttention",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "QueryMeans",
    "Scorer",
    "SnapKV",
    "Streaming",
    "Tova",
    "TriAttention",
]
