"""The mpi backend under four ranks of mpirun, started by collectives/test_mpi_backend.py (or `make test-mpi-4`)."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from conformance_misuse import MISUSES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from conformance import CHECKS, Abilities, Check
from conformance_exchanges import EXCHANGES
from conformance_refusals import REFUSALS
from exactness import far
from models import tiny, tokens
from plait.collectives import CallMismatch, PeerLost, Trace
from plait.collectives.mpi import progress, register
from plait.collectives.world import World, init
from plait.parallel import parallelize
from threads import appears

RANKS = 4
pytestmark = [
    pytest.mark.mpi(min_size=RANKS),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*process_group is None"),
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if dist.is_initialized():
        dist.destroy_process_group()
    world = init(register(), timeout_s=120)
    yield world
    world.close()


@pytest.fixture(scope="module")
def gloo(world: World) -> Any:
    return dist.new_group(backend="gloo")


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """One folder for all ranks."""
    shared = [str(tmp_path)]
    dist.broadcast_object_list(shared, 0)
    return Path(shared[0])


@pytest.mark.parametrize(
    "check", [*CHECKS, *EXCHANGES, *REFUSALS, *MISUSES], ids=lambda check: check.__name__
)
def test_conformance(world: World, check: Check) -> None:
    check(Abilities())
    dist.barrier()


# ---- what the shared checks do not reach


def strided(t: Tensor, run: int) -> Tensor:
    """The same values in runs of so many elements with holes between them: short runs are packed, long ones not."""
    wide = torch.full((t.numel() // run, 2 * run), -1).to(t.dtype)
    wide[:, :run] = t.view(-1, run)
    return wide[:, :run]


@pytest.mark.parametrize("walks", [None, True, False])
@pytest.mark.parametrize("run", [1, 16, 1024])
def test_messages_of_any_stride(
    world: World, run: int, walks: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library's table says; all by datatypes; all packed."""
    from plait.collectives.mpi.wire import Wire

    if walks is not None:
        own = walks and world.rank != 1  # one rank chooses otherwise: it is nobody else's business
        monkeypatch.setattr(Wire, "_walks", lambda self, t: own)
    after, before = (world.rank + 1) % RANKS, (world.rank - 1) % RANKS
    source = torch.arange(8192.0) + 10_000 * world.rank
    sent = dist.isend(strided(source, run), after)
    into = strided(torch.zeros(8192), run)
    dist.recv(into, before)
    sent.wait()
    assert torch.equal(into.flatten(), torch.arange(8192.0) + 10_000 * before)
    holes = into.as_strided(into.shape, into.stride(), run)
    assert bool((holes == -1).all()), "wrote between the runs"
    parts = [strided(torch.zeros(8192), run) for _ in range(RANKS)]
    dist.all_gather(parts, strided(source, run))
    for r, part in enumerate(parts):
        assert torch.equal(part.flatten(), torch.arange(8192.0) + 10_000 * r)


def test_one_description_of_equal_memory(world: World) -> None:
    from plait.collectives.mpi.strided import layout

    x = torch.empty(6, 8, 10)
    assert layout(x[:, :4]) == (160, ((6, 320),))
    assert layout(x[:, :4].reshape(6, 2, 2, 10)) == layout(x[:, :4])
    assert layout(x.transpose(0, 1)) == (40, ((8, 40), (6, 320)))
    assert layout(x[..., ::2]) == (4, ((240, 8),))


def test_who_walks_depends_on_the_library() -> None:
    from plait.collectives.mpi.strided import least_run

    assert least_run("Open MPI v5.0.11", 16 << 10) < least_run("MPICH Version: 5.0.2", 16 << 10)
    assert least_run("Open MPI v5.0.11", 1 << 20) == 0
    assert least_run("another", 1 << 20) == least_run("MPICH", 1 << 20)


@pytest.mark.parametrize("sent", [3, 600_000])
def test_a_message_of_another_length_writes_nothing(world: World, sent: int) -> None:
    room = torch.zeros(700_000)  # Open MPI by itself writes past the end of what it is given
    if world.rank == 0:
        dist.send(torch.ones(sent), 1)
        dist.send(torch.ones(4), 1)
    elif world.rank == 1:
        with pytest.raises(
            ValueError, match=f"message of {4 * sent} bytes .* the receive is for 2000000"
        ):
            dist.recv(room[:500_000], 0)
        assert not room.any()
        dist.recv(room[:4], 0)
        assert room.sum() == 4
    dist.barrier()


