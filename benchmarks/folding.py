"""A training step of a mixture of experts on a slow link: experts folded over attention's ranks, against unfolded ones.

python benchmarks/folding.py --link 200mbit       # root: network namespaces, tbf on each rank's sending
python benchmarks/folding.py --link loopback

Four ranks, two sequences: dp is at most 2, so attention uses tp or cp as well. Unfolded plans keep experts inside dp
and cut each one's matrices as attention is cut (ep within dp, etp = tp), as libraries without folding do; folded ones
use all ranks as ep. Every plan's loss is of the same batch. Bytes are what all ranks send in a step.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from typing import Any

import netns
import torch
import torch.distributed as dist
from contest import heading, launched, ratio, say, spread
from torch import Tensor

import plait
from plait.collectives.trace import Trace

UNFOLDED = ("dp2 tp2 ep2 etp2", "dp2 tp2 ep1 etp2", "tp4 ep1 etp4")
FOLDED = ("dp2 tp2 ep4 etp1", "dp2 cp2 ep4 etp1")


def make_model(args: argparse.Namespace) -> Any:
    """The untouched model; the same on every rank."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        num_local_experts=8,
        vocab_size=512,
    )
    return MixtralForCausalLM(config)


class Step:
    """Forward and backward of this rank's sequences under a plan."""

    def __init__(self, model: Any, plan: str, ids: Tensor) -> None:
        self.model: Any = plait.parallelize(copy.deepcopy(model), plan).train()
        done = self.model._plait
        at = done.ranks.groups.folding.coords(done.ranks.groups.rank)["dp"]
        self.ids = ids.chunk(done.plan.dp.size)[at]

    def __call__(self) -> float:
        """The loss."""
        self.model.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def sent_bytes(self) -> int:
        """Bytes that all ranks send in a step."""
        with Trace() as trace:
            self()
        total = torch.tensor([trace.sent_bytes()])
        dist.all_reduce(total)
        return int(total)


def work(args: argparse.Namespace) -> None:
    """Time a step under every plan, in turn."""
    os.sched_setaffinity(0, {int(os.environ["RANK"]) % (os.cpu_count() or 1)})
    plait.init("gloo")
    torch.set_num_threads(1)
    model = make_model(args)
    ids = torch.randint(0, 512, (2, args.tokens), generator=torch.Generator().manual_seed(1))
    steps = {plan: Step(model, plan, ids) for plan in (*UNFOLDED, *FOLDED)}
    sent = {plan: step.sent_bytes() for plan, step in steps.items()}
    taken: dict[str, list[float]] = {plan: [] for plan in steps}
    losses: dict[str, float] = {}
    for _ in range(args.rounds):
        for plan, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            loss = step()
            seconds = torch.tensor([time.perf_counter() - begin, loss / 4], dtype=torch.float64)
            longest = seconds[:1].clone()
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            dist.all_reduce(seconds)
            taken[plan].append(float(longest) * 1e3)
            losses[plan] = float(seconds[1])
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    report(args, taken, sent)
    dist.destroy_process_group()


def report(args: argparse.Namespace, taken: dict[str, list[float]], sent: dict[str, int]) -> None:
    """Bytes and milliseconds of every plan, and of the best folded one over the best unfolded."""
    say(heading("plait"))
    say(
        f"gloo, 4 ranks, link {args.link}; 2 sequences of {args.tokens} tokens, hidden {args.hidden}, 8 experts of "
        f"{args.ffn}, top-2, {args.layers} layers, float32; forward and backward, slowest rank"
    )
    for plan, times in taken.items():
        kind = "folded" if plan in FOLDED else "unfolded"
        say(f"{plan:20}{kind:10}{sent[plan] / 1e6:9.1f} MB {spread(times):>28} ms")
    best = {
        kind: min(plans, key=lambda p: statistics.median(taken[p]))
        for kind, plans in (("unfolded", UNFOLDED), ("folded", FOLDED))
    }
    over = 1 / ratio(taken[best["unfolded"]], taken[best["folded"]])
    fewest = min(sent[p] for p in FOLDED) / min(sent[p] for p in UNFOLDED)
    say(f"folded over unfolded, best of each: bytes {fewest:.2f}, time {over:.2f}")
    say(f"({best['folded']} over {best['unfolded']})")


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--link", default="loopback", help="loopback, or tbf's rate, e.g. 200mbit")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if launched():
        work(args)
        return
    slow = args.link != "loopback"
    if slow and not netns.possible():
        raise SystemExit("a slow link needs root, ip and tc")
    netns.run(__file__, sys.argv[1:], 4, args.link if slow else None)


if __name__ == "__main__":
    main()
