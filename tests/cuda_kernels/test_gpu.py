"""The CUDA kernels on a device, against float64; `make test-gpu`. Nothing of this has run yet: no GPU was at hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from plait.collectives import peer_norm, peer_partials, symmetric
from plait.cuda_kernels import merge_states, paged_attention
from plait.cuda_kernels.all_reduce_norm import (
    STATISTICS,
    all_reduce_norm_reference,
    norm_one_shot,
    norm_two_shot,
)
from plait.cuda_kernels.coded_attention import coded_attention
from plait.cuda_kernels.gpu import toolchain
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.helix_combine import helix_combine, helix_send, inverse_of, record_bytes
from plait.cuda_kernels.merge import merge_states_reference
from plait.cuda_kernels.paged_attention import paged_attention_reference
from plait.kvstore.codecs import PageLayout, find_codec
from world import run_world

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


@pytest.mark.slow
@pytest.mark.parametrize("build", [norm_one_shot, norm_two_shot])
def test_a_million_steps(build) -> None:
    """Two virtual ranks, 1000 steps a graph; every thousand steps the sums are checked, and the step is counted."""
    world, rows, hidden, blocks = 2, 2, 1024, 2
    layout, buffers, table, (xs, residual, weight) = ranks(world, rows, hidden)
    normed, total = torch.zeros_like(xs), torch.zeros_like(xs)
    variant = build(
        world=world, hidden=hidden, dtype=torch.bfloat16, layer_norm=False, fp8=False,
        slot_bytes=layout.slot_bytes, blocks=layout.blocks, virtual=True,
    )  # fmt: skip
    pointers = [t.data_ptr() for t in (xs, residual, weight, weight, normed, total, total)]
    args = (table.data_ptr(), 0, *pointers, rows, 1e-5)
    variant.launch((blocks, world), *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            variant.launch((blocks, world), *args)
    want = total.clone()
    for _ in range(1000):
        total.zero_()
        graph.replay()
        assert torch.equal(total, want)
    assert buffers[0][:4].view(torch.int32).item() == 1_000_001


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_partials_over_virtual_ranks_and_in_a_graph(world: int, fp8: bool) -> None:
    batch, heads, dim, cuts = 8, 4, 128, [3, 8]
    layout = Layout(world, batch * heads * record_bytes(16, fp8), 32, sets=2)
    buffers = torch.zeros(world, layout.total_bytes, dtype=torch.uint8, device="cuda")
    table = torch.tensor([b.data_ptr() for b in buffers], device="cuda")
    ends = torch.tensor(cuts, dtype=torch.int32, device="cuda")
    os = torch.randn(world, batch, world * heads, dim, device="cuda").bfloat16()
    lses = torch.randn(world, batch, world * heads, device="cuda")
    sinks = torch.randn(world, heads, device="cuda")
    out = torch.zeros(world, batch, heads, dim, device="cuda").bfloat16()
    out_lse = torch.zeros(world, batch, heads, device="cuda")
    constants = {
        "world": world, "vectors": 16, "dtype": torch.bfloat16, "slot_bytes": layout.slot_bytes,
        "chunks": layout.blocks, "virtual": True, "fp8": fp8,
    }  # fmt: skip
    send, combine = helix_send(**constants), helix_combine(**constants, sink=True)

    def step() -> None:
        for chunk, end in enumerate(cuts):
            first = cuts[chunk - 1] if chunk else 0
            send.launch(
                (end - first, world, world), table.data_ptr(), 0, os[0, first].data_ptr(),
                lses[0, first].data_ptr(), chunk, first, batch, heads,
            )  # fmt: skip
        combine.launch(
            (4, 1, world), table.data_ptr(), 0, out.data_ptr(), out_lse.data_ptr(),
            sinks.data_ptr(), ends.data_ptr(), len(cuts), heads, inverse_of(heads),
        )  # fmt: skip

    def check() -> None:
        wide = (os.double(), lses.double(), sinks.flatten().double())
        want, want_lse = merge_states_reference(*wide)
        want, want_lse = torch.stack(want.chunk(world, 1)), torch.stack(want_lse.chunk(world, 1))
        coarse = 2.0**-4 * os.double().abs().max().item() if fp8 else 1e-2
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=coarse)
        torch.testing.assert_close(out_lse.double(), want_lse, rtol=1e-4, atol=1e-4)

    step()
    check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        os.normal_()
        lses.normal_()
        graph.replay()
        check()


def in_two_processes() -> tuple[str, str]:
    """Two ranks on one device: IPC maps the memory, time slices hand the flags over."""
    group = dist.group.WORLD
    assert group is not None
    torch.cuda.set_device(0)
    norm, peers = peer_norm.make_norm(group), peer_partials.make_partials(group)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        xs = torch.randn(2, 8, 1024, generator=g).bfloat16().cuda()
        weight = torch.ones(1024).bfloat16().cuda()
        done = norm(xs[group.rank()], xs[0], weight, None, 1e-5, None)
        assert done is not None
        _, want = all_reduce_norm_reference(
            xs.double(), xs[0].double(), weight.double(), None, 1e-5
        )
        torch.testing.assert_close(done[1].double(), want, rtol=2**-7, atol=2**-5)
        os = torch.randn(2, 3, 8, 128, generator=g).bfloat16().cuda()
        lses = torch.randn(2, 3, 8, generator=g).cuda()
        run = peers.begin([1, 2], os[0])
        run.send(os[group.rank()][:1], lses[group.rank()][:1])
        run.send(os[group.rank()][1:], lses[group.rank()][1:])
        own = slice(4 * group.rank(), 4 * group.rank() + 4)
        merged, _ = merge_states_reference(os.double(), lses.double())
        torch.testing.assert_close(run.merge().double(), merged[:, own], rtol=1e-2, atol=1e-2)
    routes = norm.buffer.route, norm.buffer.passed
    norm.buffer.close()
    peers.buffer.close()
    return routes


def test_two_processes_on_one_device() -> None:
    for route, passed in run_world(in_two_processes, 2, timeout=240):
        assert route == symmetric.IPC
        assert "share a device" in passed


@pytest.mark.parametrize("form", ["e4m3", "int8", "int4", "mxfp8", "mxfp4"])
def test_attention_to_pages_of_codes(form: str) -> None:
    block = {"int4": 32, "mxfp8": 32, "mxfp4": 32}.get(form, 0)
    codec = {"e4m3": "fp8", "int4": "int4:group=32"}.get(form, form)
    pages, tokens, kv_heads, dim = 40, 16, 2, 128
    x = torch.randn(2, pages, tokens, kv_heads, dim).bfloat16()
    k_data, v_data = (torch.from_numpy(find_codec(codec).encode(one)).cuda() for one in x)
    integers = [
        torch.tensor([0, 1, 3]), torch.tensor([0, 30, 40]).int(), torch.randperm(pages).int(),
        torch.tensor([5, 0, 30]), torch.tensor([471, 99, 160]),
    ]  # fmt: skip
    integers = [t.cuda() for t in integers]
    q = torch.randn(3, 14, dim, device="cuda").bfloat16()
    got, got_lse = coded_attention(
        q, k_data, v_data, (form, block), (form, block), pages, tokens, kv_heads, *integers, 0.1
    )
    decoded = [
        find_codec(codec).decode(data.cpu().numpy(), PageLayout.of(x[0])).double().cuda()
        for data in (k_data, v_data)
    ]
    want, want_lse = paged_attention_reference(q.double(), *decoded, *integers, 0.1)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-2, atol=1e-2)
