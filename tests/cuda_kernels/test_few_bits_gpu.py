"""CUDA kernels of block integers, microexponents, signs and Lloyd-Max codes, simulated: bit for bit the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mutated import mutated
from plait.cuda_kernels import (
    block_ints,
    block_ints_gpu,
    codes_gpu,
    micro_blocks,
    sign_groups,
    sign_groups_gpu,
    turbo,
    turbo_gpu,
)
from plait.cuda_kernels.gpu import ptx

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def numbers(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw rows; the second is zeros, and where the dtype has them the next are very large, small, and subnormal."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    x[1] = 0
    sizes = (2.0**110, 2.0**-116, 2.0**-118, 2.0**-126, 2.0**-131)
    for row, size in zip(range(2, rows), sizes, strict=False):
        x[row] *= 1 if dtype == F16 else size
    x[0, 3], x[0, 5] = -0.0, 1e-6
    return x.to(dtype)


def simulated(launch, *args) -> None:
    variant, grid, given = launch(*args)
    variant.simulate(grid, *given)


def blank(parts) -> list[torch.Tensor]:
    return [torch.full_like(part, 99) for part in parts]


def same_bits(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, signs of zeros too, but for the bits of a NaN."""
    bits = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    both = got.isnan() & wanted.isnan()
    return bool(((got.view(bits) == wanted.view(bits)) | both).all())


