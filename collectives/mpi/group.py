"""`MPIGroup`: a c10d process group over MPI communicators."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from ..errors import anew
from ..python_group import PythonGroup, by_rank, elements, listed
from ..shown_call import Moved, ShownCall, is_on
from ..trace import listening, tell_traces
from ..work import Finished, Several
from . import check, exchange, failure
from .exchange import Peers, Steps, complete
from .operation import About, Operation, OperationWork
from .progress import Engine
from .reduction import one_dtype, reduction
from .rollcall import Answer

_SCATTER = dist.ReduceScatterOptions()
SPINS = 200  # tests of a request before a blocking call lets other threads and ranks go first
_TRACED = {  # how a trace calls them
    "all_gather_into_tensor": "all_gather",
    "all_reduce_coalesced": "all_reduce",
    "all_to_all_single": "all_to_all",
}


@cache
def engine() -> Engine:
    """Return this process' engine, made with its first group."""
    return Engine()


class MPIGroup(PythonGroup):
    """A group of ranks; c10d finds its methods by name, those of torch 2.11 and those of torch 2.13.

    A call with `asyncOp=False` runs to its end in the calling thread; any other returns a `Work`
    which the progress thread moves on, and so does whoever waits for it.

    Attributes:
        cuda: how CUDA tensors travel: "direct", or "staged" through pinned memory.
        lost: the error that ended this group; every later call raises it.

    State: owns its two communicators until `shutdown`.
    """

    def __init__(self, ranks: Sequence[int], timeout: timedelta, name: str, backend: str) -> None:
        self.engine = engine()
        self.engine.check_process()
        self.ranks = list(ranks)
        self._rank = self.ranks.index(self.engine.world.rank)
        super().__init__(self._rank, len(self.ranks))
        self.timeout_s = timeout.total_seconds()
        self.calls = 0
        self.lost: Exception | None = None
        self.cuda = self.engine.wire.cuda
        self._name, self._backend, self._description = name, backend, ""
        self._last: About = ("", None, None)
        self._open: bool | weakref.ref[Operation] = False  # is the last call still under way?
        self._finished = Finished()
        self._coalescing: list[dist.Work] | None = None
        self.engine.groups[name] = self
        self.peers = self._connect()

    def _connect(self) -> Peers:
        """Make the communicators; only members take part.

        MPI makes them in calls that cannot be given up, so all members meet first.
        """
        meeting = exchange.meet(self.engine.meeting, self.ranks, self._name)
        self._run_here(("new_group", None, None), [], meeting)
        with self.engine.turn:
            members = self.engine.world.Get_group().Incl(self.ranks)
            comm = self.engine.world.Create_group(members, exchange.tag_of(self._name))
            members.Free()
            return Peers(comm, comm.Dup(), self.engine.wire, self._rank, len(self.ranks))

    # ---- who we are: c10d cannot know it of a group written in Python

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:
        return self._backend

    def _set_group_name(self, name: str) -> None:
        self.engine.groups.pop(self._name, None)
        self._name = name
        self.engine.groups[name] = self

    @property
    def _device_types(self) -> list[torch.device]:  # type: ignore[override]
        return [torch.device("cpu"), torch.device("cuda")]

    def __str__(self) -> str:
        return f"group {self._name!r}"

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def orphan(self, error: RuntimeError) -> None:
        self.lost = error

    def shutdown(self) -> None:
        """Free the communicators.

        Collective: all members; MPI waits for what is under way. Nothing is freed after a loss.
        """
        if self.lost is None and not MPI.Is_finalized():
            self.abort()
            with self.engine.turn:
                self.peers.comm.Free()
                self.peers.inner.Free()

    def abort(self) -> None:
        """Refuse every further call; frees nothing, so it waits for nobody."""
        self.lost = self.lost or RuntimeError(f"{self} is closed")

    # ---- running

    def _run(
        self,
        name: str,
        tensors: list[Tensor],
        steps: Steps,
        opts: Any = None,
        peer: int | None = None,
        brought: Sequence[Tensor] | None = None,
        moved: Moved = ([], []),
    ) -> dist.Work:
        """Start or do a call that fills `tensors`; `brought` is what this rank gives, where that is not the same."""
        if self.lost is not None:
            raise anew(self.lost)
        brought = tensors if brought is None else brought
        begin = time.perf_counter() if listening() else None
        if peer is None and is_on():
            call = ShownCall.of(name, tensors, opts, *moved)
            compare = check.compare(self.peers, self.ranks, call, str(self))
            self._run_here((f"{call}, before it,", None, None), [], compare)
        work = self._run_call(name, tensors, steps, opts, peer)
        if begin is not None:
            under_way = None if work is self._finished else work
            kind, seconds = _TRACED.get(name, name), time.perf_counter() - begin
            apart = kind == "all_to_all" and any(moved[0])
            kept = moved[0][self._rank] / sum(moved[0]) if apart else None
            tell_traces(self, kind, brought, seconds, under_way, kept)
        return work

    def _run_call(
        self, name: str, tensors: list[Tensor], steps: Steps, opts: Any, peer: int | None
    ) -> dist.Work:
        about: About = (name, tensors[0].shape, tensors[0].dtype) if tensors else (name, None, None)
        if peer is None:
            self.calls += 1
            self._last = about
        if opts is None or opts.asyncOp or self._coalescing is not None:
            return self._run_aside(Operation(self, about, tensors, steps, peer))
        self._open = True
        self._run_here(about, tensors, steps)
        self._open = False
        return self._finished

    def _run_aside(self, operation: Operation) -> dist.Work:
        if operation.peer is None:
            self._open = weakref.ref(operation)
        operation.start()
        if not operation.done:
            self.engine.adopt(operation)
        work = OperationWork(operation)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _run_here(self, about: About, tensors: list[Tensor], steps: Steps) -> None:
        """Run to the end in this thread; what takes longer than a moment becomes an `Operation`."""
        requests = None
        try:
            if not self.engine.serial:
                requests = next(steps, None)
                while requests is not None and any(map(complete, repeat(requests, SPINS))):
                    requests = next(steps, None)
                if requests is None:
                    return
        except MPI.Exception as error:
            operation = Operation(self, about, tensors, steps)
            raise self.engine.explain(operation, error) from error
        operation = Operation(self, about, tensors, steps)
        if requests is None:
            operation.start()
        else:
            operation.resume(requests)
        operation.wait()

    def state(self) -> Answer:
        """Say where this rank is in the calls of the group; the roll call asks."""
        under_way = self._open() if isinstance(self._open, weakref.ref) else None
        done = (
            not self._open if isinstance(self._open, bool) else under_way is None or under_way.done
        )
        return {"calls": self.calls, "doing": failure.text(*self._last), "done": done}

    # ---- reductions

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        opts = dist.AllreduceOptions() if opts is None else opts
        (t,) = tensors = listed(tensors)
        by = reduction(opts.reduceOp.op.value, t.dtype)
        return self._run("all_reduce", tensors, exchange.all_reduce(self.peers, t, by), opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> dist.Work:
        op = opts.reduceOp.op.value
        steps = [exchange.all_reduce(self.peers, t, reduction(op, t.dtype)) for t in tensors]
        return self._run("all_reduce_coalesced", list(tensors), exchange.together(steps), opts)

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        (t,) = listed(tensors)
        self.check_rank(opts.rootRank)
        by = reduction(opts.reduceOp.op.value, t.dtype)
        return self._run("reduce", [t], exchange.reduce(self.peers, t, by, opts.rootRank), opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = _SCATTER) -> dist.Work:
        outputs = listed(outputs)
        lists = inputs if isinstance(inputs[0], (list, tuple)) else [inputs]
        op = opts.reduceOp.op.value
        for out, parts in zip(outputs, lists, strict=True):
            if len(parts) != self.size() or parts[self._rank].numel() != out.numel():
                shapes = [_shape(t) for t in parts]
                raise self._misfit(f"reduce_scatter of {shapes} into {_shape(out)}")
            one_dtype(out, parts)
        steps = [
            exchange.reduce_scatter(self.peers, o, i, reduction(op, o.dtype))
            for o, i in zip(outputs, lists, strict=True)
        ]
        brought = [t for parts in lists for t in parts]
        return self._run("reduce_scatter", outputs, exchange.together(steps), opts, brought=brought)

    def reduce_scatter_single(self, out: Tensor, t: Tensor, opts: Any = _SCATTER) -> dist.Work:
        steps = self._reduce_scatter_steps(out, t, opts.reduceOp.op.value)
        return self._run("reduce_scatter", [out], steps, opts, None, [t])

    _reduce_scatter_base = reduce_scatter_single  # pyright: ignore[reportAssignmentType]

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _SCATTER
    ) -> dist.Work:
        op, pairs = opts.reduceOp.op.value, zip(outputs, inputs, strict=True)
        steps = [self._reduce_scatter_steps(*pair, op) for pair in pairs]
        return self._run(
            "reduce_scatter", list(outputs), exchange.together(steps), opts, brought=inputs
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # pyright: ignore[reportAssignmentType]

    def _reduce_scatter_steps(self, out: Tensor, t: Tensor, op: int) -> Steps:
        if t.numel() != out.numel() * self.size():
            raise self._misfit(f"reduce_scatter_tensor of {_shape(t)} into {_shape(out)}")
        one_dtype(out, [t])
        by = reduction(op, out.dtype)
        return exchange.reduce_scatter_single(self.peers, out, t, by)

    # ---- moving

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        tensors = listed(tensors)
        self.check_rank(opts.rootRank)
        steps = exchange.together(
            [exchange.broadcast(self.peers, t, opts.rootRank) for t in tensors]
        )
        return self._run("broadcast", tensors, steps, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        inputs = listed(inputs)
        for outs, t in zip(outputs, inputs, strict=True):
            if len(outs) != self.size() or outs[self._rank].numel() != t.numel():
                raise self._misfit(f"all_gather of {_shape(t)} into {[_shape(o) for o in outs]}")
        pairs = zip(outputs, inputs, strict=True)
        steps = [exchange.all_gather(self.peers, o, t) for o, t in pairs]
        flat = [out for outs in outputs for out in outs]
        gathered = [elements(o) for o in zip(*outputs, strict=True)]
        moved = [elements(inputs)] * self.size(), gathered
        return self._run("all_gather", flat, exchange.together(steps), opts, None, inputs, moved)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        # c10d lists these by rank, then by tensor
        return self.allgather([list(outs) for outs in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, out: Tensor, t: Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([out], [t], opts)

    _allgather_base = all_gather_single  # pyright: ignore[reportAssignmentType]

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        for out, t in zip(outputs, inputs, strict=True):
            if out.numel() != t.numel() * self.size() or out.dtype != t.dtype:
                raise self._misfit(f"all_gather_into_tensor of {_shape(t)} into {_shape(out)}")
        pairs = zip(outputs, inputs, strict=True)
        steps = exchange.together([exchange.all_gather_single(self.peers, o, t) for o, t in pairs])
        return self._run("all_gather_into_tensor", list(outputs), steps, opts, None, inputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # pyright: ignore[reportAssignmentType]

    def all_to_all_single(
        self, out: Tensor, t: Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> dist.Work:
        for x, runs, what in ((t, send, "input"), (out, receive, "output")):
            rows, ranks = x.shape[0] if x.dim() else 1, len(self.ranks)
            if (sum(runs) != rows or len(runs) != ranks) if runs else rows % ranks:
                how = list(runs) or "of equal size"
                raise self._misfit(f"all_to_all of {rows} {what} rows in runs {how}")
        if out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
            t = t.clone()  # MPI may receive before it sends
        steps = exchange.all_to_all_single(self.peers, out, t, receive, send)
        if not (send or receive or is_on()):  # equal runs are of interest to nobody else
            return self._run("all_to_all_single", [out], steps, opts, None, [t])
        moved = by_rank(t, send, self.size()), by_rank(out, receive, self.size())
        self.check_own(*moved)
        return self._run("all_to_all_single", [out], steps, opts, None, [t], moved)

    alltoall_base = all_to_all_single  # pyright: ignore[reportAssignmentType]

    def alltoall(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        moved = [t.numel() for t in inputs], [t.numel() for t in outputs]
        self.check_own(*moved)
        steps = exchange.all_to_all(self.peers, outputs, inputs)
        return self._run("all_to_all", list(outputs), steps, opts, None, inputs, moved)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (t,), outs = listed(inputs), outputs[0] if outputs else []
        self.check_rank(opts.rootRank)
        if self._rank == opts.rootRank and len(outs) != self.size():
            raise self._misfit(f"gather into {len(outs)} tensors")
        steps = exchange.gather(self.peers, outs, t, opts.rootRank)
        sent = [t.numel() * (r == opts.rootRank) for r in range(self.size())]
        moved = sent, [out.numel() for out in outs] or [0] * self.size()
        return self._run("gather", list(outs) or [t], steps, opts, None, [t], moved)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (out,), parts = listed(outputs), inputs[0] if inputs else []
        self.check_rank(opts.rootRank)
        if self._rank == opts.rootRank and len(parts) != self.size():
            raise self._misfit(f"scatter of {len(parts)} tensors")
        steps = exchange.scatter(self.peers, out, parts, opts.rootRank)
        received = [out.numel() * (r == opts.rootRank) for r in range(self.size())]
        moved = [t.numel() for t in parts] or [0] * self.size(), received
        return self._run("scatter", [out], steps, opts, None, parts, moved)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._run("barrier", [], exchange.barrier(self.peers), opts)

    # ---- point to point

    def send(self, tensors: Any, to: int, tag: int) -> dist.Work:
        (t,) = listed(tensors)
        self.check_rank(to)
        return self._run("send", [t], exchange.send(self.peers, t, to, tag), peer=to)

    def recv(self, tensors: Any, source: int, tag: int) -> dist.Work:
        self.check_rank(source)
        return self._receive(tensors, source, tag)

    def _receive(self, tensors: Any, source: int, tag: int) -> dist.Work:
        (t,) = listed(tensors)
        return self._run("recv", [t], exchange.receive(self.peers, t, source, tag), peer=source)

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        return self._receive(tensors, MPI.ANY_SOURCE, tag)

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        works, self._coalescing = self._coalescing or [], None
        return Several(works)

    def _misfit(self, asked: str) -> ValueError:
        return ValueError(f"{asked} does not fit {self} of {self.size()} ranks")


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)
