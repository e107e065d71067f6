"""CUDA kernels beside the device's own copy bandwidth and torch's operations; one command, under 8 minutes.

    python benchmarks/gpu.py [PART ...] [--json FILE]        --list says what there is, also without a GPU

Events, buffers that rotate (so that the second cache does not help), medians. Each part has a process of its own, for a
kernel that faults takes its CUDA context along: what fails is told, what hangs is ended after three minutes, and the
others go on; after --minutes no part is begun. Without a GPU, or without the `cuda` extra, it says so and ends. Not yet
run on a device: every number in docs/benchmarks/gpu.md is unmeasured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_attention import GOAL, decodes
from gpu_timing import (
    MEGABYTE,
    Row,
    attempts,
    copy_bandwidth,
    failure,
    graphed,
    host_microseconds,
    line,
    microseconds,
    rotating,
    share,
    tried,
)

from plait.cuda_kernels import Regions, copy_pages, merge_states, summarise, top_k
from plait.cuda_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from plait.cuda_kernels.all_reduce_norm import STATISTICS, norm_one_shot, norm_two_shot
from plait.cuda_kernels.block_floats import dequantise_mx, quantise_mx
from plait.cuda_kernels.block_ints import dequantise_blocks, quantise_blocks
from plait.cuda_kernels.gpu import toolchain
from plait.cuda_kernels.gpu.peers import Layout
from plait.cuda_kernels.helix_combine import helix_combine, helix_send, inverse_of, record_bytes
from plait.cuda_kernels.int_groups import dequantise_groups, quantise_groups
from plait.cuda_kernels.merge import merge_states_reference
from plait.cuda_kernels.micro_blocks import dequantise_micro, quantise_micro
from plait.cuda_kernels.nvfp4 import dequantise_nvfp4, nvfp4_whole, quantise_nvfp4
from plait.cuda_kernels.scaled_rows import dequantise_scaled, quantise_scaled
from plait.cuda_kernels.sign_groups import dequantise_signs, quantise_signs
from plait.cuda_kernels.strided import pack
from plait.cuda_kernels.turbo import dequantise_turbo, quantise_turbo

SHARE = "0.85 of copy bandwidth from 64 MB"
NORM = "1.4x unfused, 0.8 of the bytes"


PART_SECONDS = 180


def merges(bandwidth: float) -> Iterator[Row]:
    return attempts(
        (f"lse merge, 8 shards, {rows} rows", partial(merge_of, rows, bandwidth))
        for rows in (64, 1024, 16384)
    )


def merge_of(rows: int, bandwidth: float) -> list[Row]:
    sets = [
        (torch.randn(8, rows, 16, 128, device="cuda").bfloat16(),
         torch.randn(8, rows, 16, device="cuda"))
        for _ in range(rotating(8 * rows * 16 * 256))
    ]  # fmt: skip
    o, lse = sets[0]
    moved = o.nbytes * 9 / 8 + lse.nbytes * 9 / 8
    ours = microseconds(lambda i: merge_states(*sets[i]), len(sets))
    torch_us = microseconds(lambda i: merge_states_reference(*sets[i]), len(sets))
    name = f"lse merge, 8 shards, {moved / MEGABYTE:.0f} MB"
    return [share(name, ours, moved, bandwidth, torch_us, SHARE)]


def copies(bandwidth: float) -> Iterator[Row]:
    pages, page = 512, (64, 8, 128)
    of = torch.randn(pages, *page, device="cuda").bfloat16()
    to, order = torch.empty_like(of), np.random.default_rng(0).permutation(pages)
    places, sources = Regions([to]), Regions([of])
    index, all_pages = torch.from_numpy(order).cuda(), torch.arange(pages, device="cuda")
    torch_us = microseconds(lambda _: torch.index_select(of, 0, index, out=to))

    def row(where: str, goal: str, to_pages: Any, of_pages: Any) -> list[Row]:
        us = microseconds(lambda _: copy_pages(places, to_pages, sources, of_pages))
        name = f"page copy, 512 of 128 KiB{where}"
        return [share(name, us, 2 * of.nbytes, bandwidth, torch_us, goal)]

    from_host = np.arange(pages), order
    return attempts([
        ("page copy", partial(row, "", SHARE, all_pages, index)),
        ("page copy from the host", partial(row, ", numbers from the host", "reported", *from_host)),
    ])  # fmt: skip


def codecs(bandwidth: float) -> Iterator[Row]:
    """Encode and decode 64 MB of a page, of which there are two; "waits": for the flag of what cannot be coded."""
    rows = [torch.randn(1 << 18, 128, device="cuda").bfloat16() for _ in range(2)]
    whole = nvfp4_whole(rows[0])
    return attempts((way[0], partial(codec, rows, bandwidth, *way)) for way in ways(whole))


def codec(
    rows: list[torch.Tensor], bandwidth: float, name: str, shape: tuple[int, ...],
    encode: Callable[..., Any], decode: Callable[..., Any],
) -> list[Row]:  # fmt: skip
    pages = [x.view(shape) for x in rows]
    parts = [encode(x) for x in pages]
    moved = pages[0].nbytes + sum(part.nbytes for part in parts[0])
    wait = ", waits" if name.startswith(WAITING) else ""
    calls: dict[str, Callable[[int], Any]] = {
        f"encode {name}{wait}": lambda i: encode(pages[i]),
        f"decode {name}": lambda i: decode(*parts[i]),
    }
    return [
        share(
            f"{what}, {moved / MEGABYTE:.0f} MB", microseconds(call, len(rows)), moved, bandwidth,
            None, SHARE,
        )
        for what, call in calls.items()
    ]  # fmt: skip


WAITING = ("int2", "int4", "int8", "fp8", "KIVI", "turbo", "ternary", "signs")


def ways(
    whole: float,
) -> Iterator[tuple[str, tuple[int, ...], Callable[..., Any], Callable[..., Any]]]:
    """Each codec's name, the shape of what it codes, and both ways."""
    flat, width, dtype = (-1, 128), 128, torch.bfloat16
    for bits in (2, 4):
        yield (
            f"int{bits}, groups of 64", flat, lambda x, b=bits: quantise_groups(x, b, 64, False),
            lambda *parts, b=bits: dequantise_groups(*parts, b, 64, False, width, dtype),
        )  # fmt: skip
        yield (
            f"KIVI, {bits} bits", (1, -1, 1024), lambda x, b=bits: quantise_groups(x, b, 32, True),
            lambda *parts, b=bits: dequantise_groups(*parts, b, 32, True, 1024, dtype),
        )  # fmt: skip
    for name, exact in (("int8", True), ("fp8", False)):
        yield (
            name, flat, lambda x, e=exact: quantise_scaled(x, e),
            lambda *parts, e=exact: dequantise_scaled(*parts, e, dtype),
        )  # fmt: skip
    for form in ("e4m3", "e2m3", "e2m1"):
        yield (
            f"MX {form}", flat, lambda x, f=form: quantise_mx(x, f, "floor"),
            lambda *parts, f=form: dequantise_mx(*parts, f, width, dtype),
        )  # fmt: skip
    yield (
        "NVFP4", flat, lambda x: quantise_nvfp4(x, whole, False),
        lambda *parts: dequantise_nvfp4(*parts, whole, width, dtype),
    )  # fmt: skip
    for name, bits in (("MXINT8", 8), ("BFP, 4 bits", 4)):
        yield (
            name, flat, lambda x, b=bits: quantise_blocks(x, b, 32),
            lambda *parts, b=bits: dequantise_blocks(*parts, b, 32, width, dtype),
        )  # fmt: skip
    for name, bits in (("mx9", 7), ("mx6", 4), ("mx4", 2)):
        yield (
            name, flat, lambda x, m=bits: quantise_micro(x, m),
            lambda *parts, m=bits: dequantise_micro(*parts, m, width, dtype),
        )  # fmt: skip
    for name, three in (("ternary", True), ("signs", False)):
        yield (
            name, (-1, 32, 1024), lambda x, t=three: quantise_signs(x, t),
            lambda *parts, t=three: dequantise_signs(*parts, 32, t, dtype),
        )  # fmt: skip
    for bits in (3, 4):
        yield (
            f"turbo, {bits} bits", flat, lambda x, b=bits: quantise_turbo(x, b, 0),
            lambda *parts, b=bits: dequantise_turbo(*parts, b, 0, width, dtype),
        )  # fmt: skip


