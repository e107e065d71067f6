"""Codecs of few bits: real bits, streams, odd shapes, extremes, and what each of them promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels.bits import pack_codes_reference, pack_into, packed_width, unpack_into
from plait.cuda_kernels.int_groups import (
    dequantise_groups,
    dequantise_reference,
    quantise_groups,
    quantise_reference,
)
from plait.kvstore import KVSpec, KVStore
from plait.kvstore.codecs import (
    CodecError,
    CodedTokens,
    PageLayout,
    bits_per_element,
    find_codec,
    find_kv_codec,
)

TOKENS = ["int4", "int3", "int2:group=16"]  # each vector by itself
CHANNELS = ["kivi", "kivi:bits=4,group=16", "kivi:bits=3"]  # groups of tokens
ALL = TOKENS + CHANNELS
# bits of an element of a bfloat16 page with heads of 64, all told
BITS = {
    "int4": 5.0,
    "int3": 4.0,
    "int2:group=16": 4.0,
    "kivi": 3.0,
    "kivi:bits=4,group=16": 6.0,
    "kivi:bits=3": 4.0,
}


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape[:-1], generator=draws)[..., None] * 5
    return (torch.randn(shape, generator=draws) * sizes).to(dtype)


def through(chain: str, page: torch.Tensor) -> torch.Tensor:
    codec = find_codec(chain)
    return codec.decode(codec.encode(page), PageLayout.of(page))


# ---- packing


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    bits=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_packed_codes_come_back(rows, width, bits, seed) -> None:
    draws = np.random.default_rng(seed)
    codes = draws.integers(0, 1 << bits, (rows, width), dtype=np.uint8)
    out = np.empty((rows, packed_width(width, bits)), np.uint8)
    pack_into(codes, bits, out)
    assert np.array_equal(out, pack_codes_reference(torch.from_numpy(codes), bits).numpy())
    back = np.empty_like(codes)
    unpack_into(out, bits, back)
    assert np.array_equal(back, codes)


# ---- kernels against plain torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "shape"), [(False, (40, 50)), (True, (2, 32, 21))])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_are_the_formulas(dtype, channels, shape, bits) -> None:
    x = noise(*shape, dtype=dtype)
    x[..., 1, :] = 3.25  # a constant
    flat = x if channels else x[..., None]
    codes, scales, lows = quantise_groups(x, bits, 16, channels)
    wanted = quantise_reference(flat, bits, 16)
    packed = pack_codes_reference(wanted[0].reshape(-1, shape[-1]), bits)
    assert torch.equal(codes, packed.reshape(codes.shape))
    assert torch.equal(scales, wanted[1].reshape(scales.shape))
    assert torch.equal(lows, wanted[2].reshape(lows.shape))
    back = dequantise_groups(codes, scales, lows, bits, 16, channels, shape[-1], dtype)
    assert torch.equal(back, dequantise_reference(*wanted, 16).reshape(shape).to(dtype))


def test_operators_know_their_shapes_without_running() -> None:
    for channels, shape in ((False, (4, 50)), (True, (2, 32, 21))):
        x = noise(*shape)
        torch.library.opcheck(quantise_groups, (x, 3, 16, channels))
        parts = quantise_groups(x, 3, 16, channels)
        args = (*parts, 3, 16, channels, shape[-1], torch.bfloat16)
        torch.library.opcheck(dequantise_groups, args)


# ---- every codec


@pytest.mark.parametrize("chain", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 32, 2, 64), (32, 1, 33), (64, 3, 5)])
def test_real_bytes_are_the_promised_ones(chain, dtype, shape) -> None:
    codec, page = find_codec(chain), noise(*shape, dtype=dtype)
    layout = PageLayout.of(page)
    data = codec.encode(page)
    assert codec.fixed
    assert data.size == codec.max_bytes(layout)
    assert np.array_equal(data, codec.encode(page.clone())), "not deterministic"
    got = codec.decode(data.copy(), layout)
    assert PageLayout.of(got) == layout
    assert torch.equal(got, codec.decode(data, layout))
    data.flags.writeable = False  # as zstd gives them
    assert torch.equal(got, codec.decode(data, layout))
    shifted = np.empty(data.size + 1, np.uint8)[1:]  # as they lie behind keys of an odd length
    shifted[:] = data
    assert torch.equal(got, codec.decode(shifted, layout))
    if shape[-1] == 64 and dtype == torch.bfloat16:
        assert bits_per_element(data.size, layout) == BITS[chain]


@pytest.mark.parametrize("chain", ALL)
def test_names_come_back(chain) -> None:
    codec = find_codec(chain)
    assert str(codec) == chain.replace("kivi:bits=2", "kivi")
    assert find_codec(str(codec)) == codec
    assert not codec.lossless


@pytest.mark.parametrize("chain", ALL)
@pytest.mark.parametrize("tail", [0, 5, 40])
def test_a_stream_is_one_shot_bit_for_bit(chain, tail) -> None:
    codec, x = find_codec(chain), noise(100, 2, 33)
    whole = CodedTokens(codec, tail)
    whole.append(x)
    for cuts in ([1] * 100, [37, 63], [99, 1]):
        run, seen = CodedTokens(codec, tail), []
        for piece in x.split(cuts):
            run.append(piece)
            assert all(a is b for a, b in zip(seen, run.coded, strict=False)), "coded again"
            seen = list(run.coded)
        assert len(run) == 100
        assert run.num_bytes == whole.num_bytes
        assert [a.tobytes() for a in run.coded] == [a.tobytes() for a in whole.coded]
        assert torch.equal(run.tokens(), whole.tokens())
    coded = len(whole.coded) * whole.run
    assert coded == (100 - tail) // whole.run * whole.run
    assert torch.equal(whole.tokens()[coded:], x[coded:])
    assert torch.equal(whole.tokens()[:coded], through(chain, x[:coded])), "runs know of each other"


@pytest.mark.parametrize("chain", ALL)
def test_extremes(chain) -> None:
    x = torch.zeros(64, 1, 40, dtype=torch.bfloat16)
    assert torch.equal(through(chain, x), x)
    x[:] = -7.25
    assert torch.equal(through(chain, x), x), "a constant is exact"
    x[:] = 1e-40  # subnormal
    assert torch.equal(through(chain, x), x)
    x.zero_()
    x[5, 0, 7] = 1e30
    got = through(chain, x)
    assert got.isfinite().all()
    assert float(got[5, 0, 7]) == pytest.approx(1e30, rel=0.01)
    assert got.count_nonzero() == 1
    for bad in (float("inf"), float("nan"), -float("inf")):
        x[5, 0, 7] = bad
        with pytest.raises(CodecError, match="infinities"):
            find_codec(chain).encode(x)


def test_values_beyond_float16_are_refused_and_bf16_takes_them() -> None:
    x = noise(32, 1, 32, dtype=torch.float32) * 1e6
    with pytest.raises(CodecError, match="or bf16 before it"):
        find_codec("int4").encode(x)
    assert (through("bf16+int4", x) - x).abs().max() < x.abs().max() / 15


@pytest.mark.parametrize("chain", ALL)
def test_errors_are_at_most_half_a_step(chain) -> None:
    x = noise(64, 2, 64, dtype=torch.float32)
    bits, size = find_codec(chain).writer.groups(PageLayout.of(x))[1:3]
    along = x.movedim(0, -1) if chain in CHANNELS else x
    back = through(chain, x)
    error = ((back.movedim(0, -1) if chain in CHANNELS else back) - along).abs()
    groups, misses = along.unfold(-1, size, size), error.unfold(-1, size, size)
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    assert (misses.amax(-1) <= step * 0.51 + groups.abs().amax(-1) * 2**-11).all()
    assert misses.amax() > step.amax() * 0.4, "the bound is near"


# ---- what a codec of channels has and one of tokens has not


def test_scaled_channels_scale_back_exactly_with_kivi_and_not_per_token() -> None:
    x = noise(64, 2, 32, dtype=torch.float32)
    powers = 2.0 ** torch.randint(-3, 6, (32,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(through("kivi", x * powers), through("kivi", x) * powers)
    assert not torch.equal(through("int2", x * powers), through("int2", x) * powers)
    tokens = 2.0 ** torch.randint(-3, 6, (64, 1, 1), generator=torch.Generator().manual_seed(1))
    assert torch.equal(through("int2", x * tokens), through("int2", x) * tokens)
    assert not torch.equal(through("kivi", x * tokens), through("kivi", x) * tokens)


def test_outlier_channels_hurt_per_token_and_not_kivi() -> None:
    x = noise(64, 2, 32, dtype=torch.float32)
    x[..., 3] *= 30

    def error(chain: str) -> float:
        rest = torch.arange(32) != 3
        return float((through(chain, x) - x)[..., rest].square().mean())

    assert error("kivi") < error("int2") / 5


# ---- keys and values


def test_keys_and_values_have_codecs_of_their_own() -> None:
    both = find_kv_codec("kivi:bits=2,group=16")
    assert str(both.keys) == "kivi:group=16"
    assert str(both.values) == "int2:group=16"
    assert str(both) == "kivi:group=16"
    apart = find_kv_codec("int4/int2+zstd")
    assert (str(apart.keys), str(apart.values)) == ("int4", "int2+zstd")
    assert find_kv_codec(str(apart)) == apart
    assert find_kv_codec(apart) is apart
    assert find_kv_codec("exponent").lossless
    with pytest.raises(CodecError, match="bits=5 has no codec of values"):
        find_kv_codec("kivi:bits=5")
    assert str(find_kv_codec("kivi:bits=5/int4").keys) == "kivi:bits=5"


@pytest.mark.parametrize(("codec", "bits"), [("kivi:group=16", 4.0), ("int4/int2", 4.0)])
def test_a_store_keeps_what_its_codecs_give(codec, bits) -> None:
    spec = KVSpec(2, 2, 64, 16, torch.bfloat16)
    k, v = noise(33, 2, 64), noise(33, 2, 64, seed=1)
    both = find_kv_codec(codec)
    with KVStore(
        spec, device_bytes="1MiB", host_bytes="1MiB", codec=codec, fetch="always"
    ) as store:
        ids = np.arange(33)
        with store.open(ids) as seq:
            step = store.reserve([seq], [33])
            for layer in range(2):
                store.append(step, layer, k, v)
            store.commit(step)
        assert store.flush(10)
        assert store.evict() > 0
        with store.open(ids) as seq:
            assert seq.cached_tokens == 32
            got = store.keys_values(seq, 1)
    for found, codec_of, wanted in zip(got, (both.keys, both.values), (k, v), strict=True):
        pages = [
            codec_of.decode(codec_of.encode(p), PageLayout.of(p)) for p in wanted[:32].split(16)
        ]
        assert torch.equal(found, torch.cat(pages))
    sizes = [c.max_bytes(PageLayout((16, 2, 64), torch.bfloat16)) for c in (both.keys, both.values)]
    assert sum(sizes) * 8 / (2 * 16 * 2 * 64) == bits


def test_what_does_not_fit_is_refused_with_a_way_out() -> None:
    with pytest.raises(
        CodecError, match=r"groups of 32 tokens do not fit pages of 16; use group=16 or page_tokens"
    ):
        KVStore(KVSpec(1, 1, 8), host_bytes="1MiB", codec="kivi")
    with pytest.raises(CodecError, match=r"must be \[..., tokens, kv_heads, head_dim\]"):
        find_codec("kivi").encode(noise(32, 8))
    with pytest.raises(ValueError, match="group=0 at least 1"):
        find_codec("int4:group=0")
    with pytest.raises(ValueError, match="bits=9 must be 1 to 8"):
        find_codec("kivi:bits=9")
    with pytest.raises(CodecError, match="multiple of 32, which kivi codes together"):
        CodedTokens(find_codec("kivi"), run=48)
    run = CodedTokens(find_codec("int4"))
    with pytest.raises(CodecError, match="no token"):
        run.tokens()
    run.append(noise(3, 2, 8))
    with pytest.raises(CodecError, match="after"):
        run.append(noise(3, 2, 9))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    chain=st.sampled_from(ALL),
    change=st.sampled_from(["random", "flip", "cut", "grow"]),
    seed=st.integers(0, 2**32),
)
def test_damaged_bytes_are_refused_or_another_page(chain, change, seed) -> None:
    codec, wanted = find_codec(chain), noise(32, 1, 9)
    layout, draws = PageLayout.of(wanted), np.random.default_rng(seed)
    data = codec.encode(wanted).copy()
    if change == "random":
        data = draws.integers(0, 256, data.size, dtype=np.uint8)
    elif change == "flip":
        data[draws.integers(data.size)] ^= 1 << draws.integers(8)
    elif change == "cut":
        data = data[: draws.integers(data.size)]
    else:
        data = np.concatenate([data, data])
    try:
        got = codec.decode(data, layout)
    except CodecError:
        assert change in ("cut", "grow")
        return
    assert PageLayout.of(got) == layout
