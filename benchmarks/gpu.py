"""CUDA kernels beside the device's own copy bandwidth and torch's operations; one command, under 8 minutes.

    python benchmarks/gpu.py [PART ...] [--json FILE]        --list says what there is, also without a GPU

Events, buffers that rotate (so that the second cache does not help), medians. Without a GPU, or without the `cuda`
extra, it says so and ends. Not yet run: every number in docs/benchmarks/gpu.md is unmeasured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.cuda_kernels import (
    Regions,
    coded_attention,
    copy_pages,
    merge_states,
    paged_attention,
    summarise,
    top_k,
)
from plait.cuda_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from plait.cuda_kernels.all_reduce_norm import STATISTICS, norm_one_shot, norm_two_shot
from plait.cuda_kernels.block_floats import dequantise_mx, quantise_mx
from plait.cuda_kernels.gpu import toolchain
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.helix_combine import helix_combine, helix_send, inverse_of, record_bytes
from plait.cuda_kernels.int_groups import dequantise_groups, quantise_groups
from plait.cuda_kernels.merge import merge_states_reference
from plait.cuda_kernels.nvfp4 import dequantise_nvfp4, nvfp4_whole, quantise_nvfp4
from plait.cuda_kernels.scaled_rows import dequantise_scaled, quantise_scaled
from plait.cuda_kernels.strided import pack

RUNS, MEGABYTE = 30, 1 << 20
SHARE = "0.85 of copy bandwidth from 64 MB"
NORM = "1.4x unfused, 0.8 of the bytes"
DECODE = "0.8 of bandwidth at 16 x 32768; never below torch"


def microseconds(call: Callable[[int], Any], buffers: int = 1) -> float:
    """Take the median of events around `call(i)`, i going round the buffers."""
    for i in range(3):
        call(i % buffers)
    times = []
    for i in range(RUNS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call(i % buffers)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1000)
    return statistics.median(times)


def graphed(call: Callable[[], Any]) -> Callable[[int], Any]:
    """Capture a call, and give its replay."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda _: graph.replay()


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy."""
    a, b = (torch.empty(512 * MEGABYTE, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * a.numel() / microseconds(lambda _: b.copy_(a)) * 1e6


def merges(bandwidth: float) -> list[dict[str, Any]]:
    found = []
    for rows in (64, 1024, 16384):
        sets = [
            (torch.randn(8, rows, 16, 128, device="cuda").bfloat16(),
             torch.randn(8, rows, 16, device="cuda"))
            for _ in range(4 if rows < 16384 else 2)
        ]  # fmt: skip
        o, lse = sets[0]
        moved = o.nbytes * 9 / 8 + lse.nbytes * 9 / 8
        ours = microseconds(lambda i, sets=sets: merge_states(*sets[i]), len(sets))
        torch_us = microseconds(lambda i, sets=sets: merge_states_reference(*sets[i]), len(sets))
        name = f"lse merge, 8 shards, {moved / MEGABYTE:.0f} MB"
        found.append(share(name, ours, moved, bandwidth, torch_us, SHARE))
    return found


def copies(bandwidth: float) -> list[dict[str, Any]]:
    pages, page = 512, (64, 8, 128)
    of = torch.randn(pages, *page, device="cuda").bfloat16()
    to, order = torch.empty_like(of), np.random.default_rng(0).permutation(pages)
    places, sources = Regions([to]), Regions([of])
    ours = microseconds(lambda _: copy_pages(places, np.arange(pages), sources, order))
    index = torch.from_numpy(order).cuda()
    torch_us = microseconds(lambda _: to.copy_(of[index]))
    return [share("page copy, 512 of 128 KiB", ours, 2 * of.nbytes, bandwidth, torch_us, SHARE)]


def codecs(bandwidth: float) -> list[dict[str, Any]]:
    """Encode and decode 64 MB of a page; int and scaled encoders wait for the flag that says what cannot be coded."""
    x = torch.randn(1 << 18, 128, device="cuda").bfloat16()
    whole, width, dtype = nvfp4_whole(x), x.shape[-1], x.dtype
    ways: list[tuple[str, Callable[[], Any], Callable[..., Any]]] = [
        (f"int{bits}, groups of 64", lambda bits=bits: quantise_groups(x, bits, 64, False),
         lambda *parts, bits=bits: dequantise_groups(*parts, bits, 64, False, width, dtype))
        for bits in (2, 4)
    ] + [
        ("int8" if exact else "fp8", lambda exact=exact: quantise_scaled(x, exact),
         lambda *parts, exact=exact: dequantise_scaled(*parts, exact, dtype))
        for exact in (True, False)
    ] + [
        (f"MX {form}", lambda form=form: quantise_mx(x, form, "floor"),
         lambda *parts, form=form: dequantise_mx(*parts, form, width, dtype))
        for form in ("e4m3", "e2m3", "e2m1")
    ] + [
        ("NVFP4", lambda: quantise_nvfp4(x, whole, False),
         lambda *parts: dequantise_nvfp4(*parts, whole, width, dtype))
    ]  # fmt: skip
    found = []
    for name, encode, decode in ways:
        parts = encode()
        moved = x.nbytes + sum(part.nbytes for part in parts)
        for what, call in (("encode", encode), ("decode", lambda d=decode, p=parts: d(*p))):
            ours = microseconds(lambda _, call=call: call())
            found.append({
                "kernel": f"{what} {name}, {moved / MEGABYTE:.0f} MB", "us": ours,
                "of copy bandwidth": moved / (ours * 1e-6) / bandwidth, "goal": "0.85 of bandwidth",
            })  # fmt: skip
    return found


def tops(bandwidth: float) -> list[dict[str, Any]]:
    found, rows, k = [], 32, 2048
    for columns in (32 << 10, 128 << 10, 256 << 10):
        x = torch.randn(rows, columns, device="cuda")
        hint = top_k(x + torch.randn_like(x) * 0.05, k)  # the step before
        torch_us = microseconds(lambda _, x=x: torch.topk(x, k, sorted=False))
        ours = microseconds(lambda _, x=x, hint=hint: top_k(x, k, hint))
        name = f"top {k} of {columns}, {rows} rows, hinted"
        found.append(share(name, ours, x.nbytes, bandwidth, torch_us, "1.5x torch.topk"))
    return found


def rows_of_one_rank(bandwidth: float) -> list[dict[str, Any]]:
    """Residual add and norm, summaries of pages, strided tensors."""
    x, residual = (torch.randn(8192, 4096, device="cuda").bfloat16() for _ in range(2))
    weight = x[0].clone()
    us = microseconds(lambda _: add_rms_norm(x, residual, weight, 1e-5))
    plain = microseconds(lambda _: add_rms_norm_reference(x, residual, weight, 1e-5))
    found = [share("add + RMSNorm, 8192 x 4096", us, 4 * x.nbytes, bandwidth, plain, SHARE)]
    keys, pages = x.view(2048, 16, 8, 128), torch.arange(2048, device="cuda").int()
    low, high = (torch.empty(2048, 8, 128, device="cuda").bfloat16() for _ in range(2))
    us = microseconds(lambda _: summarise(keys, pages, 0, 2048 * 16, 16, low, high))
    plain = microseconds(lambda _: torch.aminmax(keys, dim=1))
    moved = x.nbytes + 2 * low.nbytes
    found.append(share("least and greatest of pages of 16", us, moved, bandwidth, plain, SHARE))
    columns = x[:, 1024:3072]
    us = microseconds(lambda _: pack(columns))
    plain = microseconds(lambda _: columns.contiguous())
    found.append(
        share("pack columns of 4 KiB", us, 2 * columns.nbytes, bandwidth, plain, "reported")
    )
    return found


def norms(bandwidth: float) -> list[dict[str, Any]]:
    """Virtual ranks: one launch plays all; the bytes of all ranks go through one memory."""
    found, hidden, blocks = [], 8192, 16
    for world in (2, 4, 8):
        for rows in (16, 128):
            layout = Layout(world, rows * (hidden * 2 + STATISTICS))
            buffers = torch.zeros(world, layout.total_bytes, dtype=torch.uint8, device="cuda")
            table = torch.tensor([b.data_ptr() for b in buffers], device="cuda")
            xs = torch.randn(world, rows, hidden, device="cuda").bfloat16()
            residual, weight = xs[0].clone(), xs[0, 0].clone()
            normed, total = torch.empty_like(xs), torch.empty_like(xs)
            pointers = [t.data_ptr() for t in (xs, residual, weight, weight, normed, total, total)]

            def unfused(xs=xs, residual=residual, weight=weight, world=world, norm=add_rms_norm):
                for _ in range(world):
                    norm(xs.sum(0), residual, weight, 1e-5)

            ours_apart = microseconds(graphed(unfused))
            torch_us = microseconds(graphed(partial(unfused, norm=add_rms_norm_reference)))
            for build in (norm_one_shot, norm_two_shot):
                variant = build(
                    world=world, hidden=hidden, dtype=torch.bfloat16, layer_norm=False, fp8=False,
                    slot_bytes=layout.slot_bytes, blocks=layout.blocks, virtual=True,
                )  # fmt: skip
                args = (table.data_ptr(), 0, *pointers, rows, 1e-5)
                ours = microseconds(
                    graphed(lambda v=variant, w=world, a=args: v.launch((blocks, w), *a))
                )
                one = xs.nbytes // world
                crossed = world * one * (2 * world if build is norm_one_shot else 6)
                name = f"{build.name}, {world} virtual ranks, {rows} x {hidden}"
                row = share(name, ours, crossed + world * 4 * one, bandwidth, torch_us, NORM)
                found.append({**row, "unfused of ours / ours": ours_apart / ours})
    return found


def partials(bandwidth: float) -> list[dict[str, Any]]:
    """Helix's exchange over virtual ranks: every byte is written to a slot and read from it by one memory."""
    found, batch, heads, dim = [], 32, 128, 128
    for world in (2, 4, 8):
        for fp8 in (False, True):
            own, record = heads // world, record_bytes(dim // 8, fp8)
            layout = Layout(world, batch * own * record, 1, sets=2)
            buffers = torch.zeros(world, layout.total_bytes, dtype=torch.uint8, device="cuda")
            table = torch.tensor([b.data_ptr() for b in buffers], device="cuda")
            ends = torch.tensor([batch], dtype=torch.int32, device="cuda")
            os = torch.randn(world, batch, heads, dim, device="cuda").bfloat16()
            lses = torch.randn(world, batch, heads, device="cuda")
            out, out_lse = torch.empty_like(os[:, :, :own]), torch.empty_like(lses[:, :, :own])
            constants = {
                "world": world, "vectors": dim // 8, "dtype": torch.bfloat16,
                "slot_bytes": layout.slot_bytes, "chunks": 1, "virtual": True, "fp8": fp8,
            }  # fmt: skip
            send, combine = helix_send(**constants), helix_combine(**constants, sink=False)
            sending = (table.data_ptr(), 0, os.data_ptr(), lses.data_ptr(), 0, 0, batch, own)
            merging = (
                table.data_ptr(), 0, out.data_ptr(), out_lse.data_ptr(), 0, ends.data_ptr(), 1, own,
                inverse_of(own),
            )  # fmt: skip

            def exchange(send=send, combine=combine, a=sending, b=merging, world=world) -> None:
                send.launch((batch, world, world), *a)
                combine.launch((8, 1, world), *b)

            def apart(os=os, lses=lses, world=world, own=own) -> None:
                by_rank = os.unflatten(2, (world, own)).movedim(2, 0).contiguous()
                for rank in range(world):
                    mine = lses[..., rank * own : (rank + 1) * own]
                    merge_states_reference(by_rank[rank], mine)

            ours, torch_us = microseconds(graphed(exchange)), microseconds(graphed(apart))
            moved = os.nbytes + 2 * world * world * batch * own * record + out.nbytes
            name = (
                f"Helix exchange{', fp8' if fp8 else ''}, {world} virtual ranks, {batch} x {heads}"
            )
            found.append(share(name, ours, moved, bandwidth, torch_us, "reported"))
    return found


