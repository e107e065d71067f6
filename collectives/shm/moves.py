"""Calls that only move elements, as tables for their kernel: what goes to whom, and comes from whom."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .calls import KIND, code_of, views_of
from .engine import Engine
from .exchange import exchange
from .fold import SUM
from .tables import even_table, table_from, table_of


class Moves:
    """The moving calls of one engine, whatever the strides; those of dense tensors have a shorter way (noted.py).

    Each takes tensors that suit each other and the group, and whether to wait; it gives the work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rank, self._ranks = engine.members.rank, engine.members.ranks
        self._none = even_table(self._ranks, 0, 0)
        self._nothing = views_of([torch.empty(0, dtype=torch.uint8)])

    def meet(self, wait: bool) -> dist.Work:
        """Move nothing: all ranks come."""
        return self.move("barrier", [], self._none, [], self._none, wait)

    def broadcast(self, x: Tensor, root: int, wait: bool) -> dist.Work:
        """Spread the root's tensor."""
        sent = received = self._none
        if self._rank == root:
            sent = even_table(self._ranks, x.numel(), 0)
        else:
            received = table_from(root, self._ranks, x.numel())
        return self.move("broadcast", [x], sent, [x], received, wait, root, shared=True)

    def all_gather(self, outputs: list[Tensor], x: Tensor, wait: bool) -> dist.Work:
        """Gather into a tensor for each rank, or into runs of one."""
        sent = even_table(self._ranks, x.numel(), 0)
        if len(outputs) == self._ranks:
            received = table_of(outputs)
        else:
            received = even_table(self._ranks, x.numel(), x.numel())
        return self.move("all_gather", [x], sent, outputs, received, wait, shared=True)

    def gather(self, outputs: list[Tensor], x: Tensor, root: int, wait: bool) -> dist.Work:
        """Gather on the root, into a tensor for each rank; elsewhere there are none."""
        sent = even_table(self._ranks, x.numel(), 0)
        received = table_of(outputs) if outputs else self._none
        return self.move("gather", [x], sent, outputs, received, wait, root, shared=True)

    def scatter(self, out: Tensor, parts: list[Tensor], root: int, wait: bool) -> dist.Work:
        """Give each rank a part of the root's; elsewhere there are none."""
        sent = table_of(parts) if parts else self._none
        received = table_from(root, self._ranks, out.numel())
        outputs = [out] * self._ranks  # a view for each rank: all of one tensor
        return self.move("scatter", parts, sent, outputs, received, wait, root)

    def move(
        self,
        kind: str,
        sends: list[Tensor],
        sent: Any,
        receives: list[Tensor],
        received: Any,
        wait: bool,
        root: int = -1,
        shared: bool = False,
    ) -> dist.Work:
        """Move elements between ranks; see `exchange` for the tables."""
        some = sends or receives
        dtype = some[0].dtype if some else torch.uint8
        if odd := {x.dtype for x in (*sends, *receives)} - {dtype}:
            raise ValueError(f"shm: {kind} of {dtype} with tensors of {odd.pop()}; use one dtype")
        code = code_of(KIND[kind], dtype, SUM, root)
        meet = root < 0  # with a root, only those wait who receive
        views = views_of(sends) if sends else self._nothing
        places = views_of(receives) if receives else self._nothing
        arguments = (views, sent, places, received, shared, meet, dtype.itemsize)
        count = sends[0].numel() if len(sends) == 1 else sum(x.numel() for x in sends)
        kept = sent[self._rank, 1] / max(count, 1) if kind == "all_to_all" else None
        return self._engine.run(exchange, arguments, code, count, receives, wait, sends, kept)
