"""What torch.distributed asks a process group about itself, for groups that are written in Python."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor


class PythonGroup(dist.ProcessGroup):
    """A group that knows its own name and description: c10d, which keeps them in C++, cannot know them.

    A class made of it has `rank`, `size` and `orphan`, and sets `_name` and `_description`.

    A forked process (a DataLoader's worker) has its parent's groups in memory, but is no rank: there they refuse calls.
    """

    _name: str
    _description: str

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        _groups().add(self)

    def check_rank(self, rank: int) -> None:
        """Look whether the group has such a rank.

        Raises:
            ValueError: it has not.
        """
        if not 0 <= rank < self.size():
            raise ValueError(
                f"there is no rank {rank} in group {self.group_name}, whose ranks are 0 to {self.size() - 1}"
            )

    def check_own(self, sent: Sequence[int], received: Sequence[int]) -> None:
        """Look whether an exchange suits itself: nothing is sent backwards, and the own part is as long here as there.

        Args:
            sent: elements for each rank; `received` from each.

        Raises:
            ValueError: it does not.
        """
        own, ranks = self.rank(), self.size()
        if not len(sent) == len(received) == ranks:
            raise self.misfit(f"all_to_all from {len(sent)} parts into {len(received)}")
        sent, received = [int(n) for n in sent], [int(n) for n in received]  # of NumPy's, too
        if min(*sent, *received) < 0 or sent[own] != received[own]:
            raise ValueError(
                f"all_to_all in group {self.group_name} sends {sent} elements and has room for {received}: "
                f"none may be below 0, and what rank {own} sends to itself must be as long as the room for it"
            )

    def check_tag(self, tag: int) -> None:
        """Look whether messages can have such a tag.

        Raises:
            ValueError: it is below 0.
        """
        if tag < 0:
            raise ValueError(
                f"a message in group {self.group_name} with tag {tag}: tags are whole numbers from 0 on"
            )

    def misfit(self, asked: str) -> ValueError:
        """Make the error of tensors that do not fit this group, or each other."""
        return ValueError(f"{asked} does not fit group {self.group_name} of {self.size()} ranks")

    def orphan(self, error: RuntimeError) -> None:
        """Raise this error from every later call: this process is a fork of the rank's, and must not speak for it."""
        raise NotImplementedError

    def getRank(self) -> int:
        return self.rank()

    def getSize(self) -> int:
        return self.size()

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def group_name(self) -> str:
        return self._name

    pg_name = group_name

    @property
    def group_desc(self) -> str:
        return self._description

    def _get_backend(self, device: torch.device | str) -> PythonGroup:
        """Give the group itself, which is what C++ keeps apart as the backend of a device; torch asks in a few places.

        Raises:
            RuntimeError: it sends nothing of that device.
        """
        kinds = [able.type for able in self._device_types]
        if torch.device(device).type not in kinds:
            raise RuntimeError(
                f"group {self.group_name} sends no tensors of {device}, only of {', '.join(kinds)}"
            )
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, rank {self.rank()} of {self.size()})"


def listed(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Take one tensor for a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def elements(tensors: Sequence[Tensor]) -> int:
    """Count the elements of all."""
    return sum(t.numel() for t in tensors)


def shapes(tensors: Sequence[Tensor]) -> str:
    """Show the shapes of tensors."""
    return ", ".join(str(list(x.shape)) for x in tensors) or "no tensors"


def by_rank(x: Tensor, rows: Sequence[int], ranks: int) -> list[int]:
    """Count the elements of each rank's rows of dim 0; no rows given: equal parts."""
    row = x.numel() // max(1, x.shape[0] if x.dim() else 1)
    return [n * row for n in rows] or [x.numel() // ranks] * ranks


@cache
def _groups() -> weakref.WeakSet[PythonGroup]:
    """The groups of this process, which a fork of it may not use."""
    groups: weakref.WeakSet[PythonGroup] = weakref.WeakSet()
    process = os.getpid()

    def orphan_all() -> None:
        for group in list(groups):
            group.orphan(
                RuntimeError(
                    f"group {group.group_name} is of process {process}, of which this one is a fork: it is no rank, "
                    "and nothing can be sent from here. Communicate in the rank itself, or start processes by 'spawn'"
                )
            )

    os.register_at_fork(after_in_child=orphan_all)
    return groups
