"""Only the copies of a fused norm of two ranks, and of the same in pieces: what no schedule of theirs can spare.

No addition, no norm, no Python between: a compiled loop with a flag, over memory that both ranks have mapped. What
`fused_norm.py` shows beside the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.collectives.shm.memory import idle, load, memmove, store
from plait.collectives.shm.stores import copy_all_past
from plait.collectives.shm.symmetric import symmetric_empty
from plait.cuda_kernels.kernel_cache import njit

HEAD = 4096  # bytes before the slot, for the flag
SPINS = 2000
X, RESIDUAL, TOTAL, NORMED, OWN, PEER, ROWS, ROW, RANK, PAST, FUSED, TURN = range(12)


@njit(nogil=True)
def _give(to, of, count, past):
    if past:
        copy_all_past(to, of, count)
    else:
        memmove(to, of, count)


@njit(nogil=True)
def _meet(own, peer, level):
    store(own, level)
    turns = 0
    while load(peer) < level:
        idle(turns, SPINS)
        turns += 1


@njit(nogil=True)
def _copies(words):
    """Half of x to the other rank, its half to the sums, these to it, its own home; then what a norm moves."""
    row, own, peer, past = words[ROW], words[OWN], words[PEER], words[PAST]
    n = words[ROWS] // 2 * row
    mine, theirs = words[RANK] * n, (1 - words[RANK]) * n
    words[TURN] += 1
    _give(own + HEAD, words[X] + theirs, n, past)
    _meet(own, peer, 2 * words[TURN] - 1)
    target = words[TOTAL] if words[FUSED] else words[X]
    for at in range(0, n, row):
        memmove(target + mine + at, peer + HEAD + at, row)
        if words[FUSED]:
            memmove(words[NORMED] + mine + at, words[RESIDUAL] + mine + at, row)
        _give(own + HEAD + n + at, target + mine + at, row, past)
    _meet(own, peer, 2 * words[TURN])
    for at in range(0, n, row):
        memmove(target + theirs + at, peer + HEAD + n + at, row)
        if words[FUSED]:
            memmove(words[NORMED] + theirs + at, target + theirs + at, row)
    if not words[FUSED]:
        for at in range(0, 2 * n, row):
            memmove(words[TOTAL] + at, words[X] + at, row)
            memmove(words[NORMED] + at, words[RESIDUAL] + at, row)


def copies(
    x: Tensor, residual: Tensor, group: Any, *, fused: bool, past: bool
) -> Callable[[], Any]:
    """Prepare the copies on this rank; two ranks, even numbers of rows.

    Collective: all ranks of the group; see `symmetric_empty`.
    """
    shared = symmetric_empty((HEAD + x.numel() * x.element_size(),), torch.uint8, group)
    shared[:8] = 0
    bases = group.engine.symmetric.place_of(shared)[0]
    group.barrier().wait()
    results = torch.empty_like(x), torch.empty_like(x)
    tensors = [t.data_ptr() for t in (x, residual, *results)]
    rank, row = group.rank(), x.shape[-1] * x.element_size()
    words = np.array(
        [*tensors, bases[rank], bases[1 - rank], x.shape[0], row, rank, past, fused, 0], np.int64
    )

    def call(kept: Any = (x, residual, results, shared)) -> None:
        _copies(words)

    return call
