"""MX and NVFP4 against torchao and ml_dtypes, bit for bit: mx_oracle.py made what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plait.cuda_kernels.bits import pack_into, packed_width, unpack_into
from plait.cuda_kernels.block_floats import dequantise_mx, quantise_mx
from plait.cuda_kernels.minifloats import MINIFLOATS, table_of
from plait.cuda_kernels.nvfp4 import dequantise_nvfp4, nvfp4_whole, quantise_nvfp4
from plait.kvstore.codecs import PageLayout, find_codec

ORACLE = load_file(Path(__file__).with_name("mx_oracle.safetensors"))
X = ORACLE["x"]
INFINITE, NAN = 3, 4  # rows


def unpacked(codes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    out = np.empty((codes.shape[0], width), np.uint8)
    unpack_into(codes.numpy(), bits, out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("form", MINIFLOATS)
def test_every_code_has_its_value(form) -> None:
    assert np.array_equal(table_of(form), ORACLE[f"{form}.table"].numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
@pytest.mark.parametrize("form", MINIFLOATS)
def test_scales_and_codes_are_torchaos(form, rule, dtype) -> None:
    scales, codes = quantise_mx(X.to(dtype), form, rule)
    assert torch.equal(scales, ORACLE[f"{form}.{rule}.scales"])
    bits, wanted = MINIFLOATS[form].bits, ORACLE[f"{form}.{rule}.codes"]
    if bits == 4:
        wanted = unpacked(wanted, 4, X.shape[1])
    rows = [
        r for r in range(X.shape[0]) if r != NAN
    ]  # what a block of NaN holds besides is nobody's business
    assert torch.equal(unpacked(codes, bits, X.shape[1])[rows], wanted[rows])


def test_another_rounding_is_noticed() -> None:
    """Ties away from zero, which is microxcaling's default, gives other codes for the rows of ties."""
    _, codes = quantise_mx(X + X.float().sign() * X.float().abs() * 2.0**-20, "e2m1", "floor")
    assert not torch.equal(codes[:2], ORACLE["e2m1.floor.codes"][:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4_is_torchaos(dtype) -> None:
    x = X.nan_to_num(1.0, 1.0, 1.0).to(dtype)
    whole = nvfp4_whole(x)
    assert whole == float(ORACLE["nvfp4.whole"])
    scales, codes = quantise_nvfp4(x, whole, False)
    assert torch.equal(scales, ORACLE["nvfp4.scales"])
    assert torch.equal(codes, ORACLE["nvfp4.codes"])


@pytest.mark.parametrize("form", MINIFLOATS)
def test_all_codes_with_all_scales_come_back_as_they_went(form) -> None:
    """decode gives value * scale; coding that again gives the same code, wherever its scale is the same."""
    bits, table = MINIFLOATS[form].bits, torch.from_numpy(table_of(form))
    codes = (torch.arange(256) % (1 << bits)).to(torch.uint8).reshape(8, 32)
    fine = table.isfinite()[codes.long()]
    codes = torch.where(fine, codes, 0)
    codes[:, 0] = int(
        torch.where(table.isfinite(), table, 0).argmax()
    )  # so that the scale is the same
    packed = torch.zeros(8, packed_width(32, bits), dtype=torch.uint8)
    pack_into(codes.numpy(), bits, packed.numpy())
    for scale in range(256):
        scales = torch.full((8, 1), scale, dtype=torch.uint8)
        got = dequantise_mx(scales, packed, form, 32, torch.float32)
        if scale == 255:
            assert got.isnan().all()
            continue
        assert torch.equal(got, (table[codes.long()].double() * 2.0 ** (scale - 127)).float())
        if 1 < scale < 254 - MINIFLOATS[form].top_exponent and scale > 30:
            again, back = quantise_mx(got, form, "floor")
            assert torch.equal(again, scales)
            assert torch.equal(back, packed)


def test_nan_stays_in_its_block_and_infinity_comes_back() -> None:
    for chain in ("mxfp8", "mxfp6", "mxfp4", "mxint8"):
        codec = find_codec(chain)
        got = codec.decode(codec.encode(X), PageLayout.of(X))
        assert got[NAN, 64:96].isnan().all()
        assert not got[NAN, :64].isnan().any()
        assert float(got[INFINITE, 40]) > 3e38
        assert not got[INFINITE, 32:40].count_nonzero()
        assert torch.equal(got[2], X[2])


def test_operators_know_their_shapes_without_running() -> None:
    x = X[5:9, :50].contiguous()
    torch.library.opcheck(quantise_mx, (x, "e2m3", "even"))
    scales, codes = quantise_mx(x, "e2m3", "even")
    torch.library.opcheck(dequantise_mx, (scales, codes, "e2m3", 50, torch.bfloat16))
    torch.library.opcheck(quantise_nvfp4, (x, 0.5, True))
    torch.library.opcheck(dequantise_nvfp4, (*quantise_nvfp4(x, 0.5, True), 0.5, 50, torch.float32))
