"""Random collectives of random sizes in random sub-groups of four ranks, every result checked; a program, too.

torchrun --nproc-per-node 4 tests/soak.py --backend shm --calls 100000
mpirun -n 4 python tests/soak.py --backend mpi --calls 10000
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
import torch.distributed as dist

import plait

RANKS = 4
LENGTHS = (0, 1, 7, 64, 500, 3000)
LONG = (70_000, 400_000)
SETS = ((0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 2, 3))


class Soak:
    """Draws the same calls on every rank. A rank brings `ramp + call + 1000 * rank`, so results have a closed form."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.rank = dist.get_rank()
        self.groups = [dist.new_group(list(ranks)) for ranks in SETS]
        self.ramp = torch.arange(max(LONG) * RANKS)
        self.pending: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self.sent: list[Any] = []

    def step(self, call: int) -> None:
        draw = self.draw
        which = draw.randrange(len(SETS))
        kind = draw.choice((self.reduce, self.gather, self.exchange, self.spread, self.ring))
        n = draw.choice(LONG) if draw.random() < 0.003 else draw.choice(LENGTHS)
        root, later = draw.randrange(RANKS), draw.random() < 0.3
        ranks = SETS[which]
        if self.rank in ranks:
            work, found, expected = kind(
                self.groups[which], ranks, n, call, ranks[root % len(ranks)]
            )
            self.pending.append((work, found, expected))
        if not later:
            self.settle()

    def settle(self) -> None:
        for work, found, expected in reversed(self.pending):
            work.wait()
            assert torch.equal(found, expected), (found, expected)
        self.pending.clear()
        for work in self.sent:
            work.wait()
        self.sent.clear()

    def brought(self, of: int, n: int, call: int) -> torch.Tensor:
        return self.ramp[:n] + (call + 1000 * of)

    def reduce(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        x = self.brought(self.rank, n, call)
        work = dist.all_reduce(x, group=group, async_op=True)
        total = self.ramp[:n] * len(ranks) + sum(call + 1000 * r for r in ranks)
        return work, x, total

    def gather(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        out = torch.empty(n * len(ranks), dtype=torch.int64)
        x = self.brought(self.rank, n, call)
        work = dist.all_gather_single(out, x, group=group, async_op=True)
        return work, out, torch.cat([self.brought(r, n, call) for r in ranks])

    def exchange(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        out = torch.empty(n * len(ranks), dtype=torch.int64)
        x = self.brought(self.rank, n * len(ranks), call)
        work = dist.all_to_all_single(out, x, group=group, async_op=True)
        at = ranks.index(self.rank)
        parts = [self.ramp[at * n : (at + 1) * n] + (call + 1000 * r) for r in ranks]
        return work, out, torch.cat(parts)

    def spread(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        x = self.brought(self.rank, n, call)
        work = dist.broadcast(x, root, group=group, async_op=True)
        return work, x, self.brought(root, n, call)

    def ring(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        at = ranks.index(self.rank)
        after, before = ranks[(at + 1) % len(ranks)], ranks[at - 1]
        out = torch.empty(n, dtype=torch.int64)
        receive = dist.irecv(out, before, group=group, tag=call)
        sent = dist.isend(self.brought(self.rank, n, call), after, group=group, tag=call)
        self.sent.append(sent)
        return receive, out, self.brought(before, n, call)

    def run(self, calls: int) -> None:
        """Make so many calls; all ranks must draw from the same seed."""
        for call in range(calls):
            self.step(call)
        self.settle()
        dist.barrier()


def main() -> None:
    """Be one of four ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backend", default="shm")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with plait.init(args.backend) as world:
        begin = time.monotonic()
        Soak(args.seed).run(args.calls)
        seconds = time.monotonic() - begin
        world.print(
            f"{args.backend}: {args.calls} calls on {world.size} ranks, seed {args.seed}: all results right; "
            f"{seconds:.0f} s, {args.calls / seconds:.0f} calls/s"
        )


if __name__ == "__main__":
    main()
