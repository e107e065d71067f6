"""Changes to a model that are prepared first, applied together, and undone in reverse.

Preparing may fail and touches nothing; applying only swaps references and cannot fail half-way for a reason the user
could cause. That is what lets ``parallelize`` leave a model as it was, and ``unparallelize`` bring it back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..collectives.primitive import Group
from .layout import Cut, Run
from .ranks import Holders, Placed
from .tensor import sum_gradient


class Edit(Protocol):
    """One reversible change."""

    def apply(self) -> None:
        """Make the change."""
        ...

    def undo(self) -> None:
        """Put back what was there."""
        ...


@runtime_checkable
class Gathers(Protocol):
    """An edit that must fetch tensors from other ranks before it can be undone."""

    def gather(self) -> None:
        """Fetch them. Collective: said by the edit."""
        ...


@dataclass
class SetAttribute:
    """Set an attribute of an object; undo restores the old value or removes it."""

    owner: Any
    name: str
    value: Any
    _old: list[Any] = field(default_factory=list)

    def apply(self) -> None:
        own = vars(self.owner)
        self._old = [own[self.name]] if self.name in own else []
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        if self._old:
            setattr(self.owner, self.name, self._old[0])
        else:
            delattr(self.owner, self.name)


@dataclass
class SwapClass:
    """Give a module a subclass of its class, as FSDP2 does: hooks, names and ``isinstance`` survive."""

    module: nn.Module
    mixin: type
    _old: type | None = None

    def apply(self) -> None:
        self._old = type(self.module)
        name = f"{self.mixin.__name__}"
        self.module.__class__ = type(
            name, (self.mixin, self._old), {"__module__": self.mixin.__module__}
        )

    def undo(self) -> None:
        assert self._old is not None
        self.module.__class__ = self._old


@dataclass
class AddHook:
    """Register a hook through ``register``, which returns a removable handle."""

    register: Callable[[], Any]
    _handle: Any = None

    def apply(self) -> None:
        self._handle = self.register()

    def undo(self) -> None:
        self._handle.remove()


@dataclass
class SumGradient:
    """Sum the gradient of a parameter, or of ``parts`` of one dim of it, over the ranks that hold the same.

    ``over_dp`` says that what differs over cp and dp is summed with this (experts over edp): dp then divides only.
    """

    module: nn.Module
    name: str
    group: Group
    dim: int = 0
    parts: tuple[Run, ...] = ()
    over_dp: bool = False
    _handle: Any = None

    def apply(self) -> None:
        parameter = self.module.get_parameter(self.name)
        if self.group is not None:
            self._handle = sum_gradient(parameter, self.group, self.dim, self.parts)

    def undo(self) -> None:
        if self._handle is not None:
            self._handle.remove()


@dataclass
class OverrideConfig:
    """Give a module a copy of its config with other values, whatever config it has when this is applied."""

    module: Any
    values: dict[str, Any]
    _old: Any = None

    def apply(self) -> None:
        self._old = self.module.config
        config = copy.copy(self._old)
        for name, value in self.values.items():
            setattr(config, name, value)
        self.module.config = config

    def undo(self) -> None:
        self.module.config = self._old


@dataclass
class CutParameter:
    """Replace a whole parameter by this rank's part.

    ``path`` is the parameter's full name. ``whole`` is kept until the edits are committed, so that an undo before that
    needs no communication; afterwards ``restore`` brings the gathered tensor. ``cuts`` are made one after another, each
    along a dim of its own: one for most parameters, two for experts (experts over ep, their matrices over etp).
    """

    module: nn.Module
    name: str
    path: str
    cuts: tuple[Placed, ...]
    whole: nn.Parameter | None = None
    local: nn.Parameter | None = None
    shape: tuple[int, ...] = ()

    @property
    def cut(self) -> Cut:
        """The first cut."""
        return self.cuts[0].cut

    def placed(self, copy: Holders) -> list[tuple[Cut, Holders]]:
        """Every cut and its holders; ``copy`` are the ranks of the model copy."""
        return [(p.cut, copy if p.holders is None else p.holders) for p in self.cuts]

    def local_shape(self, copy: Holders, rank: int | None = None) -> tuple[int, ...]:
        """Shape of the part on this rank, or on any rank of the world."""
        shape = self.shape
        for cut, holders in self.placed(copy):
            shape = cut.local_shape(
                shape, holders.index if rank is None else holders.index_of(rank)
            )
        return shape

    def take(self, whole: Tensor, copy: Holders) -> Tensor:
        """Copy this rank's part out of the whole tensor. The inverse of `join`."""
        for cut, holders in self.placed(copy):
            whole = cut.take(whole, holders.index)
        return whole

    def read(self, slice_of: Callable[[int, int, int], Tensor], copy: Holders) -> Tensor:
        """Build this rank's part from ``slice_of(dim, start, stop)``, for example read from a file.

        With several cuts the first dim is read index by index, so that no more than the part is ever held.
        """
        (cut, holders), *inner = self.placed(copy)
        if not inner:
            return cut.read(lambda a, b: slice_of(cut.dim, a, b), holders.index)

        def some(start: int, stop: int) -> Tensor:
            part = slice_of(cut.dim, start, stop)
            for within, among in inner:
                part = within.take(part, among.index)
            return part

        own = cut.runs[holders.index]
        ones = ((i, i + 1) for start, stop in own for i in range(start, stop))
        return torch.cat([some(*run) for run in ones] or [some(0, 0)], cut.dim)

    def join(self, local: Tensor, copy: Holders) -> Tensor:
        """Put the parameter, or something cut like it, together on every rank.

        Collective: the holders of each cut, innermost first; an all-gather padded to the largest part each.
        """
        for cut, holders in reversed(self.placed(copy)):
            local = holders.gather(local, cut)
        return local

    def apply(self) -> None:
        self.module._parameters[self.name] = self.local

    def undo(self) -> None:
        assert self.whole is not None, "the whole parameter must be restored before undo"
        self.module._parameters[self.name] = self.whole

    def restore(self, whole: Tensor, made: dict[int, nn.Parameter]) -> None:
        """Provide the gathered tensor for ``undo``; tied parameters share one new Parameter through ``made``."""
        assert self.local is not None
        key = id(self.local)
        if key not in made:
            made[key] = nn.Parameter(whole, requires_grad=self.local.requires_grad)
        self.whole = made[key]


