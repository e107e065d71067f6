"""CUDA kernels beside the device's own copy bandwidth and torch's operations; one command, under 8 minutes.

    python benchmarks/gpu.py [--json FILE]

Events, buffers that rotate (so that the second cache does not help), medians. Without a GPU, or without the `cuda`
extra, it says so and ends. Not yet run: every number in docs/benchmarks/gpu.md is unmeasured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plait.cuda_kernels import merge_states, paged_attention
from plait.cuda_kernels.add_rms_norm import add_rms_norm_reference
from plait.cuda_kernels.all_reduce_norm import STATISTICS, norm_one_shot, norm_two_shot
from plait.cuda_kernels.block_floats import dequantise_mx, quantise_mx
from plait.cuda_kernels.gpu import toolchain
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.int_groups import dequantise_groups, quantise_groups
from plait.cuda_kernels.merge import merge_states_reference
from plait.cuda_kernels.nvfp4 import dequantise_nvfp4, nvfp4_whole, quantise_nvfp4
from plait.cuda_kernels.scaled_rows import dequantise_scaled, quantise_scaled

RUNS, MEGABYTE = 30, 1 << 20


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
        found.append({
            "kernel": f"lse merge, 8 shards, {moved / MEGABYTE:.0f} MB", "us": ours,
            "of copy bandwidth": moved / (ours * 1e-6) / bandwidth, "torch / ours": torch_us / ours,
            "goal": "0.85 of bandwidth from 64 MB",
        })  # fmt: skip
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

            def unfused(xs=xs, residual=residual, weight=weight, world=world) -> None:
                for _ in range(world):
                    add_rms_norm_reference(xs.sum(0), residual, weight, 1e-5)

            torch_us = microseconds(graphed(unfused))
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
                moved = crossed + world * 4 * one
                found.append({
                    "kernel": f"{build.name}, {world} virtual ranks, {rows} x {hidden}",
                    "us": ours, "of copy bandwidth": moved / (ours * 1e-6) / bandwidth,
                    "torch / ours": torch_us / ours, "goal": "1.4x unfused, 0.8 of the bytes",
                })  # fmt: skip
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
        ours = microseconds(
            lambda _, q=q, k=k, v=v, n=integers: paged_attention(q, k, v, *n, dim**-0.5)
        )
        whole = (q.unsqueeze(2), *(
            t.view(batch, tokens, kv_heads, dim).transpose(1, 2) for t in (k, v)
        ))  # fmt: skip
        sdpa = microseconds(
            lambda _, whole=whole: torch.nn.functional.scaled_dot_product_attention(
                *whole, enable_gqa=True
            )
        )
        found.append({
            "kernel": f"paged decode, GQA {heads}/{kv_heads}, batch {batch} x {tokens}", "us": ours,
            "of copy bandwidth": 2 * k.nbytes / (ours * 1e-6) / bandwidth,
            "torch / ours": sdpa / ours, "goal": "0.8 of bandwidth at 16 x 32768; never below 1",
        })  # fmt: skip
    return found


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


def launches(_: float) -> list[dict[str, Any]]:
    o, lse = torch.randn(2, 1, 1, 64, device="cuda"), torch.randn(2, 1, 1, device="cuda")
    plain = microseconds(lambda _: merge_states(o, lse))
    replayed = microseconds(graphed(lambda: merge_states(o, lse)))
    add = microseconds(lambda _: o.add_(1))
    return [
        {
            "kernel": "launch: operator",
            "us": plain,
            "torch / ours": add / plain,
            "goal": "reported",
        },
        {"kernel": "launch: in a graph", "us": replayed, "goal": "reported"},
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    problem = toolchain.problem() if torch.cuda.is_available() else "no CUDA device"
    if problem:
        print(f"not measured: {problem}")
        return 0
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for part in (merges, norms, decodes, codecs, launches):
        for row in part(bandwidth):
            rows.append(row)
            share, ratio = row.get("of copy bandwidth"), row.get("torch / ours")
            told = f"{row['kernel']:60} {row['us']:9.1f} us"
            told += f"  {share:5.2f} of copy" if share else " " * 15
            told += f"  {ratio:6.2f}x torch" if ratio else ""
            print(f"{told}   (goal: {row['goal']})", flush=True)
    if options.json:
        head = {"device": device, "torch": str(torch.__version__), "copy bytes/s": bandwidth}
        options.json.write_text(json.dumps({**head, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
