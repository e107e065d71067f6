"""What ranks computed and exchanged, on one clock: a Chrome trace file, and a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import primitive
from .primitive import Group
from .trace import Trace


@dataclass(frozen=True)
class Bar:
    """Something that a rank did from ``start`` for ``seconds``; ``axis`` is empty for what it computed."""

    rank: int
    name: str
    axis: str
    start: float
    seconds: float
    sent_bytes: int = 0
    scope: str = ""

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Timeline:
    """The bars of one or many ranks, by the time of day."""

    bars: tuple[Bar, ...]

    @classmethod
    def of(cls, trace: Trace, rank: int = 0) -> Timeline:
        """Read one rank's trace."""
        # a process may be kept waiting between the two: the largest of a few is the nearest
        since = max(time.time() - time.perf_counter() for _ in range(9))
        spans = [Bar(rank, s.name, "", s.start + since, s.seconds) for s in trace.spans]
        events = [
            Bar(rank, e.op, e.axis, e.start + since, e.seconds, e.sent_bytes, e.scope)
            for e in trace.events
        ]
        return cls(tuple(spans + events))

    @classmethod
    def gathered(cls, trace: Trace, group: Group) -> Timeline:
        """Put the traces of all ranks of a group together; on several hosts as true as their clocks.

        Collective: all ranks of the group; an all-gather of the sizes and one of the bars as text.
        """
        own = cls.of(trace, 0 if group is None else group.rank())
        if group is None:
            return own
        text = json.dumps([asdict(bar) for bar in own.bars]).encode()
        device = primitive.message_device(group)
        letters = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        length = torch.tensor([len(text)], device=device)
        sizes = primitive.all_gather(length, group).tolist()
        whole = bytes(primitive.all_gather(letters, group, sizes).tolist())
        bars: list[Bar] = []
        for size in sizes:
            bars += [Bar(**bar) for bar in json.loads(whole[:size])]
            whole = whole[size:]
        return cls(tuple(bars))

    def chrome(self) -> dict[str, Any]:
        """Write Chrome's trace format: a process for each rank, with lanes for what overlaps.

        Source: Trace Event Format; opened by Perfetto and chrome://tracing.
        """
        begin = min((bar.start for bar in self.bars), default=0.0)
        events: list[dict[str, Any]] = []
        for rank in self.ranks:
            events.append(_named("process_name", rank, 0, f"rank {rank}"))
            for lane, (label, bars) in enumerate(self.lanes(rank)):
                events.append(_named("thread_name", rank, lane, label))
                events += [_complete(bar, rank, lane, begin) for bar in bars]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Write a Chrome trace file."""
        Path(path).write_text(json.dumps(self.chrome()))

    @property
    def ranks(self) -> list[int]:
        """The ranks that have bars."""
        return sorted({bar.rank for bar in self.bars})

    def lanes(self, rank: int) -> list[tuple[str, list[Bar]]]:
        """Lay a rank's bars into lanes in which none overlap: computing first, then each axis."""
        mine = sorted((bar for bar in self.bars if bar.rank == rank), key=lambda bar: bar.start)
        lanes: list[tuple[str, list[Bar]]] = []
        for axis in sorted({bar.axis for bar in mine}):
            label = axis or "computing"
            lanes += [(label, lane) for lane in _apart(bar for bar in mine if bar.axis == axis)]
        return lanes

    def picture(self, path: str | Path, title: str = "") -> None:
        """Draw the bars; needs matplotlib (``pip install 'plait[plot]'``)."""
        draw(self, Path(path), title)


def _apart(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Spread bars, which come by their start, over as few lanes as keep them apart."""
    lanes: list[list[Bar]] = []
    for bar in bars:
        free = next((lane for lane in lanes if lane[-1].end <= bar.start), None)
        if free is None:
            lanes.append(free := [])
        free.append(bar)
    return lanes


def _named(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": {"name": name}}


def _complete(bar: Bar, rank: int, lane: int, begin: float) -> dict[str, Any]:
    about = {"axis": bar.axis, "sent_bytes": bar.sent_bytes, "scope": bar.scope}
    return {
        "ph": "X",
        "name": bar.name,
        "cat": "collective" if bar.axis else "compute",
        "pid": rank,
        "tid": lane,
        "ts": (bar.start - begin) * 1e6,
        "dur": bar.seconds * 1e6,
        "args": about if bar.axis else {},
    }


COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#9c6b4e")


def draw(timeline: Timeline, path: Path, title: str) -> None:
    """Draw a row for each lane of each rank, in milliseconds.

    Raises:
        ImportError: matplotlib is not installed; says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a timeline's picture needs matplotlib: pip install 'plait[plot]'"
        ) from error
    rows = [
        (f"rank {rank}  {label}", bars)
        for rank in timeline.ranks
        for label, bars in timeline.lanes(rank)
    ]
    begin = min((bar.start for bar in timeline.bars), default=0.0)
    end = max((bar.end for bar in timeline.bars), default=0.0)
    axes_seen = sorted({bar.axis for bar in timeline.bars})
    figure = Figure(figsize=(12, 1.2 + 0.42 * len(rows)), layout="constrained")
    plot: Any = figure.subplots()
    for y, (_, bars) in enumerate(rows):
        _draw_row(plot, y, bars, begin, (end - begin) / 40, axes_seen)
    plot.set_yticks(range(len(rows)), [label for label, _ in rows])
    plot.invert_yaxis()
    plot.set_xlabel("ms")
    plot.set_title(title, loc="left")
    plot.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        plot.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_row(
    plot: Any, y: int, bars: Sequence[Bar], begin: float, label_s: float, axes_seen: Sequence[str]
) -> None:
    for bar in bars:
        left, width = (bar.start - begin) * 1e3, bar.seconds * 1e3
        color = COLORS[axes_seen.index(bar.axis) % len(COLORS)]
        plot.barh(y, width, left=left, height=0.72, color=color, edgecolor="white", linewidth=0.6)
        if bar.seconds < label_s:
            continue
        text = bar.name.removeprefix("attention, ")
        plot.text(
            left + width / 2, y, text, ha="center", va="center", fontsize=7, clip_on=True
        ).set_in_layout(False)
