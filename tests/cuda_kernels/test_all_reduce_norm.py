"""The fused norm over ranks, simulated: under the weakest memory and delays at every flag, and what must fail there."""

from __future__ import annotations

import random
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from mutated import mutated
from plait.cuda_kernels import all_reduce_norm
from plait.cuda_kernels.all_reduce_norm import STATISTICS, all_reduce_norm_reference
from plait.cuda_kernels.gpu import peers
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.gpu.simulator import SimulationError
from plait.cuda_kernels.gpu.weak_memory import WeakMemory
from world import current_rank, run_world

HIDDEN, THREADS, ROWS, BLOCKS = 72, 32, 5, 3  # 9 or 18 pieces for 32 threads
SLOT = ROWS * (HIDDEN * 4 + STATISTICS)
ONE, TWO, SWITCH = "norm_one_shot", "norm_two_shot", "norm_multimem"


class Ranks:
    """Buffers of some ranks in this process, played by one launch, and the steps they take."""

    def __init__(self, world: int, module: types.ModuleType = all_reduce_norm) -> None:
        self.world, self.module, self.seed = world, module, 0
        layout = Layout(world, SLOT, BLOCKS)
        self.slots = layout.slots
        self.buffers = [torch.zeros(layout.total_bytes, dtype=torch.uint8) for _ in range(world)]
        self.table = torch.tensor([b.data_ptr() for b in self.buffers], dtype=torch.uint64)

    def step(self, schedule, dtype=torch.bfloat16, layer_norm=False, fp8=False, blocks=2) -> None:
        """Run one call on all ranks and compare it with the reference and between ranks."""
        self.seed += 1
        xs, residual, weight, bias = drawn(self.world, dtype, self.seed)
        out = torch.float8_e4m3fn if fp8 else dtype
        normed = torch.zeros(self.world, ROWS, HIDDEN, dtype=out)
        total, scales = torch.zeros_like(xs), torch.ones(self.world, ROWS)
        regions = [(buffer.data_ptr(), buffer.numel()) for buffer in self.buffers]
        memory = WeakMemory(
            regions, delays=random.Random(self.seed), device_of=lambda block: block.y
        )
        variant = getattr(self.module, schedule)(
            world=self.world, hidden=HIDDEN, dtype=dtype, layer_norm=layer_norm, fp8=fp8,
            slot_bytes=SLOT, blocks=BLOCKS, virtual=True, threads=THREADS,
        )  # fmt: skip
        cast = (memory.multicast,) if schedule == SWITCH else ()
        tensors = (xs, residual, weight, bias, normed, total, scales)
        args = (self.table.data_ptr(), *cast, 0, *(t.data_ptr() for t in tensors), ROWS, 1e-5)
        variant.simulate(
            (blocks, self.world), *args, memory=memory, resident=blocks * self.world,
            seed=self.seed, timeout=30,
        )  # fmt: skip
        for rank in range(1, self.world):
            for each in (total, normed):
                assert torch.equal(each[rank].view(torch.uint8), each[0].view(torch.uint8)), (
                    "ranks differ"
                )
        check(xs, residual, weight, bias if layer_norm else None, normed[0], total[0], scales[0])

    def steps(self, schedule: str, count: int) -> None:
        for _ in range(count):
            self.step(schedule)


def drawn(world, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = ((world, ROWS, HIDDEN), (ROWS, HIDDEN), (HIDDEN,), (HIDDEN,))
    xs, *rest = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    xs[:, -1] = 0  # a row of zeros, up to the residual
    rest[0][-1] = 0
    return xs, *rest


def check(xs, residual, weight, bias, normed, total, scales) -> None:
    """Compare with float64; what the switch adds has been rounded to bfloat16 once more."""
    wide = (t.double() if t is not None else None for t in (xs, residual, weight, bias))
    want, want_total = all_reduce_norm_reference(*wide, 1e-5)
    coarse = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}[total.dtype]
    near = partial(torch.testing.assert_close, equal_nan=True)
    near(total.double(), want_total, rtol=coarse, atol=4 * coarse)
    if normed.dtype == torch.float8_e4m3fn:
        got, coarse = normed.double() * scales.double()[:, None], 2.0**-4
        assert (normed.float().abs().amax(-1)[:-1] == 448).all()
        assert scales[-1] == 1 or bias is not None
    else:
        got = normed.double()
    near(got, want, rtol=4 * coarse, atol=8 * coarse)


@pytest.mark.parametrize("world", [2, 4])
def test_schedules_change_from_step_to_step(world) -> None:
    ranks = Ranks(world)
    ranks.step(ONE)
    ranks.step(TWO, layer_norm=True, blocks=3)
    ranks.step(SWITCH)
    ranks.step(ONE, layer_norm=True, fp8=True, blocks=1)
    ranks.step(TWO, dtype=torch.float32)
    ranks.step(ONE, dtype=torch.float32, blocks=3)
    ranks.step(TWO, fp8=True, blocks=1)


