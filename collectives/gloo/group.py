"""The process group that torch.distributed calls: torch's own gloo, with errors that name the rank that is lost."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ..errors import CallMismatch, PeerLost, anew
from ..python_group import PythonGroup, by_rank, listed
from ..shown_call import Moved, ShownCall, is_on, mismatch, room_of
from ..trace import listening, tell_traces
from ..work import Finished, Several
from .call import LOST, Call
from .lookout import lookout
from .members import Members
from .strides import check_dense, strided

STOPPED_S = 30.0  # a process that is stopped (SIGSTOP) is given up after this, whatever the timeout
SLOW_S = 1.0  # a call that takes longer is told to the others, who may be elsewhere
LINGER_S = 5.0  # ranks that waited for each other give up one after the other, and read where the others were
OTHER_DTYPES = (
    "it knows float32, float64, bfloat16, float16, int8, uint8, int32, int64 and bool; convert the tensor, or, to move "
    "it and not to sum it, use backend 'shm' or 'mpi'"
)
END_TAG = 0x7E4D  # of a message that is never sent, see `_end_all`
_SUM, _GATHER, _SCATTER, _EXCHANGE = (
    dist.AllreduceOptions(), AllgatherOptions(), dist.ReduceScatterOptions(), dist.AllToAllOptions()
)  # fmt: skip


class GlooGroup(PythonGroup):
    """A group of ranks over gloo; its methods are those of ``ProcessGroupGloo``, which does the work.

    A group that has lost a rank is over: what is under way ends, on the other ranks too, and later calls raise at once.

    Attributes:
        lost: the error that ended this group; every later call raises it.

    State: gloo's connections, and the calls under way.
    """

    def __init__(
        self, store: Any, rank: int, names: Sequence[int], timeout: timedelta, name: str
    ) -> None:
        super().__init__(rank, len(names))
        self._name, self._description = name, ""
        self.timeout_s = timeout.total_seconds()
        self.lost: Exception | None = None
        self.members = Members(store, rank, names, timeout, name)
        try:
            self._gloo: Any = dist.ProcessGroupGloo(store, rank, len(names), timeout)
        except RuntimeError as error:
            why = self.members.why("", True, self.members.others)
            raise PeerLost(f"group {name} cannot open: {why} ({error})") from error
        self._calls = 0
        # weak: who drops the work of a message waits for it no more
        self._under_way: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
        self._left_open: list[Call] = []  # that nobody waits for since an interruption
        self._ending = Lock()
        self._lost_call: Call | None = None
        self._lost_at = 0.0
        lookout().groups.add(self)

    # ---- who it is: c10d cannot know it of a group written in Python

    def rank(self) -> int:
        return self.members.rank

    def size(self) -> int:
        return len(self.members.names)

    def getBackendName(self) -> str:
        return "plait_gloo"

    name = _get_backend_name = getBackendName

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device("cuda")]

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: calls are counted anyway."""

    def _get_sequence_number_for_group(self) -> int:
        return self._calls

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout_s = timeout.total_seconds()
        self._gloo.set_timeout(timeout)

    _set_default_timeout = set_timeout

    # ---- running

    def _run(
        self,
        kind: str,
        start: Callable[[], Any],
        brought: Sequence[Tensor],
        opts: Any = None,
        moved: Moved = ([], []),
    ) -> dist.Work:
        """Start a collective, and wait for it unless the caller does; `brought` is what this rank gives."""
        begin = time.perf_counter() if listening() else None
        if is_on():
            self._compare(ShownCall.of(kind, brought, opts, *moved))
        self._calls += 1
        work = self._start(Call(self, kind, brought, self._calls), start)
        waits = opts is not None and not opts.asyncOp
        if waits:
            work.wait()
            work = Finished()
        if begin is not None:
            kept = moved[0][self.rank()] / max(sum(moved[0]), 1) if any(moved[0]) else None
            seconds = time.perf_counter() - begin
            kept = kept if kind == "all_to_all" else None
            tell_traces(self, kind, brought, seconds, None if waits else work, kept)
        return work

    def _message(self, kind: str, start: Callable[[], Any], x: Tensor, peer: int) -> Call:
        if listening():
            tell_traces(self, kind, [x], 0.0)
        name = f"rank {self.members.names[peer]}" if peer >= 0 else "any rank"
        what, place = ("send", "to") if kind == "send" else ("receive", "from")
        return self._start(Call(self, what, [x], 0, peer, f" {place} {name}"), start)

    def _start(self, call: Call, start: Callable[[], Any]) -> Call:
        if self.lost is not None:
            raise anew(self.lost)
        self._under_way[id(call)] = call
        try:
            call.inner = start()
        except RuntimeError as error:
            raise self.explain(call, error) from error
        return call

    def _compare(self, shown: ShownCall) -> None:
        """In debug mode: show a collective to all other ranks before it starts, and look at theirs.

        Raises:
            CallMismatch: two ranks are in different calls; the same on every rank.
        """
        room = room_of(self.size())
        own = torch.frombuffer(bytearray(shown.packed(room)), dtype=torch.uint8)
        found = own.new_empty(self.size() * room)
        call = Call(self, f"{shown}, before it,", [], self._calls + 1)
        self._start(call, lambda: self._gloo._allgather_base(found, own, _GATHER)).wait()
        calls = [ShownCall.unpacked(bytes(text.tolist())) for text in found.view(-1, room)]
        if why := mismatch(calls, self.members.names):
            raise CallMismatch(f"ranks of group {self._name} made different calls: {why}")

    # ---- when something is lost

    def explain(self, call: Call, error: Exception) -> Exception:
        """Turn what gloo raised into what the person can use, and end what else is under way after a loss."""
        self.forget(call)
        text = str(error)
        if text.startswith("Invalid scalar type"):
            return ValueError(f"gloo cannot do {call} in group {self._name}: {OTHER_DTYPES}")
        if self.lost is None and not LOST.search(text):
            return error
        with self._ending:
            if self.lost is None:
                late = "imed out" in text
                self._lose(call, late, self.timeout_s)
        assert self.lost is not None
        return anew(self.lost)

    def _lose(self, call: Call, late: bool, patience_s: float) -> None:
        peers = self.members.others if call.peer is None or call.peer < 0 else [call.peer]
        why = self.members.why(self.where(call), late, peers) or "a rank closed its connection"
        within = f" within {patience_s:g} s" if late else ""
        self.lost = PeerLost(f"{call} in group {self._name} did not end{within}: {why}")
        self._lost_call, self._lost_at = call, time.monotonic()
        self.members.say_lost(f"{call}: {why}")
        self._end_all()

    def _end_all(self) -> None:
        """Close gloo's connections, so that nothing waits any more, here and on the other ranks.

        It has no call for that, but closes all of a group's connections when a message does not come in time.
        """
        for other in self.members.others:  # one connection would do that is not closed yet
            with contextlib.suppress(RuntimeError):
                message = self._gloo.recv([torch.empty(1)], other, END_TAG)
                message.wait(timedelta(milliseconds=1))

    def forget(self, call: Call) -> None:
        """Take note that a call has ended."""
        self._under_way.pop(id(call), None)

    def leave_open(self, call: Call) -> None:
        """Take note that nobody waits for a call any more, which goes on."""
        self._left_open.append(call)

    def has_left_open(self) -> bool:
        """Say whether such a call goes on still."""
        self._left_open = [call for call in self._left_open if not call.is_completed()]
        return bool(self._left_open)

    def slow_calls(self) -> list[Call]:
        """Give the collectives that take long."""
        for call in list(self._under_way.values()):
            if call.peer is None and call.inner is not None and call.is_completed():
                self.forget(call)
        now = time.monotonic()
        if self._lost_call is not None and now < self._lost_at + LINGER_S:
            return [self._lost_call]
        begun = now - min(SLOW_S, self.timeout_s / 4)
        calls = list(self._under_way.values())
        return [call for call in calls if call.peer is None and call.since < begun]

    def give_up_the_stopped(self) -> None:
        """End the calls that have long waited for a process that is stopped."""
        begun = time.monotonic() - STOPPED_S
        waiting = [call for call in list(self._under_way.values()) if call.since < begun]
        stopped = self.members.stopped() if waiting and self.lost is None else []
        for call in waiting:
            if stopped and (call.peer is None or call.peer in stopped):
                with self._ending:
                    if self.lost is None:
                        self._lose(call, True, STOPPED_S)

    def where(self, call: Call) -> str:
        """Say of a call where this rank is."""
        number = f"call {call.number}, " if call.peer is None else ""
        return f"{number}{call} in group {self._name}"

    def leave(self, reason: str) -> None:
        """Tell the others that this process ends with an error, and let none of them wait for it."""
        self.members.say_farewell(reason)
        self._end_all()

    def orphan(self, error: RuntimeError) -> None:
        self.lost = error
        lookout().orphan(self, self._gloo)

    def shutdown(self) -> None:
        """Leave the group."""
        lookout().groups.discard(self)
        if self.has_left_open():
            self._end_all()  # or the process could not end before its timeout
        if self.lost is None:
            self.lost = RuntimeError(f"group {self._name} is closed")
        self.members.close()

    abort = shutdown

    # ---- collectives, as torch names them

    def allreduce(self, tensors: Any, opts: Any = _SUM) -> dist.Work:
        xs = listed(tensors)
        check_dense(xs)
        return self._run("all_reduce", lambda: self._gloo.allreduce(xs, opts), xs, opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> dist.Work:
        check_dense(tensors)
        return self._run(
            "all_reduce", lambda: self._gloo.allreduce_coalesced(tensors, opts), tensors, opts
        )

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        check_dense(tensors)
        return self._run("reduce", lambda: self._gloo.reduce(tensors, opts), tensors, opts)

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        check_dense(tensors)
        return self._run("broadcast", lambda: self._gloo.broadcast(tensors, opts), tensors, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = _GATHER) -> dist.Work:
        return self._run(
            "all_gather", lambda: self._gloo.allgather(outputs, inputs, opts), inputs, opts
        )

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = _GATHER) -> dist.Work:
        return self._run(
            "all_gather",
            lambda: self._gloo.allgather_coalesced(outputs, inputs, opts),
            inputs,
            opts,
        )

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _GATHER) -> dist.Work:
        return self._run(
            "all_gather", lambda: self._gloo._allgather_base(output, input, opts), [input], opts
        )

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _GATHER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.all_gather_single(out, x, opts) for out, x in pairs], outputs)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        return self._run("gather", lambda: self._gloo.gather(outputs, inputs, opts), inputs, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        return self._run(
            "scatter", lambda: self._gloo.scatter(outputs, inputs, opts), outputs, opts
        )

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = _SCATTER) -> dist.Work:
        brought = [x for parts in inputs for x in parts]
        return self._run(
            "reduce_scatter", lambda: self._gloo.reduce_scatter(outputs, inputs, opts), brought, opts
        )  # fmt: skip

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = _SCATTER
    ) -> dist.Work:
        return self._run(
            "reduce_scatter", lambda: self._gloo._reduce_scatter_base(output, input, opts), [input], opts
        )  # fmt: skip

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _SCATTER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.reduce_scatter_single(out, x, opts) for out, x in pairs], outputs)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = _EXCHANGE) -> dist.Work:
        moved = [x.numel() for x in inputs], [x.numel() for x in outputs]
        self.check_own(*moved)
        return self._run(
            "all_to_all", lambda: self._gloo.alltoall(outputs, inputs, opts), inputs, opts, moved
        )

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = _EXCHANGE,
    ) -> dist.Work:
        for x in (output, input):
            if not x.is_contiguous():
                raise strided(x)
        if output.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
            input = input.clone()  # gloo sends from it after it has received
        moved = (
            by_rank(input, input_splits, self.size()),
            by_rank(output, output_splits, self.size()),
        )
        self.check_own(*moved)

        def start() -> Any:
            return self._gloo.alltoall_base(output, input, output_splits, input_splits, opts)

        return self._run("all_to_all", start, [input], opts, moved)

    def barrier(self, opts: Any = None) -> dist.Work:
        given = dist.BarrierOptions() if opts is None else opts
        return self._run("barrier", lambda: self._gloo.barrier(given), [], opts)

    # the names of the same methods before torch 2.13
    _allgather_base: Any = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base: Any = reduce_scatter_single  # type: ignore[assignment]
    alltoall_base: Any = all_to_all_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced  # type: ignore[assignment]

    # ---- point to point

    def send(self, tensors: Any, to: int, tag: int = 0) -> dist.Work:
        self.check_rank(to)
        return self._message("send", lambda: self._gloo.send(tensors, to, tag), tensors[0], to)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> dist.Work:
        self.check_rank(source)
        start = lambda: self._gloo.recv(tensors, source, tag)  # noqa: E731
        return self._message("recv", start, tensors[0], source)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        return self._message(
            "recv", lambda: self._gloo.recv_anysource(tensors, tag), tensors[0], -1
        )

    def _start_coalescing(self, device: torch.device) -> None:
        """Do nothing: calls are done one by one."""

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return Several(list(self._under_way.values()), [])
