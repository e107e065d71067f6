"""Kernels: torch operators under `plait::`, each with a reference, a CPU and a fake implementation."""

from . import decode_choice  # noqa: F401  (registers what CUDA runs for paged_attention)
from .attention_mass import attention_mass
from .coded_attention import coded_attention
from .dense_attention import dense_attention
from .expert_order import sort_by_expert
from .expert_rows import permute_rows, unpermute_rows
from .merge import merge_states
from .page_copy import Regions, copy_pages, write_tokens
from .page_summary import summarise
from .paged_attention import paged_attention
from .scores import Interleave, attention_reference
from .top_k import top_k
from .unit_scores import unit_scores

__all__ = [
    "Interleave",
    "Regions",
    "attention_mass",
    "attention_reference",
    "coded_attention",
    "copy_pages",
    "dense_attention",
    "merge_states",
    "paged_attention",
    "permute_rows",
    "sort_by_expert",
    "summarise",
    "top_k",
    "unit_scores",
    "unpermute_rows",
    "write_tokens",
]
