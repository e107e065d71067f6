"""Optimizer state of a cut model: the moments of cut parameters as DTensors, like the parameters themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..edits import CutParameter
from .state_dict import as_dtensor, check_shape, local_value


def track_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make an optimizer's state dict follow the model's: moments of cut parameters become DTensors too.

    Without it torch takes the local moments for replicated tensors and saves one rank's part as the whole. State that
    has not its parameter's shape (factored moments) is refused.

    Collective: as for the model's state dict, once per moment.
    """
    done = getattr(model, "_plait", None)
    if done is None:
        return optimizer
    cuts = {id(e.module._parameters[e.name]): e for e in done.parameters()}

    def save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        def shown(value: Tensor, edit: CutParameter) -> Tensor:
            return as_dtensor(value, edit, done.ranks)

        return _with_state(optimizer, state, cuts, lambda e: e.local_shape(done.ranks), shown)

    def load(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        def taken(value: Tensor, edit: CutParameter) -> Tensor:
            return local_value(value, edit.module._parameters[edit.name], edit, done.ranks)

        return _with_state(optimizer, state, cuts, lambda e: e.shape, taken)

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return optimizer


def _with_state(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    cuts: dict[int, CutParameter],
    shape_of: Any,
    change: Any,
) -> dict[str, Any]:
    """Copy an optimizer's state dict with every moment of a cut parameter changed."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    edits = {key: cuts.get(id(p)) for key, p in zip(keys, parameters, strict=True)}
    moments = dict(state["state"])
    for key, values in moments.items():
        edit = edits.get(key)
        if edit is None:
            continue
        moments[key] = dict(values)
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            check_shape(f"{name} of {edit.path}", value, shape_of(edit))
            moments[key][name] = change(value, edit)
    return {**state, "state": moments}
