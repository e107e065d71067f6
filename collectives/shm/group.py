"""The process group that torch.distributed calls: each of its methods is one kernel over shared memory."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ..python_group import PythonGroup, shapes
from ..trace import listening, tell_traces
from ..work import Several
from .engine import Engine
from .fused import FusedNorm
from .mailbox import Mailbox
from .members import Members
from .moves import Moves
from .noted import Noted
from .reductions import Reductions
from .steps import STEP
from .tables import even_starts, even_table, table_of, table_of_rows

_SUM, _GATHER, _SCATTER, _EXCHANGE = (
    dist.AllreduceOptions(), AllgatherOptions(), dist.ReduceScatterOptions(), dist.AllToAllOptions()
)  # fmt: skip


class ShmGroup(PythonGroup):
    """A c10d group whose ranks are processes of one host.

    Collective: every method but send and recv, by all members in one order. Each costs one or two crossings of
    flags and a copy into the shared slots and out of them; sums are in rank order, in float32 or wider.

    State: the shared segment, the place in the row of steps, pending work and the thread that does it.
    """

    def __init__(self, members: Members, timeout_s: float, spins: int) -> None:
        super().__init__(members.rank, members.ranks)
        self._members = members
        self._name = self._description = ""
        self.engine = Engine(self, members, timeout_s, spins)
        self.all_reduce_norm = FusedNorm(self.engine).run  # what `collectives.fused` asks for
        self._noted = Noted(self.engine)  # dense tensors; what does not suit it, and the rest:
        self._moves = Moves(self.engine)
        self._reductions = Reductions(self.engine, self._moves)
        self._mailbox = Mailbox(members, self.engine.progress, self.engine.state)

    # ---- who it is

    def rank(self) -> int:
        return self._members.rank

    def size(self) -> int:
        return self._members.ranks

    def getBackendName(self) -> str:
        return "shm"

    name = _get_backend_name = getBackendName

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    # ---- collectives, as torch names them

    def allreduce(self, tensors: list[Tensor], opts: Any = _SUM) -> dist.Work:
        if len(tensors) != 1:
            return self.allreduce_coalesced(tensors, opts)
        (x,), op, wait = tensors, opts.reduceOp, not opts.asyncOp
        work = self._noted.all_reduce(x, op, wait)
        return work if work is not None else self._reductions.reduce(x, op, -1, wait)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = _SUM) -> dist.Work:
        op, wait = opts.reduceOp, not opts.asyncOp
        return Several([self._reductions.reduce(x, op, -1, wait) for x in tensors], tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        (x,) = tensors
        self.check_rank(opts.rootRank)
        return self._reductions.reduce(x, opts.reduceOp, opts.rootRank, not opts.asyncOp)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        (x,) = tensors
        self.check_rank(opts.rootRank)
        return self._moves.broadcast(x, opts.rootRank, not opts.asyncOp)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        (found,), (x,) = outputs, inputs
        if len(found) != self.size():
            raise self.misfit(f"all_gather into {len(found)} tensors")
        own = found[self.rank()]
        if own.numel() != x.numel():
            raise self.misfit(f"{shapes([x])} gathered into {shapes([own])}")
        return self._moves.all_gather(found, x, not opts.asyncOp)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _GATHER) -> dist.Work:
        work = self._noted.runs("all_gather", output, input, not opts.asyncOp)
        if work is not None:
            return work
        if output.numel() != input.numel() * self.size():
            raise self.misfit(f"{shapes([input])} gathered into {shapes([output])}")
        return self._moves.all_gather([output], input, not opts.asyncOp)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        # c10d lists these by rank, then by tensor
        pairs = zip(zip(*outputs, strict=True), inputs, strict=True)
        works = [self.allgather([list(found)], [x], opts) for found, x in pairs]
        return Several(works, [x for found in outputs for x in found])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.all_gather_single(out, x, opts) for out, x in pairs], outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> dist.Work:
        (x,), root = inputs, opts.rootRank
        self.check_rank(root)
        found = outputs[0] if self.rank() == root else []
        if self.rank() == root and len(found) != self.size():
            raise self.misfit(f"gather into {len(found)} tensors")
        return self._moves.gather(found, x, root, not opts.asyncOp)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        (out,), root = outputs, opts.rootRank
        self.check_rank(root)
        parts = inputs[0] if self.rank() == root else []
        if self.rank() == root and len(parts) != self.size():
            raise self.misfit(f"scatter of {len(parts)} tensors")
        return self._moves.scatter(out, parts, root, not opts.asyncOp)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = _SCATTER
    ) -> dist.Work:
        (out,), (parts,) = outputs, inputs
        if odd := [x.dtype for x in parts if x.dtype != out.dtype]:
            raise ValueError(f"shm: reduce_scatter of {odd[0]} into {out.dtype}; use one dtype")
        if len(parts) != self.size() or parts[self.rank()].numel() != out.numel():
            raise self.misfit(f"{shapes(parts)} reduced and scattered into {shapes([out])}")
        return self._reductions.scatter_parts(parts, out, opts.reduceOp, not opts.asyncOp)

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = _SCATTER
    ) -> dist.Work:
        work = self._noted.runs("reduce_scatter", output, input, not opts.asyncOp, opts.reduceOp)
        if work is not None:
            return work
        n = output.numel()
        if input.dtype != output.dtype:
            raise ValueError(
                f"shm: reduce_scatter of {input.dtype} into {output.dtype}; use one dtype"
            )
        if input.numel() != n * self.size():
            raise self.misfit(f"{shapes([input])} reduced and scattered into {shapes([output])}")
        starts = even_starts(self.size(), n)
        return self._reductions.scatter([input], starts, output, opts.reduceOp, not opts.asyncOp)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _SCATTER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.reduce_scatter_single(out, x, opts) for out, x in pairs], outputs)

    def alltoall(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _EXCHANGE
    ) -> dist.Work:
        sent, received = table_of(inputs), table_of(outputs)
        self.check_own(sent[:, 1], received[:, 1])
        return self._moves.move("all_to_all", inputs, sent, outputs, received, not opts.asyncOp)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = _EXCHANGE,
    ) -> dist.Work:
        if not output_splits and not input_splits:
            work = self._noted.runs("all_to_all", output, input, not opts.asyncOp)
            if work is not None:
                return work
        sent, received = self._split(input, input_splits), self._split(output, output_splits)
        self.check_own(sent[:, 1], received[:, 1])
        return self._moves.move("all_to_all", [input], sent, [output], received, not opts.asyncOp)

    def _split(self, x: Tensor, rows: list[int]) -> Any:
        """Make the table of rows for each rank; no rows given: equal parts."""
        n, length = self.size(), x.shape[0] if x.dim() else 1
        if not rows:
            if length % n:
                raise self.misfit(f"{length} rows exchanged without split sizes")
            return even_table(n, x.numel() // n, x.numel() // n)
        if len(rows) != n or sum(rows) != length or min(rows) < 0:
            raise self.misfit(f"{shapes([x])} with split sizes {list(rows)}")
        return table_of_rows(x, rows)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._moves.meet(wait=opts is None or not opts.asyncOp)

    # the names of the same methods before torch 2.13
    _allgather_base: Any = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base: Any = reduce_scatter_single  # type: ignore[assignment]
    alltoall_base: Any = all_to_all_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced  # type: ignore[assignment]

    # ---- point to point

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> dist.Work:
        self.check_rank(to)
        self.check_tag(tag)
        begin = time.perf_counter()
        return self._told("send", tensors, begin, self._mailbox.send(tensors[0], to, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> dist.Work:
        self.check_rank(source)
        self.check_tag(tag)
        begin = time.perf_counter()
        return self._told("recv", tensors, begin, self._mailbox.receive(tensors[0], source, tag))

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        begin = time.perf_counter()
        return self._told("recv", tensors, begin, self._mailbox.receive(tensors[0], None, tag))

    def _told(self, op: str, tensors: list[Tensor], begin: float, work: dist.Work) -> dist.Work:
        """Tell traces of a message."""
        if listening():
            tell_traces(self, op, tensors, time.perf_counter() - begin, work)
        return work

    # ---- coalescing, and the end

    def _start_coalescing(self, device: torch.device) -> None:
        """Do nothing: calls are done one by one."""

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return Several([line[-1] for line in list(self.engine.progress.lines) if line], [])

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: the steps are counted anyway."""

    def _get_sequence_number_for_group(self) -> int:
        return int(self.engine.state[STEP])

    def set_timeout(self, timeout: timedelta) -> None:
        self.engine.progress.timeout_s = timeout.total_seconds()

    def orphan(self, error: RuntimeError) -> None:
        self.engine.progress.orphan(error)

    def shutdown(self) -> None:
        """Leave the group: a rank that still waits for this one is told at once."""
        self.engine.close()

    abort = shutdown
