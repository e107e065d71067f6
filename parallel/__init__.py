"""How a model is cut over ranks: plans, and parallelize(model, plan)."""

from .activations import offload_activations
from .api import parallelize, unparallelize
from .attention.mla import Mla
from .attention.role import Attention
from .axes import Experts, Fssdp, Helix, Pipeline, Replicate, Ring, Shard, Tensor, Ulysses
from .checkpoint import track_optimizer
from .clipping import clip_grad_norm_
from .context.modules import Sequence
from .errors import PlanError
from .experts import (
    BiasBalance,
    LocalExperts,
    RoutedExperts,
    RouterZLoss,
    Routing,
    offload_experts,
    record_routing,
)
from .pipeline import Stages, measure_layers
from .plan import Plan
from .tracing import trace

__all__ = [
    "Attention",
    "BiasBalance",
    "Experts",
    "Fssdp",
    "Helix",
    "LocalExperts",
    "Mla",
    "Pipeline",
    "Plan",
    "PlanError",
    "Replicate",
    "Ring",
    "RoutedExperts",
    "RouterZLoss",
    "Routing",
    "Sequence",
    "Shard",
    "Stages",
    "Tensor",
    "Ulysses",
    "clip_grad_norm_",
    "measure_layers",
    "offload_activations",
    "offload_experts",
    "parallelize",
    "record_routing",
    "trace",
    "track_optimizer",
    "unparallelize",
]
