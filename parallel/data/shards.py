"""Shards: torch's FSDP2 on the local parameters, one unit per decoder layer and one for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..axes import Shard
from ..edits import CutParameter, Edit, HoldRows, SetAttribute, SumGradient
from ..families import repeated_layers
from ..ranks import ModelRanks
from ..tensor import hook_gradient

DTYPES = {"model": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ShardParameters:
    """Give every parameter to FSDP2 but those of experts, which other axes spread over dp already.

    FSDP2 has no way back: what it puts on a module (class, hooks, marks) is noted before and taken off by ``undo``,
    and the parameters themselves are kept, empty, to be filled again by `gather`.
    """

    model: nn.Module
    mesh: DeviceMesh
    choice: Shard
    sums: list[SumGradient]
    cuts: list[CutParameter]
    rows: dict[nn.Parameter, Tensor]
    # a stage's layers run without the model around them: each is a root of its own
    staged: bool = False
    _surfaces: list[Surface] = field(default_factory=list)
    _kept: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def apply(self) -> None:
        experts = {e.module.get_parameter(e.name) for e in self.sums if e.over_dp}
        # of experts that are modules another rank's are empty here; FSDP2 takes nothing empty
        left = experts | {p for p in self.model.parameters() if not p.numel()}
        layers = sharding_units(self.model)
        units = [*layers, *(ends_of(self.model, layers) if self.staged else [self.model])]
        self._handles += [unit.register_forward_hook(own_outputs) for unit in units]
        self._surfaces = [Surface(module) for module in self.model.modules()]
        self._kept = [
            (module, name, p)
            for module in self.model.modules()
            for name, p in module._parameters.items()
            if p is not None and p not in left
        ]
        for p in experts:
            self._handles.append(hook_gradient(p, lambda g: g / self.mesh.size()))
        own = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        policy = MixedPrecisionPolicy(DTYPES[self.choice.param_dtype], reduce_dtype=own)
        for unit in units:
            made = fully_shard(
                unit,
                mesh=self.mesh,
                mp_policy=policy,
                ignored_params=left,
                reshard_after_forward=True if self.staged else None,
            )
            made.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            made.set_reduce_scatter_unused_params(True, recurse=False)  # ranks may use other ones
        if not self.staged:
            self._handles.append(self.model.register_forward_hook(reshard_unused))
        self._fill()
        self._hook_sums(units)
        for surface in self._surfaces:
            surface.note()
        for _, _, p in self._kept:
            p.data = p.data.new_empty(0)

    def _fill(self) -> None:
        """Give the shards of parameters on meta the rows that were read for them."""
        filled: dict[int, nn.Parameter] = {}
        for module, name, p in self._kept:
            if p not in self.rows:
                continue
            shard = module._parameters[name]
            assert isinstance(shard, DTensor)
            if id(p) not in filled:
                value = DTensor.from_local(
                    self.rows[p], shard.device_mesh, shard.placements, run_check=False,
                    shape=shard.shape, stride=shard.stride(),
                )  # fmt: skip
                filled[id(p)] = nn.Parameter(value, p.requires_grad)
            module._parameters[name] = filled[id(p)]  # FSDP2 takes it up when it first gathers
        self.rows.clear()

    def _hook_sums(self, units: list[nn.Module]) -> None:
        """Move the hooks of partial gradients to the parameters that FSDP2 computes with; they live as long as it.

        It makes them when they are first gathered, and then hangs the last of its hooks on the modules too.
        """
        sums = [e for e in self.sums if not e.over_dp]
        for unit in units:
            assert isinstance(unit, FSDPModule)
            unit.unshard()
            for e in sums:
                if not isinstance(e.module.get_parameter(e.name), DTensor):
                    e.undo()
                    e.apply()
            unit.reshard()

    def gather(self) -> None:
        """Fill the parameters that `apply` took away, and put them back into their modules.

        Collective: all dp ranks; one all-gather per parameter.
        """
        full: dict[int, nn.Parameter] = {}
        for module, name, p in self._kept:
            if id(p) not in full:
                shard = module._parameters[name]
                assert isinstance(shard, DTensor)
                whole = shard.detach().full_tensor()
                if p.is_meta:
                    full[id(p)] = nn.Parameter(whole, shard.requires_grad)
                    continue
                p.requires_grad_(shard.requires_grad)
                p.data = whole
                full[id(p)] = p
        for edit in self.cuts:
            edit.local = full.get(id(edit.local), edit.local)
        for module, name, p in self._kept:
            module._parameters[name] = full[id(p)]

    def undo(self) -> None:
        while self._surfaces:
            self._surfaces.pop().clean()
        while self._handles:
            self._handles.pop().remove()


def own_outputs(_: nn.Module, args: Any, output: Any) -> Any:
    """Copy outputs that are views: FSDP2 hooks them, and would lose the hook to a caller's in-place operation."""
    if not any(isinstance(x, Tensor) and x._is_view() for x in tree_leaves(output)):
        return None
    return tree_map_only(Tensor, lambda x: x.clone() if x._is_view() else x, output)


