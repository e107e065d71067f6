"""What routers chose, recorded: which experts each token went to, in every layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..documents import refusing
from ..errors import PlanError
from .compute import is_packed
from .layer import ExpertLayer

FORMAT = "plait-routing-1"


@dataclass
class Routing:
    """The choices of some tokens, in order, layer by layer.

    Attributes:
        experts: how many each layer has, by the path of its experts; layers in the order in which tokens meet them.
        chosen: [tokens, top_k] of each layer, as it was given to the experts.
    """

    experts: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, Tensor] = field(default_factory=dict)

    def loads(self, layer: str) -> Tensor:
        """Rows of each expert of a layer."""
        flat = self.chosen[layer].reshape(-1).long()
        return torch.bincount(flat, minlength=self.experts[layer])[: self.experts[layer]]

    def passages(self, first: str, second: str) -> Tensor:
        """How many (token, choice, choice) go from each expert of one layer to each of another.

        Shape: [experts, experts]
        """
        sides = [(self.chosen[name].long(), self.experts[name]) for name in (first, second)]
        (a, rows), (b, columns) = sides
        pairs = (a[:, :, None] * columns + b[:, None, :])[
            (a < rows)[:, :, None] & (b < columns)[:, None, :]
        ]
        return torch.bincount(pairs, minlength=rows * columns).view(rows, columns)

    def save(self, path: str | Path) -> None:
        """Write safetensors: one tensor of 16 bits a choice for each layer."""
        from safetensors.torch import save_file

        about = {"format": FORMAT, "experts": json.dumps(self.experts)}
        small = {name: chosen.to(torch.int16).contiguous() for name, chosen in self.chosen.items()}
        save_file(small, str(path), about)

    @classmethod
    def load(cls, *paths: str | Path) -> Routing:
        """Read what `save` wrote; several files' tokens follow one another (one of each dp rank, say).

        Raises:
            PlanError: a file is no such file, or they are of different models.
        """
        parts = [_read(path) for path in paths]
        if any(part.experts != parts[0].experts for part in parts):
            raise PlanError("these routings", "are of different models", "give files of one model")
        names = parts[0].experts
        return cls(names, {n: torch.cat([part.chosen[n] for part in parts]) for n in names})


def _read(path: str | Path) -> Routing:
    from safetensors import SafetensorError, safe_open

    remedy = "record one with plait.record_routing(model)"
    with (
        refusing(f"routing {path}", "cannot be read", remedy, SafetensorError),
        safe_open(str(path), "pt") as file,
    ):
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError("it was not written by Routing.save")
        experts = json.loads(about["experts"])
        return Routing(experts, {name: file.get_tensor(name).long() for name in experts})


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routing]:
    """Record which experts every token of the forwards inside goes to.

    Works on an untouched model and on a cut one; each rank records the tokens it is given, so one rank of a model copy
    is enough, and ranks along dp record different tokens.

        with plait.record_routing(model) as routing:
            model(**batch)
        routing.save("routing.safetensors")

    State: hooks on the experts until the end; what was recorded stays in memory, two bytes a choice.
    """
    routing, handles, parts = Routing(), list[Any](), dict[str, list[Tensor]]()
    for path, module in model.named_modules():
        if isinstance(module, ExpertLayer):
            routing.experts[path] = module._plait_experts.place.experts
        elif is_packed(module):
            routing.experts[path] = module.get_parameter("down_proj").shape[0]
        else:
            continue
        parts[path] = []

        def note(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            index = [*args, *kwargs.values()][1]
            chosen = index.detach().reshape(-1, index.shape[-1])
            parts[path].append(chosen.to("cpu", torch.int16))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    if not parts:
        raise PlanError(
            f"recording {type(model).__name__}", "finds no experts in it", "give a model of experts"
        )
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
        routing.chosen = {path: torch.cat(p).long() for path, p in parts.items() if p}
        routing.experts = {path: n for path, n in routing.experts.items() if path in routing.chosen}
