"""The whole store over a disk: pages going down and coming back, and one token appended to 32 layers.

    python benchmarks/kv_store.py DIR [--only tiers|append] [--pages 64] [--context 32768] [--rounds 7] [--fresh]

"tiers", of 2 MiB pages of an 8B Llama (32 layers, 8 KV heads of 128, bf16, 16 tokens): "store" is a prompt's pages
from the pool to durable (`flush`), "load" is `open` to the last page in the pool, both with checksums, cold (O_DIRECT),
against a raw O_DIRECT loop over the same bytes in the same round, out of huge pages and out of ordinary memory
("small", as fio uses). The directory is full, as in the long run: a round overwrites the pages of an earlier one, as
raw does. With `--fresh` it still fills, and the file system has to turn preallocated room into written room.

"append" is one token's keys and values of 32 layers at a long context, `reserve` to `commit`, against the bare paged
write of the same rows and transformers' DynamicLayer (2 layers of it, times 16). Prints min / median / max and median
ratios.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading
from kv_disk import Raw, report, small_pages

from plait.kvstore import KVSpec, KVStore, Step
from plait.kvstore.tiers.memory import aligned_region

WARM = 3  # rounds: the first writes of a slab also convert its extents
LLAMA = KVSpec(32, 8, 128, 16, torch.bfloat16)


def computed(store: KVStore, ids: np.ndarray) -> Step:
    """Do all of one prompt but its commit: noise for keys and values."""
    seq = store.open(ids)
    step = store.reserve([seq], [len(ids) - seq.cached_tokens])
    rows = torch.randn(step.num_tokens, 8, 128).to(torch.bfloat16)
    for layer in range(LLAMA.layers):
        store.append(step, layer, rows, rows)
    return step


def tiers(folder: Path, pages: int, rounds: int, fresh: bool) -> None:
    """Time the way down and up against the raw disk."""
    memory = aligned_region(pages, LLAMA.bytes_per_page)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.shape, dtype=np.uint8)
    clocks: dict[str, list[tuple[float, float]]] = {}
    small = small_pages(memory)
    kept = rounds + WARM if fresh else 2
    room = kept * (pages + 4) * (LLAMA.bytes_per_page + 8192)
    with ThreadPoolExecutor(4) as pool, KVStore(
        LLAMA, num_pages=pages + 2, grow=False, disk=folder / "cache", disk_bytes=room, fetch="always"
    ) as store:  # fmt: skip
        raw = Raw(folder, memory, pool)

        def down(step: Step) -> None:
            store.commit(step)
            store.close(step.seqs)
            assert store.flush(600)

        def up(ids: np.ndarray) -> None:
            with store.open(ids) as seq:
                assert seq.cached_tokens == 16 * pages

        for number in range(rounds + WARM):
            ids = np.arange(16 * pages + 1) + number * 100_000
            step = computed(store, ids)
            calls: dict[str, Callable[[], object]] = {
                "store raw, synced": lambda: raw.write(synced=True),
                "store raw": raw.write,
                "store raw, small": lambda: raw.write(of=small),
                "store plait": lambda step=step: down(step),
                "evict": store.evict,
                "load raw": lambda: raw.read(memory),
                "load raw, small": lambda: raw.read(small),
                "load plait": lambda ids=ids: up(ids),
            }
            for name, call in calls.items():
                begin, busy = time.perf_counter(), time.process_time()
                call()
                took = time.perf_counter() - begin, time.process_time() - busy
                if number >= WARM:
                    clocks.setdefault(name, []).append(took)
            store.evict()
        moves = store.tier_counters()["moves"]
    evictions = statistics.median(wall for wall, _ in clocks.pop("evict"))
    print(f"{pages} pages of 2 MiB{', fresh' * fresh}; all evicted in {1e3 * evictions:.2f} ms")
    report(clocks, pages * LLAMA.bytes_per_page / 1e9)
    print("moves", moves)


def append(context: int, rounds: int) -> None:
    """Time one token's writing at a long context."""
    from transformers import __version__
    from transformers.cache_utils import DynamicLayer

    store = KVStore(LLAMA, num_pages=context // 16 + 8, grow=False)
    seq = store.open()
    step = store.reserve([seq], [context])
    many = torch.randn(context, 8, 128).to(torch.bfloat16)
    for layer in range(32):
        store.append(step, layer, many, many)
    store.commit(step)
    row = many[:1].clone()

    def ours() -> None:
        step = store.reserve([seq], [1])
        for layer in range(32):
            store.append(step, layer, row, row)
        store.commit(step)

    pages = [torch.zeros(64, 16, 8, 128, dtype=torch.bfloat16) for _ in range(64)]

    def floor() -> None:
        for region in pages:
            region[3, 5] = row[0]

    layers = [DynamicLayer() for _ in range(2)]
    whole = many.transpose(0, 1)[None]
    for layer in layers:
        layer.update(whole, whole)
    one = row.transpose(0, 1)[None]
    calls = {
        "paged write alone": (floor, 1), "plait": (ours, 1),
        "DynamicLayer": (lambda: [layer.update(one, one) for layer in layers], 16),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, scale) in calls.items():
            begin = time.process_time()
            call()
            times[name].append((time.process_time() - begin) * 1e3 * scale)
    base = statistics.median(times["paged write alone"])
    print(
        f"one token of 32 layers at {context}: CPU ms min / median / max; transformers {__version__}"
    )
    for name, ms in times.items():
        middle = statistics.median(ms)
        print(f"{name:24}{min(ms):9.2f} / {middle:.2f} / {max(ms):.2f}{middle / base:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["tiers", "append"])
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    print(heading("transformers", "xxhash"))
    if args.only in (None, "tiers"):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            tiers(folder, args.pages, args.rounds, args.fresh)
        finally:
            shutil.rmtree(folder)
    if args.only in (None, "append"):
        append(args.context, args.rounds)


if __name__ == "__main__":
    main()