@pytest.mark.parametrize("schedule", [ONE, TWO, SWITCH])
def test_nan_and_infinity_of_one_rank_are_seen_by_all(schedule, monkeypatch) -> None:
    draw = drawn

    def extreme(*args):
        xs, *rest = draw(*args)
        xs[1, 0, 3], xs[0, 1, 5] = torch.nan, torch.inf
        xs[0, 2, 6], xs[1, 2, 6] = torch.inf, -torch.inf
        xs[:, 3] *= 2.0**-133  # subnormal
        return xs, *rest

    monkeypatch.setattr(sys.modules[__name__], "drawn", extreme)
    Ranks(2).step(schedule)


def test_steps_go_on_where_their_number_wraps() -> None:
    """As after four billion steps: flags and steps begin three before the end of 32 bits."""
    ranks, begin = Ranks(2), 2**32 - 3
    for buffer in ranks.buffers:
        words = buffer[: ranks.slots].view(torch.uint32)
        words[peers.HEAD // 4 :] = begin
        words[0] = begin
    for schedule in (ONE, TWO, SWITCH, ONE, TWO, ONE):
        ranks.step(schedule)
    assert ranks.buffers[0][:4].view(torch.uint32).item() == 3


def crossing(old: str, new: str) -> types.ModuleType:
    """All-reduce and norm with a mutated crossing."""
    changed = mutated(all_reduce_norm)
    vars(changed)["cross"] = mutated(peers, old, new).cross
    return changed


LATE = "ptx.barrier()  # all of the block"
WAIT = "        wait_for(own + flags + u64(u32(peer)) * u64(4), step)\n"


@pytest.mark.parametrize("schedule", [ONE, TWO, SWITCH])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("ptx.st4_release", "ptx.st4_relaxed", id="no-release"),
        pytest.param("ptx.ld4_acquire", "ptx.ld4_relaxed", id="no-acquire"),
        pytest.param(LATE, "pass  #", id="flag-before-the-block-has-written"),
        pytest.param(WAIT, "", id="no-wait"),
        pytest.param(WAIT, WAIT.replace("step)", "u32(step - u32(1)))"), id="waits-for-last-step"),
    ],
)
def test_a_mutated_crossing_fails(schedule, old, new) -> None:
    ranks = Ranks(2, crossing(old, new))
    with pytest.raises((AssertionError, SimulationError)):
        ranks.steps(schedule, 8)


@pytest.mark.parametrize(
    ("schedule", "old", "new"),
    [
        pytest.param(TWO, "flags + u64(set_bytes)", "flags", id="one-set-of-flags"),
        pytest.param(ONE, "        end_step(own, step)\n", "", id="step-not-raised"),
    ],
)
def test_mutated_steps_fail(schedule, old, new) -> None:
    ranks = Ranks(2, mutated(all_reduce_norm, old, new))
    with pytest.raises((AssertionError, SimulationError)):
        ranks.steps(schedule, 8)


def rank_in_a_process(path: str, world: int, steps: int) -> None:
    """One rank: its own process, all buffers mapped, sleeps at flags."""
    layout, rank = Layout(world, SLOT, BLOCKS), current_rank()
    size = layout.total_bytes
    shared = torch.from_file(path, shared=True, size=world * size, dtype=torch.uint8)
    regions = [(shared.data_ptr() + r * size, size) for r in range(world)]
    table = torch.tensor([address for address, _ in regions], dtype=torch.uint64)
    for step in range(steps):
        xs, residual, weight, bias = drawn(world, torch.bfloat16, step)
        normed, total, scales = (torch.zeros(ROWS, n).bfloat16() for n in (HIDDEN, HIDDEN, 1))
        schedule = (ONE, TWO, SWITCH)[step % 3]
        delays = random.Random(100 * step + rank)
        memory = WeakMemory(regions, delays=delays, naps=0.01)
        cast = (memory.multicast,) if schedule == SWITCH else ()
        tensors = (xs[rank].clone(), residual, weight, bias, normed, total, scales)
        getattr(all_reduce_norm, schedule)(
            world=world, hidden=HIDDEN, dtype=torch.bfloat16, layer_norm=False, fp8=False,
            slot_bytes=SLOT, blocks=BLOCKS, virtual=False, threads=THREADS,
        ).simulate(
            2, table.data_ptr(), *cast, rank, *(t.data_ptr() for t in tensors), ROWS, 1e-5,
            memory=memory, seed=step, timeout=60,
        )  # fmt: skip
        check(xs, residual, weight, None, normed, total, scales)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_in_processes(world: int, tmp_path: Path) -> None:
    path = tmp_path / "buffers"
    path.write_bytes(bytes(world * Layout(world, SLOT, BLOCKS).total_bytes))
    run_world(rank_in_a_process, world, str(path), world, 6 if world < 8 else 3, backend=None)
