"""Decode at a long context with one KV head: the KV cut along the sequence (Helix) against copied.

    python benchmarks/helix_decode.py [--context 65536] [--rounds 20] [--kv-heads 1]

With fewer KV heads than ranks, tensor parallelism must copy the KV to every rank (plan
``tp2,replicate_kv=true``); Helix (``kvp2``) cuts it along the sequence. The caches are filled with the
same random keys and values in every contender, not by reading a prompt of that length, which changes
nothing in a decode step. transformers' own cache copies all keys at every step, which would flatter
Helix; so the contenders without Helix run with it and with a cache that writes in place.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.distributed as dist
from contest import Contender, compete, heading, launch, launched, say, table
from tensor_parallel import SIZES, make_model, plait_model
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from plait.collectives.trace import Trace


class RoomyLayer(DynamicLayer):
    """A cache layer with room ahead: new tokens are written in place, the view grows."""

    room: int = 512

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the old ones; move everything only when the room is used up."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.held, self.length = None, 0
        end = self.length + key_states.shape[-2]
        if self.held is None or end > self.held[0].shape[-2]:
            shapes = [
                (*t.shape[:-2], end + self.room, t.shape[-1]) for t in (key_states, value_states)
            ]
            grown = [key_states.new_empty(shape) for shape in shapes]
            for old, new in zip(self.held or (), grown, strict=False):
                new[..., : self.length, :] = old[..., : self.length, :]
            self.held = grown
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[..., self.length : end, :] = new
        self.length = end
        self.keys, self.values = (held[..., :end, :] for held in self.held)
        return self.keys, self.values


def random_layer(layer: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, the same on all ranks: [context, kv_heads, head_dim]."""
    head_dim = args.shape["hidden"] // args.shape["heads"]
    generator = torch.Generator().manual_seed(layer)
    shape = (args.context, args.kv_heads, head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def whole_cache(model: Any, args: argparse.Namespace, roomy: bool) -> DynamicCache:
    """transformers' cache with all keys; under ``tp`` with ``replicate_kv`` each rank holds them all."""
    cache = DynamicCache(config=model.config)
    for number in range(args.shape["layers"]):
        k, v = random_layer(number, args)
        if roomy:
            cache.layers[number] = RoomyLayer()
        cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], number)
    return cache


def cut_cache(model: Any, args: argparse.Namespace) -> Any:
    """A Helix cache with this rank's tokens, written through the store."""
    cache = model.kv_cache()
    cache.begin(1, args.context, None, torch.device("cpu"))
    own = cache.state.running().own
    for number in range(args.shape["layers"]):
        k, v = random_layer(number, args)
        cache.store.append(cache.write_step, number, k[own], v[own])
    cache.end()
    return cache


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values one rank holds for the request."""
    if isinstance(cache, DynamicCache):
        return sum(t.numel() * t.element_size() for c in cache.layers for t in (c.keys, c.values))
    return cache.kv_bytes


class Writer:
    """A model with a filled cache."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache

    @torch.no_grad()
    def decode(self) -> Tensor:
        """One more token."""
        out = self.model(input_ids=torch.tensor([[7]]), past_key_values=self.cache, use_cache=True)
        logits = out.logits[0, -1]
        logits.argmax().item()
        return logits


def work(args: argparse.Namespace) -> None:
    """All contenders in turn, then what each holds and sends."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = make_model(args.shape, args.context)
    copied = (
        f"tp{args.ranks},replicate_kv=true" if args.kv_heads < args.ranks else f"tp{args.ranks}"
    )
    helix, tensor = plait_model(model, f"kvp{args.ranks}"), plait_model(model, copied)
    writers = {
        "one process": Writer(model, whole_cache(model, args, False)),
        "one process, cache in place": Writer(model, whole_cache(model, args, True)),
        f"plait kvp{args.ranks}": Writer(helix, cut_cache(helix, args)),
        f"plait {copied}": Writer(tensor, local_cache(tensor, args, False)),
        "  the same, cache in place": Writer(tensor, local_cache(tensor, args, True)),
    }
    contenders = [
        Contender(name, writer.decode, not name.startswith("one"))
        for name, writer in writers.items()
    ]
    say(heading("plait"))
    say(
        f"{args.size} {args.shape}, float32, batch 1, "
        f"{args.ranks} ranks x 1 thread; caches filled with random keys and values"
    )
    compete(contenders, args.rounds, warm=3)
    ours = f"plait kvp{args.ranks}"
    title = f"decode at {args.context} tokens, {args.rounds} rounds; ratios to {ours}"
    say("\n" + table(title, contenders, ours) + "\n")
    for contender in contenders:
        account(contender, writers[contender.name])
    dist.destroy_process_group()


def local_cache(model: Any, args: argparse.Namespace, roomy: bool) -> DynamicCache:
    """transformers' cache with this rank's heads; all of them if there are fewer heads than ranks."""
    cache = whole_cache(model, args, roomy)
    if args.kv_heads < args.ranks:
        return cache
    share = args.kv_heads // args.ranks
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    cut = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        if roomy:
            cut.layers[number] = RoomyLayer()
        cut.update(layer.keys[:, mine].contiguous(), layer.values[:, mine].contiguous(), number)
    return cut


def account(contender: Contender, writer: Writer) -> None:
    """Print the KV bytes of every rank, and the collectives of one step."""
    held = torch.tensor([kv_bytes(writer.cache)])
    every = [torch.empty_like(held) for _ in range(dist.get_world_size())]
    dist.all_gather(every, held)
    ranks = every if contender.everywhere else every[:1]
    line = f"{contender.name:34} KV bytes a rank: {', '.join(f'{int(b):,}' for b in ranks)}"
    if contender.takes_part:
        with Trace() as trace:
            writer.decode()
        counts = ", ".join(f"{n} {op}" for (op, _), n in sorted(trace.counts().items()))
        line += f"; a step: {counts or 'no collectives'}; sends {trace.sent_bytes():,} bytes"
    dist.barrier()
    say(line)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="issue")
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    args.shape = {**SIZES[args.size], "kv_heads": args.kv_heads}
    if launched():
        work(args)
    else:
        launch(__file__, sys.argv[1:], args.ranks)


if __name__ == "__main__":
    main()
