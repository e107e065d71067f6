"""State dicts of a cut model: DTensors under the model's own names, so that any plan reads what another wrote.

Each cut parameter appears with its whole shape, cut like ``torch.chunk`` over one 1-D mesh of all ranks of the model
copy in *run order* (see docs/decisions/009-state-dicts.md), whatever runs of it the ranks hold in the model.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...collectives.primitive import chunk_sizes
from ..agreement import agree
from ..edits import AddHook, CutParameter, Edit
from ..errors import PlanError
from ..layout import Cut, Run
from ..ranks import ModelRanks
from .sharded import as_shard, cut_twice, dp_chunk, from_chunk, taken_back

MESH_NAME = "ffn_tp"


def state_dict_edits(
    model: nn.Module, cuts: Iterable[CutParameter], ranks: ModelRanks
) -> list[Edit]:
    """Edits that make ``state_dict()`` give DTensors and ``load_state_dict()`` take DTensors or whole tensors.

    Collective: none here; the hooks say what they send.
    """
    by_module: dict[nn.Module, list[CutParameter]] = defaultdict(list)
    for edit in cuts:
        by_module[edit.module].append(edit)
    if not by_module and not ranks.sharded:
        return []
    hooks = [ModuleHooks(edits, ranks) for edits in by_module.values()]
    edits: list[Edit] = [
        _hook(module.register_state_dict_post_hook, h.save)
        for module, h in zip(by_module, hooks, strict=True)
    ]
    check = ModelCheck(model, {e.path: e for group in by_module.values() for e in group}, ranks)
    edits.append(_hook(model.register_load_state_dict_pre_hook, check))
    # after the check: a model whose own parameters are cut must be checked before they are taken apart
    edits += [
        _hook(module.register_load_state_dict_pre_hook, h.load)
        for module, h in zip(by_module, hooks, strict=True)
    ]
    return edits


def _hook(register: Any, hook: Any) -> AddHook:
    def call(
        *args: Any,
    ) -> None:  # torch marks the hook it is given, which a bound method does not allow
        hook(*args)

    return AddHook(lambda: register(call))


class ModuleHooks:
    """The hooks of one module that has cut parameters.

    Collective: all ranks of the model copy, for parameters in which some rank holds its chunk in several pieces or not
    at all (fused projections, uneven heads): one all-gather of the parameter, padded to the largest part. Nothing else.
    """

    def __init__(self, edits: list[CutParameter], ranks: ModelRanks) -> None:
        self.edits = edits
        self.ranks = ranks

    def save(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put DTensors in place of the local parts."""
        for edit in self.edits:
            if (local := state.get(prefix + edit.name)) is not None:
                state[prefix + edit.name] = as_dtensor(local, edit.cut, edit.shape, self.ranks)

    def load(
        self, module: nn.Module, state: dict[str, Any], prefix: str, meta: dict[str, Any], *_: Any
    ) -> None:
        """Put this rank's parts in place of DTensors or whole tensors."""
        for edit in self.edits:
            value = state.get(prefix + edit.name)
            if value is None:
                continue
            if meta.get("assign_to_params_buffers"):
                raise PlanError(
                    "load_state_dict(assign=True)",
                    f"would replace {edit.path}, which is cut over the ranks",
                    "use assign=False",
                )
            check_shape(edit.path, value, edit.shape)
            held = module._parameters[edit.name]
            state[prefix + edit.name] = local_value(value, held, edit.cut, self.ranks)


class ModelCheck:
    """Refuses a state dict that does not fit before anything is loaded, on every rank if on one.

    Collective: all ranks of the model copy; one all-gather of 4 KiB per ``load_state_dict`` of the whole model.
    """

    def __init__(self, model: nn.Module, cuts: dict[str, CutParameter], ranks: ModelRanks) -> None:
        self.model = model
        self.cuts = cuts
        self.ranks = ranks

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        shapes = {name: tuple(t.shape) for name, t in self._tensors()}
        shapes |= {path: edit.shape for path, edit in self.cuts.items()}
        failure: Exception | None = None
        found = {
            name: state[prefix + name]
            for name in shapes
            if isinstance(state.get(prefix + name), Tensor)
        }
        try:
            for name, value in found.items():
                check_shape(name, value, shapes[name])
        except PlanError as error:
            failure = error
        # a rank with a DTensor where another has a whole tensor would wait for it for ever
        kinds = "/".join(
            f"{n}{v.placements}{v.device_mesh.shape}"
            for n, v in found.items()
            if isinstance(v, DTensor)
        )
        agree(self.ranks.holders, {"state dict": _short(kinds)}, failure)
        held = dict(self._tensors())
        for name in found.keys() - self.cuts.keys():
            value, own = found[name], held[name]
            if isinstance(value, DTensor) and not _alike(value, own):
                value = value.full_tensor()
            state[prefix + name] = as_shard(value, own)

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)


