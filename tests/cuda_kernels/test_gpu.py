"""The CUDA kernels on a device, against float64; `make test-gpu`. Nothing of this has run yet: no GPU was at hand."""

from __future__ import annotations

import math

import pytest
import torch

from plait.cuda_kernels import merge_states, paged_attention
from plait.cuda_kernels.all_reduce_norm import (
    STATISTICS,
    all_reduce_norm_reference,
    norm_one_shot,
    norm_two_shot,
)
from plait.cuda_kernels.gpu import toolchain
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.merge import merge_states_reference
from plait.cuda_kernels.paged_attention import paged_attention_reference

pytestmark = pytest.mark.gpu


def test_the_toolchain_is_complete() -> None:
    assert toolchain.problem() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 7, 3, 128), (8, 64, 16, 128), (20, 5, 2, 512)])
def test_merge(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    o = torch.randn(shape, generator=g, device="cuda").to(dtype)
    lse = torch.randn(shape[:-1], generator=g, device="cuda") * 20
    gone = torch.rand(shape[:-1], generator=g, device="cuda") < 0.3
    lse[gone], o[gone] = -math.inf, math.nan
    got, got_lse = merge_states(o, lse)
    want, want_lse = merge_states_reference(o.double(), lse.double())
    coarse = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=coarse, atol=coarse)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def ranks(world: int, rows: int, hidden: int):
    """Buffers of virtual ranks: one launch plays all of them, block y is the rank."""
    layout = Layout(world, rows * (hidden * 2 + STATISTICS))
    buffers = torch.zeros(world, layout.total_bytes, dtype=torch.uint8, device="cuda")
    table = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device="cuda")
    g = torch.Generator("cuda").manual_seed(world)
    drawn = [
        torch.randn(shape, generator=g, device="cuda").bfloat16()
        for shape in ((world, rows, hidden), (rows, hidden), (hidden,))
    ]
    return layout, buffers, table, drawn


@pytest.mark.parametrize("build", [norm_one_shot, norm_two_shot])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_norm_over_virtual_ranks_and_in_a_graph(build, world: int) -> None:
    rows, hidden, blocks = 16, 4096, 8
    layout, _buffers, table, (xs, residual, weight) = ranks(world, rows, hidden)
    normed, total = torch.zeros_like(xs), torch.zeros_like(xs)
    variant = build(
        world=world, hidden=hidden, dtype=torch.bfloat16, layer_norm=False, fp8=False,
        slot_bytes=layout.slot_bytes, blocks=layout.blocks, virtual=True,
    )  # fmt: skip
    pointers = [t.data_ptr() for t in (xs, residual, weight, weight, normed, total, total)]

    def step() -> None:
        variant.launch((blocks, world), table.data_ptr(), 0, *pointers, rows, 1e-5)

    def check() -> None:
        wide = [t.double() for t in (xs, residual, weight)]
        want, want_total = all_reduce_norm_reference(*wide, None, 1e-5)
        for rank in range(world):
            assert torch.equal(normed[rank], normed[0])
            assert torch.equal(total[rank], total[0])
        torch.testing.assert_close(total[0].double(), want_total, rtol=2**-7, atol=2**-5)
        torch.testing.assert_close(normed[0].double(), want, rtol=2**-5, atol=2**-4)

    for _ in range(3):
        step()
    check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        xs.normal_()
        graph.replay()
        check()
    for _ in range(100_000):  # flags grow, and wrap nowhere near
        graph.replay()
    check()


@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (16, 1)])
def test_paged_decode(heads: tuple[int, int]) -> None:
    g = torch.Generator("cuda").manual_seed(1)
    lengths, page_tokens, dim = [1000, 17, 4096], 16, 128
    counts = [-(-n // page_tokens) for n in lengths]
    cut = torch.tensor([0, *counts]).cumsum(0)
    shape = (int(cut[-1]), page_tokens, heads[1], dim)
    k, v = (torch.randn(shape, generator=g, device="cuda").bfloat16() for _ in range(2))
    q = torch.randn(5, heads[0], dim, generator=g, device="cuda").bfloat16()
    integers = [
        torch.tensor([0, 1, 3, 5]), cut.int(), torch.randperm(int(cut[-1])).int(),
        torch.tensor([0, 0, 3, 100, 0]), torch.tensor([1000, 16, 17, 4095, 4096]),
    ]  # fmt: skip
    integers = [t.cuda() for t in integers]
    got, got_lse = paged_attention(q, k, v, *integers, dim**-0.5)
    wide = [t.double() for t in (q, k, v)]
    want, want_lse = paged_attention_reference(*wide, *integers, dim**-0.5)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-4, atol=1e-4)
