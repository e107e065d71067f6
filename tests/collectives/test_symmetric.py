"""Memory that all ranks have mapped: routes, handles, closing, and a failure on one rank that all of them hear of."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shared_driver import SharedDriver

from plait.collectives import fused, peer_norm, shm, symmetric
from plait.collectives.errors import PeerMemoryError
from plait.collectives.norm_schedule import (
    MEASURED,
    MOST_BYTES,
    ONE,
    SWITCH,
    TWO,
    choose,
    steps_for,
)
from plait.collectives.peer_norm import PeerNorm
from plait.collectives.peer_partials import PeerPartials
from plait.collectives.trace import Trace
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.merge import merge_states_reference
from plait.cuda_kernels.quantised import Quantised
from world import current_rank, run_world

SIZE = 4096
LARGE = 1 << 32  # bytes that nobody touches


def mapped(folder: str, fails: str, devices: str) -> tuple[str, str, list[str], int]:
    """Map, write to every rank's memory, read one's own, and close; or give the error and what is left."""
    driver, group = SharedDriver(folder, fails, devices), dist.group.WORLD
    assert group is not None
    try:
        buffer = symmetric.symmetric_buffer(SIZE, group, driver)
    except PeerMemoryError as error:
        return str(error), "", driver.log, len(driver.maps)
    for rank, address in enumerate(buffer.addresses):
        driver.view(address, SIZE)[4 * group.rank()] = 10 * rank + group.rank() + 1
    dist.barrier()
    got = buffer.own[: 4 * group.size() : 4].tolist()
    assert got == [10 * group.rank() + r + 1 for r in range(group.size())]
    dist.barrier()
    buffer.close()
    buffer.close()  # again: nothing
    return buffer.route, buffer.passed, driver.log, len(driver.maps)


def test_torch_symmetric_memory_is_taken_first(tmp_path: Path) -> None:
    for route, passed, log, _ in run_world(mapped, 3, str(tmp_path), "", "abc"):
        assert (route, passed) == (symmetric.TORCH, "")
        assert log == ["card", "begin_torch", "join_torch", "wait"]


@pytest.mark.parametrize("fails", ["begin_torch", "join_torch"])
def test_where_torch_fails_on_one_rank_all_take_ipc(fails: str, tmp_path: Path) -> None:
    for rank, (route, passed, log, left) in enumerate(
        run_world(mapped, 2, str(tmp_path), fails, "ab")
    ):
        assert route == symmetric.IPC
        assert passed == f"{symmetric.TORCH}: rank 1: {fails} was refused"
        ipc = log[log.index("allocate") :]
        assert ipc == ["allocate", "export", "open", "wait", "close", "free"], rank
        assert left == (0 if fails == "begin_torch" or rank else 2)  # rank 0 had joined torch's


def test_two_ranks_of_one_device_take_ipc(tmp_path: Path) -> None:
    for route, passed, log, left in run_world(mapped, 2, str(tmp_path), "", "aa"):
        assert (route, passed) == (
            symmetric.IPC,
            f"{symmetric.TORCH}: several ranks share a device",
        )
        assert log == ["card", "allocate", "export", "open", "wait", "close", "free"]
        assert left == 0


@pytest.mark.parametrize("fails", ["card", "objection", "allocate", "export", "open"])
def test_a_failure_on_one_rank_is_every_ranks(fails: str, tmp_path: Path) -> None:
    results = run_world(mapped, 3, str(tmp_path), fails, "aaa")
    assert len({error for error, *_ in results}) == 1
    told = "no peer access" if fails == "objection" else f"{fails} was refused"
    assert f"rank 1: {told}" in results[0][0]
    assert all(left == 0 for *_, left in results), "memory is left allocated"
    assert not list(tmp_path.iterdir())


def refusal(group: dist.ProcessGroup, driver: SharedDriver) -> str:
    with pytest.raises(PeerMemoryError) as caught:
        symmetric.symmetric_buffer(SIZE, group, driver)
    return str(caught.value)


def with_much_to_say(folder: str) -> str:
    """The error where rank 1's device has a problem of many lines, letters that JSON writes with six, and length."""
    driver, group = SharedDriver(folder), dist.group.WORLD
    assert group is not None
    if group.rank():
        known = driver.card()
        driver.card = lambda: known | {"problem": '\N{SNOWMAN}\x1b"' * 500 + "\nmore"}
    return refusal(group, driver)


def test_a_problem_of_any_length_is_told(tmp_path: Path) -> None:
    first, second = run_world(with_much_to_say, 2, str(tmp_path))
    assert first == second
    assert 'rank 1: ??"??"' in first


def with_a_device_that_fails_when_asked(folder: str) -> str:
    driver, group = SharedDriver(folder), dist.group.WORLD
    assert group is not None

    def fails(uuid: str) -> str:
        raise RuntimeError(f"the device of {uuid} has fallen off the bus")

    if group.rank():
        driver.objection = fails
    return refusal(group, driver)


