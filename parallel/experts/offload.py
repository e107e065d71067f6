"""Decoding with more experts than memory holds: their weights stay on the host or on disk, and come when needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...cuda_kernels import permute_rows, unpermute_rows
from ...kvstore.spec import parse_bytes
from ..edits import Edit, Edits, SetAttribute, SwapClass
from ..errors import PlanError
from ..groups import Groups
from ..plan import Plan
from ..ranks import ModelRanks
from .cache import Counters, ExpertCache, Key, Weights
from .compute import Packed, is_packed, runs
from .fssdp import Borrowed
from .layer import ExpertLayer
from .route import Assignment


@dataclass
class Offloaded:
    """One layer of experts whose weights are elsewhere; computes as `Packed` does, one expert at a time.

    Attributes:
        following: the next layer's router, and which experts are held here under which numbers; None for the last.
    """

    path: str
    packed: Packed
    cache: ExpertCache
    following: tuple[str, nn.Module, dict[int, int]] | None = None

    def rows(self, module: Any, x: Tensor, counts: list[int]) -> Tensor:
        """Send rows, sorted by expert, through the experts of this layer.

        Shape: [rows, hidden] -> [rows, hidden]
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "experts on host or disk are for inference; call the model under torch.no_grad()"
            )
        out = torch.empty_like(x)
        for e, start, stop in runs(counts):
            held = {n: t.unsqueeze(0) for n, t in self.cache.get((self.path, e)).items()}
            out[start:stop] = self.packed.rows(
                Borrowed(module, held), x[start:stop], [stop - start]
            )
        return out

    def look_ahead(self, hidden: Tensor, needed: list[int]) -> None:
        """Ask the next layer's router about these tokens, and begin to fetch what it chooses."""
        if self.following is None:
            return
        path, router, own = self.following
        told = router(hidden)
        index = told[-1] if isinstance(told, tuple) else told.topk(1).indices
        likely = torch.bincount(index.reshape(-1)).argsort(descending=True, stable=True).tolist()
        chosen = set(index.reshape(-1).tolist())
        keys = [(path, own[e]) for e in likely if e in chosen and e in own]
        self.cache.expect(keys, [(self.path, e) for e in needed])


class OffloadedLayer(nn.Module):
    """Experts of an uncut model, fetched when needed.

    Shape: hidden [tokens, hidden], index and weights [tokens, top_k] -> [tokens, hidden]
    """

    _plait_offloaded: Offloaded

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        here = self._plait_offloaded
        mine = Assignment.of(index, self.num_experts)  # type: ignore[arg-type]
        counts = mine.counts.tolist()
        here.look_ahead(hidden, [e for e, n in enumerate(counts) if n])
        pairs = mine.order[: sum(counts)]
        out = here.rows(self, permute_rows(hidden, pairs, mine.top_k), counts)
        return unpermute_rows(out, pairs, weights).to(hidden.dtype)


class OffloadedExperts:
    """What `offload_experts` returns: counters, and the way back."""

    def __init__(self, cache: ExpertCache, edits: Edits) -> None:
        self.cache, self._edits = cache, edits

    @property
    def counters(self) -> Counters:
        """What the cache has done so far."""
        return self.cache.counters

    def close(self) -> None:
        """Give the model its experts back, where they are on the host; on disk they stay."""
        self._edits.undo()
        self.cache.close()