def tops(bandwidth: float) -> Iterator[Row]:
    return attempts(
        (f"top 2048 of {columns}", partial(top_of, columns, bandwidth))
        for columns in (32 << 10, 128 << 10, 256 << 10)
    )


def top_of(columns: int, bandwidth: float) -> list[Row]:
    rows, k = 32, 2048
    sets = rotating(4 * rows * columns)
    xs = torch.randn(sets, rows, columns, device="cuda")
    hints = [top_k(x + torch.randn_like(x) * 0.05, k) for x in xs]  # the step before
    torch_us = microseconds(lambda i: torch.topk(xs[i], k, sorted=False), sets)
    ours = microseconds(lambda i: top_k(xs[i], k, hints[i]), sets)
    name = f"top {k} of {columns}, {rows} rows, hinted"
    return [share(name, ours, xs[0].nbytes, bandwidth, torch_us, "1.5x torch.topk")]


def rows_of_one_rank(bandwidth: float) -> Iterator[Row]:
    """Residual add and norm, summaries of pages, strided tensors."""
    x = torch.randn(8192, 4096, device="cuda").bfloat16()
    cases = {"add + RMSNorm": one_norm, "page summaries": summaries, "pack": packing}
    return attempts((name, partial(case, x, bandwidth)) for name, case in cases.items())


