"""The routers of a transformers model, whose logits its balancing loss wants from all stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import PlanError

LOGITS = "router_logits"


def widths(model: Any, layer: nn.Module) -> list[int]:
    """Count the experts of every router of a layer, by what the model says it records as router logits.

    Raises:
        PlanError: it has a router of which we do not know how wide its logits are.
    """
    found = (getattr(model.base_model, "_can_record_outputs", None) or {}).get(LOGITS) or ()
    recorders = found if isinstance(found, list | tuple) else [found]
    experts = []
    for recorder in recorders:
        kind = getattr(recorder, "target_class", recorder)
        where = getattr(recorder, "layer_name", None)
        for path, module in layer.named_modules():
            if isinstance(module, kind) and (where is None or where in path):
                experts.append(width(module))
    return experts


def hooked(model: Any) -> None:
    """Let transformers hang its recorders on all layers here: it does so on those that its first forward sees."""
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    maybe_install_capturing_hooks(model.base_model)


def width(router: nn.Module) -> int:
    """Number of experts of a router."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise PlanError(
            f"a balancing loss of {type(router).__name__} under pp",
            "needs to know the width of its logits, and it has no weight of [experts, hidden]",
            "set output_router_logits=False, or use pp1",
        )
    return weight.shape[0]
