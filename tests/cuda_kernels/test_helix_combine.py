"""Helix's exchange on CUDA, simulated: sends and the combine at once, under weak memory; and ranks in processes."""

from __future__ import annotations

import math
import random
import types
from pathlib import Path

import pytest
import torch

from mutated import mutated
from plait.cuda_kernels import helix_combine as module
from plait.cuda_kernels.gpu import ptx, simulator
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.gpu.ptx import i32, u32, u64
from plait.cuda_kernels.gpu.simulator import SimulationError
from plait.cuda_kernels.gpu.weak_memory import WeakMemory
from plait.cuda_kernels.helix_combine import helix_combine_reference, inverse_of, record_bytes
from plait.cuda_kernels.merge import merge_states_reference
from world import current_rank, run_world

BATCH, HEADS, DIM, THREADS = 4, 3, 24, 32  # 3 heads of each rank, 3 pieces a row
ENDS = [1, 4]  # two chunks, not alike
CHUNKS = len(ENDS)
A_CHUNK = BATCH // CHUNKS  # where all blocks are of one launch
VECTORS = DIM * 2 // 16
SLOT = BATCH * HEADS * record_bytes(VECTORS)


def drawn(world: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    os = torch.randn(world, BATCH, world * HEADS, DIM, generator=g).bfloat16()
    lses = torch.randn(world, BATCH, world * HEADS, generator=g) * 5
    empty = torch.rand(lses.shape, generator=g) < 0.2
    lses[empty], os[empty] = -math.inf, math.nan
    return os, lses


def variants(
    source: types.ModuleType, world: int, virtual: bool, fp8: bool = False, sink: bool = False
):
    constants = {
        "world": world, "vectors": VECTORS, "dtype": torch.bfloat16, "slot_bytes": SLOT,
        "chunks": CHUNKS, "virtual": virtual, "fp8": fp8, "threads": THREADS,
    }  # fmt: skip
    return source.helix_send(**constants), source.helix_combine(**constants, sink=sink)


def check(os, lses, out, out_lse, fp8=False, sinks=None) -> None:
    os, lses = os.double(), lses.double()
    if sinks is None:
        want, want_lse = helix_combine_reference(os, lses)
    else:  # a logit of each head, once
        o, lse = merge_states_reference(os, lses, sinks.flatten().double())
        want, want_lse = torch.stack(o.chunk(len(os), 1)), torch.stack(lse.chunk(len(os), 1))
    coarse = 1e-2
    if (
        fp8
    ):  # a number is off by 1/16 of itself or 2^-18 of the row's largest; weights only average that
        coarse = 2.0**-4 * os.nan_to_num().abs().amax()
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=float(coarse))
    torch.testing.assert_close(out_lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def steps(source: types.ModuleType, world: int, count: int, fp8=False, sink=False) -> None:
    """Play all ranks in one launch: of the blocks of x, some send while the others combine."""
    send, combine = variants(source, world, True, fp8, sink)
    size = Layout(world, SLOT, CHUNKS, sets=2).total_bytes
    buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(world)]
    table = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64)
    ends = torch.tensor([A_CHUNK, BATCH], dtype=torch.int32)
    for step in range(count):
        os, lses = drawn(world, step)
        sinks = torch.randn(world, HEADS) * 3
        out = torch.zeros(world, BATCH, HEADS, DIM).bfloat16()
        out_lse = torch.zeros(world, BATCH, HEADS)
        given = [u64(t.data_ptr()) for t in (table, os, lses, out, out_lse, sinks, ends)]

        def both(table, os, lses, out, out_lse, sinks, ends):
            if ptx.block_y() < i32(world):
                for chunk in range(CHUNKS):
                    first, heads = chunk * A_CHUNK, world * HEADS
                    send.body(
                        table, i32(0), os + u64(first * heads * 2 * DIM),
                        lses + u64(first * heads * 4), i32(chunk), i32(first), i32(BATCH),
                        i32(HEADS),
                    )  # fmt: skip
            else:
                combine.body(
                    table, i32(0), out, out_lse, sinks, ends, i32(CHUNKS), i32(HEADS),
                    u32(inverse_of(HEADS)),
                )  # fmt: skip

        memory = WeakMemory(
            [(b.data_ptr(), size) for b in buffers],
            delays=random.Random(step),
            device_of=lambda block: block.z,
        )
        grid = (A_CHUNK, world + 1, world)
        simulator.run(
            both, grid, THREADS, *given, memory=memory, resident=math.prod(grid), seed=step,
            timeout=60,
        )  # fmt: skip
        check(os, lses, out, out_lse, fp8, sinks if sink else None)