def as_dtensor(local: Tensor, cut: Cut, shape: tuple[int, ...], ranks: ModelRanks) -> DTensor:
    """Show this rank's chunk of a cut tensor as a DTensor; a view of ``local`` where that holds the chunk.

    Shape: local as ``cut`` says -> DTensor of ``shape``, ``Shard(cut.dim)`` over the ranks in run order
    Collective: all ranks of the model copy if `in_place` is false (one all-gather of the tensor), else none; at the
        first call of a plan with tp > 1 and kvp > 1 the communicator in run order is made.
    """
    if isinstance(local, DTensor):
        return _of_shard(local, cut, shape, ranks)
    start, stop = chunk_run(cut, ranks, ranks.index)
    if in_place(cut, ranks):
        offset = (cut.offset_of(ranks.index, start, stop) or 0) if start < stop else 0
        chunk = local.narrow(cut.dim, offset, stop - start)
    else:
        chunk = ranks.gather(local.detach(), cut).narrow(cut.dim, start, stop - start).clone()
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        chunk,
        run_mesh(ranks, local.device),
        [Shard(cut.dim)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _of_shard(shard: DTensor, cut: Cut, shape: tuple[int, ...], ranks: ModelRanks) -> DTensor:
    """Show dp's shard of this rank's part as a DTensor of the whole.

    Collective: none where the parts are chunks; else all ranks that hold the parameter, an all-gather of it.
    """
    shown = cut_twice(shard, cut, shape, ranks)
    if shown is None:
        chunk = as_dtensor(shard.detach().full_tensor(), cut, shape, ranks).to_local()
        shown = from_chunk(dp_chunk(chunk, shard).clone(), cut, shape, ranks)
    return shown


def local_value(value: Tensor, held: Tensor | None, cut: Cut, ranks: ModelRanks) -> Tensor:
    """Take what this rank's parameter ``held`` should hold out of a DTensor or a whole tensor.

    Collective: as `local_part`, unless the value has the form that this plan's state dict gives.
    """
    back = taken_back(value, held, cut, ranks)
    return as_shard(local_part(value, cut, ranks), held) if back is None else back


def local_part(value: Tensor, cut: Cut, ranks: ModelRanks) -> Tensor:
    """Take this rank's part of a DTensor or of a whole tensor.

    Collective: for a DTensor, its ranks; one all-gather of the tensor, unless it is cut exactly as this plan cuts it.
    """
    if not isinstance(value, DTensor):
        return cut.take(value.detach(), ranks.index)
    if _is_ours(value, cut, ranks):
        return value.to_local().detach()
    return cut.take(value.detach().full_tensor(), ranks.index)


def chunk_run(cut: Cut, ranks: ModelRanks, index: int) -> Run:
    """The run of ``cut.dim`` that a rank's DTensor holds: chunk ``run_order[index]`` by torch.chunk's rule."""
    sizes = chunk_sizes(cut.length, ranks.size)
    number = ranks.run_order[index]
    return sum(sizes[:number]), sum(sizes[: number + 1])


def in_place(cut: Cut, ranks: ModelRanks) -> bool:
    """Say whether every rank holds its DTensor chunk in one piece; the same on all ranks."""
    runs = [chunk_run(cut, ranks, j) for j in range(ranks.size)]
    return all(
        start == stop or cut.offset_of(j, start, stop) is not None
        for j, (start, stop) in enumerate(runs)
    )


def run_mesh(ranks: ModelRanks, device: torch.device) -> DeviceMesh:
    """The 1-D mesh of all ranks of the model copy, in run order.

    Collective: all of them, at the first call of a plan with tp > 1 and kvp > 1; otherwise the existing group serves.
    """
    order = sorted(range(ranks.size), key=lambda j: ranks.run_order[j])
    device_type = "cpu" if device.type == "meta" else device.type
    return ranks.groups.mesh_of(tuple(ranks.members[j] for j in order), MESH_NAME, device_type)


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of a state dict that has another shape than the whole parameter.

    Raises:
        PlanError: naming the parameter and both shapes.
    """
    if tuple(value.shape) != shape:
        raise PlanError(
            f"{name} of shape {list(value.shape)} in the state dict",
            f"does not fit the model's {list(shape)}",
            "load the state dict of a model with this config; nothing was loaded",
        )


def _is_ours(value: DTensor, cut: Cut, ranks: ModelRanks) -> bool:
    """Say whether the DTensor's chunks are the parts themselves, on every rank."""
    same = all(cut.runs[j] == (chunk_run(cut, ranks, j),) for j in range(ranks.size))
    return (
        same
        and value.placements == (Shard(cut.dim),)
        and value.device_mesh == run_mesh(ranks, value.device)
    )


def _alike(value: DTensor, held: Tensor) -> bool:
    """Say whether a value is held as the model holds it."""
    return (
        isinstance(held, DTensor)
        and value.device_mesh == held.device_mesh
        and value.placements == held.placements
    )


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if text else "whole tensors"
