"""Selection on the CPU: top-k, a decode step that reads a part, SnapKV's votes; ratios in one run.

    python benchmarks/kv_select.py [--context 131072] [--kvpress /path/to/its/python]

Prints CPU milliseconds (min / median / max) and the ratio of medians. kvpress pins an older transformers: give the
interpreter of an environment that has it, and its own score of the same shape is taken there.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contest import heading

from plait.cuda_kernels import top_k
from plait.kvstore import KVSpec, KVStore
from plait.kvstore.compress import CompressedStore, LayerView
from plait.kvstore.compress.scorers import SnapKV
from plait.kvstore.select.rocket import split

HEADS, KV_HEADS, WIDTH = 32, 8, 128
Calls = dict[str, Callable[[], object]]

KVPRESS = """
import logging, sys, time, torch, warnings
warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
import kvpress
from transformers import LlamaConfig, LlamaForCausalLM
tokens, rounds = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(int(sys.argv[3])); torch.set_grad_enabled(False)
config = LlamaConfig(vocab_size=32, hidden_size=4096, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=tokens + 8)
model = LlamaForCausalLM(config).eval()
k, h = torch.randn(1, 8, tokens, 128), torch.randn(1, tokens, 4096)
places = torch.arange(tokens)[None]
given = dict(position_embeddings=model.model.rotary_emb(h, places), cache_position=places[0], hidden_states=h)
press = kvpress.SnapKVPress(compression_ratio=0.5); press.post_init_from_model(model)
for _ in range(rounds + 1):
    begin = time.process_time()
    press.score(model.model.layers[0].self_attn, h, k, k, None, given)
    print((time.process_time() - begin) * 1e3)
"""


def race(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each, there and back: none always follows the same one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for _, call in order:
        call()
    for _ in range(rounds):
        order.reverse()
        for name, call in order:
            begin = time.process_time()
            call()
            times[name].append((time.process_time() - begin) * 1e3)
    return times


def report(title: str, times: dict[str, list[float]], ours: str) -> None:
    """Print, with each one's median over ours."""
    print(title)
    base = statistics.median(times[ours])
    for name, ms in times.items():
        middle = statistics.median(ms)
        print(
            f"  {name:>34}: {min(ms):9.3f} / {middle:9.3f} / {max(ms):9.3f} ms   / ours {middle / base:7.2f}"
        )


def top_ks(tokens: int, rounds: int) -> None:
    """Rows that move as scores of following steps do."""
    before = torch.randn(tokens)
    x = 0.95 * before + (1 - 0.95**2) ** 0.5 * torch.randn(tokens)
    for k in (64, 512, 2048):
        hint = before.topk(k).indices
        calls: Calls = {
            "plait, warm": lambda k=k, hint=hint: top_k(x, k, hint),
            "plait, cold": lambda k=k: top_k(x, k),
            "torch.topk, not sorted": lambda k=k: torch.topk(x, k, sorted=False),
        }
        report(f"top {k} of {tokens}", race(calls, rounds), "plait, warm")


def fill(store: KVStore | CompressedStore, k: torch.Tensor, heads: int = HEADS) -> object:
    """A sequence with one layer of keys; a compressed store chooses by the last queries."""
    seq = store.open()
    step = store.reserve([seq], [len(k)])
    store.append(step, 0, k, k)
    if isinstance(store, CompressedStore):
        store.finish(step, 0, torch.randn(1, heads, WIDTH).to(k.dtype).expand(len(k), -1, -1))
    store.commit(step)
    return seq


def decode_steps(tokens: int, rounds: int) -> None:
    """One layer of one decode step over the same keys, bfloat16."""
    spec = KVSpec(layers=1, kv_heads=KV_HEADS, head_dim=WIDTH, page_tokens=16, dtype=torch.bfloat16)
    k = torch.randn(tokens, KV_HEADS, WIDTH).bfloat16()
    q = torch.randn(1, HEADS, WIDTH).bfloat16()
    kept = split(tokens, 256, 0, WIDTH).kept
    stores: dict[str, KVStore | CompressedStore] = {
        "rocketkv, 256 tokens": CompressedStore(
            spec, f"snapkv:window=32,kernel=63,pool=max,budget={kept}", selector="rocket:budget=256"
        ),
        "quest, 2048 tokens": KVStore(spec, selector="quest:budget=2048,dense=0"),
        "sparq, 2048 tokens": KVStore(spec, selector="sparq:budget=2048"),
        "exact top 2048": KVStore(spec, selector="exact:budget=2048"),
        "dense": KVStore(spec),
    }
    seqs = {name: fill(store, k) for name, store in stores.items()}
    calls: Calls = {
        name: lambda store=store, seq=seqs[name]: store.attend(seq, 0, q)  # type: ignore[arg-type]
        for name, store in stores.items()
    }
    report(f"one layer of a decode step at {tokens}", race(calls, rounds), "rocketkv, 256 tokens")
    a_token = KV_HEADS * WIDTH * 2 * 2
    print(
        f"  bytes read: dense {tokens * a_token / 2**20:.0f} MiB, rocketkv {128 * a_token / 2**20:.2f} MiB and ranges"
    )


def coded_steps(tokens: int, rounds: int) -> None:
    """One layer of the following decode steps over coded pages; some tokens are coded meanwhile."""
    spec = KVSpec(layers=1, kv_heads=2, head_dim=WIDTH, page_tokens=16, dtype=torch.bfloat16)
    k = torch.randn(tokens, 2, WIDTH).bfloat16()
    for codec in (None, "int4", "kivi:bits=4,group=16", "int8"):
        calls: Calls = {}
        for selector in (None, "quest:budget=512,dense=0", "rocket:budget=256"):
            store = CompressedStore(spec, "knorm:budget=1.0", codec=codec, selector=selector)
            calls[selector or "no selector"] = steps_of(store, fill(store, k, heads=8))
        times = race(calls, 4 * rounds)
        report(f"one layer at {tokens}, codec {codec}", times, "quest:budget=512,dense=0")


def steps_of(store: CompressedStore, seq: Any) -> Callable[[], object]:
    """Decode a token: append, attend, commit."""
    k, q = torch.randn(1, 2, WIDTH).bfloat16(), torch.randn(1, 8, WIDTH).bfloat16()

    def decode() -> None:
        step = store.reserve([seq], [1])
        store.append(step, 0, k, k)
        store.attend(seq, 0, q, step=step)
        store.commit(step)

    return decode


def votes(tokens: int, rounds: int, threads: int, kvpress: Path | None) -> None:
    """SnapKV's score of one layer."""
    k, q = torch.randn(1, KV_HEADS, tokens, WIDTH), torch.randn(1, HEADS, 64, WIDTH)
    times = race({"plait": lambda: SnapKV().score(LayerView(k, k, q), tokens // 2)}, rounds)
    if kvpress is not None:
        command = [str(kvpress), "-c", KVPRESS, str(tokens), str(rounds), str(threads)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        times["kvpress SnapKVPress.score"] = [float(line) for line in said[1:]]
    report(f"SnapKV's votes at {tokens}, one layer", times, "plait")


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--prompt", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kvpress", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(heading("numba"))
    top_ks(options.context, options.rounds)
    votes(options.prompt, options.rounds, options.threads, options.kvpress)
    decode_steps(options.context, options.rounds)
    coded_steps(options.prompt, options.rounds)


if __name__ == "__main__":
    main()
