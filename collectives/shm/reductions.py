"""Calls that reduce, for the kernels that do them: in place, where all ranks see the tensor, or scattered again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ..work import Finished, Several
from .all_reduce import all_reduce, all_reduce_symmetric
from .calls import KIND, code_of, real_of, reduction, view_of, views_of
from .engine import Engine
from .moves import Moves
from .reduce_scatter import reduce_scatter
from .tables import even_table


class Reductions:
    """The reducing calls of one engine, whatever the strides; those of dense tensors have a shorter way (noted.py).

    Each takes tensors that suit each other and the group, and whether to wait; it gives the work.
    """

    def __init__(self, engine: Engine, moves: Moves) -> None:
        self._engine, self._moves = engine, moves
        self._rank, self._ranks = engine.members.rank, engine.members.ranks

    def reduce(self, x: Tensor, op: Any, root: int, wait: bool) -> dist.Work:
        """Reduce a tensor in place, on the root or (-1) on all ranks."""
        x = real_of(x, op) if x.is_complex() else x
        kind = "all_reduce" if root < 0 else "reduce"
        function, number, code = reduction(kind, x.dtype, op, root)
        if self._ranks == 1:
            return Finished([x])
        count = x.numel()
        place = self._engine.symmetric.place_of(x) if root < 0 else None
        if place is not None:
            code = code_of(KIND["all_reduce of symmetric tensors"], x.dtype, number)
            arguments = (*place, x.element_size(), function, count, number)
            return self._engine.run(all_reduce_symmetric, arguments, code, count, [x], wait)
        arguments = (view_of(x), function, count, number, root)
        return self._engine.run(all_reduce, arguments, code, count, [x], wait)

    def scatter(
        self, parts: list[Tensor], starts: Any, out: Tensor, op: Any, wait: bool
    ) -> dist.Work:
        """Reduce what begins at `starts` in one tensor, or in one for each rank, and keep this rank's."""
        result = out
        if out.is_complex():
            parts, out, starts = [real_of(x, op) for x in parts], real_of(out, op), 2 * starts
        function, number, code = reduction("reduce_scatter", out.dtype, op)
        n = out.numel()
        if self._ranks == 1:
            table = even_table(1, n, 0)
            return self._moves.move("all_to_all", parts, table, [out], table, wait)
        arguments = (views_of(parts), starts, view_of(out), function, n, number)
        return self._engine.run(reduce_scatter, arguments, code, n, [result], wait, parts)

    def scatter_parts(self, parts: list[Tensor], out: Tensor, op: Any, wait: bool) -> dist.Work:
        """Reduce a tensor for each rank, and keep this rank's; those of unequal length one by one."""
        if len({x.numel() for x in parts}) == 1:
            return self.scatter(parts, np.zeros(self._ranks, np.int64), out, op, wait)
        own = self._rank
        out.view_as(parts[own]).copy_(parts[own])
        each = [out if r == own else x for r, x in enumerate(parts)]
        return Several([self.reduce(x, op, r, wait) for r, x in enumerate(each)], [out])
