"""Calls that every rank makes wrongly: all refuse them with words of their own, send nothing, and go on.

A table of them, for `conformance.run_all`. What only one rank gets wrong the others cannot see: it is for them a rank
that has not come.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from conformance import Abilities, Check, rank, size
from conformance_refusals import goes_on

Op = dist.ReduceOp
Call = Callable[[], object]
Row = tuple[str, Call, str]  # what is wrong, the call, what its refusal says
# a line of C++, or of Python's about itself: no words for who called
RAW = re.compile(r"\.cpp|Check failed|unpack|object at 0x|np\.int64|index out of range|aten::")
FITS = "does not fit|none may be below 0|same number|must be"
DTYPE = "dtype"
NO_MEMORY = "no memory to send|cannot be sent|resolve_neg"


def ones(length: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(length).to(dtype)


def room(length: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(length, dtype=dtype) for _ in range(size())]


def lengths_that_do_not_fit() -> Iterator[Row]:
    n, gather, exchange = size(), dist.all_gather, dist.all_to_all_single
    yield "no output", lambda: gather([], ones()), FITS
    yield "too few outputs", lambda: gather(room()[1:], ones()), FITS
    yield "longer outputs", lambda: gather(room(4), ones()), FITS
    yield "a short whole", lambda: dist.all_gather_into_tensor(torch.zeros(3 * n - 1), ones()), FITS
    yield "no parts", lambda: dist.reduce_scatter(ones(), []), FITS
    yield "too few parts", lambda: dist.reduce_scatter(ones(), room()[1:]), FITS
    yield "a longer output", lambda: dist.reduce_scatter(ones(5), room(2)), FITS
    yield "a long whole", lambda: dist.reduce_scatter_tensor(ones(2), ones(2 * n + 1)), FITS
    yield "nothing to exchange", lambda: dist.all_to_all([], []), FITS
    yield "too few to exchange", lambda: dist.all_to_all(room()[1:], room()[1:]), FITS
    yield "a longer own part", lambda: dist.all_to_all(room(4), room()), FITS
    yield "rows left over", lambda: exchange(ones(n + 1), ones(n + 1)), FITS
    yield "twice the room", lambda: exchange(ones(2 * n), ones(n)), FITS
    for runs in ([-1, 3] + [1] * (n - 2), [2] + [1] * (n - 1), [2] + [1] * (n - 2)):
        yield f"runs {runs}", lambda runs=runs: exchange(ones(n), ones(n), runs, runs), FITS
    group = dist.group.WORLD
    assert group is not None
    short = [[torch.zeros(3), torch.zeros(2)] for _ in range(n - 1)]
    yield "short lists", lambda: group.allgather_coalesced(short, [ones(), ones(2)]), FITS


def dtypes_that_differ() -> Iterator[Row]:
    n, other = size(), torch.int32
    mixed = [*room()[1:], torch.zeros(3, dtype=other)]
    yield "gathered", lambda: dist.all_gather(room(3, other), ones()), DTYPE
    yield "gathered into some", lambda: dist.all_gather(mixed, ones()), DTYPE
    yield (
        "whole",
        lambda: dist.all_gather_into_tensor(torch.zeros(3 * n, dtype=other), ones()),
        f"{DTYPE}|fit",
    )
    yield "scattered", lambda: dist.reduce_scatter(ones(), room(3, other)), DTYPE
    yield "scattered some", lambda: dist.reduce_scatter(ones(), mixed), DTYPE
    yield "scattered whole", lambda: dist.reduce_scatter_tensor(ones(2, other), ones(2 * n)), DTYPE
    yield "exchanged", lambda: dist.all_to_all(room(3, other), room()), DTYPE
    yield "exchanged some", lambda: dist.all_to_all(room(), mixed), DTYPE
    yield "exchanged whole", lambda: dist.all_to_all_single(ones(n, other), ones(n)), DTYPE


def operators_without_meaning() -> Iterator[Row]:
    n = size()
    cases = [
        (torch.float32, Op.BAND), (torch.bfloat16, Op.BXOR), (torch.float64, Op.BOR),
        (torch.complex64, Op.MIN), (torch.complex64, Op.BAND), (torch.complex128, Op.MAX),
        (torch.float8_e5m2, Op.SUM), (torch.float32, dist._make_nccl_premul_sum(2.0)),
    ]  # fmt: skip
    said = "not defined|has no|cannot|whole numbers|does not support|knows"
    for dtype, op in cases:
        name = f"{dtype}"
        yield f"all_reduce of {name}", lambda d=dtype, o=op: dist.all_reduce(ones(3, d), o), said
        yield f"reduce of {name}", lambda d=dtype, o=op: dist.reduce(ones(3, d), 0, o), said
        yield (
            f"reduce_scatter of {name}",
            lambda d=dtype, o=op: dist.reduce_scatter(ones(3, d), room(3, d), o),
            said,
        )
        yield (
            f"reduce_scatter_tensor of {name}",
            lambda d=dtype, o=op: dist.reduce_scatter_tensor(ones(3, d), ones(3 * n, d), o),
            said,
        )


def tensors_without_memory() -> Iterator[Row]:
    to = (rank() + 1) % size()
    negated = torch.complex(ones(), ones()).conj().imag
    with warnings.catch_warnings(action="ignore"):  # torch's, of a beta
        rows = torch.ones(3, 1).to_sparse_csr()
    tensors = [ones().to("meta"), ones().to_sparse(), rows, negated]
    for x in tensors:
        name = f"{x.device} {x.layout}"
        calls: dict[str, Call] = {
            "broadcast": lambda x=x: dist.broadcast(x, 0),
            "reduce": lambda x=x: dist.reduce(x, 0),
            "all_gather": lambda x=x: dist.all_gather(room(), x),
            "all_gather into": lambda x=x: dist.all_gather([x] * size(), ones()),
            "gather": lambda x=x: dist.gather(x, room() if rank() == 0 else None),
            "scatter": lambda x=x: dist.scatter(x, room() if rank() == 0 else None),
            "reduce_scatter": lambda x=x: dist.reduce_scatter(ones(), [x] * size()),
            "all_to_all": lambda x=x: dist.all_to_all(room(), [x] * size()),
            "all_to_all into": lambda x=x: dist.all_to_all([x] * size(), room()),
            "isend": lambda x=x: dist.isend(x, to),
            "irecv": lambda x=x: dist.irecv(x, to),
        }
        if x.layout is not torch.sparse_coo:  # which gloo adds
            calls["all_reduce"] = lambda x=x: dist.all_reduce(x)
        for call, make in calls.items():
            yield f"{call} of {name}", make, NO_MEMORY


def who_and_what(can: Abilities) -> Iterator[Row]:
    to, nobody = (rank() + 1) % size(), "of type"
    yield "None", lambda: dist.all_reduce(None), nobody
    yield "a list", lambda: dist.all_reduce([ones()]), nobody
    yield "no list", lambda: dist.reduce_scatter(ones(), None), nobody
    yield "sent None", lambda: dist.send(None, to), nobody
    yield "sent with tag -1", lambda: dist.isend(ones(), to, tag=-1), "tag -1"
    yield "received with tag -1", lambda: dist.irecv(ones(), to, tag=-1), "tag -1"


def refused(rows: Iterator[Row]) -> None:
    for what, call, said in rows:
        print("asked for:", what, flush=True)  # shown if it is not refused
        with pytest.raises((ValueError, TypeError, RuntimeError)) as refusal:
            call()
        words = str(refusal.value)
        assert not RAW.search(words), (what, words)
        assert re.search(said, words), (what, words)
        goes_on()


def lengths_that_do_not_fit_are_refused(can: Abilities) -> None:
    refused(lengths_that_do_not_fit())


def dtypes_that_differ_are_refused(can: Abilities) -> None:
    refused(dtypes_that_differ())


def operators_without_meaning_are_refused(can: Abilities) -> None:
    refused(operators_without_meaning())


def tensors_without_memory_are_refused(can: Abilities) -> None:
    refused(tensors_without_memory())


def wrong_arguments_are_refused(can: Abilities) -> None:
    refused(who_and_what(can))


def a_right_call_is_no_misuse(can: Abilities) -> None:
    """The negative control."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(iter([("right", lambda: dist.all_gather(room(), ones()), FITS)]))
    with pytest.raises(AssertionError, match="Check failed"):
        refused(iter([("raw", raw, "")]))