def reshard_unused(module: nn.Module, args: Any, output: Any) -> None:
    """Put the root's shards back after a forward without backward: FSDP2 leaves it whole, which only a backward ends.

    Until then the model's parameters are not those the optimizer knows, and their gradients are missed.
    """
    if not torch.is_grad_enabled():
        assert isinstance(module, FSDPModule)
        module.reshard()


class Surface:
    """What FSDP2 puts on a module: a class, hooks, and what else it hangs there."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.names, self.hooks = set(vars(module)), _hooks(module)

    def note(self) -> None:
        """Keep what came since: other edits add and take away their own."""
        self.names = vars(self.module).keys() - self.names
        self.hooks = {n: keys - self.hooks[n] for n, keys in _hooks(self.module).items()}

    def clean(self) -> None:
        """Take off what `note` kept; hook tables stay the objects they are, for their handles know them."""
        _module_state_mapping.pop(self.module, None)  # where torch keeps what fully_shard was given
        self.module.__class__ = self.kind
        for name in self.names:
            delattr(self.module, name)
        for name, keys in self.hooks.items():
            for key in keys:
                del getattr(self.module, name)[key]


def _hooks(module: nn.Module) -> dict[str, set[Any]]:
    own = vars(module)
    return {n: set(v) for n, v in own.items() if isinstance(v, dict) and "hooks" in n}


def ends_of(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The modules outside the layers that have parameters: embedding, norm, head."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    return [
        m for m in model.modules() if id(m) not in inside and any(True for _ in m.parameters(False))
    ]


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: the layers that have parameters on this rank."""
    return [m for m in repeated_layers(model) if any(True for _ in m.parameters())]


def shard_edits(model: nn.Module, ranks: ModelRanks, edits: list[Edit]) -> list[Edit]:
    """Edits that shard the parameters over dp.

    Collective: all dp ranks; forward and backward an all-gather per unit, backward a reduce-scatter.
    """
    sums = [e for e in edits if isinstance(e, SumGradient)]
    choice = ranks.plan.dp
    assert isinstance(choice, Shard)
    staged = ranks.plan.pp.size > 1

    @contextmanager
    def no_sync() -> Iterator[None]:
        """Accumulate gradients without sending them, each rank whole ones: the memory of one model copy.

        Under stages it does nothing: every microbatch reduces, which is right and sends more.
        """
        if staged:
            yield
            return
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    mesh = ranks.groups.device_mesh("dp")
    cuts = [e for e in edits if isinstance(e, CutParameter)]
    rows = next((e.rows for e in edits if isinstance(e, HoldRows)), {})
    return [
        ShardParameters(model, mesh, choice, sums, cuts, rows, staged),
        SetAttribute(model, "no_sync", no_sync),
    ]
