"""What every call of a group goes through: the kernels, their state, and what becomes of a call that must wait."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ..errors import anew
from ..shown_call import ShownCall, is_on
from ..trace import listening, tell_traces
from ..work import Finished
from . import check
from .calls import KIND, KINDS, code_of, describe, views_of
from .exchange import exchange
from .fold import SCRATCH_BYTES
from .members import Members
from .noted import NotedCall
from .progress import Progress
from .segment import CHUNK, SLOT, STRIDE, Segment, SymmetricMemory
from .single_copy import BY_COST, NEVER
from .steps import (
    CHUNK_BYTES,
    CONTROL,
    DATA,
    DONE,
    FIRST_INPUT,
    INPUTS,
    LINE_BYTES,
    MISMATCH,
    RANK,
    SCRATCH,
    SETS,
    SINGLE,
    SLOT_BYTES,
    SPINS,
    STEP,
    STRIDE_BYTES,
    STUCK,
    WAITING,
    WORLD,
    line_bytes,
)  # fmt: skip
from .tables import even_table
from .work import PATIENCE, Pending

Kernel = Callable[..., int]


class Engine:
    """Runs the kernels of one rank in a group.

    Attributes:
        finished: what a call gives that is done.
        shows_calls: whether all ranks' calls are compared before each.

    State: where the group is in the row of steps (an array that the kernels keep), pending work, symmetric memory,
    calls that come again.
    """

    def __init__(
        self, group: dist.ProcessGroup, members: Members, timeout_s: float, spins: int
    ) -> None:
        self._group = weakref.ref(group)
        self.members = members
        self.progress = Progress(members, timeout_s)
        self.state = state = np.zeros(FIRST_INPUT + 2 * members.ranks, np.int64)
        self._scratch = np.zeros(SCRATCH_BYTES, np.uint8)
        base = members.segment.address
        state[[CONTROL, DATA]] = base, base + members.layout.data
        state[[RANK, WORLD, SLOT_BYTES, STRIDE_BYTES]] = members.rank, members.ranks, SLOT, STRIDE
        state[[SPINS, STEP, SETS, CHUNK_BYTES]] = spins, 1, 1, CHUNK
        state[[SCRATCH, INPUTS]] = self._scratch.ctypes.data, state[FIRST_INPUT:].ctypes.data
        state[FIRST_INPUT + members.ranks :] = [card["pid"] for card in members.cards]
        state[LINE_BYTES] = line_bytes(members.ranks)
        state[SINGLE] = BY_COST if members.readable else NEVER
        self.noted: dict[Any, NotedCall | None] = {}  # see noted.py
        self.symmetric = SymmetricMemory(members.rank)
        self.finished = Finished()
        self.shows_calls = is_on()

    def run(
        self,
        kernel: Kernel,
        arguments: tuple[Any, ...],
        code: int,
        count: int,
        outputs: list[Tensor],
        wait: bool,
        inputs: list[Tensor] | None = None,
        kept: float | None = None,
    ) -> dist.Work:
        """Run a kernel if no work is before it; if it must wait longer than a moment, make it pending work."""
        if self.shows_calls:
            tables = self._tables(kernel, arguments)
            self._show(check.shown(code, count, outputs, tables, self.members.rank))
        begin = time.perf_counter() if listening() else None
        progress = self.progress
        with progress.lock:
            if progress.broken is not None:
                raise anew(progress.broken)
            status = WAITING
            if not progress.collectives:
                status = kernel(self.state, *arguments, code, PATIENCE if wait else 0)
                if status == DONE and wait and begin is None:  # most calls
                    return self.finished
            if status == DONE:
                work = self.finished if wait else Finished(outputs)
            else:
                work = self.pend(kernel, arguments, code, count, outputs, inputs)
        if status != DONE and wait:
            work.wait()
        elif status != DONE:
            progress.wake()
        if begin is not None:
            brought, seconds = outputs if inputs is None else inputs, time.perf_counter() - begin
            self._tell(code, brought, seconds, None if wait else work, kept)
        return work

    def _tell(
        self, code: int, brought: list[Tensor], seconds: float, work: dist.Work | None, kept: float | None
    ) -> None:  # fmt: skip
        """Tell traces of a call; `work`: if it is under way."""
        group, root = self._group(), (code >> 24) - 1
        if group is not None:
            op = KINDS[code & 255].split()[0]
            tell_traces(group, op, brought, seconds, work, kept, root if root >= 0 else None)

    def _show(self, call: ShownCall) -> None:
        """In debug mode: compare all ranks' calls first; elsewhere a root does not look at those it only sends to.

        Raises:
            CallMismatch: two ranks are in different calls; the same on every rank.
        """
        ranks = self.members.ranks
        own = check.letters(call, ranks)
        found = own.new_empty(ranks * own.numel())
        same, runs = even_table(ranks, own.numel(), 0), even_table(ranks, own.numel(), own.numel())
        arguments = (views_of([own]), same, views_of([found]), runs, True, True, own.itemsize)
        code = code_of(KIND["all_gather"], own.dtype)
        self.shows_calls = False
        try:
            self.run(exchange, arguments, code, own.numel(), [found], True, [own])
        finally:
            self.shows_calls = True
        if why := check.differing(found, ranks, [self.members.called(r) for r in range(ranks)]):
            raise check.different(self.members, why)

    def _tables(self, kernel: Kernel, arguments: Any) -> Any:
        """Find what an exchange sends to each rank, and expects from each; None for other calls."""
        if isinstance(kernel, NotedCall):
            return kernel.tables
        return (arguments[1], arguments[3]) if kernel is exchange else None

    def pend(
        self,
        kernel: Kernel,
        arguments: Any,
        code: int,
        count: int,
        outputs: list[Tensor],
        inputs: list[Tensor] | None,
    ) -> Pending:
        """Make a call pending work; the caller holds the lock."""
        state = self.state

        def advance(patience: int) -> bool:
            status = kernel(state, *arguments, code, patience)
            if status == MISMATCH:
                tables = self._tables(kernel, arguments)
                expected = None if tables is None else tables[1]
                raise check.stuck(self.members, state, code, count, expected)
            return status == DONE

        work = Pending(
            self.progress,
            describe(code, count),
            advance,
            lambda: [int(state[STUCK])],
            outputs,
            alive=inputs,
        )
        return self.progress.add(self.progress.collectives, work)

    def adopt(self, segments: list[Segment], bases: Any, size: int) -> None:
        """Take memory that all ranks have mapped as symmetric (see symmetric.py)."""
        self.symmetric.add(segments, bases, size)
        self.noted.clear()  # there may have been another tensor

    def close(self) -> None:
        """End what is pending, and leave the group."""
        self.progress.close()
        self.members.close()
        self.symmetric.forget()
