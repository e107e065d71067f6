"""Threads for CPU kernels that release the GIL.

Numba's own threads are not used: its `workqueue` layer aborts the process when two Python threads
enter it, its `omp` layer aborts after a fork and spins against torch's OpenMP, and its thread count
is a process-wide setting. Plain threads calling `nogil` kernels have none of these faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Keep one pool per process: threads do not survive a fork, so the key holds the pid."""
    return ThreadPoolExecutor(threads, thread_name_prefix="plait-kernel")


def run_shares(share: Callable[[int], None], shares: int) -> None:
    """Call `share(0) .. share(shares - 1)` at once and return when all are done.

    Share 0 runs in the calling thread. An error of any share is raised here.
    """
    if shares <= 1:
        share(0)
        return
    pool = _pool(os.getpid(), shares - 1)
    waiting = [pool.submit(share, i) for i in range(1, shares)]
    try:
        share(0)
    finally:
        for one in waiting:
            one.result()


def run_rows(part: Callable[[int, int], None], rows: int, least: int) -> None:
    """Call `part(start, stop)` over all rows, in as many threads as torch uses, each with `least` rows or more."""
    shares = max(1, min(torch.get_num_threads(), rows // max(1, least)))
    run_shares(lambda i: part(rows * i // shares, rows * (i + 1) // shares), shares)
