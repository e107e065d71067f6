"""Buffers that no checkpoint keeps because they follow from the config: rotary frequencies, embedding scales."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..families import is_transformers


def computed_buffers(model: nn.Module, path: str, module: nn.Module) -> dict[str, Tensor]:
    """Compute a module's non-persistent buffers that are on meta, with the model's own ``_init_weights``.

    That is what ``from_pretrained`` does, so the values are its values, for every kind of rope. The module itself is
    not touched: a stand-in with meta parameters and fresh buffers is initialised.

    Raises:
        PlanError: the model does not say how a buffer is computed.
    """
    names = [n for n in module._non_persistent_buffers_set if _on_meta(module._buffers.get(n))]
    if not names:
        return {}
    stand_in = copy.copy(module)
    fresh = {
        n: torch.empty_like(b, device="cpu")
        for n, b in module._buffers.items()
        if n in names and b is not None
    }
    stand_in._buffers = {**module._buffers, **fresh}
    stand_in._parameters = {
        n: None if p is None else nn.Parameter(p.detach().to("meta"))
        for n, p in module._parameters.items()
    }
    before = {n: b._version for n, b in fresh.items()}
    owner = _owner(model, path)
    if owner is not None:
        with torch.no_grad(), torch.device("cpu"):
            owner._init_weights(stand_in)
    silent = [n for n, b in fresh.items() if b._version == before[n]]
    if silent:
        raise PlanError(
            f"buffers {silent} of {path or type(module).__name__}",
            "are on meta, belong to no checkpoint, and the model does not say how to compute them",
            "build the model with these buffers on a device",
        )
    return fresh


def _on_meta(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.device.type == "meta"


def _owner(model: nn.Module, path: str) -> Any:
    """The innermost transformers model around a module."""
    found: Any = model if is_transformers(model) else None
    at: nn.Module = model
    for part in path.split(".") if path else ():
        at = getattr(at, part)
        if is_transformers(at):
            found = at
    return found
