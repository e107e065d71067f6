"""Changes to a model that are prepared first, applied together, and undone in reverse.

Preparing may fail and touches nothing; applying only swaps references and cannot fail half-way for a reason the user
could cause. That is what lets ``parallelize`` leave a model as it was, and ``unparallelize`` bring it back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..collectives.primitive import Group
from .layout import Cut, Run
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

    ``over_dp`` says that the group already spans what differs over dp (experts over edp): dp then divides only.
    """

    module: nn.Module
    name: str
    group: Group
    dim: int = 0
    parts: tuple[Run, ...] = ()
    over_dp: bool = False
    _handle: Any = None

    def apply(self) -> None:
        self._handle = sum_gradient(
            self.module.get_parameter(self.name), self.group, self.dim, self.parts
        )

    def undo(self) -> None:
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
    needs no communication; afterwards ``restore`` brings the gathered tensor.
    """

    module: nn.Module
    name: str
    path: str
    cut: Cut
    whole: nn.Parameter | None = None
    local: nn.Parameter | None = None
    shape: tuple[int, ...] = ()

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
