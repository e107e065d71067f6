"""The simulator of CUDA kernels: warps, barriers, what it refuses; and the words against torch's own conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.cuda_kernels.gpu import ptx, simulator
from plait.cuda_kernels.gpu.ptx import f32, i32, u32, u64
from plait.cuda_kernels.gpu.simulator import SimulationError


def run(body, threads=64, grid=1, **options) -> torch.Tensor:
    """Run a body that gets the address of one float32 for each thread of the grid."""
    out = torch.zeros(grid * threads)
    simulator.run(body, grid, threads, u64(out.data_ptr()), **options)
    return out


def mine(out):
    return out + u64(4 * int(ptx.block() * ptx.threads() + ptx.thread()))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_sums_over_warps_and_blocks(seed) -> None:
    def body(out):
        x = f32(ptx.thread())
        ptx.st_f32(mine(out), ptx.block_sum(x) + f32(1000) * ptx.warp_max(x))

    out = run(body, 96, grid=2, seed=seed, resident=2)
    tops = torch.arange(3).repeat_interleave(32) * 32 + 31
    assert torch.equal(out.view(2, 96), (1000 * tops + 96 * 95 / 2).expand(2, 96))


def test_votes_and_shuffles() -> None:
    def body(out):
        lane = ptx.thread() & i32(31)
        odd = ptx.ballot(u32(int(lane) & 1))
        like = ptx.same(u32(int(lane) // 8))
        below = ptx.shuffle_up_u32(u32(lane), i32(4))
        good = odd == u32(0xAAAAAAAA) and like == u32(0xFF << int(lane) // 8 * 8)
        ptx.st_f32(mine(out), f32(below) if good else f32(-1))

    lanes = torch.arange(32.0).repeat(2)
    assert torch.equal(run(body), torch.where(lanes < 4, lanes, lanes - 4))


def test_a_matrix_product_of_a_warp() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=g).bfloat16(), torch.randn(16, 8, generator=g).bfloat16()
    aw, bw = (
        t.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for t in (a, b.T)
    )
    c = torch.zeros(16, 8)

    def pair(rows, r, k):
        return u32(int(rows[r, k]) | int(rows[r, k + 1]) << 16)

    def body(_):
        n = int(ptx.thread())
        g, k = n >> 2, 2 * (n & 3)
        frags = [pair(aw, g + 8 * (i & 1), k + 8 * (i >> 1)) for i in range(4)]
        frags += [pair(bw, g, k + 8 * i) for i in range(2)]
        d = ptx.mma_bf16(*frags, f32(1), f32(1), f32(1), f32(1))
        for i in range(4):
            c[g + 8 * (i >> 1), k + (i & 1)] = float(d[i])

    run(body, 32)
    torch.testing.assert_close(c, a.float() @ b.float() + 1, rtol=1e-5, atol=1e-5)


def divergent(out):
    if ptx.thread() < i32(8):
        return
    ptx.barrier()


def waits_for_ever(out):
    while ptx.ld4_acquire(out) == u32(0):
        ptx.pause(u32(20))


def half_a_warp(out):
    if ptx.thread() < i32(16):
        ptx.shuffle_xor(f32(0), i32(1))


def stops(out):
    ptx.trap()


def misaligned(out):
    ptx.ld16(out + u64(8))


@pytest.mark.parametrize(
    ("body", "error", "said", "timeout"),
    [
        (divergent, SimulationError, "8 threads ended", 60),
        (half_a_warp, SimulationError, "deadlock: 16 threads", 60),
        (waits_for_ever, SimulationError, "no end in sight", 0.3),
        (stops, simulator.Trap, "trap", 60),
        (misaligned, AssertionError, "16-byte load", 60),
    ],
)
def test_what_would_hang_or_fault_is_an_error(body, error, said, timeout) -> None:
    with pytest.raises(error, match=said):
        run(body, timeout=timeout)


def test_words_outside_a_kernel_are_refused() -> None:
    with pytest.raises(SimulationError, match="outside a kernel"):
        ptx.thread()


def specials(n: int = 4000) -> torch.Tensor:
    bits = np.random.default_rng(0).integers(0, 1 << 32, n, dtype=np.uint32)
    few = np.array([0, -0.0, np.inf, -np.inf, 448, 464, 465, 1e-45, 2**-9, 2**-10, 3 * 2**-10], f32)
    near = np.random.default_rng(1).standard_normal(n).astype(f32) * 30
    return torch.from_numpy(np.concatenate([few, -few, near, bits.view(f32)]))


@pytest.mark.parametrize(
    ("pack", "low", "dtype", "bits"),
    [
        (ptx.bf16x2, ptx.bf16_low, torch.bfloat16, 16),
        (ptx.f16x2, ptx.f16_low, torch.float16, 16),
        (ptx.e4m3x2, lambda pair: ptx.f16_low(ptx.f16x2_of_e4m3x2(pair)), torch.float8_e4m3fn, 8),
    ],
)
def test_conversions_are_torchs(pack, low, dtype, bits) -> None:
    x = specials()
    with np.errstate(all="ignore"):
        packed = [int(pack(a, f32(1))) for a in x.numpy()]
        back = torch.tensor([float(low(u32(pair))) for pair in packed])
    assert {pair >> bits for pair in packed} == {int(pack(f32(1), f32(0)))}
    bound = x.clamp(-448, 448) if bits == 8 else x
    torch.testing.assert_close(back, bound.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_bytes_and_bits() -> None:
    assert ptx.pick_bytes(u32(0x33221100), u32(0x77665544), u32(0x7531)) == 0x77553311
    assert ptx.nearest(f32(2.5)) == 2
    assert ptx.nearest(f32(-1e20)) == -(2**31)
    assert ptx.leading_zeros(u32(1)) == 31
    assert ptx.mul_high(u32(0xFFFFFFFF), u32(0x10)) == 0xF