def test_an_error_of_one_device_is_told(tmp_path: Path) -> None:
    first, second = run_world(with_a_device_that_fails_when_asked, 2, str(tmp_path))
    assert first == second
    assert "rank 1: the device of a has fallen off the bus" in first


def test_refused_before_anything_is_allocated() -> None:
    one: dict[str, Any] = {"size": 1, "host": "a/1", "problem": "", "uuid": "x"}
    assert symmetric._objection([one, one]) == ""
    assert "2 hosts (a, b)" in symmetric._objection([one, one | {"host": "b/1"}])
    assert "different sizes: [1, 2]" in symmetric._objection([one, one | {"size": 2}])
    bad = one | {"problem": "numba-cuda is not installed; type: pip install 'plait[cuda]'"}
    assert symmetric._objection([bad, one, bad]).startswith(
        "rank 0, 2: numba-cuda is not installed"
    )


def without_a_device() -> str:
    with pytest.raises(PeerMemoryError) as caught:
        symmetric.symmetric_empty((4,))
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_an_error_on_every_rank() -> None:
    first, second = run_world(without_a_device, 2)
    assert first == second
    assert "rank 0, 1" in first
    assert "give a group of backend 'shm'" in first


def where_one_cannot_map_the_others() -> tuple[str, float]:
    """Rank 1 has addresses for its own memory and no more; the error, and a sum afterwards."""
    shm.register()
    group = dist.new_group(backend="shm")
    dist.barrier(group)  # threads and kernels have what they need
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    if current_rank() == 1:
        limit = pages * resource.getpagesize() + 3 * LARGE // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    with pytest.raises(PeerMemoryError) as caught:
        shm.symmetric_empty((LARGE,), torch.uint8, group)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    return str(caught.value), x[0].item()


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY,
    reason="has a limit already",
)
def test_shm_that_one_rank_cannot_map_is_refused_on_all() -> None:
    results = run_world(where_one_cannot_map_the_others, 3)
    assert len(set(results)) == 1
    error, total = results[0]
    assert "rank 1 cannot map the other ranks' memory: Cannot allocate memory" in error
    assert total == 3.0


def on_the_cpu(folder: str) -> None:
    shm.register()
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=2)
    x = symmetric.symmetric_empty((3, 4)).fill_(dist.get_rank() + 1)
    dist.all_reduce(x)
    assert (x == 3).all()
    dist.destroy_process_group()


def test_on_the_cpu_it_is_shared_memory(tmp_path: Path) -> None:
    run_world(on_the_cpu, 2, str(tmp_path), backend=None)


# ---- the fused norm over such memory


ROWS, HIDDEN, EPS = 5, 72, 1e-5


def norms(folder: str, devices: str) -> str:
    """Every schedule, dtype and output through the public function, against the unfused way."""
    group = dist.group.WORLD
    assert group is not None
    driver, world = SharedDriver(folder, "", devices), group.size()
    layout = Layout(world, ROWS * (HIDDEN * 4 + 16), blocks=4)
    buffer = symmetric.symmetric_buffer(layout.total_bytes, group, driver)
    driver.regions = [(address, buffer.size) for address in buffer.addresses]
    wide = ((ROWS * HIDDEN * 2, ONE), (1 << 20, TWO))
    norm = PeerNorm(buffer, layout, wide)
    g = torch.Generator().manual_seed(3)
    xs = torch.randn(world, ROWS, HIDDEN, generator=g)
    residual = torch.randn(ROWS, HIDDEN, generator=g)
    weight, bias = torch.randn(2, HIDDEN, generator=g)
    taken = []
    for dtype, rows, given_bias, stored in (
        (torch.bfloat16, ROWS, None, None),
        (torch.float32, ROWS, bias, None),
        (torch.float32, 1, None, torch.float8_e4m3fn),
    ):
        inputs = [t.to(dtype) for t in (xs[group.rank(), :rows], residual[:rows], weight)]
        b = None if given_bias is None else given_bias.to(dtype)
        taken.append(norm.schedule(*inputs, b, stored))
        with Trace() as trace:
            done = norm(*inputs, b, EPS, stored)
        assert done is not None
        assert trace.counts() == {("all_reduce", f"group of {world}"): 1}
        normed, total = done
        want = fused._compute(*inputs, b, EPS, group, stored, keep=True)
        coarse = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(total, want[1], rtol=coarse, atol=coarse)
        if stored is not None:
            assert isinstance(normed, Quantised)
            torch.testing.assert_close(normed.scales, want[0].scales, rtol=1e-4, atol=0)
            normed, want = normed.dequantised(), (want[0].dequantised(), want[1])
            coarse = 2.0**-3
        torch.testing.assert_close(normed, want[0], rtol=coarse, atol=4 * coarse)
    assert norm.schedule(*inputs, None, torch.int8) is None
    odd = [t[..., :70].bfloat16() for t in inputs]
    assert norm.schedule(*odd, None, None) is None  # rows of no whole 16 bytes
    buffer.close()
    return json.dumps(taken)


