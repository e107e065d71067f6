"""The page store's books: allocation, prefix lookup, memory per page, and what each eviction policy keeps.

    python benchmarks/kv_pages.py [--rounds 30] [--only pool|lookup|memory|runs|policies]

Pool and lookup are timed in interleaved rounds against vLLM's BlockPool and block hashing, if vLLM
can be imported (its classes run without a GPU), else without a ratio; milliseconds of CPU time,
min / median / max. The policies' hit rates are counts: the same in every run.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.kvstore import KVSpec, KVStore, PagePool
from plait.kvstore.evict import POLICIES
from plait.kvstore.tokens import History

PAGE = 16
TINY = KVSpec(
    layers=1, kv_heads=1, head_dim=1, page_tokens=PAGE, dtype=torch.float16, shared_kv=True
)
LONG = 4096  # pages of the prompt that is looked up


def race(calls: dict[str, tuple[Callable[[], object], int]], rounds: int, peer: str) -> None:
    """Time calls in turn and print; each comes with the number of pages it handles."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, (call, _) in calls.items():
            begin = time.process_time_ns()
            call()
            if round_:
                times[name].append((time.process_time_ns() - begin) / 1e6)
    rate = {name: calls[name][1] / min(ms) * 1e3 for name, ms in times.items()}
    for name, ms in times.items():
        ratio = f"   {rate[name] / rate[peer]:6.2f} x {peer}" if peer in rate else ""
        print(
            f"  {name:<34} {min(ms):8.3f} / {statistics.median(ms):8.3f} / {max(ms):8.3f} ms"
            f"   {rate[name] / 1e6:7.2f} M pages/s{ratio}"
        )


def written(store: KVStore, ids: np.ndarray, tenant: str | None = None) -> int:
    """Serve a prompt whose keys nobody reads; give the tokens that were cached."""
    seq = store.open(ids, tenant)
    store.append(seq, 0, torch.zeros(len(ids) - seq.length, 1, 1, dtype=TINY.dtype))
    store.commit(seq)
    store.close(seq)
    return seq.cached_tokens


def vllm_parts() -> tuple[Any, ...] | None:
    """Give vLLM's version, its block pool class and its hashing modules, if it is there."""
    names = ("vllm.v1.core.block_pool", "vllm.v1.core.kv_cache_utils", "vllm.utils.hashing")
    try:
        return importlib.import_module("vllm").__version__, *map(importlib.import_module, names)
    except ImportError as missing:
        print(f"vLLM cannot be imported ({missing}): no ratios")
        return None


def pool(rounds: int, peer) -> None:
    """Allocate and free 256 pages, 100 times."""
    print("allocate and free 100 x 256 of 65,536 pages; one by one: 256 x 1")
    mine, count, none = PagePool(TINY, 65_536), np.array([256]), np.array([-1])

    def ours() -> None:
        for _ in range(100):
            mine.release(mine.allocate(count, none))

    def ours_shuffled() -> None:
        for order in orders:
            mine.release(mine.allocate(count, none)[order])

    def ours_single() -> None:
        for _ in range(256):
            mine.release(mine.allocate(none * -1, none))

    orders = [np.random.default_rng(i).permutation(256) for i in range(100)]
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "plait": (ours, 25_600),
        "plait, freed in random order": (ours_shuffled, 25_600),
        "plait, one by one": (ours_single, 256),
    }
    if peer is not None:
        for caching in (False, True):
            theirs = peer[1].BlockPool(65_536, caching, PAGE)

            def cycle(theirs=theirs) -> None:
                for _ in range(100):
                    theirs.free_blocks(reversed(theirs.get_new_blocks(256)))

            def single(theirs=theirs) -> None:
                for _ in range(256):
                    theirs.free_blocks(theirs.get_new_blocks(1))

            name = "vLLM" + (", caching on" if caching else "")
            calls[name] = (cycle, 25_600)
            calls[name + ", one by one"] = (single, 256)
    race(calls, rounds, "vLLM")


