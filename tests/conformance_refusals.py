"""What every backend must refuse, on every rank before anything is sent, and go on afterwards; see conformance.py."""

from __future__ import annotations

import atexit
import os
import re
import signal
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conformance import Abilities, Check, rank, size


def goes_on() -> None:
    """The default group works as before."""
    x = torch.full((3,), 1.0 + rank())
    dist.all_reduce(x)
    assert x.tolist() == [size() * (size() + 1) / 2] * 3


def ranks_that_are_not_there(can: Abilities) -> None:
    x = torch.ones(3)
    calls: list[Callable[[int], object]] = [
        lambda r: dist.broadcast(x, r),
        lambda r: dist.reduce(x, r),
        lambda r: dist.send(x, r),
        lambda r: dist.recv(x, r),
        lambda r: dist.gather(x, None, dst=r),
        lambda r: dist.scatter(x, None, src=r),
    ]
    for call in calls:
        for wrong in (-1, size(), 99):
            with pytest.raises((ValueError, RuntimeError), match=rf"rank|{wrong}"):
                call(wrong)
    goes_on()


def exchanges_that_cannot_be(can: Abilities) -> None:
    n = size()
    even, own, backwards = [1] * n, [1] * n, [1] * n
    own[rank()], own[(rank() + 1) % n] = 2, 0
    backwards[0], backwards[1] = -1, 3
    for sent, received in ((own, even), (even, own), (backwards, backwards), (even[1:], even)):
        with pytest.raises((ValueError, RuntimeError)):
            dist.all_to_all_single(torch.zeros(n), torch.ones(n), received, sent)
    with pytest.raises((ValueError, RuntimeError)):
        dist.all_to_all([torch.zeros(1)] * (n - 1), [torch.ones(1)] * (n - 1))
    goes_on()


