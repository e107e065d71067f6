"""plait: run one large language model over many ranks, and keep its keys and values."""

from .collectives import World, init
from .parallel import (
    Attention,
    BiasBalance,
    Experts,
    Helix,
    Mla,
    Pipeline,
    Plan,
    PlanError,
    Replicate,
    Ring,
    RoutedExperts,
    Routing,
    Sequence,
    Shard,
    Tensor,
    Ulysses,
    clip_grad_norm_,
    parallelize,
    record_routing,
    track_optimizer,
    unparallelize,
)

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "BiasBalance",
    "Experts",
    "Helix",
    "Mla",
    "Pipeline",
    "Plan",
    "PlanError",
    "Replicate",
    "Ring",
    "RoutedExperts",
    "Routing",
    "Sequence",
    "Shard",
    "Tensor",
    "Ulysses",
    "World",
    "clip_grad_norm_",
    "init",
    "parallelize",
    "record_routing",
    "track_optimizer",
    "unparallelize",
]
