"""How long the planner's whole sweep takes: every legal plan, batch and chunk count, against one second.

    python benchmarks/planner_sweep.py [--model deepseek-r1] [--gpus 72] [--rounds 20]

CPU seconds of this process; the first call, which fills tables that later ones share, is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

from contest import heading

from plait.parallel.planner import search
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.goals import Goal
from plait.parallel.planner.reading import decoder

PROMISED = 1.0


def main() -> None:
    """Time the sweep of decode plans, and of aggregated and disaggregated serving."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deepseek-r1")
    parser.add_argument("--gpus", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(heading("plait", "numpy"))
    for name, prompt in (("decode", 0), ("aggregated and disaggregated", 8192)):
        goal = Goal(ranks=args.gpus, context=131072, prompt=prompt, weights=("nvfp4",), kv=("fp8",))
        times, points = [], 0
        for _ in range(args.rounds + 1):
            start = time.process_time()
            points = sum(map(len, search.sweep(decoder(args.model), hardware("gb200"), goal)))
            times.append(time.process_time() - start)
        first, *rest = times
        print(
            f"{name:30} {points:7,} points that fit: first {first:.3f} s, then min {min(rest):.3f}, "
            f"median {statistics.median(rest):.3f}, max {max(rest):.3f} s; median / promised "
            f"{statistics.median(rest) / PROMISED:.3f}"
        )


if __name__ == "__main__":
    main()