def tensors_of_no_use(can: Abilities) -> None:
    n, meta = size(), torch.ones(3, device="meta")
    for call in (
        lambda: dist.all_reduce(meta),
        lambda: dist.broadcast(meta, 0),
        lambda: dist.reduce_scatter_tensor(torch.zeros(2, dtype=torch.float64), torch.ones(2 * n)),
        lambda: dist.all_gather_into_tensor(torch.zeros(2 * n + 1), torch.ones(2)),
        lambda: dist.all_gather([torch.zeros(2)] * (n - 1), torch.ones(2)),
        lambda: dist.reduce_scatter(torch.zeros(2), [torch.ones(2)] * (n - 1)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()
    goes_on()


def dtypes_without_sums(can: Abilities) -> None:
    """The message names the dtype and says what would do; what has sums goes on."""
    for dtype in (torch.float8_e4m3fn, torch.uint16):
        x = torch.ones(3).to(dtype)
        calls: list[Callable[[], object]] = [
            lambda x=x: dist.all_reduce(x),
            lambda x=x: dist.reduce(x, 0),
            lambda x=x: dist.reduce_scatter(torch.empty_like(x), [x] * size()),
        ]
        for call in calls:
            with pytest.raises((ValueError, TypeError), match=r"convert|cast") as refusal:
                call()
            assert str(dtype).removeprefix("torch.") in str(refusal.value)
    goes_on()


def groups_that_are_gone(can: Abilities) -> None:
    group = dist.new_group(list(range(size())))
    assert isinstance(group, dist.ProcessGroup)
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="is closed"):
        group.allreduce([torch.ones(3)])
    goes_on()


def strides_are_kept_or_refused(can: Abilities) -> None:
    """Never taken for dense memory: gloo alone would sum the wrong elements."""

    def filled(x: Tensor) -> Tensor:
        dist.all_to_all_single(x, torch.full(x.shape, float(rank())))
        return x

    rows = torch.arange(float(size()))[:, None].expand(size(), 2)
    for call, wanted in (
        (summed, rows.sum(0)[0]),
        (sent_from(1), torch.tensor(1.0)),
        (filled, rows),
    ):
        whole = torch.full((2, 2 * size()), float(rank()))
        view = whole[:, ::2].t()
        if can.strided:
            assert torch.equal(call(view), wanted.expand(size(), 2))
            assert (whole[:, 1::2] == rank()).all()
        else:
            with pytest.raises(ValueError, match="contiguous"):
                call(view)
    dense = torch.full((2, 3), float(rank())).t()  # no holes: sums need no more
    assert torch.equal(summed(dense), torch.full((3, 2), float(sum(range(size())))))
    goes_on()


def parts_of_other_strides(can: Abilities) -> None:
    """A list that is reduced and scattered: torch's gloo writes a result with holes over what lies behind it."""
    numbers = torch.arange(6.0)
    for parts, stride in (
        (numbers.view(3, 2), 1),
        (numbers.view(2, 3).t(), 1),
        (numbers.view(3, 2), 3),
    ):
        whole = torch.zeros(3, 2 * stride) if stride > 1 else torch.zeros(2, 3).t()
        for out in (whole[:, ::stride], torch.zeros(3, 2)):
            alike = out.stride() == parts.stride()
            if can.strided or alike:
                dist.reduce_scatter(out, [parts] * size())
                assert torch.equal(out, parts * size())
            else:
                with pytest.raises(ValueError, match="contiguous"):
                    dist.reduce_scatter(out, [parts] * size())
        assert not whole[:, 1:stride].any()
    goes_on()


def complex_parts(can: Abilities) -> None:
    x = torch.complex(torch.arange(3.0), torch.ones(3) + rank())
    total = torch.complex(torch.arange(3.0) * size(), torch.full((3,), size() * (size() + 1) / 2))
    found = torch.empty_like(x)
    dist.reduce_scatter(found, [x] * size())
    assert torch.equal(found, total)
    with pytest.raises(ValueError, match="resolve_conj"):
        dist.reduce_scatter(found, [x.conj()] * size())
    goes_on()


def refused_on_one_rank_only(can: Abilities) -> None:
    """It has taken no part: the others wait until it comes again, with what can be sent, and nobody is out of step."""
    n, late = size(), 1
    own, every = torch.full((2,), float(rank())), torch.arange(2.0 * n) + rank()
    total = torch.full((2,), n * (n - 1) / 2)
    everyone = torch.arange(float(n)).repeat_interleave(2)
    share = (torch.arange(2.0) + 2 * rank()) * n + total
    column = (torch.arange(2.0) + 2 * rank()).repeat(n) + everyone
    calls = {
        "all_reduce": (summed, own, total),
        "broadcast": (sent_from(late), own, torch.full((2,), float(late))),
        "all_gather": (in_parts(dist.all_gather), own, everyone),
        "all_gather, whole": (whole(2 * n, dist.all_gather_into_tensor), own, everyone),
        "reduce_scatter": (
            whole(2, lambda out, x: dist.reduce_scatter(out, chunks(x))), every, share
        ),
        "reduce_scatter, whole": (whole(2, dist.reduce_scatter_tensor), every, share),
        "all_to_all": (
            in_parts(lambda parts, x: dist.all_to_all(parts, chunks(x))), every, column
        ),
        "all_to_all, whole": (whole(2 * n, dist.all_to_all_single), every, column),
    }  # fmt: skip
    for name, (call, brought, wanted) in calls.items():
        if rank() == late:
            with pytest.raises(ValueError, match="resolve_neg"):
                call(torch._neg_view(brought.clone()))
        assert torch.equal(call(brought.clone()), wanted), name
    goes_on()


def summed(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def sent_from(root: int) -> Callable[[Tensor], Tensor]:
    def broadcast(x: Tensor) -> Tensor:
        dist.broadcast(x, root)
        return x

    return broadcast


def whole(length: int, call: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor], Tensor]:
    """What a call puts into a tensor."""

    def run(x: Tensor) -> Tensor:
        found = torch.zeros(length)
        call(found, x)
        return found

    return run


def in_parts(call: Callable[[list[Tensor], Tensor], object]) -> Callable[[Tensor], Tensor]:
    """What it puts into a tensor of two for each rank."""

    def run(x: Tensor) -> Tensor:
        parts = [torch.zeros(2) for _ in range(size())]
        call(parts, x)
        return torch.cat(parts)

    return run


def chunks(x: Tensor) -> list[Tensor]:
    return list(x.chunk(size()))


def exchanges_in_place(can: Abilities) -> None:
    for length in (1, 30_000):
        x = torch.arange(float(size() * length)) + 1000 * rank()
        wanted = torch.empty_like(x)
        dist.all_to_all_single(wanted, x.clone())
        dist.all_to_all_single(x, x)
        assert torch.equal(x, wanted)


def what_follows_a_call_may_call(can: Abilities) -> None:
    """A future's callback is run by whoever ends the work, who must not hold what the callback needs."""
    for asynchronous in (False, True):
        work = dist.all_reduce(torch.ones(3), async_op=True)
        assert work is not None

        def again(
            done: torch.futures.Future, first: dist.Work = work, later: bool = asynchronous
        ) -> Tensor:
            (x,) = done.value()
            assert first.get_future().done()
            work = dist.all_reduce(x, async_op=later)
            if work is not None:
                work.wait()
            return x

        assert work.get_future().then(again).wait().tolist() == [size() ** 2] * 3
    goes_on()


def a_fork_is_no_rank(can: Abilities) -> None:
    """As a DataLoader's worker: it may not send, and its end is not the rank's."""
    dist.barrier()
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(60)  # a hang here is an end by SIGALRM
        said = []
        for call in (goes_on, lambda: dist.isend(torch.ones(2), (rank() + 1) % size())):
            try:
                call()
            except RuntimeError as error:
                said.append(str(error))
        os.write(writing, "\n".join(said).encode())
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        os._exit(7)
    os.close(writing)
    with os.fdopen(reading) as words:
        said = words.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(said) == 2
    assert all(re.search("of which this one is a fork: it is no rank", line) for line in said)
    goes_on()


REFUSALS: Sequence[Check] = (
    ranks_that_are_not_there,
    exchanges_that_cannot_be,
    tensors_of_no_use,
    dtypes_without_sums,
    groups_that_are_gone,
    strides_are_kept_or_refused,
    parts_of_other_strides,
    complex_parts,
    refused_on_one_rank_only,
    exchanges_in_place,
    what_follows_a_call_may_call,
    a_fork_is_no_rank,
)