def one_norm(x: torch.Tensor, bandwidth: float) -> list[Row]:
    residual, weight = torch.randn_like(x), x[0].clone()
    us = microseconds(lambda _: add_rms_norm(x, residual, weight, 1e-5))
    plain = microseconds(lambda _: add_rms_norm_reference(x, residual, weight, 1e-5))
    return [share("add + RMSNorm, 8192 x 4096", us, 4 * x.nbytes, bandwidth, plain, SHARE)]


def summaries(x: torch.Tensor, bandwidth: float) -> list[Row]:
    keys, pages = x.view(2048, 16, 8, 128), torch.arange(2048, device="cuda").int()
    low, high = (torch.empty(2048, 8, 128, device="cuda").bfloat16() for _ in range(2))
    us = microseconds(lambda _: summarise(keys, pages, 0, 2048 * 16, 16, low, high))
    plain = microseconds(lambda _: torch.aminmax(keys, dim=1))
    moved = x.nbytes + 2 * low.nbytes
    return [share("least and greatest of pages of 16", us, moved, bandwidth, plain, SHARE)]


def packing(x: torch.Tensor, bandwidth: float) -> list[Row]:
    columns = x[:, 1024:3072]
    us = microseconds(lambda _: pack(columns))
    plain = microseconds(lambda _: columns.contiguous())
    return [share("pack columns of 4 KiB", us, 2 * columns.nbytes, bandwidth, plain, "reported")]


def norms(bandwidth: float) -> Iterator[Row]:
    """Virtual ranks: one launch plays all; the bytes of all ranks go through one memory."""
    return attempts(
        (f"norm over {world} virtual ranks, {rows} rows", partial(norms_of, world, rows, bandwidth))
        for world in (2, 4, 8)
        for rows in (16, 128)
    )


def norms_of(world: int, rows: int, bandwidth: float) -> list[Row]:
    found, hidden, blocks = [], 8192, 16
    layout = Layout(world, rows * (hidden * 2 + STATISTICS))
    buffers = torch.zeros(world, layout.total_bytes, dtype=torch.uint8, device="cuda")
    table = torch.tensor([b.data_ptr() for b in buffers], device="cuda")
    xs = torch.randn(world, rows, hidden, device="cuda").bfloat16()
    residual, weight = xs[0].clone(), xs[0, 0].clone()
    normed, total = torch.empty_like(xs), torch.empty_like(xs)
    pointers = [t.data_ptr() for t in (xs, residual, weight, weight, normed, total, total)]

    def unfused(norm=add_rms_norm):
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
        ours = microseconds(graphed(lambda v=variant, a=args: v.launch((blocks, world), *a)))
        one = xs.nbytes // world
        crossed = world * one * (2 * world if build is norm_one_shot else 6)
        name = f"{build.name}, {world} virtual ranks, {rows} x {hidden}"
        row = share(name, ours, crossed + world * 4 * one, bandwidth, torch_us, NORM)
        found.append({**row, "unfused of ours / ours": ours_apart / ours})
    return found


def partials(bandwidth: float) -> Iterator[Row]:
    """Helix's exchange over virtual ranks: every byte is written to a slot and read from it by one memory."""
    return attempts(
        (f"Helix exchange, {world} virtual ranks", partial(partials_of, world, fp8, bandwidth))
        for world in (2, 4, 8)
        for fp8 in (False, True)
    )


def partials_of(world: int, fp8: bool, bandwidth: float) -> list[Row]:
    batch, heads, dim = 32, 128, 128
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

    def exchange() -> None:
        send.launch((batch, world, world), *sending)
        combine.launch((8, 1, world), *merging)

    def apart() -> None:
        by_rank = os.unflatten(2, (world, own)).movedim(2, 0).contiguous()
        for rank in range(world):
            mine = lses[..., rank * own : (rank + 1) * own]
            merge_states_reference(by_rank[rank], mine)

    ours, torch_us = microseconds(graphed(exchange)), microseconds(graphed(apart))
    moved = os.nbytes + 2 * world * world * batch * own * record + out.nbytes
    name = f"Helix exchange{', fp8' if fp8 else ''}, {world} virtual ranks, {batch} x {heads}"
    return [share(name, ours, moved, bandwidth, torch_us, "reported")]


def launches(_: float) -> Iterator[Row]:
    """What a small call costs the host, by its own clock."""
    return attempts([("launch", launch_costs)])