def test_receives_take_messages_in_the_order_of_their_calls(world: World) -> None:
    """Whoever is waited for first: of one sender and tag, and of any sender before and after."""
    if world.rank == 0:
        for i in range(12):
            dist.send(torch.tensor([float(i)]), 1, tag=i % 2)
    elif world.rank == 1:
        found = [torch.zeros(1) for _ in range(12)]
        works = [dist.irecv(x, None if i % 4 == 3 else 0, tag=i % 2) for i, x in enumerate(found)]
        for i in (11, 3, 2, 10, 0, 7, 1, 9, 4, 8, 6, 5):
            works[i].wait()
        assert [x.item() for x in found] == list(range(12))
    dist.barrier()


def test_handles_of_any_mpi_are_words() -> None:
    """MPICH's are ints below 0, which mpi4py gives as numbers above 2**63; Open MPI's are addresses."""
    from plait.collectives.mpi.swap import as_words

    words = as_words([0xFFFFFFFF84000002, 0x7F2020A58300, 4])
    assert words.tolist() == [0x84000002 - (1 << 32), 0x7F2020A58300, 4]


def test_uneven_exchange_of_strided_rows(world: World) -> None:
    assert torch.equal(*uneven_exchange(world.rank))


def uneven_exchange(rank: int) -> tuple[Tensor, Tensor]:
    """Counts of equal totals, so that swapped ones stay inside the tensors."""
    counts = [[(j - i) % RANKS + 1 for j in range(RANKS)] for i in range(RANKS)]
    total = sum(counts[0])
    rows = [torch.arange(total * 6.0).view(6, total).t() + 1000 * r for r in range(RANKS)]
    send, receive = counts[rank], [counts[r][rank] for r in range(RANKS)]
    found = torch.empty(6, total).t()
    dist.all_to_all_single(found, rows[rank], receive, send)
    return found, torch.cat([rows[r].split(counts[r])[rank] for r in range(RANKS)])


def test_average_is_rounded_once(world: World) -> None:
    value = 1.0 + torch.arange(100) / 128 + world.rank / 256
    x = value.bfloat16()
    dist.all_reduce(x, dist.ReduceOp.AVG)
    parts = [(1.0 + torch.arange(100) / 128 + r / 256).bfloat16().double() for r in range(RANKS)]
    assert torch.equal(x, (torch.stack(parts).sum(0) / RANKS).bfloat16())
    whole = torch.tensor([-7 - world.rank])
    dist.all_reduce(whole, dist.ReduceOp.AVG)
    assert whole.item() == -8  # -34 / 4, toward zero


def test_gradients_and_inference_do_not_mind(world: World) -> None:
    leaf = torch.ones(70_000, requires_grad=True)
    dist.all_reduce(leaf)
    assert bool((leaf == RANKS).all())
    with torch.inference_mode():
        x = torch.ones(70_000)
        work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert bool((x == RANKS).all())


def test_groups_of_threads(world: World) -> None:
    """Each thread has its own group; their calls interleave freely."""
    groups = [dist.new_group() for _ in range(3)]
    sums: dict[int, list[float]] = {}

    def talk(i: int) -> None:
        sums[i] = []
        for step in range(20):
            x = torch.full((1 + 40_000 * (step % 2),), float(world.rank + step))
            dist.all_reduce(x, group=groups[i])
            sums[i].append(x[-1].item())

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sums[i] for i in range(3)] == [[float(6 + 4 * step) for step in range(20)]] * 3


