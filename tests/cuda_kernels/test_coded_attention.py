"""Attention to pages of codes: what the store's codecs write, read by the simulated kernel, against float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from mutated import mutated
from plait.cuda_kernels import merge_states, paged_decode
from plait.cuda_kernels.coded_attention import (
    coded_attention,
    coded_launch,
    cut_pages,
    decode_pages_reference,
    served_coded,
)
from plait.cuda_kernels.gpu import page_forms
from plait.cuda_kernels.paged_attention import paged_attention_reference
from plait.kvstore.codecs import PageLayout, find_codec

SINGLE, BLOCKS = ["e4m3", "int8"], {"int4": 16, "mxfp8": 32, "mxfp4": 32}
CODECS = {
    "e4m3": "fp8",
    "int8": "int8",
    "int4": "int4:group=16",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
}
PAGES, TOKENS, KV_HEADS = 4, 16, 2


def coded(form: str, width: int, alone: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages as the store's codec writes them, and what it decodes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(PAGES, TOKENS, KV_HEADS, width, generator=g)
    x[0, 3] = 0
    x[1, 4, 1, :8] *= 100
    x[2, 5] *= 2.0**-30
    x, codec = x.bfloat16(), find_codec(CODECS[form])
    kind = (
        torch.float32 if form in SINGLE else torch.bfloat16
    )  # the kernel does not round such products
    if not alone:
        data = torch.from_numpy(codec.encode(x))
        return data, codec.decode(data.numpy(), PageLayout(tuple(x.shape), kind))
    each = [torch.from_numpy(codec.encode(page)) for page in x]
    decoded = [codec.decode(data.numpy(), PageLayout(tuple(x[0].shape), kind)) for data in each]
    return torch.stack(each), torch.stack(decoded)


INTEGERS = [
    torch.tensor([0, 2, 3]), torch.tensor([0, 3, 4]), torch.tensor([2, 0, 3, 1]),
    torch.tensor([0, 20, 1]), torch.tensor([41, 44, 14]),
]  # fmt: skip


def check(module, k_form, v_form, group=3, width=64, alone=False, splits=1, cap=0.0) -> None:
    (k_data, k), (v_data, v) = (
        coded(form, width, alone, seed) for seed, form in enumerate((k_form, v_form))
    )
    keys, values = (
        cut_pages(data, form, BLOCKS.get(form, 0), PAGES, TOKENS * KV_HEADS, width)
        for data, form in ((k_data, k_form), (v_data, v_form))
    )
    q = torch.randn(3, group * KV_HEADS, width, generator=torch.Generator().manual_seed(5))
    q = q.bfloat16()
    assert served_coded(q, keys, values, TOKENS, KV_HEADS)
    launch = types.FunctionType(
        coded_launch.__code__, {**vars(sys.modules[coded_launch.__module__]), **vars(module)}
    )
    words = [t.int() for t in INTEGERS]
    variant, grid, args, o, lse = launch(
        q, keys, values, TOKENS, KV_HEADS, words, 0.125, cap, splits
    )
    variant.simulate(grid, *args)
    got, got_lse = merge_states(o, lse)
    wide = [t.double() for t in (q, k, v)]
    want, want_lse = paged_attention_reference(*wide, *INTEGERS, 0.125, cap)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    size = v.double().abs().amax()
    torch.testing.assert_close(got.double() / size, want / size, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("k_form", "v_form", "options"),
    [
        ("e4m3", "int8", {}),
        ("int8", "e4m3", {"width": 128, "alone": True, "splits": 2}),
        ("int4", "mxfp4", {"alone": True}),
        ("mxfp4", "int4", {"width": 128, "group": 1}),
        ("mxfp8", "mxfp8", {"cap": 3.0}),
    ],
)
def test_the_kernel_reads_what_codecs_write(k_form: str, v_form: str, options: dict) -> None:
    check(paged_decode, k_form, v_form, **options)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("form", list(CODECS))
def test_the_reference_decodes_as_codecs_do(form: str, alone: bool) -> None:
    data, want = coded(form, 128, alone, 1)
    cut = cut_pages(data, form, BLOCKS.get(form, 0), PAGES, TOKENS * KV_HEADS, 128)
    got = decode_pages_reference(cut, 128).view(want.shape)
    torch.testing.assert_close(got.float(), want.float(), rtol=2.0**-8, atol=0)


def decoded_in_float64(data: torch.Tensor, form: str, width: int) -> torch.Tensor:
    """What codes stand for, by the definitions of the formats, not rounded."""
    cut = cut_pages(data, form, BLOCKS.get(form, 0), PAGES, TOKENS * KV_HEADS, width)
    codes = cut.codes.contiguous()
    if page_forms.FORMS[form] == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    if form == "int8":
        return codes.view(torch.int8).double() * cut.scales.contiguous().view(torch.float32)
    if form in ("e4m3", "mxfp8"):
        numbers = codes.view(torch.float8_e4m3fn).double()
    elif form == "mxfp4":
        sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        numbers = torch.cat([sizes, -sizes])[codes.long()]
    else:
        numbers = codes.double()
    if form == "e4m3":
        return numbers * cut.scales.contiguous().view(torch.float32)
    blocks = numbers.unflatten(-1, (-1, BLOCKS[form]))
    if form == "int4":
        scale, low = (t.contiguous().view(torch.bfloat16).double() for t in cut[2:])
        return (blocks * scale[..., None] + low[..., None]).flatten(-2)
    return (blocks * torch.exp2(cut.scales.double() - 127)[..., None]).flatten(-2)


@pytest.mark.parametrize("form", list(CODECS))
def test_one_tile_of_the_kernel_against_float64(form: str) -> None:
    """Sixteen tokens of one page through the simulated kernel: only products of bfloat16 are added."""
    width, group = 64, 2
    (k_data, _), (v_data, _) = coded(form, width, False, 0), coded(form, width, False, 1)
    cut = [
        cut_pages(data, form, BLOCKS.get(form, 0), PAGES, TOKENS * KV_HEADS, width)
        for data in (k_data, v_data)
    ]
    q = torch.randn(1, group * KV_HEADS, width, generator=torch.Generator().manual_seed(5))
    q, page = q.bfloat16(), 3
    words = [torch.tensor(own).int() for own in ([0, 1], [0, 1], [page], [0], [TOKENS])]
    variant, grid, args, o, lse = coded_launch(q, *cut, TOKENS, KV_HEADS, words, 0.125, 0.0, 1)
    variant.simulate(grid, *args)
    k, v = (decoded_in_float64(data, form, width)[page] for data in (k_data, v_data))
    if form == "int4":  # the one form that a reader rounds
        k, v = k.bfloat16().double(), v.bfloat16().double()
    k, v = (x.view(TOKENS, KV_HEADS, width).repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("hd,thd->ht", q[0].double(), k) * 0.125
    torch.testing.assert_close(lse[0, 0].double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    want = torch.einsum("ht,thd->hd", logits.softmax(-1), v)
    torch.testing.assert_close(o[0, 0].double(), want, rtol=1e-2, atol=1e-2)
    with pytest.raises(AssertionError):  # a neighbour's page is another answer
        torch.testing.assert_close(
            lse[0, 0].double(), logits.roll(1, 0).logsumexp(-1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("form", list(CODECS))
def test_the_operator_is_attention_to_the_decoded(form: str, alone: bool) -> None:
    """In float64, so that what is read must be what the format says, to the last digits of a float32."""
    (k_data, _), (v_data, _) = coded(form, 64, alone, 0), coded("e4m3", 64, alone, 1)
    q = torch.randn(3, 4, 64, dtype=torch.float64)
    forms = (form, BLOCKS.get(form, 0)), ("e4m3", 0)
    o, lse = coded_attention(q, k_data, v_data, *forms, PAGES, TOKENS, KV_HEADS, *INTEGERS, 0.125)
    shape = (PAGES, TOKENS, KV_HEADS, 64)
    k = decoded_in_float64(k_data, form, 64).view(shape)
    v = decoded_in_float64(v_data, "e4m3", 64).view(shape)
    want, want_lse = paged_attention_reference(q, k, v, *INTEGERS, 0.125)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-4)


def test_blocks_of_eight_are_decoded_first() -> None:
    codec = find_codec("int4:group=8")
    x = torch.randn(PAGES, TOKENS, KV_HEADS, 32).bfloat16()
    data = torch.from_numpy(codec.encode(x))
    k = codec.decode(data.numpy(), PageLayout(tuple(x.shape), torch.bfloat16))
    q, form = torch.randn(3, 4, 32), ("int4", 8)
    got = coded_attention(q, data, data, form, form, PAGES, TOKENS, KV_HEADS, *INTEGERS, 0.125)
    for mine, want in zip(got, paged_attention_reference(q, k, k, *INTEGERS, 0.125), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def over_mutated_readers(old: str, new: str) -> types.ModuleType:
    """The decode over readers of which one word is changed."""
    changed = mutated(paged_decode, name="coded")
    changed.__dict__["reader"] = mutated(page_forms, old, new).reader
    return changed


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        pytest.param("int8", "pair & u32(0x00800080)", "pair & u32(0)", id="sign"),
        pytest.param("int4", "first, second, HIGHS", "third, fourth, HIGHS", id="order"),
        pytest.param("mxfp8", "out[place + i], scale, MINUS_ZERO", "out[place + i], ONE, MINUS_ZERO", id="scale"),
        pytest.param("mxfp4", "u32(field << u32(7))", "u32(field << u32(6))", id="exponent"),
    ],
)  # fmt: skip
def test_a_mutated_reader_fails(form: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check(over_mutated_readers(old, new), form, form, group=1)


def test_pages_that_cannot_be_read_are_refused() -> None:
    data = torch.zeros(PAGES, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot be read by attention; decode them"):
        cut_pages(data, "kivi", 32, PAGES, 32, 64)
    with pytest.raises(ValueError, match="cannot be read"):
        cut_pages(data, "int4", 48, PAGES, 32, 64)
    with pytest.raises(ValueError, match="are not the bytes of 4 pages of 32 vectors of 64"):
        cut_pages(data, "int8", 0, PAGES, 32, 64)
