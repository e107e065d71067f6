"""Compositions of axes in a job of any launcher and backend; rank 0 reports the errors of each.

mpirun -n 4 python tests/compositions_job.py mpi "pp2 cp2" "tp2:sp dp2 ep4"
"""

from __future__ import annotations

import sys

from exactness import case
from jobs import report
from plait import init
from training import composed

if __name__ == "__main__":
    backend, *plans = sys.argv[1:]
    with init(backend) as world:
        report(world.rank, {plan: composed(case(plan, "mixtral"), 2) for plan in plans})