def raw() -> None:
    raise RuntimeError("[F ProcessGroupGloo.cpp:2216] Check failed: outputs[0].sizes() (5 vs. 2)")


def groups_of_others(can: Abilities) -> None:
    """A rank that is not in a group, and a group's root that is not."""
    pair = dist.new_group([0, 1])
    if rank() > 1:
        assert pair == dist.GroupMember.NON_GROUP_MEMBER
    else:
        for call in (
            lambda: dist.broadcast(ones(), 2, group=pair),
            lambda: dist.send(ones(), 3, group=pair),
            lambda: dist.broadcast(ones(), group=pair, group_src=2),
        ):
            with pytest.raises((ValueError, RuntimeError), match=r"(?i)rank"):
                call()
        x = ones()
        dist.all_reduce(x, group=pair)
        assert x.tolist() == [2.0] * 3
        dist.destroy_process_group(pair)
    goes_on()


def wrappers_are_no_tensors(can: Abilities) -> None:
    """A DTensor has its rank's part inside; a collective takes that."""
    x = DTensor.from_local(ones(), init_device_mesh("cpu", (size(),)), [Replicate()])
    n = size()
    calls: dict[str, Call] = {
        "all_reduce": lambda: dist.all_reduce(x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "all_gather": lambda: dist.all_gather(room(), x),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.zeros(3 * n), x),
        "all_to_all": lambda: dist.all_to_all(room(), [x] * n),
        "isend": lambda: dist.isend(x, (rank() + 1) % n),
    }
    refused((name, call, NO_MEMORY) for name, call in calls.items())


MISUSES: tuple[Check, ...] = (
    lengths_that_do_not_fit_are_refused,
    dtypes_that_differ_are_refused,
    operators_without_meaning_are_refused,
    tensors_without_memory_are_refused,
    wrong_arguments_are_refused,
    a_right_call_is_no_misuse,
    groups_of_others,
    wrappers_are_no_tensors,
)
