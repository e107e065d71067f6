"""Two pictures: interactivity against throughput, and a layer's time against the context (extra ``[plot]``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import PlanError
from ..plan import Plan
from . import search
from .accuracy import PUBLISHED
from .candidates import one
from .catalogue import hardware
from .goals import Goal
from .proposals import Proposal
from .reading import decoder
from .step_time import CAUSES, decode_step

COLORS = {"with Helix": "#1b6ca8", "best without Helix": "#b8552b"}
LAYERS = {
    "weights": "#4c78a8", "kv": "#f58518", "compute": "#54a24b", "communication": "#b279a2", "floor": "#9d9d9d",
}  # fmt: skip
NAMES = {"weights": "reading weights", "kv": "reading the cache", "floor": "fixed"}


def _axes(title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError("a picture", "needs matplotlib", "pip install 'plait[plot]'") from None
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def curves(model: str, part: str, goal: Goal) -> dict[str, tuple[Any, Any, list[str]]]:
    """Return the two frontiers: tokens/s/user, tokens/s/GPU and plan text of each point."""
    known, chip = decoder(model), hardware(part)
    found = {}
    for name, wish in (("with Helix", goal), ("best without Helix", search.without_helix(goal))):
        rows = [search.envelope(points) for points in search.sweep(known, chip, wish)]
        columns = [
            (points.per_user[i], points.per_rank[i], str(points.candidates.plan(i, known.shape)))
            for points in rows
            for i in range(len(points))
        ]
        columns.sort(key=lambda point: (-point[0], -point[1]))
        kept: list[tuple[float, float, str]] = []
        for point in columns:
            if not kept or point[1] > kept[-1][1]:
                kept.append(point)
        found[name] = ([p[0] for p in kept], [p[1] for p in kept], [p[2] for p in kept])
    return found


def frontier_picture(model: str, part: str, goal: Goal, path: str) -> None:
    """Draw what one user gets against what a GPU yields, with Helix and without."""
    title = f"{model} on {goal.ranks} x {hardware(part).title}, {goal.context:,} tokens of context"
    figure, axes = _axes(title)
    for name, (users, ranks, plans) in curves(model, part, goal).items():
        if not users:
            continue
        axes.step(users, ranks, where="post", color=COLORS[name], label=name, linewidth=2)
        axes.plot(users, ranks, "o", color=COLORS[name], markersize=3)
        axes.annotate(plans[0], (users[0], ranks[0]), fontsize=7, xytext=(4, 6), textcoords="offset points",
                      color=COLORS[name], ha="right")  # fmt: skip
        axes.annotate(plans[-1], (users[-1], ranks[-1]), fontsize=7, xytext=(4, 4), textcoords="offset points",
                      color=COLORS[name])  # fmt: skip
    if goal.ttl:
        axes.axvline(1 / goal.ttl, color="black", linestyle=":", linewidth=1)
        axes.annotate(f"{goal.ttl * 1e3:.3g} ms per token", (1 / goal.ttl, axes.get_ylim()[1]), fontsize=8,
                      rotation=90, va="top", ha="right")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tokens/s per user")
    axes.set_ylabel("tokens/s per GPU")
    axes.legend(frameon=False)
    _sign(figure)
    figure.savefig(path)


def layer_picture(model: str, part: str, goal: Goal, best: Proposal, path: str) -> None:
    """Draw the seconds of one layer of the best plan, stacked by cause, against the context."""
    known, chip = decoder(model), hardware(part)
    (machine,) = search.machines(chip, replace(goal, **best.precisions))
    row = one(Plan.parse(best.plan), best.batch, best.draft)
    contexts = np.geomspace(1024, max(2048, 4 * goal.context), 60)
    table = np.array([_causes(decode_step(known, machine, row, context)) for context in contexts]).T
    figure, axes = _axes(
        f"{known.name}, '{best.plan}', batch {best.batch} on {chip.title}: time of one layer"
    )
    labels = [NAMES.get(cause, cause) for cause in CAUSES]
    axes.stackplot(
        contexts,
        table * 1e6 / known.layers,
        labels=labels,
        colors=[LAYERS[cause] for cause in CAUSES],
    )
    axes.axvline(goal.context, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("microseconds per layer and token")
    axes.legend(frameon=False, loc="upper left")
    _sign(figure)
    figure.savefig(path)


def _causes(split: Any) -> list[float]:
    return list(split.named(0).values())


def _sign(figure: Any) -> None:
    figure.text(
        0.995, 0.005, f"plait planner; {PUBLISHED}", fontsize=5, ha="right", color="#666666"
    )
