"""Which tensors that autograd saves are a layer's activations, and where in a forward they are saved."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..edits import AddHook, Edit


@dataclass
class Group:
    """What one layer saves in one forward; ``before`` is the layer that backward comes to next."""

    before: Group | None
    kept: bool  # backward begins with it: not worth moving
    slots: list[Any] = field(default_factory=list)  # weak references
    reached: bool = False


class Place(Protocol):
    """Where activations go."""

    def put(self, x: Tensor, group: Group) -> Any:
        """Take a storage that no earlier call took as it is now; give the slot for it."""
        ...

    def take(self, slot: Any, group: Group) -> Tensor:
        """Give the storage back, as bytes."""
        ...

    def reach(self, group: Group) -> None:
        """Hear that backward has come to a group, before anything of it is taken."""
        ...


class Saved:
    """One saved tensor that was moved: its slot, and what part of it the tensor was."""

    def __init__(self, x: Tensor, slot: Any, group: Group) -> None:
        self.slot, self.group, self.dtype = slot, group, x.dtype
        self.view = x.storage_offset(), x.size(), x.stride()


class Kept:
    """One saved tensor that stays. torch does not look for changes in place where there are hooks, so we do."""

    def __init__(self, x: Tensor, group: Group) -> None:
        self.x, self.version, self.group = x.detach(), x._version, group


class SavedTensors:
    """Hands what the layers of a model save for backward to a `Place`, and what else is saved back unchanged.

    Parameters and buffers, storages under ``least_bytes``, and all that the last layer and what follows it save stay.
    Views of one storage are moved once. Between the base model's first and last line, and only while gradients are
    recorded; so activation checkpointing, whose own hooks are nearer, hands on what it keeps: the layers' inputs.

    State: the forward that runs, of this thread.
    """

    def __init__(
        self, base: nn.Module, layers: list[nn.Module], place: Place, least_bytes: int
    ) -> None:
        self.base, self.layers, self.place, self.least_bytes = base, layers, place, least_bytes
        self._hooks: Any = None
        self._group = Group(None, True)
        self._owned: set[int] = set()  # storages of parameters and buffers
        self._seen: dict[int, tuple[Any, int, Any]] = {}

    def edits(self) -> list[Edit]:
        """Hooks at the base model's door and at those of its layers."""
        return [
            AddHook(lambda: self.base.register_forward_pre_hook(self._begin)),
            AddHook(lambda: self.base.register_forward_hook(self._end, always_call=True)),
            *(AddHook(lambda m=m: m.register_forward_pre_hook(self._enter)) for m in self.layers),
        ]

    # --- forward ----------------------------------------------------------------------------------

    def _begin(self, *_: Any) -> None:
        if self._hooks is not None or not torch.is_grad_enabled():
            return
        self._owned, self._seen = storages(self.base), {}
        self._group = Group(None, False)
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def _end(self, *_: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()

    def _enter(self, layer: nn.Module, args: Any) -> None:
        if self._hooks is None:  # a layer that is computed again in backward
            return
        self._owned |= storages(layer)  # FSDP2's are there only now
        self._group = Group(self._group, layer is self.layers[-1])

    def _pack(self, x: Tensor) -> Saved | Kept:
        group = self._group
        if group.kept or not self._moves(x):
            return Kept(x, group)
        slot = self._slot(x)
        slot.uses += 1
        slot.left += 1
        group.slots.append(weakref.ref(slot))
        return Saved(x, slot, group)

    def _moves(self, x: Tensor) -> bool:
        """Say whether a saved tensor is an activation that is worth moving."""
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            return False
        storage = x.untyped_storage()
        return storage.nbytes() >= self.least_bytes and storage._cdata not in self._owned

    def _slot(self, x: Tensor) -> Any:
        storage = x.untyped_storage()
        key = storage._cdata
        _, version, known = self._seen.get(key, (None, -1, lambda: None))
        slot = known()
        if slot is None or version != x._version:
            slot = self.place.put(x, self._group)
            dead = weakref.ref(storage, lambda _: self._seen.pop(key, None))
            self._seen[key] = dead, x._version, weakref.ref(slot)
        return slot

    # --- backward ---------------------------------------------------------------------------------

    def _unpack(self, saved: Saved | Kept) -> Tensor:
        group = saved.group
        if not group.reached:
            group.reached = True
            self.place.reach(group)
        if isinstance(saved, Kept):
            if saved.x._version != saved.version:
                raise RuntimeError(CHANGED)
            return saved.x
        raw = self.place.take(saved.slot, group)
        return torch.empty(0, dtype=saved.dtype, device=raw.device).set_(
            raw.untyped_storage(), *saved.view
        )


CHANGED = (
    "one of the tensors that backward needs was modified in place after it was saved; torch says which, without "
    "offload_activations"
)


def storages(module: nn.Module) -> set[int]:
    """The storages of a module's parameters and buffers."""
    every = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage()._cdata for t in every if type(t) in (Tensor, nn.Parameter)}
