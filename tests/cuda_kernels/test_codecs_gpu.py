"""The codecs' CUDA kernels, simulated: the bytes and the numbers that the CPU makes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.cuda_kernels import (
    block_floats,
    block_floats_gpu,
    codes_gpu,
    hadamard,
    hadamard_gpu,
    int_channels_gpu,
    int_groups,
    nvfp4,
    scaled_rows,
    scaled_rows_gpu,
)
from plait.cuda_kernels.gpu import ptx
from plait.cuda_kernels.minifloats import MINIFLOATS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def numbers(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw rows; the second is zeros, and where the dtype has them the next are very large, small, and subnormal."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    x[1] = 0
    if dtype != torch.float16:
        for row, size in zip(
            range(2, rows), (2.0**110, 2.0**-118, 2.0**-126, 2.0**-131), strict=False
        ):
            x[row] *= size
    x[0, 3], x[0, 5] = -0.0, 1e-6
    return x.to(dtype)


def run(launch, *args) -> None:
    variant, grid, given = launch(*args)
    variant.simulate(grid, *given)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rows(dtype, whole) -> None:
    x = numbers(7, 32, dtype)
    assert scaled_rows_gpu.serves(dtype, 32)
    wanted = scaled_rows.quantise_scaled(x, whole)
    codes, scales = scaled_rows.scaled_reference(x, whole)
    assert torch.equal(wanted[0], scales)
    assert torch.equal(wanted[1], codes.view(torch.uint8))
    got, flag = [torch.full_like(part, 99) for part in wanted], torch.zeros(1, dtype=torch.int32)
    run(scaled_rows_gpu.quantise_launch, x, whole, *got, flag)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not flag.any()
    back = torch.full_like(x, float("nan"))
    run(scaled_rows_gpu.dequantise_launch, *wanted, whole, back)
    assert torch.equal(back, scaled_rows.dequantise_scaled(*wanted, whole, dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[3, 20] = bad
        run(scaled_rows_gpu.quantise_launch, x, whole, *got, flag.zero_())
        assert flag.item() == 1
        with pytest.raises(ValueError, match="infinities or NaN"):
            scaled_rows.quantise_scaled(x, whole)


def test_operators_of_scaled_rows_know_their_shapes() -> None:
    x = numbers(3, 24, torch.bfloat16)
    torch.library.opcheck(scaled_rows.quantise_scaled, (x, True))
    parts = scaled_rows.quantise_scaled(x, False)
    torch.library.opcheck(scaled_rows.dequantise_scaled, (*parts, False, torch.float32))
    assert not scaled_rows_gpu.serves(torch.bfloat16, 24)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    return torch.equal(got.nan_to_num(7.5), wanted.nan_to_num(7.5)) and torch.equal(
        got.isnan(), wanted.isnan()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("form", "rule"),
    [("e4m3", "floor"), ("e5m2", "even"), ("e3m2", "floor"), ("e2m3", "even"), ("e2m1", "ceil")],
)
def test_mx(form, rule, dtype) -> None:
    x = numbers(7, 32, dtype)
    x[4, 9], x[5, 8], x[5, 20] = float("nan"), float("inf"), -float("inf")
    wanted = block_floats.quantise_mx(x, form, rule)
    assert wanted[0][4] == 255
    got = [torch.full_like(part, 99) for part in wanted]
    lift = block_floats.lift_of(rule, MINIFLOATS[form].mantissa_bits)
    run(block_floats_gpu.quantise_mx_launch, x, form, lift, *got)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    codes = torch.arange(wanted[1].numel()).to(torch.uint8).view_as(wanted[1])  # those of NaN too
    scales = torch.tensor([[0], [1], [90], [127], [200], [254], [255]], dtype=torch.uint8)
    for parts in (wanted, (scales, codes)):
        back = torch.full_like(x, 99)
        run(block_floats_gpu.dequantise_mx_launch, *parts, form, back)
        assert same(back, block_floats.dequantise_mx(*parts, form, 32, dtype))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4(dtype, both) -> None:
    x = numbers(6, 48, dtype)
    for rows in ([0, 1], [0, 2], [1, 3], [1, 4], [1, 5]):  # large, small and subnormal pages
        page = x[rows].contiguous()
        whole = nvfp4.nvfp4_whole(page)
        wanted = nvfp4.quantise_nvfp4(page, whole, both)
        got, lift = [torch.full_like(part, 99) for part in wanted], nvfp4.nvfp4_lift(whole)
        run(block_floats_gpu.quantise_nvfp4_launch, page, whole, lift, both, *got)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        back = torch.full_like(page, 99)
        run(block_floats_gpu.dequantise_nvfp4_launch, *wanted, whole, back)
        assert same(back, nvfp4.dequantise_nvfp4(*wanted, whole, 48, dtype))
        assert not back[page == 0].count_nonzero()


@pytest.mark.parametrize(
    ("dtype", "bits", "group"),
    [(torch.bfloat16, 2, 16), (torch.float16, 8, 4), (torch.float32, 4, 8)],
)
def test_channels(dtype, bits, group) -> None:
    draws = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 2 * group, 24, generator=draws)
    x[..., 3], x[..., 5] = 2.5, 0
    if dtype == torch.bfloat16:
        x[..., 8] *= 2.0**100
        x[..., 9] *= 2.0**-128  # with scales that are subnormal
    x = x.to(dtype)
    wanted = int_groups.quantise_groups(x, bits, group, True)
    got, flag = [torch.full_like(part, 99) for part in wanted], torch.zeros(1, dtype=torch.int32)
    assert int_channels_gpu.serves(dtype, 24, bits, 4)
    run(int_channels_gpu.quantise_launch, x, bits, group, *got, flag)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not flag.any()
    back = torch.full_like(x, float("nan"))
    run(int_channels_gpu.dequantise_launch, *wanted, bits, group, back)
    args = (*wanted, bits, group, True, 24, dtype)
    assert torch.equal(back, int_groups.dequantise_groups(*args))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 1, 20] = bad
        run(int_channels_gpu.quantise_launch, x, bits, group, *got, flag.zero_())
        assert flag.item() == 1
    assert not int_channels_gpu.serves(dtype, 23, bits, 4)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 32), (torch.float32, 32)])
def test_rotations(dtype, width) -> None:
    x = numbers(5, width, dtype)
    x[2:] = x[2:].nan_to_num() * 2.0**-10
    signs = torch.from_numpy(hadamard.rotation_signs(width, 3)[0].copy())
    assert hadamard_gpu.serves(dtype, width)
    assert not hadamard_gpu.serves(dtype, 48)
    for inverse in (False, True):
        got, wanted = torch.full_like(x, 99), hadamard.rotate(x, 3, inverse)
        run(hadamard_gpu.rotate_launch, x, signs, inverse, got)
        assert torch.equal(got, wanted)
        run(hadamard_gpu.rotate_launch, x, -signs, inverse, got)
        assert not torch.equal(got, wanted)


# ---- what must be noticed, and what a device does that the simulator does not


def test_a_quotient_rounded_twice_is_noticed(monkeypatch) -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    wanted = scaled_rows.quantise_scaled(x, False)
    got, flag = [torch.full_like(part, 99) for part in wanted], torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(scaled_rows_gpu, "quotient", lambda x, by, inverse: x * inverse)
    run(scaled_rows_gpu.quantise_launch, x, False, *got, flag)
    assert not torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[0], wanted[0])


def test_an_approximate_reciprocal_changes_nothing(monkeypatch) -> None:
    """`rcp.approx` may be off by one unit; the step after it makes it the nearest."""
    numbers = np.random.default_rng(0).uniform(1, 2, 3000).astype(np.float32)
    for end in (np.float32(0), np.float32(np.inf)):
        monkeypatch.setattr(
            ptx, "reciprocal", lambda x, end=end: np.nextafter(np.float32(1) / x, end)
        )
        assert all(codes_gpu.inverse_of(x) == np.float32(1) / x for x in numbers)
        assert not any(ptx.reciprocal(x) == np.float32(1) / x for x in numbers)


def test_a_block_that_looks_at_its_neighbour_is_noticed(monkeypatch) -> None:
    x = numbers(6, 64, torch.bfloat16)
    wanted = block_floats.quantise_mx(x, "e2m1", "floor")
    got = [torch.full_like(part, 99) for part in wanted]
    swapped = ptx.shuffle_xor_u32
    monkeypatch.setattr(ptx, "shuffle_xor_u32", lambda value, step: swapped(value, step * 4))
    run(block_floats_gpu.quantise_mx_launch, x, "e2m1", 0, *got)
    assert not torch.equal(got[0], wanted[0])
