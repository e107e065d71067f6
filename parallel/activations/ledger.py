"""What `offload_activations` would move in a step: counted, on meta tensors too, and nothing moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .saved import Group
from .shelf import whole_storage


@dataclass
class Counted:
    """A storage that was counted; it stays where it is."""

    x: Tensor
    uses: int = 0
    left: int = 0


@dataclass
class Ledger:
    """A place that counts the bytes of what it is given."""

    moved_bytes: int = 0

    def put(self, x: Tensor, group: Group) -> Any:
        """Count a storage."""
        self.moved_bytes += x.untyped_storage().nbytes()
        return Counted(x.detach())

    def take(self, slot: Any, group: Group) -> Tensor:
        """Give it back."""
        return whole_storage(slot.x)

    def reach(self, group: Group) -> None:
        """Do nothing."""
