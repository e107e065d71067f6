"""What every call of a group goes through: the kernels, their state, and what becomes of a call that must wait."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CallMismatch, anew
from ..shown_call import ShownCall, is_on
from ..trace import listening, tell_traces
from ..work import Finished
from . import check
from .calls import (
    KIND,
    KINDS,
    code_of,
    describe,
    even_table,
    operator,
    real_of,
    view_of,
    views_of,
)
from .exchange import exchange
from .fold import SCRATCH_BYTES, SUM, fold_address
from .members import Members
from .noted import NotedCall
from .progress import Progress
from .reductions import all_reduce, all_reduce_symmetric
from .segment import CHUNK, SLOT, STRIDE, Segment
from .single_copy import BY_COST, NEVER
from .steps import (
    CHUNK_BYTES,
    CODE,
    CONTROL,
    COUNT,
    DATA,
    DONE,
    FIRST_INPUT,
    INPUTS,
    LINE_BYTES,
    MISMATCH,
    RANK,
    SCRATCH,
    SENT,
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
        self._reductions: dict[Any, tuple[int, int, int]] = {}
        self.finished = Finished()
        self._nothing = views_of([torch.empty(0, dtype=torch.uint8)])
        self._symmetric: list[tuple[list[Segment], Any, int]] = []  # with the ranks' bases, bytes
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
            under_way, brought = None if wait else work, outputs if inputs is None else inputs
            group, seconds = self._group(), time.perf_counter() - begin
            if group is not None:
                op = KINDS[code & 255].split()[0]
                root = (code >> 24) - 1
                tell_traces(
                    group, op, brought, seconds, under_way, kept, root if root >= 0 else None
                )
        return work

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
            raise CallMismatch(f"ranks of group {self.members.name!r} made different calls: {why}")

    def _tables(self, kernel: Kernel, arguments: Any) -> Any:
        """Find what an exchange sends to each rank, and expects from each; None for other calls."""
        if isinstance(kernel, NotedCall):
            return kernel.tables
        return (arguments[1], arguments[3]) if kernel is exchange else None

    def _differing(self, one: tuple[int, str], other: tuple[int, str]) -> str:
        (a, first), (b, second) = one, other
        called = self.members.called
        return (
            f"ranks of group {self.members.name!r} made different calls: rank {called(a)} is in {first}, "
            f"rank {called(b)} in {second}"
        )

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
                raise self._mismatch(code, count, self._expected(kernel, arguments))
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

    def _expected(self, kernel: Kernel, arguments: Any) -> Any:
        """Find what an exchange expects of each rank: first element and number."""
        tables = self._tables(kernel, arguments)
        return None if tables is None else tables[1]

    def _mismatch(self, code: int, count: int, received: Any) -> CallMismatch:
        """Say which rank is in another call, or (`received`: what is expected of each) sends another number."""
        other = int(self.state[STUCK])
        line = (2 * other + int(self.state[STEP]) % 2) * line_bytes(self.members.ranks) // 8
        header = self.members.segment.words[line : line + SENT]
        theirs = describe(int(header[CODE]), int(header[COUNT]))
        own = (self.members.rank, describe(code, count))
        said = self._differing(own, (other, theirs))
        if received is not None and header[CODE] == code:
            own_name, name = map(self.members.called, (self.members.rank, other))
            said += (
                f"; rank {own_name} has room for {received[other, 1]} elements of rank {name}, "
                "which sends it another number"
            )
        return CallMismatch(said)

    def reduction(
        self, kind: str, dtype: torch.dtype, op: Any, root: int = -1
    ) -> tuple[int, int, int]:
        """Look up, or compile once, what reduces a dtype by an operator: function, operator, code."""
        key = (
            kind,
            dtype,
            op.op.value,
            root,
        )  # the operator's number: to compare operators costs 1 us
        found = self._reductions.get(key)
        if found is None:
            number = operator(dtype, op)
            code = code_of(KIND[kind], dtype, number, root)
            found = self._reductions[key] = fold_address(dtype, number), number, code
        return found

    def reduce(self, x: Tensor, op: Any, root: int, kind: str, wait: bool) -> dist.Work:
        """Reduce a tensor in place, on the root or (-1) on all ranks."""
        x = real_of(x, op) if x.is_complex() else x
        function, number, code = self.reduction(kind, x.dtype, op, root)
        if self.members.ranks == 1:
            return Finished([x])
        count = x.numel()
        if root < 0:
            place = self.place_of(x)
            if place is not None:
                code = code_of(KIND["all_reduce of symmetric tensors"], x.dtype, number)
                arguments = (*place, x.element_size(), function, count, number)
                return self.run(all_reduce_symmetric, arguments, code, count, [x], wait)
        arguments = (view_of(x), function, count, number, root)
        return self.run(all_reduce, arguments, code, count, [x], wait)

    def adopt(self, segments: list[Segment], bases: Any, size: int) -> None:
        """Take memory that all ranks have mapped as symmetric (see symmetric.py)."""
        self._symmetric.append((segments, bases, size))
        self.noted.clear()  # there may have been another tensor

    def place_of(self, x: Tensor) -> tuple[Any, int] | None:
        """Find where in symmetric memory a contiguous tensor lies: the ranks' bases and its offset."""
        if not self._symmetric or not x.is_contiguous():
            return None
        address, size = x.data_ptr(), x.numel() * x.element_size()
        for _, bases, room in self._symmetric:
            offset = address - int(bases[self.members.rank])
            if offset >= 0 and offset + size <= room:
                return bases, offset
        return None

    def exchange(
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
        kept = sent[self.members.rank, 1] / max(count, 1) if kind == "all_to_all" else None
        return self.run(exchange, arguments, code, count, receives, wait, sends, kept)

    def close(self) -> None:
        """End what is pending, and leave the group."""
        self.progress.close()
        self.members.close()
        self._symmetric.clear()