def test_a_destroyed_group_ends_what_is_under_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPI would wait for it: for ever, as nobody sends."""
    monkeypatch.setattr(progress, "FAREWELL_S", 5.0)  # the others may be late by more than two
    group = dist.new_group()
    dist.barrier()
    done = dist.all_reduce(torch.ones(3), group=group, async_op=True)
    begin = time.monotonic()
    waits = dist.irecv(torch.ones(3), (world.rank + 1) % world.size, group=group)
    assert done is not None
    assert waits is not None
    dist.destroy_process_group(group)
    done.wait()  # what ends is not given up
    with pytest.raises(RuntimeError, match="is closed"):
        waits.wait()
    assert time.monotonic() - begin < 100  # of a timeout of 300
    dist.barrier()


def test_what_cannot_be_is_refused_at_once(world: World) -> None:
    with pytest.raises(TypeError, match=r"BAND of torch\.float32"):
        dist.all_reduce(torch.ones(2), dist.ReduceOp.BAND)
    with pytest.raises(ValueError, match=r"all_gather_into_tensor of \[2\] into \[3\]"):
        dist.all_gather_into_tensor(torch.empty(3), torch.empty(2))
    with pytest.raises(ValueError, match="5 input rows"):
        dist.all_to_all_single(torch.empty(4), torch.empty(5))
    with pytest.raises(ValueError, match=r"all_to_all of \[4, 2\] torch.float32 into \[4\]"):
        dist.all_to_all_single(torch.empty(4), torch.empty(4, 2))
    dist.barrier()


# ---- short calls, by one kernel


@pytest.mark.parametrize(
    "rows", [1, 12, 60, 1000]
)  # of 100 bytes, for each rank: one message, pieces, one
def test_ranks_may_differ_in_whether_they_count(world: World, rows: int) -> None:
    x = torch.arange(RANKS * rows * 25.0).view(-1, 25) + world.rank
    found = torch.empty_like(x)
    counts = [rows] * RANKS if world.rank % 2 else None
    dist.all_to_all_single(found, x, counts, counts)
    own = (x - world.rank).chunk(RANKS)[world.rank]
    assert torch.equal(found, torch.cat([own + r for r in range(RANKS)]))


@pytest.mark.parametrize("length", [8, 400_000])
def test_halves_are_rounded_once(world: World, length: int) -> None:
    """256 + 1 is no bfloat16: summed in pairs, ones are lost."""
    brought = torch.full((length,), 256.0 if world.rank == 0 else 1.0, dtype=torch.bfloat16)
    x = brought.clone()
    dist.all_reduce(x)
    expected = torch.tensor(256.0 + RANKS - 1, dtype=torch.bfloat16)
    assert bool((x == expected).all())
    part = torch.empty(length // RANKS, dtype=torch.bfloat16)
    dist.reduce_scatter_tensor(part, brought)
    assert bool((part == expected).all())


def test_a_call_may_take_its_own_part_of_what_it_brings(world: World) -> None:
    for length in (5, 3000, 50_000):
        x = torch.arange(float(RANKS * length)) * (1 + world.rank)
        for place in (0, 3):  # the own part of one rank, another's of the others
            whole = x.clone()
            part = whole[place * length : (place + 1) * length]
            dist.reduce_scatter_tensor(part, whole)
            start = world.rank * length
            assert torch.equal(part, 10 * torch.arange(float(start), start + length)), length


def test_late_ranks_finish_what_the_kernel_left(world: World) -> None:
    """Who came first has waited long enough in the kernel; the rest is done by steps."""
    for late in range(RANKS):
        if world.rank == late:
            time.sleep(0.02)
        x = torch.full((700,), float(world.rank))
        dist.all_reduce(x)
        assert bool((x == 6).all())
        works = [dist.all_reduce(torch.full((n,), 1.0), async_op=True) for n in (3, 700, 3000)]
        for work in works:
            work.wait()
            assert bool((work.result()[0] == RANKS).all())


def test_a_call_goes_on_after_an_interruption(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the first moments of a call, before it is anybody's to move on: the others get what they wait for."""
    from plait.collectives.mpi import member

    def interrupted(requests: Any) -> bool:
        monkeypatch.undo()
        raise KeyboardInterrupt

    for length in (3, 700, 300_000):
        x, heard = torch.full((length,), float(world.rank)), folder / f"heard {length}"
        if world.rank == 0:
            monkeypatch.setattr(member, "complete", interrupted)
            with pytest.raises(KeyboardInterrupt):
                dist.all_reduce(x)
            heard.touch()
        else:
            assert appears(heard.exists)
            dist.all_reduce(x)
        assert appears(lambda x=x: bool((x == 6).all()))  # rank 0's goes on aside
        dist.barrier()