@pytest.mark.parametrize(
    ("bits", "block", "dtype"),
    [(8, 32, BF16), (4, 32, BF16), (5, 16, F16), (3, 8, BF16), (2, 16, BF16), (6, 8, F32)],
)
def test_block_integers(bits, block, dtype) -> None:
    x = numbers(7, 64, dtype)
    x[4, 9], x[5, 40], x[6, 33] = float("nan"), float("inf"), -float("inf")
    assert block_ints_gpu.serves(dtype, 64, bits, block)
    wanted = block_ints.quantise_blocks(x, bits, block)
    assert (wanted[0] == 255).sum() == 1
    got = blank(wanted)
    simulated(block_ints_gpu.quantise_blocks_launch, x, bits, block, *got)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    drawn = torch.randint(0, 256, wanted[1].shape, generator=torch.Generator().manual_seed(bits))
    scales = torch.tensor([0, 1, 7, 90, 127, 253, 254, 255]).repeat(7, 8)[:, : 64 // block]
    for parts in (wanted, (scales.byte().contiguous(), drawn.byte())):
        back = torch.full_like(x, 99)
        simulated(block_ints_gpu.dequantise_blocks_launch, *parts, bits, block, back)
        assert same_bits(back, block_ints.dequantise_blocks(*parts, bits, block, 64, dtype))


@pytest.mark.parametrize(("magnitude", "dtype"), [(7, BF16), (4, F16), (2, BF16), (7, F32)])
def test_microexponents(magnitude, dtype) -> None:
    x = numbers(7, 48, dtype)
    x[:, 2:8:3] /= 64
    x[4, 9], x[5, 20] = float("nan"), -float("inf")
    assert block_ints_gpu.serves(dtype, 48, magnitude + 1, 16)
    wanted = micro_blocks.quantise_micro(x, magnitude)
    assert wanted[1].any()
    got = blank(wanted)
    simulated(block_ints_gpu.quantise_micro_launch, x, magnitude, *got)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    drawn = torch.randint(0, 256, wanted[2].shape, generator=torch.Generator().manual_seed(3))
    scales = torch.tensor([0, 1, 90, 253, 254, 255, 7]).repeat(3).view(7, 3)
    for parts in (wanted, (scales.byte(), wanted[1], drawn.byte())):
        back = torch.full_like(x, 99)
        simulated(block_ints_gpu.dequantise_micro_launch, *parts, magnitude, back)
        assert same_bits(back, micro_blocks.dequantise_micro(*parts, magnitude, 48, dtype))


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4, 24), BF16), ((2, 8, 16), F16), ((3, 2, 40), F32)]
)
def test_signs(three, shape, dtype) -> None:
    """Codes of three levels cross tokens and groups; the last byte is not full."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[2])).to(dtype)
    x[0, :, 1], x[0, 1, 2] = 0, -0.0
    if dtype == BF16:
        x[1, :, 3:5] *= 2.0**-131
        x[1, :, 5] *= 2.0**100
    assert sign_groups_gpu.serves(dtype, shape)
    wanted = sign_groups.quantise_signs(x, three)
    got, flag = blank(wanted), torch.zeros(1, dtype=torch.int32)

    def quantise() -> None:
        simulated(sign_groups_gpu.sizes_launch, x, got[0], flag)
        simulated(sign_groups_gpu.code_launch, x, three, *got)

    quantise()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not flag.any()
    drawn = torch.randint(0, 256, wanted[1].shape, generator=torch.Generator().manual_seed(3))
    for codes in (wanted[1], drawn.byte()):
        back = torch.full_like(x, float("nan"))
        simulated(sign_groups_gpu.widen_launch, wanted[0], codes, three, back)
        args = (wanted[0], codes, shape[1], three, dtype)
        assert same_bits(back, sign_groups.dequantise_signs(*args))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 1, 7] = bad
        flag.zero_()
        quantise()
        assert flag.item() == 1
        with pytest.raises(ValueError, match="16-bit scales"):
            sign_groups.quantise_signs(x, three)


def test_what_signs_are_served() -> None:
    assert not sign_groups_gpu.serves(BF16, (3, 6, 24)), "a sum over 6 is not a product"
    assert not sign_groups_gpu.serves(BF16, (3, 4, 20))
    assert not sign_groups_gpu.serves(torch.float64, (3, 4, 24))


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 7, 24, 127, 128, 1000, (1 << 20) - 1])
def test_rows_are_found_without_a_division(pieces: int) -> None:
    per_row, inverse, shift, _ = sign_groups_gpu._division((1, 1, 8 * pieces))
    near = {row * per_row + by for row in (0, 1, 2, 3, 1 << 12, 1 << 27) for by in (-1, 0, 1)}
    for piece in [p for p in (*near, (1 << 28) - 1) if 0 <= p < 1 << 31]:
        assert piece * inverse >> shift == piece // per_row
        assert piece * inverse < 1 << 64


@pytest.mark.parametrize(
    ("bits", "width", "dtype"),
    [(1, 64, BF16), (2, 32, F16), (3, 128, BF16), (4, 64, F32), (4, 8, BF16), (3, 16, F16)],
)
def test_lloyd_max_codes(bits, width, dtype) -> None:
    x = numbers(7, width, dtype)
    x[2] *= 2.0**-105 if dtype == F32 else 1  # norms are float16
    assert turbo_gpu.serves(dtype, width, bits)
    wanted = turbo.quantise_turbo(x, bits, 5)
    assert wanted[0].count_nonzero() >= 2
    bounds, levels = (
        turbo.table_on(width, 5, tuple(part.tolist()), x.device)
        for part in reversed(turbo.lloyd_max(bits))
    )
    got, flag = blank(wanted), torch.zeros(1, dtype=torch.int32)
    simulated(turbo_gpu.quantise_launch, x, bounds, bits, *got, flag)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not flag.any()
    back = torch.full_like(x, 99)
    simulated(turbo_gpu.dequantise_launch, *wanted, levels, bits, back)
    assert same_bits(back, turbo.dequantise_turbo(*wanted, bits, 5, width, dtype))
    for bad in (float("nan"), float("inf"), 6e4 if dtype == F16 else -float("inf")):
        x[0, :2] = bad
        simulated(turbo_gpu.quantise_launch, x, bounds, bits, *got, flag.zero_())
        assert flag.item() == 1
        with pytest.raises(ValueError, match="norms beyond"):
            turbo.quantise_turbo(x, bits, 5)


def test_norms_are_those_of_float64_to_a_few_units() -> None:
    for width in (1, 3, 8, 96, 128, 257):
        x = torch.randn(33, width, generator=torch.Generator().manual_seed(width))
        x[::3] *= 2.0**100
        x[1::3] *= 2.0**-100
        norms, _ = turbo.quantise_turbo(x.bfloat16(), 3, 0)
        wanted = x.bfloat16().double().norm(dim=1)
        assert torch.allclose(norms.double(), wanted, rtol=2.0**-8, atol=0)


def test_operators_know_their_shapes() -> None:
    x = numbers(4, 40, BF16)
    torch.library.opcheck(block_ints.quantise_blocks, (x, 3, 16))
    parts = block_ints.quantise_blocks(x, 3, 16)
    torch.library.opcheck(block_ints.dequantise_blocks, (*parts, 3, 16, 40, F32))
    torch.library.opcheck(micro_blocks.quantise_micro, (x, 4))
    parts = micro_blocks.quantise_micro(x, 4)
    torch.library.opcheck(micro_blocks.dequantise_micro, (*parts, 4, 40, BF16))
    torch.library.opcheck(turbo.quantise_turbo, (x, 3, 1))
    norms, codes = turbo.quantise_turbo(x, 3, 1)
    torch.library.opcheck(turbo.dequantise_turbo, (norms, codes, 3, 1, 40, BF16))
    for three in (False, True):
        torch.library.opcheck(sign_groups.quantise_signs, (x.view(2, 2, 40), three))
        scales, codes = sign_groups.quantise_signs(x.view(2, 2, 40), three)
        torch.library.opcheck(sign_groups.dequantise_signs, (scales, codes, 2, three, F32))


# ---- what must be noticed, and what a device does that the simulator does not


@pytest.mark.parametrize(
    ("module", "old", "new", "check"),
    [
        (block_ints_gpu, "i32(i32(254) - max(", "i32(i32(255) - max(", (test_block_integers, 4, 32, BF16)),
        (block_ints_gpu, "i32(field - lesser)", "i32(field)", (test_microexponents, 7, BF16)),
        (block_ints_gpu, "< field else", "<= field else", (test_microexponents, 7, BF16)),
        (sign_groups_gpu, "row >> group_shift", "row", (test_signs, True, (3, 4, 24), BF16)),
        (sign_groups_gpu, "i32(i) < before", "i32(i) <= before", (test_signs, True, (3, 4, 24), BF16)),
        (sign_groups_gpu, "v[i] >= f32(0)", "v[i] > f32(0)", (test_signs, False, (3, 4, 24), BF16)),
        (turbo_gpu, "v[i] > bound", "v[i] >= f32(bound * f32(1.01))", (test_lloyd_max_codes, 3, 128, BF16)),
        (turbo_gpu, "v[i] = f32(v[i] * lift)", "pass", (test_lloyd_max_codes, 3, 128, BF16)),
    ],
)  # fmt: skip
def test_a_mutated_kernel_is_noticed(module, old, new, check, monkeypatch) -> None:
    changed = mutated(module, old, new)
    monkeypatch.setitem(globals(), module.__name__.rpartition(".")[2], changed)
    test, *args = check
    with pytest.raises(AssertionError):
        test(*args)


@pytest.mark.parametrize("units", [-2, -1, 0, 1, 2])
def test_an_approximate_root_changes_nothing(units: int, monkeypatch) -> None:
    """`rsqrt.approx` may be off by two units; the steps after it make the nearest, for every other mantissa."""
    x = np.arange(0x3F800000, 0x40800000, 2, dtype=np.uint32).view(np.float32)
    near = (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)
    near = (near.view(np.int32) + np.int32(units)).view(np.float32)
    monkeypatch.setattr(ptx, "rsqrt", lambda x: near)
    monkeypatch.setattr(ptx, "multiply_add", _fused)
    monkeypatch.setattr(codes_gpu, "f32", lambda x: np.asarray(x, np.float32))
    assert np.array_equal(codes_gpu.root_of(x), np.sqrt(x))
    assert not np.array_equal(x * near, np.sqrt(x))


def _fused(a, b, c):
    """a * b + c in float64, where the product of two float32 is exact."""
    return (a.astype(np.float64) * b + c).astype(np.float32)
