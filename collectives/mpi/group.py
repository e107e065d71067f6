"""`MPIGroup`: a c10d process group over MPI communicators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from ..python_group import by_rank, elements, listed, shapes
from ..work import Several
from . import exchange, folds
from .arrival import receive
from .member import Member
from .peers import Steps, barrier, together
from .reduction import one_dtype, reduction
from .swap import SPINS

_SCATTER = dist.ReduceScatterOptions()


class MPIGroup(Member):
    """A group of ranks; c10d finds its methods by name, those of torch 2.11 and those of torch 2.13."""

    # ---- reductions

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        opts = dist.AllreduceOptions() if opts is None else opts
        (t,) = tensors = listed(tensors)
        by = reduction(hash(opts.reduceOp), t.dtype)
        return self._run(
            "all_reduce", tensors, folds.all_reduce(self.peers, t, by, _spins(opts)), opts
        )

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> dist.Work:
        op = hash(opts.reduceOp)
        steps = [folds.all_reduce(self.peers, t, reduction(op, t.dtype)) for t in tensors]
        return self._run("all_reduce_coalesced", list(tensors), together(steps, tensors), opts)

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        (t,) = listed(tensors)
        self.check_rank(opts.rootRank)
        by = reduction(hash(opts.reduceOp), t.dtype)
        return self._run("reduce", [t], folds.reduce(self.peers, t, by, opts.rootRank), opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = _SCATTER) -> dist.Work:
        outputs = listed(outputs)
        lists = inputs if isinstance(inputs[0], (list, tuple)) else [inputs]
        op = hash(opts.reduceOp)
        for out, parts in zip(outputs, lists, strict=True):
            if len(parts) != self.size() or parts[self._rank].numel() != out.numel():
                raise self.misfit(f"reduce_scatter of {shapes(parts)} into {shapes([out])}")
            one_dtype(out, parts)
        steps = [
            folds.reduce_scatter(self.peers, o, i, reduction(op, o.dtype))
            for o, i in zip(outputs, lists, strict=True)
        ]
        brought = [t for parts in lists for t in parts]
        moved = [elements(p) for p in zip(*lists, strict=True)], [elements(outputs)] * self.size()
        whole = together(steps, [*outputs, *brought])
        return self._run("reduce_scatter", outputs, whole, opts, None, brought, moved)

    def reduce_scatter_single(self, out: Tensor, t: Tensor, opts: Any = _SCATTER) -> dist.Work:
        steps = self._reduce_scatter_steps(out, t, hash(opts.reduceOp), _spins(opts))
        return self._run("reduce_scatter", [out], steps, opts, None, [t])

    _reduce_scatter_base = reduce_scatter_single  # pyright: ignore[reportAssignmentType]

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _SCATTER
    ) -> dist.Work:
        op, pairs = hash(opts.reduceOp), zip(outputs, inputs, strict=True)
        steps = [self._reduce_scatter_steps(*pair, op) for pair in pairs]
        whole = together(steps, [*outputs, *inputs])
        return self._run("reduce_scatter", list(outputs), whole, opts, brought=inputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # pyright: ignore[reportAssignmentType]

    def _reduce_scatter_steps(self, out: Tensor, t: Tensor, op: int, spins: int = 0) -> Steps:
        if t.numel() != out.numel() * self.size():
            raise self.misfit(f"reduce_scatter_tensor of {shapes([t])} into {shapes([out])}")
        one_dtype(out, [t])
        by = reduction(op, out.dtype)
        return folds.reduce_scatter_single(self.peers, out, t, by, spins)

    # ---- moving

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        tensors = listed(tensors)
        self.check_rank(opts.rootRank)
        steps = [exchange.broadcast(self.peers, t, opts.rootRank) for t in tensors]
        return self._run("broadcast", tensors, together(steps, tensors), opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        inputs = listed(inputs)
        for outs, t in zip(outputs, inputs, strict=True):
            if len(outs) != self.size() or outs[self._rank].numel() != t.numel():
                raise self.misfit(f"all_gather of {shapes([t])} into {shapes(outs)}")
        pairs = zip(outputs, inputs, strict=True)
        steps = [exchange.all_gather(self.peers, o, t) for o, t in pairs]
        flat = [out for outs in outputs for out in outs]
        gathered = [elements(o) for o in zip(*outputs, strict=True)]
        moved = [elements(inputs)] * self.size(), gathered
        return self._run(
            "all_gather", flat, together(steps, [*flat, *inputs]), opts, None, inputs, moved
        )

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        # c10d lists these by rank, then by tensor
        return self.allgather([list(outs) for outs in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, out: Tensor, t: Tensor, opts: Any = None) -> dist.Work:
        self._check_gather(out, t)
        steps = exchange.all_gather_single(self.peers, out, t, _spins(opts))
        return self._run("all_gather_into_tensor", [out], steps, opts, None, [t])

    _allgather_base = all_gather_single  # pyright: ignore[reportAssignmentType]

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        for out, t in zip(outputs, inputs, strict=True):
            self._check_gather(out, t)
        pairs = zip(outputs, inputs, strict=True)
        steps = [exchange.all_gather_single(self.peers, o, t) for o, t in pairs]
        whole = together(steps, [*outputs, *inputs])
        return self._run("all_gather_into_tensor", list(outputs), whole, opts, None, inputs)

    def _check_gather(self, out: Tensor, t: Tensor) -> None:
        if out.numel() != t.numel() * self.size() or out.dtype != t.dtype:
            raise self.misfit(f"all_gather_into_tensor of {shapes([t])} into {shapes([out])}")

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # pyright: ignore[reportAssignmentType]

    def all_to_all_single(
        self, out: Tensor, t: Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> dist.Work:
        shape, even = t.shape, not (receive or send)
        alike = even and out.shape == shape and out.dtype == t.dtype
        if not alike or (shape[0] if shape else 1) % len(self.ranks):
            self._check_exchange(out, t, receive, send)
        steps = exchange.all_to_all_single(self.peers, out, t, receive, send, _spins(opts))
        if even and not self.shows_calls:  # equal runs are of interest to nobody else
            return self._run("all_to_all_single", [out], steps, opts, None, [t])
        moved = by_rank(t, send, self.size()), by_rank(out, receive, self.size())
        self.check_own(*moved)
        return self._run("all_to_all_single", [out], steps, opts, None, [t], moved)

    alltoall_base = all_to_all_single  # pyright: ignore[reportAssignmentType]

    def _check_exchange(
        self, out: Tensor, t: Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> None:
        for x, runs, what in ((t, send, "input"), (out, receive, "output")):
            rows, ranks = x.shape[0] if x.dim() else 1, len(self.ranks)
            if (sum(runs) != rows or len(runs) != ranks) if runs else rows % ranks:
                how = list(runs) or "of equal size"
                raise self.misfit(f"all_to_all of {rows} {what} rows in runs {how}")
        if out.dtype != t.dtype or not (send or receive or out.numel() == t.numel()):
            raise self.misfit(
                f"all_to_all of {shapes([t])} {t.dtype} into {shapes([out])} {out.dtype}"
            )

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
            raise self.misfit(f"gather into {len(outs)} tensors")
        steps = exchange.gather(self.peers, outs, t, opts.rootRank)
        sent = [t.numel() * (r == opts.rootRank) for r in range(self.size())]
        moved = sent, [out.numel() for out in outs] or [0] * self.size()
        return self._run("gather", list(outs) or [t], steps, opts, None, [t], moved)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (out,), parts = listed(outputs), inputs[0] if inputs else []
        self.check_rank(opts.rootRank)
        if self._rank == opts.rootRank and len(parts) != self.size():
            raise self.misfit(f"scatter of {len(parts)} tensors")
        steps = exchange.scatter(self.peers, out, parts, opts.rootRank)
        received = [out.numel() * (r == opts.rootRank) for r in range(self.size())]
        moved = [t.numel() for t in parts] or [0] * self.size(), received
        return self._run("scatter", [out], steps, opts, None, parts, moved)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._run("barrier", [], barrier(self.peers), opts)

    # ---- point to point

    def send(self, tensors: Any, to: int, tag: int) -> dist.Work:
        (t,) = listed(tensors)
        self.check_rank(to)
        self.check_tag(tag)
        return self._run("send", [t], exchange.send(self.peers, t, to, tag), peer=to)

    def recv(self, tensors: Any, source: int, tag: int) -> dist.Work:
        self.check_rank(source)
        self.check_tag(tag)
        return self._receive(tensors, source, tag)

    def _receive(self, tensors: Any, source: int, tag: int) -> dist.Work:
        (t,) = listed(tensors)
        return self._run("recv", [t], receive(self.peers, t, source, tag), peer=source)

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        return self._receive(tensors, MPI.ANY_SOURCE, tag)

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        works, self._coalescing = self._coalescing or [], None
        return Several(works)


def _spins(opts: Any) -> int:
    """How long the first step may wait: not at all if the caller does not."""
    return 0 if opts is None or opts.asyncOp else SPINS
