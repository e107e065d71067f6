"""The process group that torch.distributed calls: torch's own gloo, with errors that name the rank that is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ..python_group import by_rank, listed, shapes
from ..sendable import check_sendable
from ..work import Finished, Several
from .call import Call
from .member import Member
from .tensors import check_alike, check_contiguous, check_dense, check_operator, one_dtype

_SUM, _GATHER, _SCATTER, _EXCHANGE = (
    dist.AllreduceOptions(), AllgatherOptions(), dist.ReduceScatterOptions(), dist.AllToAllOptions()
)  # fmt: skip


class GlooGroup(Member):
    """A group of ranks; its methods are those of ``ProcessGroupGloo``, which does the work."""

    # ---- collectives, as torch names them

    def allreduce(self, tensors: Any, opts: Any = _SUM) -> dist.Work:
        xs = listed(tensors)
        if any(x.layout is not torch.sparse_coo for x in xs):  # which gloo can add
            check_dense(xs)
        check_operator(opts.reduceOp, xs)
        return self._run("all_reduce", lambda: self._gloo.allreduce(xs, opts), xs, opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> dist.Work:
        if not tensors:
            return Finished()
        check_dense(tensors)
        one_dtype("all_reduce_coalesced", tensors)
        check_operator(opts.reduceOp, tensors)
        return self._run(
            "all_reduce", lambda: self._gloo.allreduce_coalesced(tensors, opts), tensors, opts
        )

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        check_dense(tensors)
        check_operator(opts.reduceOp, tensors)
        return self._run("reduce", lambda: self._gloo.reduce(tensors, opts), tensors, opts)

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        check_dense(tensors)
        return self._run("broadcast", lambda: self._gloo.broadcast(tensors, opts), tensors, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = _GATHER) -> dist.Work:
        (found,), (x,) = outputs, inputs
        self._check_parts("all_gather", found, x)
        if len({part.numel() for part in found}) > 1:
            return self._broadcast_each(found, x, opts)
        return self._run(
            "all_gather", lambda: self._gloo.allgather(outputs, inputs, opts), inputs, opts
        )

    def _broadcast_each(self, found: Sequence[Tensor], x: Tensor, opts: Any) -> dist.Work:
        """Gather parts of unequal length, each from its rank."""
        check_contiguous(found)
        found[self.rank()].copy_(x.view_as(found[self.rank()]))
        works = []
        for r, part in enumerate(found):
            each = dist.BroadcastOptions()
            each.rootRank, each.asyncOp = r, opts.asyncOp
            works.append(self.broadcast([part], each))
        return Several(works, found)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = _GATHER) -> dist.Work:
        # c10d lists these by rank, then by tensor
        pairs = zip(zip(*outputs, strict=True), inputs, strict=True)
        works = [self.allgather([list(found)], [x], opts) for found, x in pairs]
        return Several(works, [x for found in outputs for x in found])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _GATHER) -> dist.Work:
        check_sendable("gloo", (output, input))
        one_dtype("all_gather", (input, output))
        if output.numel() != input.numel() * self.size():
            raise self.misfit(f"all_gather of {shapes([input])} into {shapes([output])}")
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
        check_sendable("gloo", inputs)
        if self.rank() == opts.rootRank:
            self._check_parts("gather", outputs[0] if outputs else [], *inputs, even=True)
        return self._run("gather", lambda: self._gloo.gather(outputs, inputs, opts), inputs, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        self.check_rank(opts.rootRank)
        check_sendable("gloo", outputs)
        if self.rank() == opts.rootRank:
            self._check_parts("scatter", inputs[0] if inputs else [], *outputs, even=True)
        given = [x for parts in inputs for x in parts]
        start = lambda: self._gloo.scatter(outputs, inputs, opts)  # noqa: E731
        return self._run("scatter", start, outputs, opts, given=given)

    def _check_parts(self, what: str, parts: Any, x: Tensor, even: bool = False) -> None:
        """Look whether there is a part for each rank, and this rank's (`even`: each) is as long as `x`."""
        check_sendable("gloo", (x, *parts))
        one_dtype(what, (x, *parts))
        if len(parts) == self.size():
            same = parts if even else [parts[self.rank()]]
            if all(part.numel() == x.numel() for part in same):
                return
        raise self.misfit(f"{what} between {shapes([x])} and {shapes(parts)}")

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = _SCATTER) -> dist.Work:
        (out,), (parts,) = outputs, inputs
        self._check_parts("reduce_scatter", parts, out)
        check_operator(opts.reduceOp, outputs)
        check_alike((out, *parts))
        own = out.view(parts[self.rank()].shape) if out.is_contiguous() else out
        return self._run(
            "reduce_scatter", lambda: self._gloo.reduce_scatter([own], inputs, opts), parts, opts
        )  # fmt: skip

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = _SCATTER
    ) -> dist.Work:
        check_sendable("gloo", (output, input))
        one_dtype("reduce_scatter", (input, output))
        check_operator(opts.reduceOp, (output,))
        if input.numel() != output.numel() * self.size():
            raise self.misfit(f"reduce_scatter of {shapes([input])} into {shapes([output])}")
        return self._run(
            "reduce_scatter", lambda: self._gloo._reduce_scatter_base(output, input, opts), [input], opts
        )  # fmt: skip

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _SCATTER
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.reduce_scatter_single(out, x, opts) for out, x in pairs], outputs)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = _EXCHANGE) -> dist.Work:
        sent, received = moved = [x.numel() for x in inputs], [x.numel() for x in outputs]
        self.check_own(*moved)
        check_sendable("gloo", (*inputs, *outputs))
        one_dtype("all_to_all", (*inputs, *outputs))
        # gloo's own takes lists of one size
        whole = torch.cat([x.reshape(-1) for x in inputs])
        found = whole.new_empty(sum(received))

        def start() -> Any:
            return self._gloo.alltoall_base(found, whole, received, sent, opts)

        def bring_home() -> list[Tensor]:
            for out, part in zip(outputs, found.split(received), strict=True):
                out.copy_(part.view(out.shape))
            return outputs

        work = self._run("all_to_all", start, inputs, opts, moved, last=bring_home)
        if isinstance(work, Call):
            work.get_future()  # brings home what came, whether somebody waits or not
        return work

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = _EXCHANGE,
    ) -> dist.Work:
        check_contiguous((output, input))
        one_dtype("all_to_all", (input, output))
        for x, rows in ((input, input_splits), (output, output_splits)):
            length = x.shape[0] if x.dim() else 1
            if (sum(rows) != length or len(rows) != self.size()) if rows else length % self.size():
                how = list(rows) or "of equal size"
                raise self.misfit(f"all_to_all of {shapes([x])} in runs {how}")
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
        self._check_message("send", tensors, to, tag)
        return self._message("send", lambda: self._gloo.send(tensors, to, tag), tensors[0], to)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> dist.Work:
        self._check_message("receive", tensors, source, tag)
        start = lambda: self._gloo.recv(tensors, source, tag)  # noqa: E731
        return self._message("recv", start, tensors[0], source)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        check_contiguous(tensors)
        self.check_tag(tag)
        return self._message(
            "recv", lambda: self._gloo.recv_anysource(tensors, tag), tensors[0], -1
        )

    def _check_message(self, what: str, tensors: Sequence[Tensor], peer: int, tag: int) -> None:
        self.check_rank(peer)
        self.check_tag(tag)
        check_contiguous(tensors)
        if peer == self.rank():
            raise ValueError(
                f"gloo has no connection from rank {peer} of group {self.group_name} to itself, on which to {what}; "
                "copy the tensor, or use backend 'shm' or 'mpi'"
            )

    def _start_coalescing(self, device: torch.device) -> None:
        """Do nothing: calls are done one by one."""

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return Several(self._ledger.under_way(), [])
