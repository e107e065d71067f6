"""The oracle of the kernel tests: attention written out in Python loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch


def brute_force(q, k, v, lo, hi, scale, softcap=None, slopes=None, q_pos=(), key_pos=(), sink=None):
    """One row, one head, one key at a time; shares nothing with the library."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    o = torch.zeros(rows, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((rows, heads), -math.inf, dtype=torch.float64)
    for r in range(rows):
        seen = range(int(lo[r]), min(int(hi[r]), k.shape[0]))
        for h in range(heads):
            scores = []
            for t in seen:
                s = float(q[r, h].double() @ k[t, h // group].double()) * scale
                if softcap:
                    s = softcap * math.tanh(s / softcap)
                if slopes is not None:
                    s += float(slopes[h]) * (int(key_pos[t]) - int(q_pos[r]))
                scores.append(s)
            extra = [] if sink is None else [float(sink[h])]
            if not scores + extra:
                continue
            top = max(scores + extra)
            total = sum(math.exp(s - top) for s in scores + extra)
            lse[r, h] = top + math.log(total)
            for s, t in zip(scores, seen, strict=True):
                o[r, h] += math.exp(s - top) / total * v[t, h // group].double()
    return o, lse


@pytest.fixture
def brute():
    """Give the brute-force attention."""
    return brute_force


@pytest.fixture
def assert_close():
    """Give a comparison in which -inf equals -inf and NaN equals nothing."""

    def compare(got, want, tolerance=1e-12):
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)

    return compare
