"""What the papers say, one token at a time in plain torch; nothing of the library is used."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best(scores: Tensor, count: int) -> list[int]:
    """The greatest, of equals the lowest, ascending."""
    ranked = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(ranked[:count])


def exact(q: Tensor, k: Tensor, count: int) -> list[int]:
    """By the group's sum of attention weights; q `[group, d]`, k `[tokens, d]`."""
    return best((q @ k.T / q.shape[-1] ** 0.5).softmax(-1).sum(0), count)


def quest(q: Tensor, k: Tensor, page: int, count: int) -> list[int]:
    """Pages by the sum over heads and channels of max(q kmax, q kmin), the last one always."""
    scores = []
    for start in range(0, len(k), page):
        rows = k[start : start + page]
        low, high = rows.min(0).values, rows.max(0).values
        scores.append(torch.maximum(q * low, q * high).sum())
    scores[-1] = torch.tensor(math.inf)
    return best(torch.stack([s.double() for s in scores]), count)


def sparq(q: Tensor, k: Tensor, channels: int, window: int, count: int) -> list[int]:
    """SparQ steps 1 and 2, over a group."""
    some = best(q.abs().sum(0), channels)
    total = torch.zeros(len(k), dtype=torch.float64)
    for head in q:
        share = head[some].abs().sum() / head.abs().sum()
        total += (k[:, some] @ head[some] / (q.shape[-1] * share).sqrt()).softmax(-1)
    total[len(k) - window :] = math.inf
    return best(total, count)


def rocket(q: Tensor, k: Tensor, chunk: int, channels: int, count: int) -> list[int]:
    """Hybrid sparse attention, second stage: token resolution, chunk scores repeated."""
    some = best(q.abs().mean(0), channels)
    summed = q.sum(0)
    rows = []
    for token in range(len(k)):
        own = k[token // chunk * chunk : (token // chunk + 1) * chunk]
        extreme = torch.where(summed > 0, own.max(0).values, own.min(0).values)
        rows.append(extreme)
    keys = torch.stack(rows)
    total = torch.zeros(len(k), dtype=torch.float64)
    for head in q:
        share = head[some].abs().sum() / head.abs().sum()
        total += (keys[:, some] @ head[some] / (q.shape[-1] * share).sqrt()).softmax(-1)
    return best(total, count)


def delta(q: Tensor, k: Tensor, page: int, newest: int, count: int) -> list[int]:
    """Pages by the sum over tokens of the largest weight over ALL heads; q `[kv, group, d]`, k `[tokens, kv, d]`."""
    weights = torch.stack(
        [(q[h] @ k[:, h].T / q.shape[-1] ** 0.5).softmax(-1).max(0).values for h in range(len(q))]
    ).amax(0)
    mass = [weights[start : start + page].sum() for start in range(0, len(k), page)]
    scores = torch.stack(mass)
    scores[len(mass) - newest :] = math.inf
    return best(scores, count)


def top_p(q: Tensor, k: Tensor, page: int, pages: float, share: float) -> list[int]:
    """Pages by mean key and size up to a share of the estimated mass, then tokens of them."""
    scale = q.shape[-1] ** -0.5
    starts = range(0, len(k), page)
    guesses = []
    for head in q:
        logits = [
            head @ k[s : s + page].mean(0) * scale + math.log(len(k[s : s + page])) for s in starts
        ]
        guesses.append(torch.stack(logits).softmax(-1))
    taken = _up_to(torch.stack(guesses).mean(0), pages) | {len(starts) - 1}
    tokens = [t for t in range(len(k)) if t // page in taken]
    weights = (q @ k[tokens].T * scale).softmax(-1).mean(0)
    return sorted(tokens[i] for i in _up_to(weights, share))


def _up_to(mass: Tensor, share: float) -> set[int]:
    chosen: set[int] = set()
    total = 0.0
    for i in sorted(range(len(mass)), key=lambda i: (-float(mass[i]), i)):
        if total >= share * float(mass.sum()):
            break
        chosen.add(i)
        total += float(mass[i])
    return chosen
