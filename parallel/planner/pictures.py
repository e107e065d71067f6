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
# of each curve the ends for the fastest user and for the most throughput: side, level, points away
LABELS = {
    "with Helix": (("right", "top", (2, -16)), ("left", "bottom", (0, 5))),
    "best without Helix": (("right", "top", (0, -6)), ("left", "top", (-2, -18))),
}
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
NAMES = {"weights": "reading weights", "kv": "reading the cache", "floor": "fixed"}


def _axes(title: str, under: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError("a picture", "needs matplotlib", "pip install 'plait[plot]'") from None
    figure = Figure(figsize=(8, 4.8), dpi=150)
    axes = figure.add_axes((0.09, 0.135, 0.88, 0.73))
    figure.text(0.09, 0.935, title, fontsize=12, fontweight="bold")
    figure.text(0.09, 0.89, under, fontsize=8.5, color="#444444")
    figure.text(
        0.97, 0.012, f"plait planner; {PUBLISHED}", fontsize=5.5, ha="right", color="#777777"
    )
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
    """Draw what one user gets against what a GPU yields, with Helix and without, and where it gains most."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    precisions = (
        f"weights {'/'.join(goal.weights)}, cache {'/'.join(goal.kv)}; each dot a plan and a batch"
    )
    title = f"{model} on {goal.ranks} x {hardware(part).title}, {goal.context:,} tokens of context"
    figure, axes = _axes(title, precisions)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    found = curves(model, part, goal)
    for name, (users, ranks, plans) in found.items():
        if not users:
            continue
        axes.step(users, ranks, where="post", color=COLORS[name], label=name, linewidth=2)
        axes.plot(users, ranks, "o", color=COLORS[name], markersize=3)
        for place, (side, level, offset) in zip((0, -1), LABELS[name], strict=True):
            axes.annotate(
                plans[place], (users[place], ranks[place]), fontsize=7, color=COLORS[name], ha=side, va=level,
                xytext=offset, textcoords="offset points", bbox=WHITE, zorder=1.5,
            )  # fmt: skip
    _gain(axes, goal, found)
    axes.margins(x=0.05, y=0.1)
    axes.set_xlabel("tokens/s per user")
    axes.set_ylabel("tokens/s per GPU")
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    figure.savefig(path)


def _gain(axes: Any, goal: Goal, found: dict[str, tuple[Any, Any, list[str]]]) -> None:
    """Mark how much more a GPU yields with Helix: at the goal's latency, else where it is most."""
    (users, ours, _), (others, best, _) = found["with Helix"], found["best without Helix"]
    if goal.ttl:
        axes.axvline(1 / goal.ttl, color="black", linestyle=":", linewidth=1)
        axes.annotate(
            f"{goal.ttl * 1e3:.3g} ms per token", (1 / goal.ttl, 0.02), fontsize=8, rotation=90, va="bottom",
            ha="right", xycoords=("data", "axes fraction"), xytext=(-2, 0), textcoords="offset points",
        )  # fmt: skip
    places = [1 / goal.ttl] if goal.ttl else others
    pairs = [(user, _at(users, ours, user), _at(others, best, user)) for user in places]
    gains = [(high / low, user, low, high) for user, high, low in pairs if low and high]
    if not gains or max(gains)[0] < 1.01:
        return
    gain, user, low, high = max(gains)
    arrow = {"arrowstyle": "<->", "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (user, high), (user, low), arrowprops=arrow)
    side, away = ("right", -5) if user > 0.8 * max(users) else ("left", 5)
    axes.annotate(f"{gain:.2g}x", (user, (low * high) ** 0.5), fontsize=11, fontweight="bold", xytext=(away, 0),
                  textcoords="offset points", va="center", ha=side, bbox=WHITE)  # fmt: skip


def _at(users: Any, ranks: Any, user: float) -> float:
    """Return the most throughput at that speed for a user or a higher one."""
    return max((r for u, r in zip(users, ranks, strict=True) if u >= user), default=0.0)


def layer_picture(model: str, part: str, goal: Goal, best: Proposal, path: str) -> None:
    """Draw the seconds of one layer of the best plan, stacked by cause, against the context."""
    from matplotlib.ticker import EngFormatter

    known, chip = decoder(model), hardware(part)
    (machine,) = search.machines(chip, replace(goal, **best.precisions))
    row = one(Plan.parse(best.plan), best.batch, best.draft)
    contexts = np.geomspace(1024, max(2048, 4 * goal.context), 60)
    table = np.array([_causes(decode_step(known, machine, row, context)) for context in contexts]).T
    table *= 1e6 / known.layers
    figure, axes = _axes(
        f"{known.name} on {chip.title}: where a layer's time goes",
        f"plan '{best.plan}', batch {best.batch}, weights {best.weights}, cache {best.kv}",
    )
    there = [i for i in range(len(CAUSES)) if table[i].max() > 0.005 * table.sum(axis=0).max()]
    labels = [NAMES.get(CAUSES[i], CAUSES[i]) for i in there]
    colors = [LAYERS[CAUSES[i]] for i in there]
    axes.stackplot(contexts, table[there], labels=labels, colors=colors)
    axes.set_xscale("log")
    axes.set_xlim(contexts[0], contexts[-1])
    axes.axvline(goal.context, color="black", linestyle=":", linewidth=1)
    axes.annotate(f"{goal.context:,} tokens", (goal.context, 0.98), xycoords=("data", "axes fraction"), fontsize=8,
                  rotation=90, va="top", ha="right", xytext=(-2, 0), textcoords="offset points")  # fmt: skip
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("microseconds per layer and step")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path)


def _causes(split: Any) -> list[float]:
    return list(split.named(0).values())