def decodes(bandwidth: float) -> list[dict[str, Any]]:
    found, heads, kv_heads, dim, page = [], 32, 8, 128, 16
    for batch, tokens in ((1, 4096), (1, 131072), (16, 4096), (16, 32768), (64, 4096)):
        pages = batch * tokens // page
        k, v = (
            torch.randn(pages, page, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        q = torch.randn(batch, heads, dim, device="cuda", dtype=torch.bfloat16)
        each = torch.arange(batch + 1, device="cuda")
        integers = (
            each, (each * (tokens // page)).int(), torch.arange(pages, device="cuda").int(),
            torch.zeros(batch, dtype=torch.int64, device="cuda"),
            torch.full((batch,), tokens, device="cuda"),
        )  # fmt: skip
        keys, values = (t.view(batch, tokens, kv_heads, dim).transpose(1, 2) for t in (k, v))
        queries = q.unsqueeze(2)
        sdpa = microseconds(
            lambda _, q=queries, k=keys, v=values: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            )
        )
        name = f"paged decode, GQA {heads}/{kv_heads}, batch {batch} x {tokens}"
        ours = microseconds(
            lambda _, q=q, k=k, v=v, n=integers: paged_attention(q, k, v, *n, dim**-0.5)
        )
        row = share(name, ours, 2 * k.nbytes, bandwidth, sdpa, DECODE)
        peer = flashinfer_us(q, k, v, integers, page)
        found.append(row if peer is None else {**row, "FlashInfer / ours": peer / ours})
        for form, block, size in (("e4m3", 0, dim + 4), ("int4", 32, dim // 2 + dim // 8)):
            data = torch.zeros(2, pages * page * kv_heads * size, dtype=torch.uint8, device="cuda")
            ours = microseconds(
                lambda _, q=q, d=data, f=(form, block), n=integers, c=pages: coded_attention(
                    q, d[0], d[1], f, f, c, page, kv_heads, *n, dim**-0.5
                )
            )
            found.append(share(f"{name}, {form}", ours, data.nbytes, bandwidth, sdpa, DECODE))
    return found


def flashinfer_us(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, integers: Any, page: int
) -> float | None:
    """Time FlashInfer's decode if it is installed."""
    try:
        flashinfer: Any = importlib.import_module("flashinfer")
    except ImportError:
        return None
    space = torch.empty(128 * MEGABYTE, dtype=torch.uint8, device="cuda")
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD")
    last = torch.full((len(q),), page, dtype=torch.int32, device="cuda")
    decode.plan(
        integers[1], integers[2], last, q.shape[1], k.shape[2], q.shape[2], page,
        q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return microseconds(lambda _: decode.run(q, (k, v)))


def share(
    name: str, us: float, moved: float, bandwidth: float, torch_us: float, goal: str
) -> dict[str, Any]:
    """One row of the table."""
    part = moved / (us * 1e-6) / bandwidth
    return {
        "kernel": name, "us": us, "of copy bandwidth": part, "torch / ours": torch_us / us, "goal": goal,
    }  # fmt: skip


def launches(_: float) -> list[dict[str, Any]]:
    o, lse = torch.randn(2, 1, 1, 64, device="cuda"), torch.randn(2, 1, 1, device="cuda")
    plain = microseconds(lambda _: merge_states(o, lse))
    replayed = microseconds(graphed(lambda: merge_states(o, lse)))
    add = microseconds(lambda _: o.add_(1))
    triton = triton_us(o)
    row = {
        "kernel": "launch: operator",
        "us": plain,
        "torch / ours": add / plain,
        "goal": "reported",
    }
    return [
        row if triton is None else {**row, "Triton / ours": triton / plain},
        {"kernel": "launch: in a graph", "us": replayed, "goal": "reported"},
    ]


def triton_us(x: torch.Tensor) -> float | None:
    """Time the launch of an empty Triton kernel with as many arguments, if it is installed."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError:
        return None

    def empty(a, b, c, d, e, n, m):
        pass

    kernel = triton.jit(empty)
    return microseconds(lambda _: kernel[(1,)](x, x, x, x, x, 1, 64))


PARTS: dict[str, tuple[Callable[[float], list[dict[str, Any]]], str]] = {
    "merge": (merges, f"lse merge of 8 shards; {SHARE}"),
    "copy": (copies, f"page copy; {SHARE}"),
    "codecs": (codecs, f"int2, int4, int8, fp8, MX, NVFP4; {SHARE}"),
    "rows": (rows_of_one_rank, "norm on one GPU, summaries, packing; 0.85 of copy bandwidth"),
    "top-k": (tops, "2048 of 32k to 256k with a hint; 1.5x torch.topk"),
    "norm": (norms, f"all-reduce + residual + norm, 2 to 8 virtual ranks; {NORM}"),
    "partials": (partials, "Helix's exchange, 2 to 8 virtual ranks, bf16 and fp8; reported"),
    "decode": (decodes, f"paged decode of bf16, fp8 and int4 pages; {DECODE}"),
    "launch": (launches, "an operator, in a graph and out, beside torch and Triton; reported"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without")
    parser.add_argument("--list", action="store_true", help="what there is, and its goals; no GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.list:
        for name, (_, what) in PARTS.items():
            print(f"{name:10} {what}")
        return 0
    problem = toolchain.problem() if torch.cuda.is_available() else "no CUDA device"
    if problem:
        print(f"not measured: {problem}")
        return 0
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for name in options.parts or PARTS:
        for row in PARTS[name][0](bandwidth):
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        head = {"device": device, "torch": str(torch.__version__), "copy bytes/s": bandwidth}
        options.json.write_text(json.dumps({**head, "rows": rows}, indent=1))
    return 0


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    told = f"{row['kernel']:60} {row['us']:9.1f} us"
    part = row.get("of copy bandwidth")
    told += f"  {part:5.2f} of copy" if part else " " * 15
    peers = {key: ratio for key, ratio in row.items() if key.endswith("/ ours")}
    told += "".join(f"  {ratio:6.2f}x {key.split(' /')[0]}" for key, ratio in peers.items())
    return f"{told}   (goal: {row['goal']})"


if __name__ == "__main__":
    sys.exit(main())
