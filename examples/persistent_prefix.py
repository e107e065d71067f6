"""A plain `generate` that remembers: the second process finds the first one's prompt on disk and skips its prefill.

    python examples/persistent_prefix.py cache/      # computes the document's keys and values
    python examples/persistent_prefix.py cache/      # another process: reads them, same answer

Needs transformers; the model is the small one of examples/tinylm.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from plait.kvstore.engines.transformers import PlaitCache, make_store

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("disk", type=Path, help="directory of the cache")
    parser.add_argument("--document", type=Path, default=HERE / "tinylm" / "README.md")
    parser.add_argument("--tokens", type=int, default=4096, help="at most so many of the document")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(HERE / "tinylm" / "checkpoint").eval()
    text = options.document.read_bytes()[: options.tokens]
    ids = torch.tensor([list(text)])  # the model reads bytes

    # fetch="always": a model this small would often be computed sooner than read, which is for the store to say
    with make_store(model, disk=options.disk, disk_bytes="1GiB", fetch="always") as store:
        begin = time.perf_counter()
        with PlaitCache(store, ids) as cache:
            out = model.generate(
                ids, past_key_values=cache, max_new_tokens=32, do_sample=False, pad_token_id=0
            )
            cache.tell(out)
            cached = cache.cached_tokens
        seconds = time.perf_counter() - begin
        store.flush()
        moves = store.tier_counters()["moves"]
    print(f"{ids.shape[1]} prompt tokens, {cached} of them from disk, {seconds:.2f} s")
    print(f"pages read {moves['pages_fetched']}, written {moves['pages_written']}")
    print("answer", bytes(out[0, ids.shape[1] :].tolist()))


if __name__ == "__main__":
    main()