@pytest.mark.parametrize("world", [2, 4])
def test_sends_and_combine_at_once(world: int) -> None:
    steps(module, world, 3 if world == 2 else 1)


def test_an_fp8_payload_and_sinks() -> None:
    steps(module, 2, 2, fp8=True, sink=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("ptx.st4_release", "ptx.st4_relaxed", id="no-release"),
        pytest.param("wait_for(own + flag, step)", "pass", id="no-wait"),
        pytest.param(
            "flag = u64(u32(i32(chunk * i32(world) + ptx.thread())))",
            "flag = u64(u32(ptx.thread()))",
            id="one-flag",
        ),
        pytest.param("* i32(world) - i32(1)):", "* i32(0)):", id="first-block-raises-the-flag"),
        pytest.param("weights[s] = ptx", "weights[s] = f32(0) * ptx", id="lse-ignored"),
        pytest.param("i32(first + request)", "i32(request)", id="chunks-in-one-place"),
    ],
)
def test_a_mutated_exchange_fails(old: str, new: str) -> None:
    source = mutated(module, old, new)
    with pytest.raises((AssertionError, SimulationError)):
        steps(source, 2, 6)


def rank_in_a_process(path: str, world: int, count: int) -> None:
    rank, size = current_rank(), Layout(world, SLOT, CHUNKS, sets=2).total_bytes
    send, combine = variants(module, world, virtual=False)
    shared = torch.from_file(path, shared=True, size=world * size, dtype=torch.uint8)
    regions = [(shared.data_ptr() + r * size, size) for r in range(world)]
    table = torch.tensor([address for address, _ in regions], dtype=torch.uint64)
    for step in range(count):
        os, lses = drawn(world, step)
        mine, my_lse = os[rank].clone(), lses[rank].clone()
        out, out_lse = torch.zeros(BATCH, HEADS, DIM).bfloat16(), torch.zeros(BATCH, HEADS)
        memory = WeakMemory(regions, delays=random.Random(100 * step + rank), naps=0.01)
        for chunk, end in enumerate(ENDS):
            first = ENDS[chunk - 1] if chunk else 0
            o, lse = mine[first:end], my_lse[first:end]
            send.simulate(
                (end - first, world), table.data_ptr(), rank, o.data_ptr(), lse.data_ptr(), chunk,
                first, BATCH, HEADS, memory=memory,
            )  # fmt: skip
        ends = torch.tensor(ENDS, dtype=torch.int32)
        combine.simulate(
            2, table.data_ptr(), rank, out.data_ptr(), out_lse.data_ptr(), 0, ends.data_ptr(),
            CHUNKS, HEADS, inverse_of(HEADS), memory=memory,
        )  # fmt: skip
        want, want_lse = helix_combine_reference(os, lses)
        torch.testing.assert_close(out, want[rank], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(out_lse, want_lse[rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_in_processes(world: int, tmp_path: Path) -> None:
    path = tmp_path / "buffers"
    path.write_bytes(bytes(world * Layout(world, SLOT, CHUNKS, sets=2).total_bytes))
    run_world(rank_in_a_process, world, str(path), world, 4, backend=None)
