"""A script as a user writes it, started by test_launch.py with every launcher, unchanged.

The first argument is a Python expression over (rank, size, w) where `w` is what plait.init() returned.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from jobs import report
from plait.collectives.world import init

with init(timeout_s=120) as w:
    total = torch.tensor([w.rank + 1.0])
    dist.all_reduce(total)
    w.print("only rank", w.rank, "of", w.size, "says this")
    report(
        w.rank,
        {
            "size": w.size,
            "local": [w.local_rank, w.local_size],
            "launcher": w.launcher,
            "total": total.item(),
            "threads": w.threads,
            "cpus": len(os.sched_getaffinity(0)),
            "mpi4py": "mpi4py" in sys.modules,
            "job": sys.argv[1:],
        },
    )