def test_a_group_is_closed_where_an_interruption_lost_its_place(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps: what MPI was told to do has no name any more, so nothing is sent after it."""
    from plait.collectives.mpi.reduction import Reduction

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    group, heard = dist.new_group(), folder / "heard"
    assert isinstance(group, dist.ProcessGroup)
    x = torch.full((300_000,), float(world.rank))
    if world.rank == 0:
        monkeypatch.setattr(Reduction, "fold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dist.all_reduce(x, group=group)
        monkeypatch.undo()
        with pytest.raises(
            RuntimeError, match=r"is closed: all_reduce \[300000\].* was interrupted"
        ):
            dist.all_reduce(x, group=group)
        heard.touch()
    else:
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None
        assert appears(heard.exists)
        group.set_timeout(timedelta(seconds=3))
        with pytest.raises(PeerLost, match=r"rank 0 .*all_reduce \[300000\].* was interrupted"):
            work.wait()
    dist.barrier()


def test_it_says_how_cuda_tensors_travel(world: World) -> None:
    assert dist.group.WORLD.cuda in ("direct", "staged")


# ---- traces, and the debug mode


def test_a_trace_sees_the_calls(world: World) -> None:
    with Trace() as trace:
        dist.all_reduce(torch.ones(6))
        dist.all_gather_into_tensor(torch.empty(16), torch.ones(4), async_op=True).wait()
        dist.reduce_scatter_tensor(torch.empty(3), torch.ones(12))
        dist.all_to_all_single(torch.empty(4), torch.ones(4))
        dist.broadcast(torch.ones(5), 1)
    dist.all_reduce(torch.ones(6))
    assert [(e.op, e.axis, e.payload_bytes, e.sent_bytes) for e in trace.events] == [
        ("all_reduce", "group of 4", 24, 36),
        ("all_gather", "group of 4", 16, 48),
        ("reduce_scatter", "group of 4", 48, 36),
        ("all_to_all", "group of 4", 16, 12),
        ("broadcast", "group of 4", 20, 20 * (world.rank != 0)),
    ]


@pytest.fixture
def debug() -> Iterator[None]:
    world: Any = dist.group.WORLD  # made without it
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    world.shows_calls = True
    yield
    world.shows_calls = False
    dist.set_debug_level(dist.DebugLevel.OFF)


def mistaken(first: bool) -> dict[str, tuple[Callable[[], Any], str]]:
    """Calls in which rank 0 does one thing and the others another, and what is to be said of them."""
    ones = torch.ones(8)
    uneven = [2, 1, 1, 4] if first else [2, 2, 2, 2]
    return {
        "length": (
            lambda: dist.all_reduce(torch.ones(4 if first else 5)),
            "rank 0 is in all_reduce of 4 float32 by sum, rank 1 in all_reduce of 5 float32 by sum",
        ),
        "dtype": (
            lambda: dist.broadcast(ones.double() if first else ones, 2),
            "rank 0 is in broadcast of 8 float64, root 2, rank 1 in broadcast of 8 float32, root 2",
        ),
        "op": (
            lambda: dist.all_reduce(ones, dist.ReduceOp.MAX if first else dist.ReduceOp.SUM),
            "rank 0 is in all_reduce of 8 float32 by max, rank 1 in all_reduce of 8 float32 by sum",
        ),
        "order": (
            lambda: dist.barrier() if first else dist.all_reduce(ones, async_op=True).wait(),
            "rank 0 is in barrier, rank 1 in all_reduce of 8 float32 by sum",
        ),
        "counts": (
            lambda: dist.all_to_all_single(ones.clone(), ones, [2] * 4, uneven),
            "sent [2, 1, 1, 4], received [2, 2, 2, 2]), rank 1 in all_to_all_single of float32",
        ),
    }


@pytest.mark.parametrize("mistake", ["length", "dtype", "op", "order", "counts"])
def test_the_debug_mode_shows_both_sides(world: World, debug: None, mistake: str) -> None:
    call, told = mistaken(world.rank == 0)[mistake]
    with pytest.raises(CallMismatch) as refusal:
        call()
    assert told in str(refusal.value)
    x = torch.ones(3)
    dist.all_reduce(x)  # nothing was begun: the group still works
    assert bool((x == RANKS).all())


def test_the_debug_mode_lets_right_calls_pass(world: World, debug: None) -> None:
    """Those whose sizes differ between ranks; checks that start calls out of step would wait here for ever."""
    uneven = ("gather_and", "all_gather_of", "reduce_scatter", "all_to_all", "coalesced", "objects")
    chosen = [check for check in CHECKS if check.__name__.startswith(uneven)]
    assert len(chosen) == 9
    for check in chosen:
        check(Abilities())


# ---- many calls of all kinds at once


def brought(rank: int, step: int, length: int) -> Tensor:
    return torch.full((length,), float((7 * rank + step) % 11))


def issue(kind: str, members: list[int], group: Any, step: int, length: int, me: int) -> Any:
    """Start one call; return its work, what it fills and what that must become."""
    i, ranks, options = members.index(me), len(members), {"group": group, "async_op": True}
    parts = [brought(r, step, length) for r in members]
    if kind == "all_reduce":
        x = parts[i].clone()
        return dist.all_reduce(x, **options), x, torch.stack(parts).sum(0)
    if kind == "broadcast":
        x, root = parts[i].clone(), step % ranks
        return dist.broadcast(x, members[root], **options), x, parts[root]
    if kind == "all_gather":
        x = torch.empty(ranks * length)
        return dist.all_gather_into_tensor(x, parts[i], **options), x, torch.cat(parts)
    if kind == "reduce_scatter":
        x, rows = torch.empty(length), torch.cat([parts[i] + r for r in range(ranks)])
        return dist.reduce_scatter_tensor(x, rows, **options), x, sum(parts) + ranks * i
    counts = [[(3 * a + 5 * b + step) % 7 * length for b in range(ranks)] for a in range(ranks)]
    receive = [counts[a][i] for a in range(ranks)]
    x, sent = torch.empty(sum(receive)), brought(me, step, sum(counts[i]))
    work = dist.all_to_all_single(x, sent, receive, counts[i], **options)
    come = [brought(r, step, n) for r, n in zip(members, receive, strict=True)]
    return work, x, torch.cat(come)


def test_random_calls_in_groups(world: World) -> None:
    """Ranks wait for what they issued in orders of their own; long runs were done by hand."""
    sets = [[0, 1, 2, 3], [0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 3], [1, 2, 3]]
    groups = [dist.new_group(members) for members in sets]
    draw, own = random.Random(5), random.Random(world.rank)
    kinds = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")
    under_way: list[Any] = []
    for step in range(400):
        n, kind, length = (
            draw.randrange(len(sets)),
            draw.choice(kinds),
            int(2 ** draw.uniform(0, 16)),
        )
        if world.rank in sets[n]:
            call = issue(kind, sets[n], groups[n], step, length, world.rank)
            under_way.append((kind, sets[n], length, *call))
        if draw.random() < 0.1:
            own.shuffle(under_way)
            while under_way:
                *what, work, found, expected = under_way.pop()
                work.wait()
                assert torch.equal(found, expected), (step, what)
    for *what, work, found, expected in under_way:
        work.wait()
        assert torch.equal(found, expected), what


# ---- a mutated version must fail


def test_swapped_counts_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.collectives.mpi import exchange

    true = exchange.all_to_all_single
    monkeypatch.setattr(
        exchange, "all_to_all_single", lambda p, o, t, r, s, spins: true(p, o, t, s, r, spins)
    )
    assert not torch.equal(*uneven_exchange(world.rank))
    dist.barrier()


def test_a_piece_left_out_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.collectives.mpi.reduction import Reduction
    from plait.collectives.mpi.swap import Swap

    true = Reduction._fold
    monkeypatch.setattr(Reduction, "_fold", lambda self, out, parts: true(self, out, parts[:-1]))
    whole = Swap.reduce
    monkeypatch.setattr(
        Swap, "reduce", lambda self, a, b, c, n, *by: whole(self, a, b, c, n - 4, *by)
    )
    for length in (10, 100_000):
        x = torch.ones(length)
        dist.all_reduce(x)
        assert not bool((x == RANKS).all())
    dist.barrier()


def test_a_wrong_stride_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.collectives.mpi import wire

    true = wire.layout
    monkeypatch.setattr(wire.Wire, "_walks", lambda self, t: True)
    monkeypatch.setattr(
        wire, "layout", lambda t: (true(t)[0], tuple((n, s // 2) for n, s in true(t)[1]))
    )
    parts = [strided(torch.zeros(8192), 1024) for _ in range(RANKS)]
    dist.all_gather(parts, strided(torch.arange(8192.0), 1024))
    assert not torch.equal(parts[world.rank - 1].flatten(), torch.arange(8192.0))
    dist.barrier()


# ---- those who use a backend: the same over gloo


def make_model() -> nn.Sequential:
    torch.manual_seed(7)
    layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(*layers).double()


def batch(rank: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def gradients(wrap: Callable[[nn.Module], nn.Module], rank: int) -> list[Tensor]:
    model = wrap(make_model())
    for _ in range(2):
        model(batch(rank)).square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads if g is not None]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ddp(world: World, gloo: Any) -> None:
    def wrap(group: Any) -> Callable[[nn.Module], nn.Module]:
        # small buckets, so that several all-reduces are under way in one backward pass
        return lambda m: DistributedDataParallel(m, process_group=group, bucket_cap_mb=0.001)

    close(gradients(wrap(dist.group.WORLD), world.rank), gradients(wrap(gloo), world.rank))


def test_fsdp2(world: World, gloo: Any) -> None:
    def wrap(group: Any) -> Callable[[nn.Module], nn.Module]:
        mesh = DeviceMesh.from_group(group, "cpu")

        def shard(model: nn.Module) -> nn.Module:
            for layer in model.children():
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        return shard

    close(gradients(wrap(dist.group.WORLD), world.rank), gradients(wrap(gloo), world.rank))


def test_dtensor_redistributes(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.arange(5 * 7, dtype=torch.float64).view(5, 7)
    d = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    for placements in ([Shard(1), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        d = d.redistribute(mesh, placements)
        assert torch.equal(d.full_tensor(), x)
    part = DTensor.from_local(x, mesh, [Partial(), Partial()])
    assert torch.equal(part.redistribute(mesh, [Shard(0), Replicate()]).full_tensor(), 4 * x)
    a = distribute_tensor(x, mesh["tp"], [Shard(1)])
    b = distribute_tensor(x.t().contiguous(), mesh["tp"], [Shard(0)])
    assert torch.equal((a @ b).full_tensor(), x @ x.t())


def pipeline_loss(group: Any, rank: int) -> Tensor:
    layers = list(make_model())
    stage = rank % 2
    part = nn.Sequential(*layers[:3]) if stage == 0 else nn.Sequential(*layers[3:])
    pipe = PipelineStage(part, stage, 2, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(pipe, n_microbatches=4, loss_fn=lambda y, t: (y - t).square().mean())
    target = torch.zeros(8, 4, dtype=torch.float64)
    losses: list[Tensor] = []
    if stage == 0:
        schedule.step(batch(5))
    else:
        schedule.step(target=target, losses=losses)
    weights = [p.grad for p in part.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in weights] + [x.flatten() for x in losses])


def test_pipelining(world: World) -> None:
    found = {}
    for backend in (None, "gloo"):
        pairs = [dist.new_group([0, 1], backend=backend), dist.new_group([2, 3], backend=backend)]
        found[backend] = pipeline_loss(pairs[world.rank // 2], world.rank)
    torch.testing.assert_close(found[None], found["gloo"], rtol=1e-12, atol=1e-12)


def test_checkpoint(world: World, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    x = torch.arange(50.0).view(10, 5)
    saved = {"x": distribute_tensor(x, mesh, [Shard(0)]), "step": torch.tensor(7)}
    checkpoint.save(saved, checkpoint_id=str(folder / "saved"))
    loaded = {"x": distribute_tensor(torch.zeros(10, 5), mesh, [Shard(1)]), "step": torch.tensor(0)}
    checkpoint.load(loaded, checkpoint_id=str(folder / "saved"))
    assert torch.equal(loaded["x"].full_tensor(), x)
    assert loaded["step"].item() == 7


@pytest.mark.parametrize(
    ("plan", "op"),
    [
        ("kvp2,interleave=2,chunks=3,exchange=partials tp2", "all_to_all"),  # HOP-B
        ("tp4,weave=2", "all_reduce"),
    ],
)
@torch.no_grad()
def test_plans_run_over_it(world: World, plan: str, op: str) -> None:
    """A language model reads and decodes as one process does; its groups are of this backend."""
    reference = tiny("llama")
    model = parallelize(copy.deepcopy(reference), plan)
    ids = tokens(6, 40, reference.config.vocab_size)
    model(ids[:, :5])
    with Trace() as trace:
        out = model(ids[:, :36], use_cache=True)
        last = out
        for at in range(36, 40):
            last = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
    assert far(out.logits, reference(ids[:, :36]).logits) < 1e-9
    assert far(last.logits, reference(ids).logits[:, -1:]) < 1e-9
    assert any(e.op == op and e.axis != "group of 1" for e in trace.events)


# ---- last, for it ends the world: the name that torch keeps for MPI


@pytest.mark.filterwarnings("ignore:For MPI backend")
def test_the_name_mpi_of_torch(world: World) -> None:
    dist.destroy_process_group()
    dist.init_process_group("mpi")
    assert (dist.get_rank(), dist.get_world_size()) == (world.rank, world.size)
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    x = torch.tensor([2**world.rank])
    dist.all_reduce(x, group=pairs[world.rank % 2])
    assert x.item() == (5 if world.rank % 2 == 0 else 10)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = distribute_tensor(torch.arange(8.0), mesh, [Shard(0), Shard(0)])
    assert torch.equal(whole.full_tensor(), torch.arange(8.0))
    dist.destroy_process_group()
