"""Footprint: how many bytes of tensors are alive while code runs, on any device, meta included."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Footprint(TorchDispatchMode):
    """Count the storages that operators make inside ``with Footprint() as footprint``, until they die.

    Bytes are those of tensors the dispatcher sees: what a kernel allocates and frees inside itself is not
    among them. Tensors made before are not counted.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.live = 0
        self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                self._see(leaf, (args, kwargs))
        return result

    def mark(self) -> int:
        """Begin a step: forget the peak so far; return what is alive."""
        self.peak = self.live
        return self.live

    def _see(self, tensor: Tensor, inputs: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        given = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        # A view of, or a write into, something made before we looked (a weight): not made here.
        size = 0 if any(t.untyped_storage()._cdata == key for t in given) else storage.nbytes()

        def dead(_: Any) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, dead)
        self.live += size
        self.peak = max(self.peak, self.live)