def lookup(rounds: int, peer) -> None:
    """Find a prompt of 4,096 cached pages: hash it, find its pages, pin and let go."""
    print(f"look up a prompt of {LONG} cached pages ({LONG * PAGE} tokens)")
    store = KVStore(TINY, num_pages=2 * LONG, grow=False)
    ids = np.random.default_rng(0).integers(0, 128_000, LONG * PAGE + 1).astype(np.int32)
    written(store, ids)
    assert store.match([ids]) == [LONG * PAGE]
    listed, stranger = ids.tolist(), ids[::-1].copy()
    key = store._key(None)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "plait: hash + find + compare": (lambda: store.cache.match(History(key, ids, PAGE)), LONG),
        "plait: match(array)": (lambda: store.match([ids]), LONG),
        "plait: open + close(array)": (lambda: store.close(store.open(ids)), LONG),
        "plait: open + close(list)": (lambda: store.close(store.open(listed)), LONG),
        "plait: match, nothing cached": (lambda: store.match([stranger]), LONG),
    }
    if peer is not None:
        calls |= vllm_lookup(peer, listed)
    race(calls, rounds, "vLLM: hash + find")


def vllm_lookup(peer, ids: list[int]) -> dict[str, tuple[Callable[[], object], int]]:
    """Make vLLM's way: hash block after block, then find each block's hash."""
    _, block_pool, kv_cache_utils, hashing = peer
    hash_of = hashing.get_hash_fn_by_name("sha256")
    theirs = block_pool.BlockPool(2 * LONG, True, PAGE)
    blocks = [ids[i * PAGE : (i + 1) * PAGE] for i in range(LONG)]

    def hashes():
        parent = bytes(32)
        for block in blocks:
            parent = kv_cache_utils.hash_block_tokens(hash_of, parent, block, None)
            yield parent

    taken = theirs.get_new_blocks(LONG)
    for block, digest in zip(taken, hashes(), strict=True):
        key = kv_cache_utils.make_block_hash_with_group_id(digest, 0)
        block.set_block_hash(key)
        theirs.cached_block_hash_to_block.insert(key, block)
    theirs.free_blocks(reversed(taken))

    def find() -> list:
        return [theirs.get_cached_block(digest, [0])[0] for digest in hashes()]

    def pin() -> None:
        found = find()
        theirs.touch(found)
        theirs.free_blocks(reversed(found))

    return {"vLLM: hash + find": (find, LONG), "vLLM: hash + find + pin + free": (pin, LONG)}


def memory() -> None:
    """Count the bytes of everything but the pages, at a million pages."""
    KVStore(TINY, num_pages=1)  # so that what loads once is not counted
    print("bytes of books per page at 1,000,000 pages of 16 tokens")
    for name in POLICIES:
        tracemalloc.start()
        store = KVStore(TINY, num_pages=1_000_000, grow=False, evict=name)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"  {name:<10} {held / store.pool.capacity:6.1f}")


def runs() -> None:
    """Decode 32 sequences side by side, closing and opening: pages per consecutive run."""
    print("pages in one consecutive run, on average, after 4,000 decode steps of 32 sequences")
    for pages in (1024, 4096):
        store = KVStore(TINY, num_pages=pages, grow=False)
        draws = np.random.default_rng(0)
        seqs = store.open_batch(32)
        for turn in range(4000):
            step = store.reserve(seqs, 1 if turn else [int(n) for n in draws.integers(1, 300, 32)])
            store.append(step, 0, torch.zeros(step.num_tokens, 1, 1, dtype=TINY.dtype))
            store.commit(step)
            for at in np.flatnonzero(draws.random(32) < 1 / 200):
                store.close(seqs[at])
                seqs[at] = store.open()
                more = store.reserve([seqs[at]], [int(draws.integers(1, 300))])
                store.append(more, 0, torch.zeros(more.num_tokens, 1, 1, dtype=TINY.dtype))
                store.commit(more)
        held = sum(len(seq.pages) for seq in seqs)
        pieces = sum(1 + int((np.diff(seq.pages) != 1).sum()) for seq in seqs if len(seq.pages))
        print(f"  {pages} pages, {held} held: {held / pieces:.1f} pages a run")


