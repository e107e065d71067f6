"""The process group that torch.distributed calls: each of its methods is one kernel over shared memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from .calls import KINDS, code_of, dense_view, describe, operator, view_of, views_of
from .exchange import exchange
from .fold import SCRATCH_BYTES, fold_address
from .mailbox import Mailbox
from .members import Members
from .progress import Progress
from .reductions import all_reduce, reduce_scatter
from .segment import SLOT, STRIDE
from .steps import (
    CODE,
    CONTROL,
    COUNT,
    DATA,
    DONE,
    FIRST_INPUT,
    INPUTS,
    LINE,
    MISMATCH,
    RANK,
    SCRATCH,
    SETS,
    SLOT_BYTES,
    SPINS,
    STEP,
    STRIDE_BYTES,
    STUCK,
    WORLD,
)
from .work import PATIENCE, Finished, Pending, Several

_SUM, _GATHER, _SCATTER, _EXCHANGE = (
    dist.AllreduceOptions(), AllgatherOptions(), dist.ReduceScatterOptions(), dist.AllToAllOptions()
)  # fmt: skip
_KIND = {name: number for number, name in enumerate(KINDS)}
Kernel = Callable[..., int]


class CallMismatch(RuntimeError):
    """Ranks of a group are in different calls; the message shows both sides."""


class ShmGroup(dist.ProcessGroup):
    """A c10d group whose ranks are processes of one host.

    Collective: every method but send and recv, by all members in one order. Each costs one or two crossings of
    flags and a copy into the shared slots and out of them; sums are in rank order, in float32 or wider.

    State: the shared segment, the place in the row of steps, pending work and the thread that does it.
    """

    def __init__(self, members: Members, timeout_s: float, spins: int) -> None:
        super().__init__(members.rank, members.ranks)  # type: ignore[call-arg]
        self._members = members
        self._name = self._description = ""
        self._progress = Progress(members, timeout_s)
        self._mailbox = Mailbox(members, self._progress)
        self._state = state = np.zeros(FIRST_INPUT + members.ranks, np.int64)
        base = members.segment.address
        state[[CONTROL, DATA]] = base, base + members.layout.data
        state[[RANK, WORLD, SLOT_BYTES, STRIDE_BYTES]] = members.rank, members.ranks, SLOT, STRIDE
        self._scratch = np.zeros(SCRATCH_BYTES, np.uint8)
        state[[SPINS, STEP, SCRATCH]] = spins, 1, self._scratch.ctypes.data
        state[SETS] = 1
        state[INPUTS] = state[FIRST_INPUT:].ctypes.data
        self._reductions: dict[Any, tuple[int, int, int]] = {}
        self._view = dense_view(0, 1)
        self._empty = views_of([torch.empty(0)])
        self._finished = Finished()

    # ---- who it is

    def rank(self) -> int:
        return self._members.rank

    def size(self) -> int:
        return self._members.ranks

    getRank, getSize = rank, size

    def getBackendName(self) -> str:
        return "shm"

    name = _get_backend_name = getBackendName

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

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
        return f"ShmGroup({self._name!r}, rank {self.rank()} of {self.size()})"

    # ---- what every call goes through

    def _call(
        self,
        kernel: Kernel,
        arguments: tuple[Any, ...],
        code: int,
        count: int,
        outputs: list[Tensor],
        wait: bool,
        inputs: list[Tensor] | None = None,
    ) -> dist.Work:
        """Run a kernel if no work is before it; if it must wait longer than a moment, make it pending work."""
        progress = self._progress
        with progress.lock:
            if progress.broken is not None:
                raise progress.broken
            if not progress.collectives:
                status = kernel(self._state, *arguments, code, PATIENCE if wait else 0)
                if status == DONE:
                    return self._finished if wait else Finished(outputs)
            work = self._pend(kernel, arguments, code, count, outputs, inputs)
        if not wait:
            progress.wake()
            return work
        work.wait()
        return self._finished

    def _pend(
        self,
        kernel: Kernel,
        arguments: Any,
        code: int,
        count: int,
        outputs: list[Tensor],
        inputs: list[Tensor] | None,
    ) -> Pending:
        state = self._state

        def advance(patience: int) -> bool:
            status = kernel(state, *arguments, code, patience)
            if status == MISMATCH:
                raise self._mismatch(code, count)
            return status == DONE

        self._view = dense_view(0, 1)  # the work keeps the one that was in use
        work = Pending(
            self._progress,
            describe(code, count),
            advance,
            lambda: [int(state[STUCK])],
            outputs,
            alive=inputs,
        )
        return self._progress.add(self._progress.collectives, work)

    def _mismatch(self, code: int, count: int) -> CallMismatch:
        other = int(self._state[STUCK])
        line = (2 * other + int(self._state[STEP]) % 2) * LINE // 8
        header = self._members.segment.words[line : line + LINE // 8]
        called = self._members.called
        theirs = describe(int(header[CODE]), int(header[COUNT]))
        return CallMismatch(
            f"ranks of group {self._name!r} made different calls: rank {called(self.rank())} is in "
            f"{describe(code, count)}, rank {called(other)} in {theirs}"
        )

    def _reduction(
        self, kind: str, dtype: torch.dtype, op: Any, root: int = -1
    ) -> tuple[int, int, int]:
        """Look up, or compile once, what reduces a dtype by an operator: function, operator, code."""
        key = (kind, dtype, op, root)
        found = self._reductions.get(key)
        if found is None:
            number = operator(dtype, op)
            code = code_of(_KIND[kind], dtype, number, root)
            found = self._reductions[key] = fold_address(dtype, number), number, code
        return found

    def _reduce(self, x: Tensor, op: Any, root: int, kind: str, wait: bool) -> dist.Work:
        x = real_of(x, op) if x.is_complex() else x
        function, number, code = self._reduction(kind, x.dtype, op, root)
        if self.size() == 1:
            return Finished([x])
        count = x.numel()
        if x.is_contiguous():
            view = self._view  # described without an allocation
            view[0], view[2] = x.data_ptr(), x.element_size()
        else:
            view = view_of(x)
        arguments = (view, function, count, number, root)
        return self._call(all_reduce, arguments, code, count, [x], wait)

    def _exchange(
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
        of = (sends or receives)[0]
        views = [views_of(x) if x else self._empty for x in (sends, receives)]
        code = code_of(_KIND[kind], of.dtype, root=root)
        meet = root < 0  # with a root, only those wait who receive
        count = int(sent[self.rank(), 1] if shared else sent[:, 1].sum())
        arguments = (views[0], sent, views[1], received, shared, meet, of.element_size())
        return self._call(exchange, arguments, code, count, receives, wait, sends)

    # ---- collectives, as torch names them

    def allreduce(self, tensors: list[Tensor], opts: Any = _SUM) -> dist.Work:
        if len(tensors) != 1:
            return self.allreduce_coalesced(tensors, opts)
        return self._reduce(tensors[0], opts.reduceOp, -1, "all_reduce", not opts.asyncOp)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = _SUM) -> dist.Work:
        op, wait = opts.reduceOp, not opts.asyncOp
        return Several([self._reduce(x, op, -1, "all_reduce", wait) for x in tensors], tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        (x,) = tensors
        return self._reduce(x, opts.reduceOp, opts.rootRank, "reduce", not opts.asyncOp)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        (x,) = tensors
        root, n = opts.rootRank, x.numel()
        sent, received = self._table(), self._table()
        if self.rank() == root:
            sent[:, 1] = n
        else:
            received[root, 1] = n
        return self._exchange(
            "broadcast", [x], sent, [x], received, not opts.asyncOp, root, shared=True
        )

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        (found,), (x,) = outputs, inputs
        _check(len(found) == self.size(), f"all_gather into {len(found)} tensors", self)
        own = found[self.rank()]
        _check(own.numel() == x.numel(), f"{_shapes(x)} gathered into {_shapes(own)}", self)
        return self._exchange(
            "all_gather", [x], self._table(x.numel()), found, self._lengths(found),
            not opts.asyncOp, shared=True,
        )  # fmt: skip

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _GATHER) -> dist.Work:
        n = input.numel()
        whole = n * self.size()
        _check(output.numel() == whole, f"{_shapes(input)} gathered into {_shapes(output)}", self)
        return self._exchange(
            "all_gather", [input], self._table(n), [output], self._runs(n),
            not opts.asyncOp, shared=True,
        )  # fmt: skip

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        works = [self.allgather([found], [x], opts) for found, x in pairs]
        return Several(works, [x for found in outputs for x in found])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.all_gather_single(out, x, opts) for out, x in pairs], outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> dist.Work:
        (x,), root = inputs, opts.rootRank
        found = outputs[0] if self.rank() == root else []
        received = self._lengths(found) if found else self._table()
        return self._exchange(
            "gather", [x], self._table(x.numel()), found, received, not opts.asyncOp, root, shared=True
        )  # fmt: skip

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        (out,), root = outputs, opts.rootRank
        parts = inputs[0] if self.rank() == root else []
        received = self._table()
        received[root, 1] = out.numel()
        sent = self._lengths(parts) if parts else self._table()
        receives = [out] * self.size()  # a view for each rank: all of one tensor
        return self._exchange("scatter", parts, sent, receives, received, not opts.asyncOp, root)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = _SCATTER
    ) -> dist.Work:
        (out,), (parts,) = outputs, inputs
        _check(
            len(parts) == self.size() and all(x.numel() == out.numel() for x in parts),
            f"{_shapes(*parts)} reduced and scattered into {_shapes(out)}", self,
        )  # fmt: skip
        return self._reduce_scatter(parts, np.zeros(self.size(), np.int64), out, opts)

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = _SCATTER
    ) -> dist.Work:
        n = output.numel()
        fits = input.numel() == n * self.size()
        _check(fits, f"{_shapes(input)} reduced and scattered into {_shapes(output)}", self)
        return self._reduce_scatter([input], np.arange(self.size()) * n, output, opts)

    def _reduce_scatter(
        self, parts: list[Tensor], starts: Any, out: Tensor, opts: Any
    ) -> dist.Work:
        op = opts.reduceOp
        result = out
        if out.is_complex():
            parts, out, starts = [real_of(x, op) for x in parts], real_of(out, op), 2 * starts
        function, number, code = self._reduction("reduce_scatter", out.dtype, op)
        n = out.numel()
        if self.size() == 1:
            table = self._table(n)
            return self._exchange("all_to_all", parts, table, [out], table, not opts.asyncOp)
        arguments = (views_of(parts), starts, view_of(out), function, n, number)
        wait = not opts.asyncOp
        return self._call(reduce_scatter, arguments, code, n, [result], wait, parts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _SCATTER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.reduce_scatter_single(out, x, opts) for out, x in pairs], outputs)

    def alltoall(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _EXCHANGE
    ) -> dist.Work:
        fits = len(outputs) == len(inputs) == self.size()
        _check(fits, f"all_to_all of {len(inputs)} tensors into {len(outputs)}", self)
        sent, received = self._lengths(inputs), self._lengths(outputs)
        return self._exchange("all_to_all", inputs, sent, outputs, received, not opts.asyncOp)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = _EXCHANGE,
    ) -> dist.Work:
        sent, received = self._split(input, input_splits), self._split(output, output_splits)
        return self._exchange("all_to_all", [input], sent, [output], received, not opts.asyncOp)

    def barrier(self, opts: Any = None) -> dist.Work:
        wait = opts is None or not opts.asyncOp
        nothing = self._table()
        arguments = (self._empty, nothing, self._empty, nothing, True, True, 1)
        return self._call(exchange, arguments, code_of(_KIND["barrier"]), 0, [], wait)

    # the names of the same methods before torch 2.13
    _allgather_base: Any = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base: Any = reduce_scatter_single  # type: ignore[assignment]
    alltoall_base: Any = all_to_all_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced  # type: ignore[assignment]

    # ---- point to point

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> dist.Work:
        return self._mailbox.send(tensors[0], to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> dist.Work:
        return self._mailbox.receive(tensors[0], source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        return self._mailbox.receive(tensors[0], None, tag)

    # ---- coalescing, and the end

    def _start_coalescing(self, device: torch.device) -> None:
        """Do nothing: calls are done one by one."""

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return Several([line[-1] for line in list(self._progress.lines) if line], [])

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: the steps are counted anyway."""

    def _get_sequence_number_for_group(self) -> int:
        return int(self._state[STEP])

    def set_timeout(self, timeout: timedelta) -> None:
        self._progress.timeout_s = timeout.total_seconds()

    def shutdown(self) -> None:
        """Leave the group: a rank that still waits for this one is told at once."""
        self._progress.close()
        self._members.close()

    abort = shutdown

    # ---- tables of (first element, elements) for each rank

    def _table(self, count: int = 0) -> Any:
        table = np.zeros((self.size(), 2), np.int64)
        table[:, 1] = count
        return table

    def _runs(self, count: int) -> Any:
        table = self._table(count)
        table[:, 0] = np.arange(self.size()) * count
        return table

    def _lengths(self, tensors: list[Tensor]) -> Any:
        table = self._table()
        table[:, 1] = [x.numel() for x in tensors]
        return table

    def _split(self, x: Tensor, rows: list[int]) -> Any:
        n, length = self.size(), x.shape[0] if x.dim() else 1
        if not rows:
            _check(length % n == 0, f"{length} rows exchanged without split sizes", self)
            return self._runs(x.numel() // n)
        fits = len(rows) == n and sum(rows) == length
        _check(fits, f"{_shapes(x)} with split sizes {list(rows)}", self)
        counts = np.array(rows) * (x.numel() // max(1, length))
        return np.stack([np.cumsum(counts) - counts, counts], 1)


def real_of(x: Tensor, op: Any) -> Tensor:
    """See a complex tensor as pairs of numbers, which can be added."""
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        raise ValueError(f"shm: {op} has no meaning for {x.dtype}; complex tensors can be summed")
    return torch.view_as_real(x)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _check(fits: bool, what: str, group: ShmGroup) -> None:
    if not fits:
        raise ValueError(f"shm: {what} does not fit a group of {group.size()} ranks")
