"""HOP-B on a slow link: Helix attention in chunks that exchange behind each other, against lockstep.

    python benchmarks/hopb.py --link 1gbit          # root: network namespaces, tbf on each rank's sending
    python benchmarks/hopb.py --link loopback
    python benchmarks/hopb.py --model-link 1        # no root: a link of 1 Gbit/s made up by waiting (EMULATION)
    python benchmarks/hopb.py --link 1gbit --timeline hopb    # hopb.json for Perfetto, hopb.png

One Helix layer of a decode step over a real store. "hidden" is the time saved over lockstep, of the
smaller of attention and exchange, each timed alone. `--realtime` (root) asks for real-time priority,
for machines that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import netns
import torch
import torch.distributed as dist
from contest import heading, launched, ratio, say, spread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import plait
from plait.collectives import Trace, primitive
from plait.collectives.timeline import Timeline
from plait.parallel.attention.exchange import exchange_partials


def make_model(args: argparse.Namespace) -> Any:
    """A decoder that is little more than its attention, cut over kvp."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        vocab_size=512,
        num_hidden_layers=1,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=4 * args.context,
    )
    model = LlamaForCausalLM(config).eval()
    return plait.parallelize(model, f"kvp{args.ranks},exchange=partials")


@torch.no_grad()
def fill(model: Any, args: argparse.Namespace) -> Any:
    """A cache of random keys and values, and an open step of one more token a request."""
    cache = model.kv_cache()
    cache.begin(args.batch, args.context, None, torch.device("cpu"))
    rows = sum(cache.state.running().own_counts)
    cache.store.append(cache.write_step, 0, *random_rows(rows, args))
    cache.end()
    cache.begin(args.batch, 1, None, torch.device("cpu"))
    rows = sum(cache.state.running().own_counts)
    cache.store.append(cache.write_step, 0, *random_rows(rows, args))
    return cache


def random_rows(rows: int, args: argparse.Namespace) -> list[Tensor]:
    """Keys and values of some tokens."""
    return [torch.randn(rows, args.kv_heads, args.head_dim) for _ in range(2)]


class Emulated:
    """A link by arithmetic: what was sent arrives when the bytes before it and its own have had their time.

    It stands in for `start_all_to_all`, on top of the exchange over loopback.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.rate, self.free = bytes_per_s, 0.0
        self.start = primitive.start_all_to_all

    def __call__(self, x: Tensor, group: dist.ProcessGroup) -> primitive.Started:
        started = self.start(x, group)
        sent = x.numel() * x.element_size() * (group.size() - 1) / group.size()
        self.free = max(self.free, time.perf_counter()) + sent / self.rate
        return primitive.Started(Due(started, self.free), x, started.arrived)  # type: ignore[arg-type]


class Due:
    """Work that is over when its exchange is, and not before its time."""

    def __init__(self, started: primitive.Started, due: float) -> None:
        self.started, self.due = started, due

    def wait(self) -> bool:
        """Sleep until it has arrived."""
        self.started.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))
        return True


@torch.no_grad()
def work(args: argparse.Namespace) -> None:
    """Time one layer in all ways, in turn."""
    if args.model_link:
        primitive.start_all_to_all = Emulated(args.model_link * 1e9 / 8)
    model = make_model(args)
    cache = fill(model, args)
    calls = ways(model, args)
    taken = time_all(calls, args.rounds)
    report(taken, args)
    if args.timeline:
        draw(calls, args)
    cache.release()
    auto(model, args)


def ways(model: Any, args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Attention alone, exchange alone, lockstep, and chunks."""
    state = model._plait.ranks.attention
    layer, step, scale = state.layers[0], state.running(), args.head_dim**-0.5
    q = torch.randn(args.batch, args.heads, 1, args.head_dim, generator=seeded())
    k, v = (torch.zeros(args.batch, args.kv_heads, 1, args.head_dim) for _ in range(2))
    rows = step.pick(q.transpose(1, 2))
    (whole,) = step.parts(1)
    o, lse = layer._over_pages(rows, whole, scale, None)
    group = state.ranks.kvp_group

    def chunks(count: int) -> Tensor:
        state.parts = step.parts(count)
        return layer.attend(q, k, v, scale, None, None)

    def exchange() -> Tensor:
        if args.model_link:  # only what is started passes the emulated link
            return primitive.start_all_to_all(o.repeat(1, 1, 1), group).wait()
        return exchange_partials(o, lse, group)

    calls: dict[str, Callable[[], Tensor]] = {
        "attention alone": lambda: layer._over_pages(rows, whole, scale, None)[0],
        "exchange alone": exchange,
        "lockstep": (lambda: emulated_lockstep(chunks, exchange))
        if args.model_link
        else (lambda: chunks(1)),
    }
    for count in args.chunks:
        calls[f"{count} chunks"] = lambda count=count: chunks(count)
    return calls


