"""CUDA kernels of pages, top-k, packing and the norm of one rank on a device, in a graph too. Not yet run: no GPU."""

from __future__ import annotations

import pytest
import torch

from plait.cuda_kernels import Regions, copy_pages, summarise, top_k, write_tokens
from plait.cuda_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from plait.cuda_kernels.page_summary import summarise_reference
from plait.cuda_kernels.strided import pack, unpack
from plait.cuda_kernels.top_k import top_k_reference

pytestmark = pytest.mark.gpu


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).cuda().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [4000, 32_771, 262_144])
def test_top_k_with_hints_good_and_bad_and_in_a_graph(n: int, dtype: torch.dtype) -> None:
    x = draw(3, n, dtype=dtype)
    for hint in (None, x.topk(2048).indices, x.argsort(-1)[:, :2048].contiguous()):
        assert torch.equal(top_k(x, 2048, hint), top_k_reference(x, 2048))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = top_k(x, 2048)
    x.copy_(torch.randn_like(x).clamp(max=0))
    graph.replay()
    assert torch.equal(found, top_k_reference(x, 2048))


def test_pages_tokens_and_summaries() -> None:
    of, to = draw(40, 16, 8, 128), draw(50, 16, 8, 128)
    pages, places = torch.randperm(40)[:30], torch.randperm(50)[:30]
    for where in ((places, pages), (places.cuda(), pages.cuda())):
        to.zero_()
        copy_pages(Regions([to]), where[0], Regions([of]), where[1])
        assert torch.equal(to[places], of[pages])
    host = torch.zeros(30, 16, 8, 128, dtype=torch.bfloat16, pin_memory=True)
    copy_pages(Regions([host]), torch.arange(30), Regions([of]), pages)
    torch.cuda.synchronize()
    assert torch.equal(host, of[pages].cpu())
    rows, slots = draw(9, 8, 200)[..., 8:136], torch.randperm(640)[:9]
    write_tokens(of, slots.numpy(), rows)
    assert torch.equal(of.view(640, 8, 128)[slots], rows)
    found, want = (torch.zeros(2, 50, 8, 128, dtype=of.dtype, device="cuda") for _ in range(2))
    for low, high, call in ((*found, summarise), (*want, summarise_reference)):
        given = (of, torch.arange(40, device="cuda"), 0, 633, 13)
        call(*given, low, high) if call is summarise else call(*given, 0, low, high)
    assert torch.equal(found, want)


def test_packing_and_the_norm() -> None:
    x = draw(64, 40, 256)[:, ::2, 64:192]
    assert torch.equal(pack(x), x)
    into = torch.zeros(64, 40, 256, dtype=x.dtype, device="cuda")[:, ::2, 64:192]
    unpack(pack(x), into)
    assert torch.equal(into, x)
    rows, residual, weight = draw(100, 4096), draw(101, 4096)[1:], draw(4096)
    wide = [t.double() for t in (rows, residual, weight)]
    for found, want in zip(
        add_rms_norm(rows, residual, weight, 1e-5), add_rms_norm_reference(*wide, 1e-5), strict=True
    ):
        torch.testing.assert_close(found.double(), want, rtol=2**-6, atol=2**-5)
