"""Kill a process that serves prompts from a store with a disk, again and again, and look at what the next one finds.

    python tests/kvstore/store_faults.py --kills 500 [--seed 0] [--folder DIR] [--json]

The child serves random prompts of two tenants from a pool too small for them and says which of them a `flush` made
durable; it is killed (SIGKILL) a random time after it opened or after one of those. Then bits of
the files are flipped, at times. The parent opens the store, serves all flushed prompts and compares every key and
value. Exits with 1 if a wrong byte was served, a flushed page lost, or a file left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from faults import death, killed_child, say

from plait.kvstore import KVSpec, KVStore

SPEC = KVSpec(layers=2, kv_heads=1, head_dim=2, page_tokens=4, dtype=torch.float64)
EXPECTED = {"lock", "index", "secret", "slab-00000"}
MOST_PROMPTS = 400


def make(folder: Path) -> KVStore:
    """The store of child and parent; its secret is the directory's."""
    return KVStore(SPEC, num_pages=24, grow=False, disk=folder, disk_bytes="32MiB", fetch="always")


def prompt_of(name: str) -> tuple[list[int], str]:
    """A prompt and its tenant, the same in child and parent."""
    draw = random.Random(name)
    return [draw.randrange(3) for _ in range(draw.randint(9, 40))], draw.choice("ab")


def rows_of(ids: list[int], tenant: str, layer: int) -> torch.Tensor:
    """Keys and values that are a function of all tokens before, as a model's are."""
    sums = torch.cumsum(torch.tensor(ids, dtype=torch.float64) + 1, 0)
    return (
        (sums + 1000 * layer + 0.5 * (tenant == "b"))[:, None, None].expand(-1, 1, 2).contiguous()
    )


def serve(store: KVStore, name: str) -> tuple[int, bool]:
    """Serve one prompt; give the tokens that were found, and whether they were the right ones."""
    ids, tenant = prompt_of(name)
    with store.open(ids, tenant) as seq:
        cached = seq.cached_tokens
        want = [rows_of(ids, tenant, layer) for layer in range(SPEC.layers)]
        right = all(
            torch.equal(store.keys_values(seq, layer)[part], want[layer][:cached])
            for layer in range(SPEC.layers) for part in (0, 1)
        )  # fmt: skip
        step = store.reserve([seq], [len(ids) - cached])
        for layer in range(SPEC.layers):
            store.append(step, layer, want[layer][cached:], want[layer][cached:])
        store.commit(step)
    return cached, right


def child(folder: Path, number: int, pipe: int) -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    store, draw = make(folder), random.Random(number)
    say(pipe, "open", [])
    for turn in range(10**9):
        names = [f"{number}.{turn}.{i}" for i in range(draw.randint(1, 3))]
        for name in names:
            serve(store, name)
        if store.flush(60):
            say(pipe, "flushed", [name.encode() for name in names])


class StoreHarness:
    """The parent: what was flushed, and the counts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.flushed: list[str] = []
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("kills", "bits flipped", "prompts served", "pages found", "wrong bytes served",
                           "flushed pages lost", "files left over"), 0)
        )  # fmt: skip

    def kill(self, number: int) -> None:
        """One life of the directory."""
        when, harm = death(self.draw, (-1, 0, 1, 3, 9), 0.1), self.draw.random() < 0.3
        for what, names in killed_child(self.folder, number, when, b"flushed", child):
            if what == "flushed":
                self.flushed += [name.decode() for name in names]
        self.counts["kills"] += 1
        harmed = harm and self.flip()
        self.look(harmed)
        if len(self.flushed) > MOST_PROMPTS:  # before the directory must evict what was promised
            shutil.rmtree(self.folder)
            self.flushed.clear()

    def flip(self) -> bool:
        """Turn over a bit somewhere in a slab or the index."""
        path = self.folder / self.draw.choice(("index", "slab-00000"))
        if not path.exists():
            return False
        with path.open("r+b") as file:
            at = self.draw.randrange(min(path.stat().st_size, 1 << 21))
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << self.draw.randrange(8)]))
        self.counts["bits flipped"] += 1
        return True

    def look(self, harmed: bool) -> None:
        """Serve what was flushed; damage may cost pages, and nothing else may."""
        if not self.folder.exists():
            return
        with make(self.folder) as store:
            for name in self.flushed:
                cached, right = serve(store, name)
                full = (len(prompt_of(name)[0]) - 1) // SPEC.page_tokens
                self.counts["prompts served"] += 1
                self.counts["pages found"] += cached // SPEC.page_tokens
                self.counts["wrong bytes served"] += not right
                if not harmed:
                    self.counts["flushed pages lost"] += max(0, full - cached // SPEC.page_tokens)
                store.evict()
            store.check_integrity()
        names = {path.name for path in self.folder.iterdir()}
        self.counts["files left over"] += len(names - EXPECTED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to put the directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        harness = StoreHarness(Path(folder) / "cache", options.seed)
        for number in range(options.kills):
            harness.kill(number)
    counts = dict(harness.counts)
    lines = (f"{name:24}{count:>10}" for name, count in counts.items())
    print(json.dumps(counts) if options.json else "\n".join(lines))
    sys.stdout.flush()
    bad = counts["wrong bytes served"], counts["flushed pages lost"], counts["files left over"]
    os._exit(1 if any(bad) else 0)


if __name__ == "__main__":
    main()
