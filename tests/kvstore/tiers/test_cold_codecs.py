"""The codec contract and the cold codecs: what comes back, in how many bits, and what damaged bytes do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kvstore.codecs import CODECS, CodecError, PageLayout, bits_per_element, find_codec
from plait.kvstore.codecs.codec import tensor_bytes

CHAINS = [
    "none",
    "fp8",
    "int8",
    "exponent",
    "zstd",
    "fp8+zstd",
    "int8+zstd:level=3",
    "bf16+exponent",
    "exponent+zstd",
]
SHAPE = (2, 16, 4, 64)


def page(dtype=torch.bfloat16, shape=SHAPE, seed=0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape[:-1], generator=draws)[..., None] * 20
    return (torch.randn(shape, generator=draws) * sizes).to(dtype)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pages_come_back(chain, dtype) -> None:
    codec, wanted = find_codec(chain), page(dtype)
    layout = PageLayout.of(wanted)
    if chain.startswith("exponent") and dtype != torch.bfloat16:
        with pytest.raises(CodecError, match="bfloat16"):
            codec.encode(wanted)
        return
    data = codec.encode(wanted)
    assert data.dtype == np.uint8
    assert data.size <= codec.max_bytes(layout)
    got = codec.decode(data.copy(), layout)
    assert PageLayout.of(got) == layout
    if codec.lossless:
        assert np.array_equal(tensor_bytes(got), tensor_bytes(wanted))
    else:
        assert torch.equal(got, wanted) == (chain == "bf16+exponent" and dtype == torch.bfloat16)
        largest = wanted.float().abs().amax(-1, keepdim=True)
        assert ((got.float() - wanted.float()).abs() <= largest / 16).all()


@pytest.mark.parametrize("chain", CHAINS)
def test_text_form_is_read_back(chain) -> None:
    codec = find_codec(chain)
    assert find_codec(str(codec)) == codec
    assert hash(find_codec(str(codec))) == hash(codec)
    assert codec.lossless == (not any(name in chain for name in ("fp8", "int8", "bf16")))


def test_every_bfloat16_comes_back() -> None:
    every = (
        torch.arange(65536, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
        .reshape(256, 256)
    )
    for chain in ("exponent", "none", "zstd", "exponent+zstd"):
        codec = find_codec(chain)
        got = codec.decode(codec.encode(every), PageLayout.of(every))
        assert torch.equal(got.view(torch.int16), every.view(torch.int16)), chain


def test_real_bits() -> None:
    normal = page(shape=(4, 16, 8, 128))
    layout = PageLayout.of(normal)

    def bits(chain: str) -> float:
        return bits_per_element(find_codec(chain).encode(normal).size, layout)

    assert bits("none") == 16
    assert bits("fp8") == bits("int8") == 8 + 32 / 128
    assert 10.5 < bits("exponent") < 12.5
    noise = torch.randint(-(2**15), 2**15, (64, 128), generator=torch.Generator().manual_seed(1))
    noise = noise.to(torch.int16).view(torch.bfloat16)
    packed = find_codec("exponent").encode(noise)
    assert packed.size <= 4 + 2 * noise.numel(), "what cannot be packed costs four bytes"


def test_int8_and_fp8_keep_their_bounds() -> None:
    wide = page(torch.float32, shape=(50, 3, 64))
    largest = wide.abs().amax(-1, keepdim=True)
    for chain, per_vector in (("int8", 1 / 254), ("fp8", 2.0**-18)):
        codec = find_codec(chain)
        got = codec.decode(codec.encode(wide), PageLayout.of(wide))
        error = (got - wide).abs()
        bound = (
            largest * per_vector
            if chain == "int8"
            else torch.maximum(wide.abs() / 16, largest * per_vector)
        )
        assert (error <= bound * (1 + 1e-5)).all(), chain
        again = codec.decode(codec.encode(got), PageLayout.of(got))
        torch.testing.assert_close(again, got, rtol=1e-6, atol=0)  # error does not grow


@pytest.mark.parametrize("chain", ["fp8", "int8"])
def test_zeros_and_extremes(chain) -> None:
    codec = find_codec(chain)
    odd = torch.tensor([[0.0, 0.0], [1e-45, -1e-45], [3.4e38, -3.4e38], [1e-30, 5e-31]])
    got = codec.decode(codec.encode(odd), PageLayout.of(odd))
    assert got.isfinite().all()
    assert torch.equal(got[0], odd[0])
    torch.testing.assert_close(got[2:], odd[2:], rtol=0.07, atol=0)
    for bad in (float("inf"), float("nan")):
        with pytest.raises(CodecError, match="infinities"):
            codec.encode(torch.tensor([[1.0, bad]]))


@settings(max_examples=60, deadline=None)
@given(
    chain=st.sampled_from(CHAINS),
    change=st.sampled_from(["random", "flip", "cut", "grow"]),
    seed=st.integers(0, 2**32),
)
def test_damaged_bytes_are_refused_or_another_page(chain, change, seed) -> None:
    """Never a crash, never another layout, never more memory than a page takes."""
    codec, wanted = find_codec(chain), page(shape=(2, 4, 8))
    layout, draws = PageLayout.of(wanted), np.random.default_rng(seed)
    size = draws.integers(0, 300) if change == "random" else 0
    data = damaged(codec.encode(wanted), change, draws, size)
    try:
        got = codec.decode(data, layout)
    except CodecError:
        return
    assert PageLayout.of(got) == layout
    assert change in ("random", "flip")


def test_a_frame_that_claims_too_much_is_refused_before_memory_is_taken() -> None:
    bomb = find_codec("zstd").encode(torch.zeros(1 << 22, dtype=torch.bfloat16))
    assert bomb.size < 2000
    with pytest.raises(CodecError, match="8388608"):
        find_codec("zstd").decode(bomb, PageLayout((4, 4), torch.bfloat16))


def test_bad_names_and_orders() -> None:
    with pytest.raises(ValueError, match=r"no codec 'gzip'; there are adaquant, bf16, bfp"):
        find_codec("gzip")
    for chain in ("zstd+fp8", "fp8+int8", "fp8+bf16", ""):
        with pytest.raises(ValueError):
            find_codec(chain)
    with pytest.raises(ValueError, match="no such option"):
        find_codec("fp8:level=3")
    with pytest.raises(ValueError, match="1 to 19"):
        find_codec("zstd:level=99")
    with pytest.raises(CodecError, match="int32"):
        find_codec("int8").encode(torch.ones(2, 2, dtype=torch.int32))
    assert all(part.name == name for name, part in CODECS.items())
