"""Codecs of few bits: real bits, streams, odd shapes, extremes, and what each of them promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels.bits import pack_codes_reference, pack_into, packed_width, unpack_into
from plait.cuda_kernels.block_ints import blocks_reference
from plait.cuda_kernels.hadamard import rotate, rotation_reference, rotation_signs
from plait.cuda_kernels.int_groups import (
    dequantise_groups,
    dequantise_into,
    dequantise_reference,
    quantise_groups,
    quantise_reference,
)
from plait.cuda_kernels.int_groups_gpu import dequantise_launch, quantise_launch, serves
from plait.cuda_kernels.micro_blocks import micro_reference
from plait.cuda_kernels.numbers import bits_of
from plait.cuda_kernels.sign_groups import signs_reference
from plait.cuda_kernels.turbo import lloyd_max
from plait.kvstore import KVSpec, KVStore
from plait.kvstore.codecs import (
    AdaQuant,
    Balancer,
    Codec,
    CodecError,
    CodedTokens,
    Hadamard,
    KSort,
    KVCodec,
    Kvtc,
    Mixed,
    PageLayout,
    Transform,
    allot_bits,
    bits_per_element,
    find_codec,
    find_kv_codec,
)
from plait.kvstore.codecs.bfp import Bfp
from plait.kvstore.compress import Rotary

# name -> real bits of an element of a bfloat16 page of 2 x 32 tokens with 2 heads of 64, all told
INTS = {"int4": 5.0, "int3": 4.0, "int2:group=16": 4.0}  # groups of a token's channels
KIVI = {
    "kivi": 3.0,
    "kivi:bits=4,group=16": 6.0,
    "kivi:bits=3": 4.0,
}  # groups of a channel's tokens
SIGNS = {"ternary": 1.6 + 0.5, "vidkv": 2 - 0.5 + 0.75 + 1 / 32, "vidkv:bits=1.0": 1.5 + 1 / 32}
TURBO = {f"turbo:bits={bits}": bits + 0.25 for bits in (1, 2, 4)} | {"turbo": 3.25}
MX = {
    "mxfp8": 8.25, "mxfp8:form=e5m2,rule=even": 8.25, "mxfp6": 6.25, "mxfp6:form=e3m2": 6.25,
    "mxfp4": 4.25, "mxfp4:rule=ceil": 4.25, "mxint8": 8.25,
}  # fmt: skip
BLOCKS = {"mx9": 9.0, "mx6": 6.0, "mx4": 4.0, "bfp": 4.25, "bfp:bits=5,size=16": 5.5}
PAGE = {"nvfp4": 4.5 + 32 / 8192, "nvfp4:four=True": 4.5 + 32 / 8192}  # one scale for all of it
BITS = {
    **INTS,
    **KIVI,
    **SIGNS,
    **TURBO,
    **MX,
    **BLOCKS,
    **PAGE,
    "hadamard+int4": 5.0,
    "fp8": 8.5,
    "int8": 8.5,
}
ALL = [*BITS]
GROUPS = [*INTS, *KIVI]
CHANNELS = [*KIVI, *SIGNS]
SPREAD = [*TURBO, "hadamard+int4", "vidkv", "vidkv:bits=1.0"]  # an element's error is not its own
NANS = [*MX, *BLOCKS]  # have a code for NaN


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape[:-1], generator=draws)[..., None] * 5
    return (torch.randn(shape, generator=draws) * sizes).to(dtype)


def through(chain: str, page: torch.Tensor) -> torch.Tensor:
    codec = find_codec(chain)
    return codec.decode(codec.encode(page), PageLayout.of(page))


# ---- packing


@settings(max_examples=40, deadline=None)
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
@pytest.mark.parametrize(
    ("channels", "shape", "group"),
    [
        (False, (40, 50), 16), (True, (2, 32, 21), 16),
        (False, (40, 160), 64), (False, (3, 96), 32), (True, (3, 32, 96), 16),  # in registers
    ],
)  # fmt: skip
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_are_the_formulas(dtype, channels, shape, group, bits) -> None:
    x = noise(*shape, dtype=dtype)
    x[..., 1, :] = 3.25  # a constant
    flat = x if channels else x[..., None]
    codes, scales, lows = quantise_groups(x, bits, group, channels)
    wanted = quantise_reference(flat, bits, group)
    packed = pack_codes_reference(wanted[0].reshape(-1, shape[-1]), bits)
    assert torch.equal(codes, packed.reshape(codes.shape))
    assert torch.equal(scales, wanted[1].reshape(scales.shape))
    assert torch.equal(lows, wanted[2].reshape(lows.shape))
    back = dequantise_groups(codes, scales, lows, bits, group, channels, shape[-1], dtype)
    assert torch.equal(back, dequantise_reference(*wanted, group).reshape(shape).to(dtype))
    wide = torch.zeros(*shape[:-1], shape[-1] + 32, dtype=dtype)  # a page within a larger one
    page, numbers = wide[..., 32:], [bits_of(part) for part in (scales, lows)]
    dequantise_into(codes.flatten(0, -2).numpy(), *numbers, bits, group, channels, page)
    assert torch.equal(page, back)
    assert not wide[..., :32].count_nonzero()


def test_operators_know_their_shapes_without_running() -> None:
    for channels, shape in ((False, (4, 50)), (True, (2, 32, 21))):
        x = noise(*shape)
        torch.library.opcheck(quantise_groups, (x, 3, 16, channels))
        parts = quantise_groups(x, 3, 16, channels)
        args = (*parts, 3, 16, channels, shape[-1], torch.bfloat16)
        torch.library.opcheck(dequantise_groups, args)


# ---- every codec


@pytest.mark.parametrize("chain", ALL)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (2, 32, 2, 64)),
        (torch.bfloat16, (64, 3, 5)),
        (torch.float32, (32, 1, 33)),
        (torch.float64, (32, 1, 33)),
    ],
)
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
    into = torch.full_like(page, 7.0)
    codec.decode_into(data, into)
    assert torch.equal(got, into)
    data.flags.writeable = False  # as zstd gives them
    assert torch.equal(got, codec.decode(data, layout))
    shifted = np.empty(data.size + 1, np.uint8)[1:]  # as they lie behind keys of an odd length
    shifted[:] = data
    assert torch.equal(got, codec.decode(shifted, layout))
    if shape[-1] == 64 and dtype == torch.bfloat16:
        assert bits_per_element(data.size, layout) == pytest.approx(BITS[chain], abs=0.002)


@pytest.mark.parametrize("width", [64, 33])
def test_pages_that_were_coded_together_are_decoded_apart(width) -> None:
    """Some of them, in any order, are what they are among all; or the codec says that it cannot tell them apart."""
    apart = []
    for chain in (*ALL, "none", "bf16+int8", "hadamard+mxfp4", "int8+zstd"):
        codec, pages = find_codec(chain), noise(5, 32, 2, width)
        data, index = codec.encode(pages), np.array([3, 0, 3])
        one = PageLayout.of(pages[0])
        if codec.sections(one) is None:
            with pytest.raises(CodecError, match="cannot be decoded apart"):
                codec.some_pages(data, one, index)
            continue
        apart.append(chain)
        some = codec.decode(
            codec.some_pages(data, one, index), PageLayout((3, *one.shape), one.dtype)
        )
        assert torch.equal(some, codec.decode(data, PageLayout.of(pages))[index]), chain
    assert {chain for chain in ALL if chain not in apart} <= {"ternary"}
    assert {"none", "bf16+int8", "hadamard+mxfp4"} < set(apart)


@pytest.mark.parametrize("chain", ALL)
def test_names_come_back(chain) -> None:
    codec = find_codec(chain)
    assert str(codec) == chain
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
    if chain not in PAGE:
        assert torch.equal(whole.tokens()[:coded], through(chain, x[:coded])), (
            "runs know of each other"
        )


@pytest.mark.parametrize("chain", ALL)
def test_extremes(chain) -> None:
    x = torch.zeros(64, 1, 40, dtype=torch.bfloat16)
    assert torch.equal(through(chain, x), x)
    for constant in (-7.25, 1e-40):  # the second is subnormal
        x[:] = constant
        if chain in GROUPS:
            assert torch.equal(through(chain, x), x), "a constant is exact"
        else:
            assert (through(chain, x) - x).double().norm() <= x.double().norm() * 1.001
    x.zero_()
    x[5, 0, 7] = 1e30
    if chain == "hadamard+int4":
        with pytest.raises(CodecError, match="or bf16 before it"):
            through(chain, x)
        got = through("hadamard+bf16+int4", x)
    else:
        got = through(chain, x)
    assert got.isfinite().all()
    if chain not in SPREAD + list(SIGNS):
        assert float(got[5, 0, 7]) == pytest.approx(1e30, rel=0.26)
        assert got.count_nonzero() == 1
    for bad in (float("inf"), float("nan"), -float("inf")):
        x[5, 0, 7] = bad
        if chain not in NANS:
            with pytest.raises(CodecError, match="infinities"):
                find_codec(chain).encode(x)
            continue
        got = through(chain, x)
        block = got[5, 0, : 7 + 1]
        assert (
            block.isnan().all()
            if bad != bad
            else (not got.isnan().any() and float(got[5, 0, 7]) * bad > 1e38)
        )
        assert not got[6:].count_nonzero(), "the rest of the page has nothing to do with it"


def test_values_beyond_float16_are_refused_and_bf16_takes_them() -> None:
    x = noise(32, 1, 32, dtype=torch.float32) * 1e6
    with pytest.raises(CodecError, match="or bf16 before it"):
        find_codec("int4").encode(x)
    assert (through("bf16+int4", x) - x).abs().max() < x.abs().max() / 15


@pytest.mark.parametrize("chain", GROUPS)
def test_errors_are_at_most_half_a_step(chain) -> None:
    x = noise(64, 2, 64, dtype=torch.float32)
    bits, size = find_codec(chain).writer.groups(PageLayout.of(x))[1:3]
    along = x.movedim(0, -1) if chain in KIVI else x
    back = through(chain, x)
    error = ((back.movedim(0, -1) if chain in KIVI else back) - along).abs()
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


@settings(max_examples=40, deadline=None)
@given(
    chain=st.sampled_from(ALL),
    change=st.sampled_from(["random", "flip", "cut", "grow"]),
    seed=st.integers(0, 2**32),
)
def test_damaged_bytes_are_refused_or_another_page(chain, change, seed) -> None:
    codec, wanted = find_codec(chain), noise(32, 1, 9)
    layout, draws = PageLayout.of(wanted), np.random.default_rng(seed)
    data = codec.encode(wanted)
    data = damaged(data, change, draws, data.size)
    try:
        got = codec.decode(data, layout)
    except CodecError:
        assert change in ("cut", "grow") or chain.startswith("vidkv")
        return
    assert PageLayout.of(got) == layout


# ---- transforms


def calibrated(name: str, k: torch.Tensor, q: torch.Tensor) -> Transform:
    if name == "hadamard":
        return Hadamard(seed=7)
    return KSort.of(k) if name == "ksort" else Balancer.of(q.abs().amax(0), k.abs().amax(0))


@pytest.mark.parametrize("name", ["hadamard", "balancer", "ksort"])
@pytest.mark.parametrize("width", [64, 80, 33, 1])
def test_transforms_keep_the_products_of_queries_and_keys(name, width) -> None:
    k, q = (
        noise(16, 2, width, dtype=torch.float32),
        noise(16, 2, width, dtype=torch.float32, seed=1),
    )
    k[..., 0] *= 50
    change = calibrated(name, k, q)
    other, mirrored = change.encode(k), change.queries(q)
    old, new = ((a.double() * b.double()).sum(-1) for a, b in ((q, k), (mirrored, other)))
    assert ((old - new).abs() <= 1e-5 * q.norm(dim=-1) * k.norm(dim=-1)).all()
    if width > 1:
        wrong = (q.double() * other.double()).sum(-1)
        assert ((old - wrong).abs() > 1e-3 * q.norm(dim=-1) * k.norm(dim=-1)).any(), (
            "queries not mirrored"
        )
    back = change.decode(other, PageLayout.of(k))
    assert torch.equal(back, k) if change.lossless else torch.allclose(back, k, atol=1e-4)


def test_rotary_embedding_goes_before_the_rotation_and_not_after() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01, 0.001]))
    k, q, at = (
        noise(9, 8, dtype=torch.float64),
        noise(9, 8, dtype=torch.float64, seed=1),
        torch.arange(9),
    )
    products = rotary.rotate(q, at) @ rotary.rotate(k, at).T
    turn = Hadamard().queries
    assert torch.allclose(turn(rotary.rotate(q, at)) @ turn(rotary.rotate(k, at)).T, products)
    assert not torch.allclose(rotary.rotate(turn(q), at) @ rotary.rotate(turn(k), at).T, products)


@pytest.mark.parametrize("width", [1, 2, 64, 128])
def test_rotations_are_hadamard_matrices_with_signs(width) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    turn = rotation_reference(width, 5)
    signs = torch.from_numpy(rotation_signs(width, 5))[0].double()
    assert torch.equal(
        turn * signs * width**0.5, torch.from_numpy(linalg.hadamard(width)).double().round()
    ) or (
        torch.allclose(
            turn * signs * width**0.5, torch.from_numpy(linalg.hadamard(width)).double(), atol=1e-14
        )
    )


@pytest.mark.parametrize("width", [2, 33, 80, 128, 576])
def test_rotations_are_orthonormal_and_mix_everything(width) -> None:
    turn = rotation_reference(width, 5)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    if width > 33:
        assert (turn.abs().amax(0) < 0.7).all()
    x = noise(37, width, dtype=torch.float32)
    assert torch.allclose(rotate(x, 5, False), (x.double() @ turn.T).float(), atol=1e-4)
    assert not torch.equal(rotation_reference(width, 6), turn)
    torch.library.opcheck(rotate, (x, 5, True))


# ---- errors: known constants, known orders


def squared(chain: str, x: torch.Tensor) -> float:
    return float(
        (through(chain, x).double() - x.double()).square().sum() / x.double().square().sum()
    )


@pytest.mark.parametrize(
    ("width", "wanted"),
    [(128, (0.3609, 0.1160, 0.0340, 0.0093)), (64, (0.3584, 0.1145, 0.0334, 0.0091))],
)
def test_turbo_has_the_distortion_of_the_sphere(width, wanted) -> None:
    x = torch.randn(4000, width, generator=torch.Generator().manual_seed(0))
    for bits, value in enumerate(wanted, 1):
        assert squared(f"turbo:bits={bits}", x) == pytest.approx(value, rel=0.02)


def test_lloyd_max_levels_are_the_published_ones() -> None:
    for bits, wanted in (
        (1, [0.7979]), (2, [0.4528, 1.5104]), (3, [0.2451, 0.7560, 1.3439, 2.1520]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326]),
    ):  # fmt: skip
        assert lloyd_max(bits)[0][2 ** (bits - 1) :] == pytest.approx(wanted, abs=6e-5)


def test_the_order_of_codecs_on_keys_with_an_outlier_pair() -> None:
    x = torch.randn(512, 1, 64, generator=torch.Generator().manual_seed(0))
    plain = x.clone()
    x[..., 5] *= 12
    x[..., 37] *= 12
    rest = [c for c in range(64) if c not in (5, 37)]

    def error(chain: str, keys: torch.Tensor) -> float:
        return float((through(chain, keys) - keys)[..., rest].square().mean())

    for bits in (2, 3):
        naive, turned, kivi = (
            error(f"{c}", x) for c in (f"int{bits}", f"hadamard+int{bits}", f"kivi:bits={bits}")
        )
        assert naive > turned > kivi
        assert kivi == error(f"kivi:bits={bits}", plain), "a channel knows nothing of another"
    assert squared("nvfp4:four=True", plain) < squared("nvfp4", plain) < squared("mxfp4", plain)
    assert squared("vidkv", plain) < squared("vidkv:bits=1.0", plain)


def test_vidkv_is_its_formulas() -> None:
    """Two bits where the range is wide; elsewhere the sign of each Fourier coefficient times its mean size."""
    x = noise(32, 1, 8, dtype=torch.float32)
    x[..., [1, 6]] *= 20
    got = through("vidkv:bits=1.25", x)
    wide, rest = [1, 6], [0, 2, 3, 4, 5, 7]
    assert torch.equal(got[..., wide], through("kivi", x[..., wide]))
    spectrum = torch.fft.rfft(x[:, 0, rest].double(), norm="ortho")
    parts = torch.cat([spectrum.real, spectrum.imag[:, 1:-1]], 1)
    size = parts.abs().mean(0)
    coded = torch.where(parts >= 0, size, -size)
    imag = torch.nn.functional.pad(coded[:, 4:], (1, 1))
    back = torch.fft.irfft(torch.complex(coded[:, :4], imag), n=6, norm="ortho")
    assert torch.allclose(got[:, 0, rest].double(), back, atol=float(size.max()) * 2e-3)


def test_ternary_keeps_sign_and_scale() -> None:
    x = noise(64, 2, 5)
    got = through("ternary", x).reshape(2, 32, 10)
    assert torch.equal(got, signs_reference(x.reshape(2, 32, 10), True).to(x.dtype))
    assert got.unique().numel() > 3, "the scale is not lost"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_block_floating_point_is_its_formula(bits) -> None:
    x = noise(40, 64)
    assert torch.equal(through(f"bfp:bits={bits}", x), blocks_reference(x, bits, 32).to(x.dtype))
    if bits == 8:
        assert torch.equal(through("mxint8", x), through("bfp:bits=8", x))


@pytest.mark.parametrize(("chain", "magnitude"), [("mx9", 7), ("mx6", 4), ("mx4", 2)])
def test_shared_microexponents_are_their_formula(chain, magnitude) -> None:
    x = noise(40, 64)
    x[:, ::7] /= 64
    assert torch.equal(through(chain, x), micro_reference(x, magnitude).to(x.dtype))


def test_sorted_channels_help_when_outliers_fill_blocks() -> None:
    x = noise(64, 1, 32, dtype=torch.float32)
    x[..., [1, 4, 9, 11, 17, 20, 25, 30]] *= 12
    sort = Codec((KSort.of(x),), Bfp(size=8), ())
    plain = find_codec("bfp:size=8")
    both = [codec.decode(codec.encode(x), PageLayout.of(x)) for codec in (sort, plain)]
    small = [c for c in range(32) if x[..., c].abs().mean() < 20]
    errors = [float((got - x)[..., small].square().mean()) for got in both]
    assert errors[0] < errors[1] / 4
    assert both[0].isfinite().all()


# ---- several codecs in a page


def test_mixed_tiers_are_their_codecs_and_nothing_is_eviction() -> None:
    x = noise(40, 3, 33)
    layout = PageLayout.of(x)
    draws = torch.Generator().manual_seed(0)
    tiers = torch.randint(0, 3, (40, 3), generator=draws).to(torch.uint8)
    mixed = Mixed((None, find_codec("int2"), find_codec("none")))
    data = mixed.encode(x, tiers)
    assert data.size == mixed.num_bytes(tiers, layout)
    got, found = mixed.decode(data, layout)
    assert torch.equal(found, tiers)
    assert not got[tiers == 0].count_nonzero()
    assert torch.equal(got[tiers == 1], through("int2", x)[tiers == 1])
    assert torch.equal(got[tiers == 2], x[tiers == 2])
    everything = Mixed((find_codec("int4"),))
    data = everything.encode(x, torch.zeros(40, 3, dtype=torch.uint8))
    assert data.tobytes() == find_codec("int4").encode(x.flatten(0, 1)).tobytes()
    nothing = Mixed((None,)).encode(x, torch.zeros(40, 3, dtype=torch.uint8))
    assert nothing.size == 0
    for cut in (mixed.encode(x, tiers)[:-1], np.zeros(3, np.uint8)):
        with pytest.raises(CodecError):
            mixed.decode(cut, layout)
    with pytest.raises(CodecError, match="codes tokens together"):
        Mixed((find_codec("kivi"),))
    with pytest.raises(CodecError, match="does not fit"):
        mixed.encode(x, tiers + 3)


def test_keeping_the_rest_in_few_bits_needs_the_balancer() -> None:
    """MiKV: with outlier channels the unimportant tokens are lost to int3 unless channels are balanced first."""
    k = torch.randn(256, 1, 32, generator=torch.Generator().manual_seed(0))
    q = torch.randn(256, 1, 32, generator=torch.Generator().manual_seed(1))
    k[..., 3], q[..., 3] = k[..., 3] * 16, q[..., 3] / 16
    tiers = torch.zeros(256, 1, dtype=torch.uint8)
    tiers[::10] = 1
    mixed, layout = Mixed((find_codec("int3"), find_codec("none"))), PageLayout.of(k)

    def miss(balance: Balancer) -> float:
        got = balance.decode(
            mixed.decode(mixed.encode(balance.encode(k), tiers), layout)[0], layout
        )
        return float(((q * got).sum(-1) - (q * k).sum(-1)).square().mean())

    balanced = miss(Balancer.of(q.abs().amax(0), k.abs().amax(0)))
    assert balanced < miss(Balancer(torch.ones(1, 32))) / 5


# ---- bits where they pay


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 100), min_size=1, max_size=5),
    average=st.floats(2, 8),
    choices=st.sampled_from([(1, 2, 4), (0, 1, 2, 3), (1, 1.58, 2, 4, 6, 8), (2, 8)]),
)
def test_allotted_bits_are_the_best_there_are(weights, average, choices) -> None:
    total = round(average * len(weights), 2)
    found = allot_bits(weights, total, choices)

    def loss(bits) -> float:
        return sum(w * 4.0**-b for w, b in zip(weights, bits, strict=True))

    tries = (bits for bits in product(choices, repeat=len(weights)) if sum(bits) <= total + 1e-9)
    assert sum(found) <= total + 1e-9
    assert loss(found) == pytest.approx(min(map(loss, tries)), rel=1e-12, abs=1e-300)


def test_keys_get_more_bits_than_values_and_layers_their_own() -> None:
    keys, values = AdaQuant.of([30.0, 60.0, 90.0], [5.0, 5.0, 20.0], bits=4)
    bits = [[int(b) for b in part.writer.bits.split("-")] for part in (keys, values)]
    assert sum(bits[0]) + sum(bits[1]) <= 24
    assert min(bits[0]) >= max(bits[1])
    x = noise(3, 16, 2, 32)
    data = keys.encode(x)
    assert data.size == keys.max_bytes(PageLayout.of(x))
    got = keys.decode(data, PageLayout.of(x))
    for layer in range(3):
        one = keys.writer.of_layer(layer, 3)
        assert torch.equal(got[layer], one.decode(one.encode(x[layer]), PageLayout.of(x[layer])))
    assert find_codec(str(keys)) == keys
    with pytest.raises(CodecError, match="has 2"):
        keys.encode(x[:2])
    with pytest.raises(ValueError, match="'5' is none of 2, 3, 4, 8"):
        find_codec("adaquant:bits=4-5")
    with pytest.raises(ValueError, match="too few"):
        allot_bits([1.0, 1.0], 3, (2, 4))


# ---- the transform codec


def lowrank(layers: int, tokens: int, seed: int) -> torch.Tensor:
    """Keys as models have them: few directions carry most."""
    draws = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(layers, 64, 64, generator=torch.Generator().manual_seed(9))
    )[0]
    sizes = 0.8 ** torch.arange(64)
    x = (torch.randn(layers, tokens, 64, generator=draws) * sizes) @ basis.transpose(1, 2) + 0.3
    return x.reshape(layers, tokens, 2, 32)


def test_kvtc_beats_bits_spent_evenly_and_packs() -> None:
    codec = Codec((), Kvtc.calibrate(lowrank(2, 2000, 0), bits=1.5), ())
    x = lowrank(2, 256, 1)
    layout = PageLayout.of(x)
    data = codec.encode(x)
    got = codec.decode(data, layout)
    bits = bits_per_element(data.size, layout)
    assert bits <= 1.5 + 32 / x.numel()
    error = float((got - x).square().mean() / (x - x.mean((0, 1))).square().mean())
    assert error < squared("int4", x) < 0.02
    finest = Codec((), Kvtc.calibrate(lowrank(2, 2000, 0), bits=8), ())
    assert torch.allclose(finest.decode(finest.encode(x), layout), x, atol=0.05)
    with pytest.raises(CodecError, match="infinities"):
        codec.encode(x / 0)
    with pytest.raises(CodecError, match="calibrated for 2 layers of 64"):
        codec.encode(x[:1])
    with pytest.raises(ValueError, match="bits=9"):
        Kvtc.calibrate(x, bits=9)


def test_kvtc_in_a_store_and_as_a_stream() -> None:
    codec = Codec((), Kvtc.calibrate(lowrank(2, 500, 0), bits=2), ())
    spec, k = KVSpec(2, 2, 32, 16), lowrank(2, 33, 2)
    with KVStore(
        spec, device_bytes="1MiB", host_bytes="1MiB", codec=KVCodec(codec, codec), fetch="always"
    ) as store:
        with store.open(np.arange(33)) as seq:
            step = store.reserve([seq], [33])
            for layer in range(2):
                store.append(step, layer, k[layer], k[layer])
            store.commit(step)
        assert store.flush(10)
        store.evict()
        with store.open(np.arange(33)) as seq:
            got = store.keys_values(seq, 1)[0]
    assert got.shape[0] == 32
    assert 0 < float((got - k[1, :32]).square().mean() / k[1].square().mean()) < 0.02
    one = Codec((), Kvtc.calibrate(lowrank(1, 500, 0)[0], bits=2), ())
    whole, bitwise = CodedTokens(one, 5), CodedTokens(one, 5)
    whole.append(k[0])
    whole.append(k[1])
    for row in torch.cat([k[0], k[1]]):
        bitwise.append(row[None])
    assert [a.tobytes() for a in whole.coded] == [a.tobytes() for a in bitwise.coded]


@settings(max_examples=25, deadline=None)
@given(change=st.sampled_from(["random", "flip", "cut"]), seed=st.integers(0, 2**32))
def test_damaged_kvtc_is_refused_or_another_page(change, seed) -> None:
    x = lowrank(1, 32, 3)
    codec = Kvtc.calibrate(lowrank(1, 200, 0), bits=2)
    data = damaged(codec.encode(x), change, np.random.default_rng(seed), 50)
    try:
        assert codec.decode(data, PageLayout.of(x)).shape == x.shape
    except CodecError:
        return
    assert change == "flip"


def test_calibrated_parts_are_equal_by_their_numbers_and_have_no_text() -> None:
    k = noise(16, 2, 8, dtype=torch.float32)
    assert KSort.of(k) == KSort.of(k.clone())
    assert KSort.of(k) != KSort.of(k.flip(-1))
    assert (
        len({Balancer(torch.ones(2, 8)), Balancer(torch.ones(2, 8)), Balancer(torch.ones(8))}) == 2
    )
    for text in ("balancer+int4", "ksort+bfp", "kvtc"):
        with pytest.raises(ValueError, match="has no text form: give a Codec with it"):
            find_codec(text)
    with pytest.raises(CodecError, match=r"calibrated for \[2, 8\], the page is \[16, 3, 8\]"):
        Codec((KSort.of(k),), Bfp(), ()).encode(noise(16, 3, 8))


# ---- the CUDA kernels, simulated


@pytest.mark.parametrize(
    ("dtype", "bits", "group"),
    [
        (torch.bfloat16, 2, 16),
        (torch.bfloat16, 4, 32),
        (torch.float16, 8, 16),
        (torch.float32, 4, 16),
    ],
)
def test_cuda_kernels_code_as_the_cpu_does(dtype, bits, group) -> None:
    x = noise(5, 64, dtype=dtype)
    x[1, :group] = 2.5
    x[2] = 0
    if dtype == torch.bfloat16:
        x[3] *= 2.0**100
        x[4] *= 2.0**-128  # with scales that are subnormal
    wanted = quantise_groups(x, bits, group, False)
    got, flag = [torch.full_like(part, 99) for part in wanted], torch.zeros(1, dtype=torch.int32)
    assert serves(dtype, 64, bits, group)
    variant, grid, args = quantise_launch(x, bits, group, *got, flag)
    variant.simulate(grid, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not flag.any()
    back = torch.full_like(x, float("nan"))
    variant, grid, args = dequantise_launch(*wanted, bits, group, back)
    variant.simulate(grid, *args)
    assert torch.equal(back, dequantise_groups(*wanted, bits, group, False, 64, dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[3, 40] = bad
        variant, grid, args = quantise_launch(x, bits, group, *got, flag.zero_())
        variant.simulate(grid, *args)
        assert flag.item() == 1


def test_cuda_kernels_take_whole_groups_only() -> None:
    assert not serves(torch.bfloat16, 80, 4, 32)
    assert not serves(torch.bfloat16, 64, 3, 32)
    assert not serves(torch.float64, 64, 4, 32)
    assert not serves(torch.bfloat16, 48, 4, 48)