@pytest.mark.parametrize(("world", "devices"), [(2, "aa"), (3, "abc")])
def test_the_fused_norm_is_the_unfused_one(world: int, devices: str, tmp_path: Path) -> None:
    results = run_world(norms, world, str(tmp_path), devices, timeout=120)
    assert results == [json.dumps([ONE, TWO, ONE])] * world


def norm_by_the_switch(folder: str) -> None:
    group = dist.group.WORLD
    assert group is not None
    driver = SharedDriver(folder)
    layout = Layout(2, ROWS * (HIDDEN * 2 + 16), blocks=4)
    buffer = symmetric.symmetric_buffer(layout.total_bytes, group, driver)
    assert buffer.multicast
    norm = PeerNorm(buffer, layout, ((1 << 20, SWITCH),))
    x = torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN).bfloat16() / 100
    weight = torch.ones(HIDDEN).bfloat16()
    done = norm(x, x, weight, None, EPS, None)
    assert done is not None
    torch.testing.assert_close(done[1], x * 3, rtol=2**-6, atol=2**-6)
    assert norm.schedule(x.float(), x.float(), weight.float(), None, None) is None  # no room
    buffer.close()


def test_a_switch_adds_where_there_is_one(tmp_path: Path) -> None:
    run_world(norm_by_the_switch, 2, str(tmp_path))


def test_the_rule_and_the_tables() -> None:
    assert MEASURED == {}
    for ranks in range(2, 17):
        small, large = steps_for("anything", ranks, False)
        assert small[1] == ONE
        assert large == (MOST_BYTES, TWO)
        assert steps_for("anything", ranks, True)[1] == (ranks * MOST_BYTES // 2, SWITCH)
    assert choose(steps_for("anything", 8, False), 100 << 10) == ONE
    assert choose(steps_for("anything", 8, False), 1 << 20) == TWO
    assert choose(steps_for("anything", 8, False), 1 << 30) is None


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise PeerMemoryError("ranks cannot map each other's memory: rank 1: no peer access")

    class Group:
        def size(self) -> int:
            return 2

    group: Any = Group()
    assert peer_norm.how(group) == "not called yet"
    monkeypatch.setattr(peer_norm, "symmetric_buffer", refuses)
    monkeypatch.setitem(peer_norm.norms.made, group, peer_norm.norms.tried(group))
    assert peer_norm.how(group).startswith("all-reduce, then add_rms_norm: ranks cannot map")
    assert peer_norm.norms.of(group, torch.zeros(1)) is None


# ---- Helix's exchange over such memory


def partials(folder: str, fp8: bool) -> None:
    """Chunks that are not alike, with and without sinks, step after step, against what all ranks' partials give."""
    group = dist.group.WORLD
    assert group is not None
    driver, world, heads, width = SharedDriver(folder, devices="aaa"), group.size(), 2, 24
    rows = [1, 2]
    layout = Layout(world, 4096, blocks=4, sets=2)
    buffer = symmetric.symmetric_buffer(layout.total_bytes, group, driver)
    driver.regions = [(address, buffer.size) for address in buffer.addresses]
    peers = PeerPartials(buffer, layout, fp8)
    o, lse = torch.zeros(3, world * heads, width).bfloat16(), torch.zeros(3, world * heads)
    assert not peers.serves([400], o, lse)
    assert not peers.serves(rows, o[:, 1:], lse)
    assert not peers.serves(rows, o.double(), lse)
    assert not peers.serves([1] * 5, o, lse)
    for step in range(2):
        g = torch.Generator().manual_seed(step)
        os = torch.randn(world, 3, world * heads, width, generator=g).bfloat16()
        lses = torch.randn(world, 3, world * heads, generator=g)
        lses[1, 0] = -math.inf
        sinks = torch.randn(world * heads, generator=g) if step else None
        o, lse = os[group.rank()], lses[group.rank()]
        assert peers.serves(rows, o, lse)
        run = peers.begin(rows, o)
        run.send(o[:1], lse[:1])
        run.send(o[1:], lse[1:])
        own = slice(group.rank() * heads, (group.rank() + 1) * heads)
        got = run.merge(None if sinks is None else sinks[own])
        wide = None if sinks is None else sinks.double()
        want, _ = merge_states_reference(os.double(), lses.double(), wide)
        coarse = 2.0**-4 * 4 if fp8 else 2.0**-6
        torch.testing.assert_close(got.double(), want[:, own], rtol=2.0**-6, atol=coarse)
    buffer.close()


@pytest.mark.parametrize("fp8", [False, True])
def test_partials_go_straight_to_who_merges_them(fp8: bool, tmp_path: Path) -> None:
    run_world(partials, 3, str(tmp_path), fp8, timeout=120)