def launch_costs() -> list[Row]:
    o, lse = torch.randn(2, 1, 1, 64, device="cuda"), torch.randn(2, 1, 1, device="cuda")
    ours = host_microseconds(lambda: merge_states(o, lse))
    replay = graphed(lambda: merge_states(o, lse))
    row: Row = {
        "kernel": "launch: operator", "us": ours, "goal": "reported",
        "torch / ours": host_microseconds(lambda: o.add_(1)) / ours,
    }  # fmt: skip
    triton = tried("Triton", lambda: triton_us(o))
    if triton is not None:
        row["Triton / ours"] = triton / ours
    in_graph = host_microseconds(lambda: replay(0))
    return [row, {"kernel": "launch: in a graph", "us": in_graph, "goal": "reported"}]


def triton_us(x: torch.Tensor) -> float:
    """Time the launch of an empty Triton kernel with as many arguments, if it is installed."""
    triton: Any = importlib.import_module("triton")

    def empty(a, b, c, d, e, n, m):
        pass

    kernel = triton.jit(empty)
    return host_microseconds(lambda: kernel[(1,)](x, x, x, x, x, 1, 64))


PARTS: dict[str, tuple[Callable[[float], Iterator[Row]], str]] = {
    "merge": (merges, f"lse merge of 8 shards; {SHARE}"),
    "copy": (copies, f"page copy; {SHARE}"),
    "codecs": (codecs, f"every codec that has kernels, both ways; {SHARE}"),
    "rows": (rows_of_one_rank, "norm on one GPU, summaries, packing; 0.85 of copy bandwidth"),
    "top-k": (tops, "2048 of 32k to 256k with a hint; 1.5x torch.topk"),
    "norm": (norms, f"all-reduce + residual + norm, 2 to 8 virtual ranks; {NORM}"),
    "partials": (partials, "Helix's exchange, 2 to 8 virtual ranks, bf16 and fp8; reported"),
    "decode": (decodes, f"paged decode of bf16, fp8 and int4 pages; {GOAL}"),
    "launch": (launches, "an operator, in a graph and out, beside torch and Triton; reported"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without")
    parser.add_argument("--list", action="store_true", help="what there is, and its goals; no GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=8, help="after so many no part is begun")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.list:
        for name, (_, what) in PARTS.items():
            print(f"{name:10} {what}")
        return 0
    return measure(options.parts or list(PARTS), options.json, 60 * options.minutes)


def measure(
    parts: list[str], file: Path | None, seconds: float,
    run: Callable[[str], Iterator[Row]] | None = None,
) -> int:  # fmt: skip
    """Measure parts, printing rows as they come; the file is written after each. Give how many rows failed."""
    begun, head = time.monotonic(), {}
    rows: list[Row] = []
    for name in parts:
        taken = time.monotonic() - begun
        found = (run or apart)(name)
        if taken > seconds:
            late = f"{taken / 60:.1f} minutes are over"
            found = iter([{"kernel": name, "skipped": late, "goal": ""}])
        for row in found:
            if "problem" in row:
                print(f"not measured: {row['problem']}")
                return 0
            if "device" not in row:
                rows.append(row)
                print(line(row), flush=True)
            elif not head:
                head = row
                print("{device}, torch {torch}, copy {copy bytes/s:.3g} bytes/s".format(**head))
            if file:
                file.write_text(json.dumps({**head, "rows": rows}, indent=1))
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    return sum("failed" in row for row in rows)


def apart(name: str) -> Iterator[Row]:
    """Measure a part in a process of its own, forked before anything here has touched CUDA."""
    ours, its = multiprocessing.Pipe(duplex=False)
    part = multiprocessing.get_context("fork").Process(target=send_rows, args=(name, its))
    part.start()
    its.close()
    until = time.monotonic() + PART_SECONDS
    while ours.poll(max(0.0, until - time.monotonic())):
        try:
            yield json.loads(ours.recv_bytes())
        except EOFError:
            break
    part.join(max(1.0, until - time.monotonic()))
    if part.is_alive():
        part.kill()
        yield failure(f"{name}, the rest", f"no end after {PART_SECONDS} s")
    elif part.exitcode:
        yield failure(f"{name}, the rest", f"its process ended with {part.exitcode}")


def send_rows(name: str, to: Connection) -> None:
    for row in rows_of(name):
        to.send_bytes(json.dumps(row).encode())


def rows_of(name: str) -> Iterator[Row]:
    """What stands in the way; or what the device is, and the rows of a part."""
    problem = toolchain.problem() if torch.cuda.is_available() else "no CUDA device"
    if problem:
        yield {"problem": str(problem)}
        return
    bandwidth = copy_bandwidth()
    yield {
        "device": torch.cuda.get_device_name(), "torch": str(torch.__version__),
        "copy bytes/s": bandwidth,
    }  # fmt: skip
    torch.cuda.empty_cache()
    yield from PARTS[name][0](bandwidth)


if __name__ == "__main__":
    sys.exit(main())
