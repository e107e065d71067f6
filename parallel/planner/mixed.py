"""Mixed batches: prompts that pass beside the decodes of a step, in chunks or in one group of layers after the other.

A step with a part of a prompt takes longer than one without; that is what the batch's requests wait for (`stall`), and
what a token costs on average: with f of the steps carrying a part, ``(1-f) t_d + f t_mix``. One product over all rows
reads its weights once and computes while it reads, so it is cheaper than a prompt and a step one after the other.
Sources: SARATHI (arXiv 2308.16369) for chunks; for layer groups the rule ``ceil(L/512)`` of layered prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .candidates import Candidates
from .columns import Array, as_array
from .goals import Goal
from .points import Index
from .serving import layer_groups
from .shapes import Decoder
from .step_time import Machine, Prompt, decode_step

PIECES = (128, 256, 512, 1024, 2048, 4096, 8192)
LONGEST = 32768  # a prompt that passes its layers in one piece keeps all its activations


@dataclass(frozen=True, slots=True)
class Mixed:
    """Ways of passing prompts beside decodes, one row each.

    Args:
        rows: which row of the decodes each belongs to.
        candidates: those rows with the way of passing.
        step: seconds of a step that carries a part of a prompt.
        parts: steps that carry a part of one prompt.
    """

    rows: Index
    candidates: Candidates
    step: Array
    parts: Array


def ways(prompt: int, layers: int) -> list[tuple[int, int]]:
    """Return (tokens of a part, layer groups): chunks up to the prompt, and layer by layer group the whole of it."""
    found = [(piece, 1) for piece in PIECES if piece < prompt]
    if prompt <= PIECES[-1]:
        found.append((prompt, 1))
    groups = min(layer_groups(prompt), layers)
    if groups > 1 and prompt <= LONGEST:
        found.append((prompt, groups))
    return found


def mixed_steps(
    model: Decoder, machine: Machine, goal: Goal, c: Candidates, pure: Array,
    choices: Sequence[tuple[int, int]] | None = None,
) -> Mixed:  # fmt: skip
    """Price every way for every row without kvp or cp: those take prompts whole, cut along the sequence.

    Args:
        pure: seconds of each row's step without a prompt.
    """
    prompt = Prompt(goal.prompt, max(0, goal.context - goal.prompt))
    choices = ways(goal.prompt, model.layers) if choices is None else choices
    plain = np.flatnonzero(c.sequence == 1)
    rows = np.tile(plain, len(choices))
    beside, groups = np.repeat(as_array(choices).reshape(-1, 2), len(plain), axis=0).T
    made = c.take(rows).passing(beside, groups)
    whole = decode_step(model, machine, made, goal.context, prompt).total if len(rows) else pure[:0]
    step = pure[rows] + (whole - pure[rows]) / groups
    return Mixed(rows, made, step, np.ceil(goal.prompt / np.maximum(beside, 1)) * groups)


def first_token(mixed: Mixed) -> Array:
    """Return the seconds to the first token beside a running batch: all parts, in order through the stages."""
    pp = mixed.candidates.pp
    return (mixed.parts + pp - 1) / pp * mixed.step