def emulated_lockstep(chunks: Callable[[int], Tensor], exchange: Callable[[], Tensor]) -> Tensor:
    """Lockstep's own exchange does not pass the emulated link: it is added."""
    out = chunks(1)
    exchange()
    return out


def seeded() -> torch.Generator:
    """The same numbers on all ranks."""
    return torch.Generator().manual_seed(1)


def time_all(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the slowest rank, by call; all calls give the same answer."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        results: dict[str, Tensor] = {}
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            results[name] = call()
            seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if number >= 0:
                taken[name].append(float(seconds) * 1e3)
        for name, result in results.items():
            if name.endswith("chunks"):
                assert torch.allclose(result, results["lockstep"], rtol=1e-5, atol=1e-6), name
    return taken


def report(taken: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Print the times, the ratio to lockstep, and how much of what can be hidden was."""
    where = f"EMULATED {args.model_link:g} Gbit/s" if args.model_link else args.link
    sent = args.batch * args.heads * (args.head_dim + 1) * 4 * (args.ranks - 1) / args.ranks
    say(heading("plait"))
    say(
        f"{args.backend}, {args.ranks} ranks, link {where}; {args.batch} requests of {args.context} tokens, "
        f"{args.heads} heads over {args.kv_heads} of {args.head_dim}; sends {sent / 1e6:.2f} MB a rank"
    )
    say(f"{'':18}{'ms, min / median / max':>28}{'lockstep / it':>16}{'hidden':>9}")
    middle = {name: statistics.median(times) for name, times in taken.items()}
    hideable = min(middle["attention alone"], middle["exchange alone"])
    for name, times in taken.items():
        line = f"{name:18}{spread(times):>28}"
        if not name.endswith("alone"):
            line += f"{ratio(taken['lockstep'], times):16.2f}"
        if name.endswith("chunks"):
            line += f"{(middle['lockstep'] - middle[name]) / hideable:9.0%}"
        say(line)


def draw(calls: dict[str, Callable[[], Tensor]], args: argparse.Namespace) -> None:
    """Trace lockstep and the best count of chunks once more, and write the file and the picture."""
    dist.barrier()
    shown = ["lockstep", f"{args.chunks[len(args.chunks) // 2]} chunks"]
    groups: dict[dist.ProcessGroup, str] = {}
    with Trace(lambda group: groups.get(group, "exchange")) as trace:
        for name in shown:
            dist.barrier()
            calls[name]()
    trace.events[:] = [event for event in trace.events if event.op != "barrier"]
    timeline = Timeline.gathered(trace, dist.group.WORLD)
    if dist.get_rank() == 0:
        timeline.save(f"{args.timeline}.json")
        timeline.picture(f"{args.timeline}.png", f"Helix attention: {', then '.join(shown)}")


def auto(model: Any, args: argparse.Namespace) -> None:
    """Whole decode steps with `chunks=auto`: what it settles on."""
    ids = torch.ones(args.batch, 1, dtype=torch.long)
    cache = model.kv_cache()
    cache.begin(args.batch, args.context, None, torch.device("cpu"))
    rows = sum(cache.state.running().own_counts)
    cache.store.append(cache.write_step, 0, *random_rows(rows, args))
    cache.end()
    counts = []
    for _ in range(12):
        model(ids, past_key_values=cache, use_cache=True)
        counts.append(max(1, len(cache.state.parts)))
    say(f"chunks=auto, step by step: {counts}")


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    netns.add_options(parser)
    parser.add_argument("--model-link", type=float, default=0.0, help="Gbit/s; emulation")
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--timeline", default="")
    args = parser.parse_args()
    if launched():
        with netns.rank(args, args.backend):
            work(args)
    else:
        netns.start(__file__, args)


if __name__ == "__main__":
    main()
