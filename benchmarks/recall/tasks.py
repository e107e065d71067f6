"""Tasks with one right answer, in symbols: facts to look up among noise, and a span to repeat.

A prompt is a context and the first question; what follows is asked turn by turn. All symbols of a row are
distinct, so each has one answer. The first question is inside any scorer's window, the later ones in none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB, ASK, COPY, FIRST_NOISE, FIRST_SYMBOL = 512, 0, 1, 2, 64
VALUES = 3  # symbols that answer one question
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Rows of one task, all of one length.

    Shape: ids `[rows, length]`, targets alike: the next symbol where it is an answer, else `IGNORE`.
        `prompt` tokens of each row end with the first question's key; `turn` `[length]` numbers the
        question that a target answers.
    """

    ids: Tensor
    targets: Tensor
    prompt: int
    turn: Tensor


def needles(rows: int, context: int, facts: int, turns: int, symbols: int, seed: int) -> Batch:
    """Facts ``key v1 v2 v3`` at random places among noise, then questions ``? key`` and their answers."""
    rng = torch.Generator().manual_seed(seed)
    width = 1 + VALUES
    drawn = _distinct(rows, facts * width, symbols, rng).view(rows, facts, width)
    ids = torch.randint(FIRST_NOISE, FIRST_SYMBOL, (rows, context), generator=rng)
    # Places of facts: a fact and a noise symbol are dealt out in random order, then laid end to end.
    noise = context - facts * width
    is_fact = torch.rand(rows, facts + noise, generator=rng).argsort(1) < facts
    widths = torch.where(is_fact, width, 1)
    starts = (widths.cumsum(1) - widths)[is_fact].view(rows, facts)
    places = starts[:, :, None] + torch.arange(width)
    ids.scatter_(1, places.flatten(1), drawn.flatten(1))
    asked = torch.rand(rows, facts, generator=rng).argsort(1)[:, :turns]
    answers = drawn.gather(1, asked[:, :, None].expand(-1, -1, width))
    question = torch.full((rows, turns, 1), ASK)
    dialogue = torch.cat([question, answers], 2)
    targets = torch.cat([torch.full((rows, turns, 1), IGNORE), answers[:, :, 1:]], 2)
    targets = torch.cat([targets, torch.full((rows, turns, 1), IGNORE)], 2)
    turn = torch.arange(turns).repeat_interleave(width + 1)
    return Batch(
        torch.cat([ids, dialogue.flatten(1)], 1),
        torch.cat([torch.full((rows, context), IGNORE), targets.flatten(1)], 1),
        context + 2,
        torch.cat([torch.full((context,), -1), turn]),
    )


def spans(rows: int, context: int, length: int, symbols: int, seed: int) -> Batch:
    """A span of distinct symbols somewhere in noise, to be repeated from its first symbol on."""
    rng = torch.Generator().manual_seed(seed)
    span = _distinct(rows, length, symbols, rng)
    ids = torch.randint(FIRST_NOISE, FIRST_SYMBOL, (rows, context), generator=rng)
    start = torch.randint(0, context - length + 1, (rows, 1), generator=rng)
    ids.scatter_(1, start + torch.arange(length), span)
    mark = torch.full((rows, 1), COPY)
    targets = torch.cat(
        [torch.full((rows, context + 1), IGNORE), span[:, 1:], mark * 0 + IGNORE], 1
    )
    turn = torch.cat([torch.full((context + 1,), -1), torch.zeros(length, dtype=torch.int64)])
    return Batch(torch.cat([ids, mark, span], 1), targets, context + 2, turn)


def _distinct(rows: int, count: int, symbols: int, rng: torch.Generator) -> Tensor:
    if count > symbols:
        raise ValueError(f"{count} distinct symbols wanted of {symbols}")
    order = torch.rand(rows, symbols, generator=rng).argsort(1)[:, :count]
    return order + FIRST_SYMBOL
