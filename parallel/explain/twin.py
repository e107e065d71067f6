"""Meta twins: a copy of a model that has every shape and no weights, made from whatever names the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import PlanError, suggestion
from ..families import is_transformers
from ..planner.configs import CONFIGS


def twin_of(model: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the meta twin of a model, a transformers config, a catalogue name, or a checkpoint's path.

    A model that is given is read and not changed: its weights are neither copied nor referenced.

    Raises:
        PlanError: nothing of that name, or a model that is already cut.
    """
    if isinstance(model, (str, Path)):
        model = config_at(model)
    if not isinstance(model, nn.Module):
        twin = _from_config(model, dtype)
    else:
        if getattr(model, "_plait", None) is not None:
            raise PlanError(
                f"explaining a model that is cut by {str(model._plait.plan)!r}",
                "would cut it twice",
                "give the model before parallelize, its config, or its checkpoint directory",
            )
        twin = _hollow(model)
    if dtype is not None:
        twin.to(dtype)
    if is_transformers(twin):
        _make_shape_only(twin)
    return twin.eval()


def config_at(name: str | Path) -> Any:
    """Read the config of a checkpoint directory, a config.json, or a name of the catalogue."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise PlanError(
            f"model {str(name)!r}", "needs transformers", "pip install 'plait[hf]'"
        ) from None
    path = Path(name)
    if str(name).lower() in CONFIGS:
        return _shipped(str(name).lower())
    if not path.exists():
        raise PlanError(
            f"model {str(name)!r}",
            "is no directory, no config.json and no name we ship",
            f"give a path, or {suggestion(str(name).lower(), CONFIGS)}",
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise PlanError(
            f"model {str(name)!r}",
            f"has no config transformers can read ({first})",
            "check config.json",
        ) from None


def _shipped(name: str) -> Any:
    from transformers import AutoConfig

    fields = copy.deepcopy(CONFIGS[name][0])
    try:
        return AutoConfig.for_model(**{"dtype": "bfloat16", **fields})
    except ValueError:
        raise PlanError(
            f"explaining {name}",
            f"needs its code, and transformers has no model of type {fields['model_type']!r}",
            f"price it from its shapes alone: plait plan {name}",
        ) from None


def _from_config(config: Any, dtype: torch.dtype | None) -> nn.Module:
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        raise PlanError(
            f"a model of type {type(config).__name__}",
            "cannot be explained",
            "give a torch module, a transformers config, or the path of one",
        )
    own = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map"):  # weights count as dtype; no code is fetched
        if hasattr(own, name):
            delattr(own, name)
    wanted = dtype or getattr(own, "dtype", None) or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own, dtype=wanted)


def _hollow(model: nn.Module) -> nn.Module:
    """Copy a module with every parameter and buffer replaced by a meta one: 405B cost no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _make_shape_only(twin: Any) -> None:
    """Choose, among a model's own code paths, those that never ask a tensor for its values.

    Neither choice moves a byte between ranks: the experts' matrix products are batched instead of looped
    over, and a rotary embedding that rescales itself with the length keeps its first scale.
    """
    text = twin.config.get_text_config(decoder=True)
    for config in {id(c): c for c in (twin.config, text)}.values():
        if getattr(config, "_experts_implementation", None) == "eager":
            config._experts_implementation = "grouped_mm"
    for module in twin.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            module.rope_type = "default"