@dataclass
class ReplaceTensor:
    """Replace an uncut parameter or buffer (a meta one by its loaded value)."""

    module: nn.Module
    name: str
    value: Tensor
    _old: Tensor | None = None

    def _slot(self) -> dict[str, Any]:
        return (
            self.module._parameters
            if self.name in self.module._parameters
            else self.module._buffers
        )

    def apply(self) -> None:
        slot = self._slot()
        self._old = slot[self.name]
        slot[self.name] = self.value

    def undo(self) -> None:
        # A meta tensor that was loaded stays loaded: going back to meta would lose the weights.
        pass


@dataclass
class HoldRows:
    """What this rank read of the parameters that dp will shard: its rows of each, which stands on meta until then.

    The shards' edit puts them in place; so no rank ever holds more than its rows and one tensor.
    """

    rows: dict[nn.Parameter, Tensor]

    def apply(self) -> None:
        pass

    def undo(self) -> None:
        pass


class Edits:
    """An ordered list of edits, applied all or not at all."""

    def __init__(self) -> None:
        self.done: list[Edit] = []

    def apply(self, edits: list[Edit]) -> None:
        """Apply every edit; if one fails, undo those before it and raise."""
        for edit in edits:
            try:
                edit.apply()
            except BaseException:
                self.undo()
                raise
            self.done.append(edit)

    def undo(self) -> None:
        """Undo what was applied, newest first."""
        while self.done:
            self.done.pop().undo()

    def gather(self) -> None:
        """Bring back what edits have spread further than the cuts say (dp's shards), before anything is undone."""
        for edit in reversed(self.done):
            if isinstance(edit, Gathers):
                edit.gather()

    def parameters(self) -> list[CutParameter]:
        """The parameters that were cut."""
        return [e for e in self.done if isinstance(e, CutParameter)]
