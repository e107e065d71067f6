"""The paged KV store: pages, prefixes, sequences, steps; attention in place."""

from .compress import CompressedStore, Compression
from .errors import IntegrityError, PoolExhausted, SequenceClosed, StepError, StoreError
from .identity import Identity
from .page import LEGAL_MOVES, PageState
from .pool import PagePool
from .sequence import Sequence
from .spec import KVSpec
from .step import Step
from .store import KVStore
from .table import PageTable

__all__ = [
    "LEGAL_MOVES",
    "CompressedStore",
    "Compression",
    "Identity",
    "IntegrityError",
    "KVSpec",
    "KVStore",
    "PagePool",
    "PageState",
    "PageTable",
    "PoolExhausted",
    "Sequence",
    "SequenceClosed",
    "Step",
    "StepError",
    "StoreError",
]
