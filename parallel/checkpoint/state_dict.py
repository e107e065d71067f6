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
from ..ranks import Holders, ModelRanks
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
                state[prefix + edit.name] = as_dtensor(local, edit, self.ranks)

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
            state[prefix + edit.name] = local_value(value, held, edit, self.ranks)


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


def as_dtensor(local: Tensor, edit: CutParameter, ranks: ModelRanks) -> DTensor:
    """Show this rank's chunk of a cut tensor as a DTensor; a view of ``local`` where that holds the chunk.

    Shape: local as the cuts say -> DTensor of the whole shape, each cut a ``Shard`` over its holders in run order
    Collective: the holders of every cut for which `in_place` is false (one all-gather of the tensor), else none; at the
        first call of a plan with tp > 1 and kvp > 1 the communicator in run order is made.
    """
    if isinstance(local, DTensor):
        return _of_shard(local, edit, ranks)
    chunk = local
    for cut, holders in reversed(edit.placed(ranks)):
        chunk = own_chunk(chunk, cut, holders)
    whole = torch.empty(edit.shape, device="meta")
    return DTensor.from_local(
        chunk,
        mesh_of(edit, ranks, local.device),
        [Shard(cut.dim) for cut, _ in edit.placed(ranks)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def own_chunk(local: Tensor, cut: Cut, holders: Holders) -> Tensor:
    """Turn the runs of a dim that this rank holds into the chunk its DTensor holds."""
    start, stop = chunk_run(cut, holders, holders.index)
    if in_place(cut, holders):
        offset = (cut.offset_of(holders.index, start, stop) or 0) if start < stop else 0
        return local.narrow(cut.dim, offset, stop - start)
    return holders.gather(local.detach(), cut).narrow(cut.dim, start, stop - start).clone()


def _of_shard(shard: DTensor, edit: CutParameter, ranks: ModelRanks) -> DTensor:
    """Show dp's shard of this rank's part as a DTensor of the whole.

    Collective: none where the parts are chunks; else all ranks that hold the parameter, an all-gather of it.
    """
    shown = cut_twice(shard, edit.cut, edit.shape, ranks)
    if shown is None:
        chunk = as_dtensor(shard.detach().full_tensor(), edit, ranks).to_local()
        shown = from_chunk(dp_chunk(chunk, shard).clone(), edit.cut, edit.shape, ranks)
    return shown


def local_value(
    value: Tensor, held: Tensor | None, edit: CutParameter, ranks: ModelRanks
) -> Tensor:
    """Take what this rank's parameter ``held`` should hold out of a DTensor or a whole tensor.

    Collective: as `local_part`, unless the value has the form that this plan's state dict gives.
    """
    back = taken_back(value, held, edit.cut, ranks)
    return as_shard(local_part(value, edit, ranks), held) if back is None else back


def local_part(value: Tensor, edit: CutParameter, ranks: ModelRanks) -> Tensor:
    """Take this rank's part of a DTensor or of a whole tensor.

    Collective: for a DTensor, its ranks; one all-gather of the tensor, unless it is cut exactly as this plan cuts it.
    """
    if not isinstance(value, DTensor):
        return edit.take(value.detach(), ranks)
    if _is_ours(value, edit, ranks):
        return value.to_local().detach()
    return edit.take(value.detach().full_tensor(), ranks)


def chunk_run(cut: Cut, holders: Holders, index: int) -> Run:
    """The run of ``cut.dim`` that a rank's DTensor holds: chunk ``run_order[index]`` by torch.chunk's rule."""
    sizes = chunk_sizes(cut.length, holders.size)
    number = holders.run_order[index]
    return sum(sizes[:number]), sum(sizes[: number + 1])


def in_place(cut: Cut, holders: Holders) -> bool:
    """Say whether every rank holds its DTensor chunk in one piece; the same on all ranks."""
    runs = [chunk_run(cut, holders, j) for j in range(holders.size)]
    return all(
        start == stop or cut.offset_of(j, start, stop) is not None
        for j, (start, stop) in enumerate(runs)
    )


def mesh_of(edit: CutParameter, ranks: ModelRanks, device: torch.device) -> DeviceMesh:
    """The mesh of the ranks that hold a parameter: one dim for each cut.

    Collective: all of them, at the first call of a plan with tp > 1 and kvp > 1; otherwise existing groups serve.
    """
    among = [holders for _, holders in edit.placed(ranks)]
    if len(among) == 1:
        return run_mesh(among[0], device)
    axes = [axis for holders in among for axis in holders.axes]
    return ranks.groups.device_mesh(*axes, device_type=_mesh_device(device))


def run_mesh(holders: Holders, device: torch.device) -> DeviceMesh:
    """The 1-D mesh of the ranks that share a dim out, in run order."""
    order = sorted(range(holders.size), key=lambda j: holders.run_order[j])
    name = MESH_NAME if isinstance(holders, ModelRanks) else "_".join(holders.axes)
    members = tuple(holders.members[j] for j in order)
    return holders.groups.mesh_of(members, name, _mesh_device(device))


def _mesh_device(device: torch.device) -> str:
    return "cpu" if device.type == "meta" else device.type


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


def _is_ours(value: DTensor, edit: CutParameter, ranks: ModelRanks) -> bool:
    """Say whether the DTensor's chunks are the parts themselves, on every rank."""
    placed = edit.placed(ranks)
    same = all(
        cut.runs[j] == (chunk_run(cut, holders, j),)
        for cut, holders in placed
        for j in range(holders.size)
    )
    return (
        same
        and value.placements == tuple(Shard(cut.dim) for cut, _ in placed)
        and value.device_mesh == mesh_of(edit, ranks, value.device)
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
