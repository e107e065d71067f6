"""Decode attention over coded pages on the CPU: read in place, against decoding them first, and against exact pages.

    python benchmarks/coded_attention.py [--contexts 4096,32768] [--batches 1,4] [--rounds 7] [--threads 1]

GQA 32/8, heads of 128, pages of 32 tokens in bfloat16, one row a sequence. "first" decodes into pages that are there
and attends to those. Fastest and median CPU milliseconds of the rounds, in turns, and ratios of the fastest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from contest import heading

from plait.cuda_kernels import paged_attention
from plait.cuda_kernels.coded_pages import attend_codes
from plait.kvstore.codecs import KVCodec, PageLayout, find_kv_codec
from plait.kvstore.codecs.places import code_table

CODECS = (
    "int8", "fp8", "int4:group=32", "int2:group=32", "kivi:bits=4,group=32", "kivi:bits=2,group=32", "mxfp8", "mxfp4",
    "nvfp4",
)  # fmt: skip
HEADS, KV_HEADS, WIDTH, SIZE = 32, 8, 128, 32


def calls_of(codec: KVCodec, tokens: int, batch: int) -> dict[str, Callable[[], object]]:
    """The three ways over the same keys and values."""
    pages = tokens * batch // SIZE
    k, v = (torch.randn(pages, SIZE, KV_HEADS, WIDTH).bfloat16() for _ in range(2))
    q, each = torch.randn(batch, HEADS, WIDTH).bfloat16(), tokens // SIZE
    rows = (
        torch.arange(batch + 1), torch.arange(batch + 1, dtype=torch.int32) * each, torch.arange(pages).int(),
        torch.zeros(batch, dtype=torch.int64), torch.full((batch,), tokens), WIDTH**-0.5,
    )  # fmt: skip
    parts, room = ((codec.keys, k), (codec.values, v)), (torch.empty_like(k), torch.empty_like(v))
    data = [part.encode(x) for part, x in parts]
    layout = PageLayout((SIZE, KV_HEADS, WIDTH), torch.bfloat16)
    keys, values = (
        code_table(part, layout, [own], KV_HEADS)
        for (part, _), own in zip(parts, data, strict=True)
    )
    assert keys is not None
    assert values is not None

    def first() -> object:
        for (part, _), own, x in zip(parts, data, room, strict=True):
            part.decode_into(own, x)
        return paged_attention(q, *room, *rows)

    return {
        "in place": lambda: attend_codes(q, keys, values, *rows),
        "first": first,
        "exact": lambda: paged_attention(q, k, v, *rows),
    }


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="4096,32768")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(heading("numba"))
    for tokens in map(int, options.contexts.split(",")):
        for batch in map(int, options.batches.split(",")):
            print(f"{tokens} tokens, batch {batch}")
            for name in CODECS:
                calls = calls_of(find_kv_codec(name), tokens, batch)
                times: dict[str, list[float]] = {way: [] for way in calls}
                for number in range(options.rounds + 1):
                    for way, call in calls.items():
                        begin = time.process_time()
                        call()
                        if number:
                            times[way].append((time.process_time() - begin) * 1e3)
                best = {way: min(ms) for way, ms in times.items()}
                said = ", ".join(
                    f"{way} {best[way]:.2f} / {statistics.median(ms):.2f}"
                    for way, ms in times.items()
                )
                print(
                    f"  {name:22} {said}; first / in place {best['first'] / best['in place']:.2f}, "
                    f"exact / in place {best['exact'] / best['in place']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