def offload_experts(
    model: nn.Module, device_bytes: int | str, *, weights: Any = None, look_ahead: bool = True
) -> OffloadedExperts:
    """Keep the experts of a transformers model on the host, or on disk, and at most ``device_bytes`` of them at hand.

    For inference. Call it after ``parallelize``, or on a model of one process; a model on meta is filled from
    ``weights``, but for its experts, which stay in the files. Results are bitwise those of everything in memory.

        model = AutoModelForCausalLM.from_config(config)             # under torch.device("meta")
        experts = plait.offload_experts(model, "8GiB", weights=folder)
        model.generate(ids); print(experts.counters)

    Args:
        weights: a directory or files of safetensors to read experts from; none: they are in memory and stay there.
        look_ahead: ask the next layer's router about a layer's tokens, and fetch what it chooses meanwhile.

    Raises:
        PlanError: the model has no packed experts, or the largest does not fit.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ExpertLayer) or is_packed(module)
    }
    if not layers:
        raise PlanError(
            f"offloading {type(model).__name__}",
            "finds no packed experts",
            "give a model of experts",
        )
    sizes = {path: expert_bytes(module) for path, module in layers.items()}
    capacity = parse_bytes(device_bytes)
    if capacity < max(sizes.values()):
        because = f"do not hold one expert of {max(sizes.values())} bytes"
        raise PlanError(
            f"device_bytes={device_bytes}", because, "give more; several experts, at best"
        )
    fetch = from_disk(model, layers, weights) if weights is not None else from_host(layers)
    cache = ExpertCache(fetch, capacity, sizes)
    edits = Edits()
    paths = list(layers)
    routers = {path: router_beside(model, path) for path in paths}
    for path, after in zip(paths, [*paths[1:], None], strict=True):
        following = None
        if after is not None and look_ahead and routers[after] is not None:
            following = after, routers[after], numbers_here(layers[after])
        here = Offloaded(path, Packed.of(layers[path]), cache, following)
        edits.apply([*layer_edits(layers[path], here), Away(layers[path])])
    return OffloadedExperts(cache, edits)


def layer_edits(module: Any, here: Offloaded) -> list[Edit]:
    """Edits that let a layer compute with what the cache gives."""
    if not isinstance(module, ExpertLayer):
        return [SetAttribute(module, "_plait_offloaded", here), SwapClass(module, OffloadedLayer)]
    routed = module._plait_experts
    if not isinstance(routed.compute, Packed) or routed.copies is not None:
        raise PlanError(
            f"experts of {here.path}", "are not packed, or are copied (fssdp)", "use plain ep"
        )
    here.packed = routed.compute
    return [SetAttribute(module, "_plait_experts", replace(routed, compute=here))]


@dataclass
class Away:
    """Take a layer's parameters out of the module, and leave their shapes."""

    module: nn.Module
    _old: dict[str, Any] | None = None

    def apply(self) -> None:
        self._old = dict(self.module._parameters)
        for name, p in self._old.items():
            if p is not None:
                shape = torch.empty(p.shape, dtype=p.dtype, device="meta")
                self.module._parameters[name] = nn.Parameter(shape, requires_grad=False)

    def undo(self) -> None:
        assert self._old is not None
        self.module._parameters.update(self._old)


def expert_bytes(module: nn.Module) -> int:
    """Bytes of one expert of a layer."""
    held = [p for p in module._parameters.values() if p is not None]
    return sum(math.prod(p.shape[1:]) * p.element_size() for p in held)


def numbers_here(module: nn.Module) -> dict[int, int]:
    """The experts held here, and their numbers among those."""
    if isinstance(module, ExpertLayer):
        place = module._plait_experts.place
        return {e: n for n, e in enumerate(place.homes.ranks[place.along_ep.index])}
    count = len(next(p for p in module._parameters.values() if p is not None))
    return {e: e for e in range(count)}


def router_beside(model: nn.Module, path: str) -> Any:
    """The router of a layer: the sibling of the experts with one row of weights for each."""
    block, experts = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    whole = (
        experts._plait_experts.place.experts
        if isinstance(experts, ExpertLayer)
        else len(numbers_here(experts))
    )
    for child in block.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == whole:
            return child
    return None


def from_host(layers: dict[str, nn.Module]) -> Callable[[Key], Weights]:
    """Fetch from the parameters the modules have now; they go to the host if they are elsewhere."""
    devices = {path: next(module.parameters()).device for path, module in layers.items()}
    kept = {
        path: {n: p.detach().to("cpu") for n, p in module._parameters.items() if p is not None}
        for path, module in layers.items()
    }

    def fetch(key: Key) -> Weights:
        path, e = key
        return {n: t[e].to(devices[path], copy=True) for n, t in kept[path].items()}

    return fetch


def from_disk(
    model: nn.Module, layers: dict[str, nn.Module], weights: Any
) -> Callable[[Key], Weights]:
    """Fetch from safetensors, expert by expert; the rest of a model on meta is filled from them here."""
    from ..checkpoint.weights import Loading, rank_device

    if any(isinstance(module, ExpertLayer) for module in layers.values()):
        raise PlanError(
            "offload_experts(weights=) of a cut model",
            "would read experts that the plan has already read",
            "leave weights out: this rank's experts stay on the host",
        )
    loading = Loading.of(model, ModelRanks.of(Plan(), Groups.single()), weights)
    experts = {id(p) for module in layers.values() for p in module._parameters.values()}
    for edit in [*loading.whole([], experts), *loading.buffers()]:
        edit.apply()
    names = {
        path: {n: p.dtype for n, p in m._parameters.items() if p is not None}
        for path, m in layers.items()
    }

    def fetch(key: Key) -> Weights:
        path, e = key
        return {
            n: loading.stored[f"{path}.{n}"]
            .slice(0, e, e + 1)[0]
            .to(rank_device(torch.device("meta")), dtype, copy=True)
            for n, dtype in names[path].items()
        }

    return fetch