# --- eviction: hit rates on traces -----------------------------------------------------------------


def zipf_prompts(draws: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw prompts of 4 to 40 pages by a Zipf law (exponent 1) out of 400; a new question follows each."""
    popular = [draws.integers(0, 32_000, int(n)) for n in draws.integers(64, 640, 400)]
    weights = 1 / np.arange(1, 401)
    for which in draws.choice(400, 1500, p=weights / weights.sum()):
        yield np.concatenate([popular[which], draws.integers(0, 32_000, 32)])


def scan_and_loop(draws: np.random.Generator) -> Iterator[np.ndarray]:
    """Ask about 20 documents in turn, while documents that nobody asks about again are read once."""
    kept = [draws.integers(0, 32_000, 480) for _ in range(20)]
    for turn in range(1500):
        if turn % 3 == 0:
            yield np.concatenate([kept[turn // 3 % 20], draws.integers(0, 32_000, 24)])
        else:
            yield draws.integers(0, 32_000, 320)


def real_text(draws: np.random.Generator) -> Iterator[np.ndarray]:
    """Hold conversations about this library's own sources and docs, byte by byte, several at a time.

    Each starts with one of 5 system prompts and a file; each turn asks for all so far and a few lines more.
    """
    here = Path(__file__).resolve().parent.parent
    files = sorted([*here.glob("*/*.py"), *here.glob("docs/**/*.md"), *here.glob("*.md")])
    texts = [np.frombuffer(path.read_bytes()[:6000], np.uint8).astype(np.int32) for path in files]
    texts = [text for text in texts if len(text) > 400]
    system = [text[:400] for text in texts[:5]]
    lines = [line.encode() for path in files for line in re.split(r"\n\n+", path.read_text())]
    talks: list[np.ndarray] = []
    for _ in range(1500):
        if len(talks) < 12 or draws.random() < 0.2:
            which = min(int(draws.zipf(1.3)) - 1, len(texts) - 1)
            talks.append(np.concatenate([system[int(draws.integers(5))], texts[which][:2400]]))
        at = int(draws.integers(len(talks)))
        said = np.frombuffer(lines[int(draws.integers(len(lines)))][:200], np.uint8)
        talks[at] = np.concatenate([talks[at], said])
        yield talks[at]
        if draws.random() < 0.2:
            del talks[at]


def policies(pages: int = 1000) -> None:
    """Replay each trace under each policy."""
    print("tokens found in the cache, of all asked for; pages of the store in the heading")
    traces = {"zipf": zipf_prompts, "scan and loop": scan_and_loop, "real text": real_text}
    for size in (pages, 3 * pages):
        print(f"  {size:>6} pages    " + "".join(f"{name:>10}" for name in POLICIES))
        for name, trace in traces.items():
            shares = []
            for policy in POLICIES:
                store = KVStore(TINY, num_pages=size, grow=False, evict=policy)
                for prompt in trace(np.random.default_rng(0)):
                    written(store, prompt)
                counters = store.counters()
                shares.append(counters["tokens_found"] / counters["tokens_asked"])
            print(f"  {name:<15}" + "".join(f"{share:10.1%}" for share in shares))


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=["pool", "lookup", "memory", "runs", "policies"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer = vllm_parts() if args.only in {None, "pool", "lookup"} else None
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}"
        + (f", vLLM {peer[0]}" if peer else "")
    )
    timed = {"pool": pool, "lookup": lookup}
    for name, part in timed.items():
        if args.only in {None, name}:
            part(args.rounds, peer)
    for name, counted in {"memory": memory, "runs": runs, "policies": policies}.items():
        if args.only in {None, name}:
            counted()


if __name__ == "__main__":
    main()
