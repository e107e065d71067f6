"""What torch.distributed asks a process group about itself, for groups that are written in Python."""

from __future__ import annotations

import torch.distributed as dist


class PythonGroup(dist.ProcessGroup):
    """A group that knows its own name and description: c10d, which keeps them in C++, cannot know them.

    A class made of it has `rank` and `size`, and sets `_name` and `_description`.
    """

    _name: str
    _description: str

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, rank {self.rank()} of {self.size()})"
