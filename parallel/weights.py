"""Where the local weights come from: a model in memory, or safetensors of which each rank reads only its slices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .edits import CutParameter, Edit, ReplaceTensor
from .errors import PlanError, listed, suggestion
from .ranks import ModelRanks

Weights = str | Path | Sequence[str | Path] | None


class Safetensors:
    """Tensors by name over one or more safetensors files, read slice by slice through the file's map."""

    def __init__(self, weights: Any) -> None:
        from safetensors import safe_open

        self.files = {str(path): safe_open(path, framework="pt") for path in _files(weights)}
        self.where = {name: path for path, file in self.files.items() for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header."""
        return tuple(self.files[self.where[name]].get_slice(name).get_shape())

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read a run of one dim; only these bytes are copied."""
        index = (slice(None),) * dim + (slice(start, stop),)
        return self.files[self.where[name]].get_slice(name)[index]

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor."""
        return self.files[self.where[name]].get_tensor(name)


def load(model: nn.Module, edits: Iterable[Edit], ranks: ModelRanks, weights: Weights) -> list[Edit]:
    """Fill in the local part of every cut parameter, and return edits for the tensors that stay whole.

    State: holds at most this rank's parts and one tensor more.

    Raises:
        PlanError: a tensor is missing, has another shape, holds NaN, or is on meta without ``weights``.
    """
    cuts = [e for e in edits if isinstance(e, CutParameter)]
    source = None if weights is None else Safetensors(weights)
    aliases = _aliases(model)
    made: dict[int, nn.Parameter] = {}
    for edit in cuts:
        assert edit.whole is not None
        key = id(edit.whole)
        if key not in made:
            made[key] = _local(edit, ranks, source, aliases[key])
        edit.local = made[key]
    if source is None:
        return []
    return _whole_tensors(model, {id(e.whole) for e in cuts}, source, aliases)


def _local(edit: CutParameter, ranks: ModelRanks, source: Safetensors | None, names: list[str]) -> nn.Parameter:
    whole = edit.whole
    assert whole is not None
    if source is None:
        local = edit.cut.take(whole.detach(), ranks.index)
    else:
        name = _find(source, names, tuple(whole.shape))
        local = edit.cut.read(lambda a, b: source.slice(name, edit.cut.dim, a, b), ranks.index)
        local = local.to(dtype=whole.dtype, device=_real(whole.device))
    _check(local, names[0])
    return nn.Parameter(local, requires_grad=whole.requires_grad)


def _whole_tensors(model: nn.Module, cut: set[int], source: Safetensors, aliases: dict[int, list[str]]) -> list[Edit]:
    """Read what stays whole, and compute again the buffers that no file holds."""
    edits: list[Edit] = []
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in cut:
                continue
            if id(p) not in made:
                value = source.tensor(_find(source, aliases[id(p)], tuple(p.shape)))
                _check(value, aliases[id(p)][0])
                made[id(p)] = nn.Parameter(value.to(dtype=p.dtype, device=_real(p.device)), requires_grad=p.requires_grad)
            edits.append(ReplaceTensor(module, name, made[id(p)]))
        for name, b in module._buffers.items():
            if b is not None:
                edits += _buffer(model, module, name, b, source)
    return edits


def _buffer(model: nn.Module, module: nn.Module, name: str, buffer: Tensor, source: Safetensors) -> list[Edit]:
    full = next((n for n, b in model.named_buffers() if b is buffer), name)
    if full in source:
        return [ReplaceTensor(module, name, source.tensor(full).to(buffer.dtype))]
    if buffer.device.type != "meta":
        return []
    return [ReplaceTensor(module, name, _computed(model, module, name, full))]


def _computed(model: nn.Module, module: nn.Module, name: str, full: str) -> Tensor:
    """Compute a buffer that transformers derives from the config (rotary frequencies)."""
    config = getattr(module, "config", None)
    if config is None:
        raise PlanError(f"buffer {full}", "is on meta and in no weights file", "build the model with its buffers on a device")
    with torch.device("cpu"):
        fresh = type(module)(config=config)
    return fresh.get_buffer(name)


def _find(source: Safetensors, names: list[str], shape: tuple[int, ...]) -> str:
    name = next((n for n in names if n in source), None)
    if name is None:
        raise PlanError(f"tensor {names[0]}", "is not in the weights", suggestion(names[0], source.where))
    if source.shape(name) != shape:
        raise PlanError(
            f"tensor {name} of shape {list(source.shape(name))} in the weights",
            f"does not fit the model's {list(shape)}",
            "use the config that belongs to these weights",
        )
    return name


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter; tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _check(value: Tensor, name: str) -> None:
    if value.device.type != "meta" and value.is_floating_point() and bool(torch.isnan(value).any()):
        raise PlanError(f"parameter {name}", "holds NaN", "repair or reload the weights; nothing was changed")


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _files(weights: Any) -> list[Path]:
    if isinstance(weights, (list, tuple)):
        return [path for item in weights for path in _files(item)]
    path = Path(weights)
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    found = sorted(path.glob("*.safetensors"))
    if not found:
        there = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else []
        raise PlanError(f"weights={str(weights)!r}", f"holds no safetensors file (found {listed(there)})", "give a checkpoint directory")
    return found
