"""Accuracy: the model held against the measured anchors, each predicted by constants fitted to the others.

Four constants are fitted, to all rows at once, by least mean relative error over a small grid: seconds per layer, per
MoE layer and per step, and the share grouped GEMMs reach of dense ones. Kernel and link efficiencies come from
kernel tables and are not touched. KV is FP8 where TensorRT-LLM ran quantised weights, else BF16: their defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from ..plan import Plan
from .anchors import Anchor, unique
from .candidates import one
from .catalogue import hardware
from .columns import Array
from .efficiency import Efficiency, fitted
from .reading import decoder
from .step_time import Machine, Prompt, decode_step

GRID: dict[str, tuple[float, ...]] = {
    "grouped": (0.5, 0.6, 0.7, 0.85),
    "layer": (8e-6, 12e-6, 16e-6, 20e-6),
    "routed": (10e-6, 20e-6, 30e-6),
    "step": (1e-3, 2e-3, 3e-3),
}


@dataclass(frozen=True, slots=True)
class Band:
    """How wrong the model was on anchors it had not seen: relative errors of the time per output token."""

    rows: int
    median: float
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"time per token: median error {self.median:.0%}, mean {self.mean:.0%} on {self.rows} measured points"
            f" left out one by one (80 % of them between {self.low:+.0%} and {self.high:+.0%})"
        )


# What `leave_one_out` gives; a test recomputes it.
PUBLISHED = Band(rows=34, median=0.129, mean=0.212, low=-0.352, high=0.255)


@dataclass(frozen=True, slots=True)
class Held:
    """One anchor, predicted without it."""

    anchor: Anchor
    predicted_ms: float

    @property
    def error(self) -> float:
        """Relative error, positive where the model is slower than what was measured."""
        return self.predicted_ms / self.anchor.tpot_ms - 1


def machine_of(anchor: Anchor, constants: Efficiency | None = None) -> Machine:
    """Return the machine an anchor ran on."""
    part = hardware(anchor.hardware)
    quantised = anchor.engine == "trtllm" and anchor.precision != "bf16"
    return Machine(
        part, constants or fitted(part), anchor.precision, "fp8" if quantised else "bf16"
    )


def predict(anchor: Anchor, constants: Efficiency | None = None) -> float:
    """Return milliseconds per output token; where prefill is aggregated, prompts pass beside the decodes.

    All prompts here are within the 8,192 tokens that engines admit to a step by default, so each passes in one.
    """
    model, machine = decoder(anchor.model), machine_of(anchor, constants)
    plan = Plan(tp=anchor.tp, dp=anchor.dp, ep=anchor.ep, etp=anchor.etp)
    row = one(plan, anchor.batch)
    context = anchor.input_tokens + anchor.output_tokens / 2
    step = float(decode_step(model, machine, row, context).total[0])
    if anchor.aggregated:
        beside = row.passing(0 * row.batch + anchor.input_tokens, row.groups)
        mixed = decode_step(model, machine, beside, context, Prompt(anchor.input_tokens)).total[0]
        step += anchor.batch / anchor.output_tokens * (float(mixed) - step)
    return 1e3 * step


@cache
def _table(rows: tuple[Anchor, ...]) -> tuple[list[dict[str, float]], Array]:
    """Predict every row under every setting of the grid: settings, and [settings, rows] in ms."""
    settings, predicted = [], []
    fixed = [(name, GRID[name]) for name in ("layer", "routed", "step")]
    # times each fixed second enters a token
    counts = np.array([_counts(anchor) for anchor in rows])
    for grouped in GRID["grouped"]:
        bare = [_bare(anchor, grouped) for anchor in rows]
        for values in product(*(choices for _, choices in fixed)):
            settings.append(
                {"grouped": grouped, **dict(zip([n for n, _ in fixed], values, strict=True))}
            )
            predicted.append(np.array(bare) + 1e3 * counts @ np.array(values))
    return settings, np.array(predicted)


def _bare(anchor: Anchor, grouped: float) -> float:
    zero: dict[str, Any] = {"layer": 0.0, "routed": 0.0, "step": 0.0, "grouped": grouped}
    return predict(anchor, replace(fitted(hardware(anchor.hardware)), **zero))


def _counts(anchor: Anchor) -> tuple[float, float, float]:
    model = decoder(anchor.model)
    routed = sum(kind.count for kind in model.kinds if kind.ffn.experts)
    return model.layers, routed, 1.0


def fit(rows: Sequence[Anchor] | None = None, without: int | None = None) -> dict[str, float]:
    """Return the setting with the least mean relative error, one row left out if asked."""
    rows = tuple(rows or unique())
    settings, predicted = _table(rows)
    errors = np.abs(predicted / np.array([anchor.tpot_ms for anchor in rows]) - 1)
    kept = np.arange(len(rows)) != (-1 if without is None else without)
    return settings[int(errors[:, kept].mean(axis=1).argmin())]


def leave_one_out(rows: Sequence[Anchor] | None = None) -> tuple[Held, ...]:
    """Predict each row with constants that were fitted to the others."""
    rows = tuple(rows or unique())
    settings, predicted = _table(rows)
    chosen = [settings.index(fit(rows, without=i)) for i in range(len(rows))]
    return tuple(Held(anchor, float(predicted[chosen[i], i])) for i, anchor in enumerate(rows))


def band(held: Sequence[Held]) -> Band:
    """Sum up held-out rows."""
    errors = np.array([row.error for row in held])
    low, high = np.quantile(errors, [0.1, 0.9])
    size = np.abs(errors)
    return Band(len(held), float(np.median(size)), float(size.mean()), float(low), float(high))
