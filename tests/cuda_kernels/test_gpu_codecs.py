"""Codecs on a device: the host's bytes, bit for bit; operators compiled, in graphs, on a device that is not current.

Not yet run: no GPU was at hand.
"""

from __future__ import annotations

import pytest
import torch

from plait.cuda_kernels import merge_states, paged_attention
from plait.cuda_kernels.block_floats import dequantise_mx, quantise_mx
from plait.cuda_kernels.block_ints import dequantise_blocks, quantise_blocks
from plait.cuda_kernels.hadamard import rotate
from plait.cuda_kernels.int_groups import dequantise_groups, quantise_groups
from plait.cuda_kernels.micro_blocks import dequantise_micro, quantise_micro
from plait.cuda_kernels.nvfp4 import dequantise_nvfp4, quantise_nvfp4
from plait.cuda_kernels.scaled_rows import dequantise_scaled, quantise_scaled
from plait.cuda_kernels.sign_groups import dequantise_signs, quantise_signs
from plait.cuda_kernels.turbo import dequantise_turbo, quantise_turbo

pytestmark = pytest.mark.gpu
FLAT, GROUPS = (300, 128), (6, 32, 256)
# name -> shape, operator, what follows the page; inverse, what follows the parts (the dtype last)
WAYS = {
    "int2": (FLAT, quantise_groups, (2, 64, False), dequantise_groups, (2, 64, False, 128)),
    "int4": (FLAT, quantise_groups, (4, 64, False), dequantise_groups, (4, 64, False, 128)),
    "kivi": (GROUPS, quantise_groups, (2, 32, True), dequantise_groups, (2, 32, True, 256)),
    "int8": (FLAT, quantise_scaled, (True,), dequantise_scaled, (True,)),
    "fp8": (FLAT, quantise_scaled, (False,), dequantise_scaled, (False,)),
    "mxfp8": (FLAT, quantise_mx, ("e4m3", "even"), dequantise_mx, ("e4m3", 128)),
    "mxfp6": (FLAT, quantise_mx, ("e2m3", "floor"), dequantise_mx, ("e2m3", 128)),
    "nvfp4": (FLAT, quantise_nvfp4, (0.002, True), dequantise_nvfp4, (0.002, 128)),
    "mxint8": (FLAT, quantise_blocks, (8, 32), dequantise_blocks, (8, 32, 128)),
    "bfp": (FLAT, quantise_blocks, (4, 32), dequantise_blocks, (4, 32, 128)),
    "mx9": (FLAT, quantise_micro, (7,), dequantise_micro, (7, 128)),
    "mx6": (FLAT, quantise_micro, (4,), dequantise_micro, (4, 128)),
    "signs": (GROUPS, quantise_signs, (False,), dequantise_signs, (32, False)),
    "ternary": (GROUPS, quantise_signs, (True,), dequantise_signs, (32, True)),
    "turbo": (FLAT, quantise_turbo, (3, 7), dequantise_turbo, (3, 7, 128)),
}


def page(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    x.view(-1, shape[-1])[3] = 0
    x.view(-1, shape[-1])[5] *= 1000
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", WAYS)
def test_bytes_and_numbers_are_those_of_the_host(name: str, dtype: torch.dtype) -> None:
    shape, encode, how, decode, back = WAYS[name]
    x = page(shape, dtype)
    wanted = encode(x, *how)
    found = encode(x.cuda(), *how)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    again = decode(*found, *back, dtype)
    assert torch.equal(again.cpu(), decode(*wanted, *back, dtype))


@pytest.mark.parametrize("name", WAYS)
def test_what_cannot_be_coded_is_refused_or_kept(name: str) -> None:
    shape, encode, how, _, _ = WAYS[name]
    x = page(shape)
    x.view(-1)[77] = float("nan")
    try:
        wanted = encode(x, *how)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            encode(x.cuda(), *how)
        return
    assert all(torch.equal(a.cpu(), b) for a, b in zip(encode(x.cuda(), *how), wanted, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
def test_rotations(inverse: bool) -> None:
    x = page(FLAT)
    assert torch.equal(rotate(x.cuda(), 3, inverse).cpu(), rotate(x, 3, inverse))


@pytest.mark.parametrize("name", WAYS)
def test_decoding_in_a_graph(name: str) -> None:
    shape, encode, how, decode, back = WAYS[name]
    parts = encode(page(shape).cuda(), *how)
    decode(*parts, *back, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode(*parts, *back, torch.bfloat16)
    for part, renewed in zip(parts, encode(page(shape).flip(0).cuda(), *how), strict=True):
        part.copy_(renewed)
    graph.replay()
    assert torch.equal(found, decode(*parts, *back, torch.bfloat16))


def test_operators_inside_torch_compile() -> None:
    """One graph, no breaks: the compiler sees the fake implementations."""
    x, weight = page(FLAT).cuda(), page((128, 128)).cuda()

    @torch.compile(fullgraph=True)
    def through(x: torch.Tensor) -> torch.Tensor:
        scales, codes = quantise_mx(x * 2, "e4m3", "floor")
        turned = rotate(dequantise_mx(scales, codes, "e4m3", 128, x.dtype), 3, False)
        return turned @ weight

    scales, codes = quantise_mx(x * 2, "e4m3", "floor")
    wanted = rotate(dequantise_mx(scales, codes, "e4m3", 128, x.dtype), 3, False) @ weight
    torch.testing.assert_close(through(x), wanted)

    @torch.compile(fullgraph=True)
    def merged(o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return merge_states(o * 2, lse)[0] + 1

    o, lse = torch.randn(2, 5, 4, 64, device="cuda"), torch.randn(2, 5, 4, device="cuda")
    torch.testing.assert_close(merged(o, lse), merge_states(o * 2, lse)[0] + 1)


def test_decode_attention_in_a_graph() -> None:
    k, v = (torch.randn(8, 16, 2, 64, device="cuda").bfloat16() for _ in range(2))
    q = torch.randn(1, 8, 64, device="cuda").bfloat16()
    integers = [
        torch.tensor([0, 1]), torch.tensor([0, 8]).int(), torch.arange(8).int(),
        torch.tensor([0]), torch.tensor([128]),
    ]  # fmt: skip
    integers = [t.cuda() for t in integers]
    paged_attention(q, k, v, *integers, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = paged_attention(q, k, v, *integers, 0.125)
    q.normal_()
    integers[4].fill_(77)
    graph.replay()
    want, want_lse = paged_attention(q, k, v, *integers, 0.125)
    assert torch.equal(o, want)
    assert torch.equal(lse, want_lse)


def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    x = page(FLAT)
    wanted = quantise_mx(x, "e4m3", "floor")
    with torch.cuda.device(0):
        found = quantise_mx(x.to("cuda:1"), "e4m3", "floor")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
