"""Helix's exchange on CUDA, simulated: sends and the combine at once, under weak memory; and ranks in processes."""

from __future__ import annotations

import inspect
import math
import random
import sys
import types
from pathlib import Path

import pytest
import torch

from plait.cuda_kernels import helix_combine as module
from plait.cuda_kernels.gpu import ptx, simulator
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.gpu.ptx import i32, u64
from plait.cuda_kernels.gpu.simulator import SimulationError
from plait.cuda_kernels.gpu.weak_memory import WeakMemory
from plait.cuda_kernels.helix_combine import helix_combine_reference, record_bytes
from world import current_rank, run_world

BATCH, HEADS, DIM, CHUNKS, THREADS = 4, 3, 24, 2, 32  # 3 heads of each rank, 3 pieces a row
VECTORS = DIM * 2 // 16
SLOT = BATCH * HEADS * record_bytes(VECTORS)


def drawn(world: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    os = torch.randn(world, BATCH, world * HEADS, DIM, generator=g).bfloat16()
    lses = torch.randn(world, BATCH, world * HEADS, generator=g) * 5
    empty = torch.rand(lses.shape, generator=g) < 0.2
    lses[empty], os[empty] = -math.inf, math.nan
    return os, lses


def variants(source: types.ModuleType, world: int, virtual: bool):
    constants = {
        "world": world, "vectors": VECTORS, "dtype": torch.bfloat16, "slot_bytes": SLOT,
        "chunks": CHUNKS, "virtual": virtual, "threads": THREADS,
    }  # fmt: skip
    return source.helix_send(**constants), source.helix_combine(**constants)


def check(os, lses, out, out_lse) -> None:
    want, want_lse = helix_combine_reference(os.double(), lses.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out_lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def steps(source: types.ModuleType, world: int, count: int) -> None:
    """Play all ranks in one launch: of the blocks of x, some send while the others combine."""
    send, combine = variants(source, world, virtual=True)
    size = Layout(world, SLOT, CHUNKS, sets=2).total_bytes
    buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(world)]
    table = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64)
    a_chunk = BATCH // CHUNKS
    for step in range(count):
        os, lses = drawn(world, step)
        out = torch.zeros(world, BATCH, HEADS, DIM).bfloat16()
        out_lse = torch.zeros(world, BATCH, HEADS)
        given = [u64(t.data_ptr()) for t in (table, os, lses, out, out_lse)]

        def both(table, os, lses, out, out_lse):
            if ptx.block_y() < i32(world):
                for chunk in range(CHUNKS):
                    send.body(
                        table, i32(0), os, lses, i32(chunk), i32(chunk * a_chunk), i32(BATCH),
                        i32(HEADS),
                    )  # fmt: skip
            else:
                combine.body(table, i32(0), out, out_lse, i32(BATCH * HEADS), i32(a_chunk * HEADS))

        memory = WeakMemory(
            [(b.data_ptr(), size) for b in buffers],
            delays=random.Random(step),
            device_of=lambda block: block.z,
        )
        grid = (a_chunk, world + 1, world)
        simulator.run(
            both, grid, THREADS, *given, memory=memory, resident=a_chunk * (world + 1) * world,
            seed=step, timeout=30,
        )  # fmt: skip
        check(os, lses, out, out_lse)


@pytest.mark.parametrize("world", [2, 4])
def test_sends_and_combine_at_once(world: int) -> None:
    steps(module, world, 3 if world == 2 else 1)


def mutated(old: str, new: str) -> types.ModuleType:
    source = inspect.getsource(module)
    assert old in source
    changed = types.ModuleType(module.__name__ + "_mutated")
    changed.__package__ = module.__package__
    sys.modules[changed.__name__] = changed
    exec(compile(source.replace(old, new), module.__file__ or "", "exec"), changed.__dict__)
    return changed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("ptx.st4_release", "ptx.st4_relaxed", id="no-release"),
        pytest.param("wait_for(own + flag, step)", "pass", id="no-wait"),
        pytest.param("begin, chunk = end, i32(chunk + i32(1))", "begin = end", id="one-flag"),
        pytest.param("* i32(world) - i32(1)):", "* i32(0)):", id="first-block-raises-the-flag"),
        pytest.param("weights[s] = ptx", "weights[s] = f32(0) * ptx", id="lse-ignored"),
    ],
)
def test_a_mutated_exchange_fails(old: str, new: str) -> None:
    source = mutated(old, new)
    with pytest.raises((AssertionError, SimulationError)):
        steps(source, 2, 6)


def rank_in_a_process(path: str, world: int, count: int) -> None:
    rank, size = current_rank(), Layout(world, SLOT, CHUNKS, sets=2).total_bytes
    send, combine = variants(module, world, virtual=False)
    shared = torch.from_file(path, shared=True, size=world * size, dtype=torch.uint8)
    regions = [(shared.data_ptr() + r * size, size) for r in range(world)]
    table = torch.tensor([address for address, _ in regions], dtype=torch.uint64)
    a_chunk = BATCH // CHUNKS
    for step in range(count):
        os, lses = drawn(world, step)
        mine, my_lse = os[rank].clone(), lses[rank].clone()
        out, out_lse = torch.zeros(BATCH, HEADS, DIM).bfloat16(), torch.zeros(BATCH, HEADS)
        memory = WeakMemory(regions, delays=random.Random(100 * step + rank), naps=0.01)
        for chunk in range(CHUNKS):
            send.simulate(
                (a_chunk, world), table.data_ptr(), rank, mine.data_ptr(), my_lse.data_ptr(),
                chunk, chunk * a_chunk, BATCH, HEADS, memory=memory,
            )  # fmt: skip
        combine.simulate(
            2, table.data_ptr(), rank, out.data_ptr(), out_lse.data_ptr(), BATCH * HEADS,
            a_chunk * HEADS, memory=memory,
        )  # fmt: skip
        want, want_lse = helix_combine_reference(os, lses)
        torch.testing.assert_close(out, want[rank], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(out_lse, want_lse[rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_in_processes(world: int, tmp_path: Path) -> None:
    path = tmp_path / "buffers"
    path.write_bytes(bytes(world * Layout(world, SLOT, CHUNKS, sets=2).total_bytes))
    run_world(rank_in_a_process, world, str(path), world, 4, backend=None)
