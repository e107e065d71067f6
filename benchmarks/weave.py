"""A prefill, or a training step, under tensor parallelism on a slow link: sums whole, or of pieces behind others.

python benchmarks/weave.py --link 1gbit        # root: network namespaces, tbf on each rank's sending
python benchmarks/weave.py --link loopback
python benchmarks/weave.py --link 1gbit --training
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import netns
import torch
import torch.distributed as dist
from contest import distance, heading, launched, ratio, say, spread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import plait


def work(args: argparse.Namespace) -> None:
    """Time a prefill, or a training step, under every number of pieces, in turn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        vocab_size=1000,
    )
    model = LlamaForCausalLM(config).train(args.training)
    ids = torch.randint(0, 1000, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], Tensor]] = {}
    for pieces in (1, *args.pieces):
        cut = plait.parallelize(copy.deepcopy(model), f"tp{args.ranks},weave={pieces}")
        name = "whole sums" if pieces == 1 else f"{pieces} pieces"
        calls[name] = partial(trained if args.training else prefilled, cut, ids)
    report(calls, args)


@torch.no_grad()
def prefilled(model: Any, ids: Tensor) -> Tensor:
    """Read the tokens; the last one's logits."""
    return model(ids, use_cache=False, logits_to_keep=1).logits


def trained(model: Any, ids: Tensor) -> Tensor:
    """Forward and backward; the gradient of a norm before the first MLP."""
    model.zero_grad()
    model(ids, use_cache=False, labels=ids).loss.backward()
    return model.model.layers[0].post_attention_layernorm.weight.grad


def report(calls: dict[str, Callable[[], Tensor]], args: argparse.Namespace) -> None:
    """Interleaved rounds; milliseconds of the slowest rank."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    expected = calls["whole sums"]()
    for number in range(-2, args.rounds):
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            out = call()
            seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if number >= 0:
                taken[name].append(float(seconds) * 1e3)
            assert distance(out, expected) < 1e-4, name
    say(heading("plait"))
    work, sums = ("training step", 4) if args.training else ("prefill", 2)  # sums of a layer
    sent = sums * args.layers * args.tokens * args.hidden * 4 * 2 * (args.ranks - 1) / args.ranks
    say(
        f"gloo, {args.ranks} ranks, link {args.link}; {work} of {args.tokens} tokens, hidden {args.hidden}, "
        f"{args.layers} layers, float32; sends {sent / 1e6:.1f} MB a rank"
    )
    for name, times in taken.items():
        median = statistics.median(times)
        say(
            f"{name:12}{spread(times):>28} ms, {ratio(taken['whole sums'], times):.2f} ({median:.0f})"
        )


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    netns.add_options(parser)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pieces", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if launched():
        with netns.rank(args):
            work(args)
    else:
        netns.start(__file__, args)


if __name__ == "__main__":
    main()
