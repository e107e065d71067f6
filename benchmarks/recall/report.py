"""The table and the picture of the recall benchmark."""

from __future__ import annotations

import math
from pathlib import Path

from measure import Row
from rich.console import Console
from rich.table import Table
from text import TextRow


def interval(share: float, count: int) -> str:
    """A share with the 95 % interval of Wilson, in percent."""
    if not count or math.isnan(share):
        return "-"
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (
        f"{100 * share:.1f} [{100 * max(0, middle - half):.0f}-{100 * min(1, middle + half):.0f}]"
    )


def show(console: Console, rows: list[Row], texts: list[TextRow]) -> None:
    """Print one table a model and task, and one of the texts."""
    for key in dict.fromkeys((row.model, row.task) for row in rows):
        table = Table(
            "family", "method", "first question %", "later ones %", "KL", "read", "held", "CPU s",
            title=f"{key[1]}, model {key[0]}",
        )  # fmt: skip
        for row in rows:
            if (row.model, row.task) == key:
                table.add_row(
                    row.family, row.method, interval(row.first, row.first_of),
                    interval(row.later, row.later_of), f"{row.kl:.4f}", f"{row.read:.3f}",
                    f"{row.held:.3f}", f"{row.seconds:.1f}",
                )  # fmt: skip
        console.print(table)
    if texts:
        table = Table(
            "family", "method", "bits a byte", "more (95 %)", "KL", "read", "held", "CPU ms a token",
            title=f"text: {texts[0].scored} bytes after {texts[0].context}, {texts[0].texts} texts",
        )  # fmt: skip
        for row in texts:
            table.add_row(
                row.family, row.method, f"{row.bits_per_byte:.3f}", f"{row.more:+.3f} +-{row.half:.3f}",
                f"{row.kl:.4f}", f"{row.read:.3f}", f"{row.held:.3f}", f"{1e3 * row.seconds:.1f}",
            )  # fmt: skip
        console.print(table)


def draw(rows: list[Row], path: Path) -> None:
    """Draw KL against what is read (selection, eviction) or held (codecs), one panel a model."""
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys((row.model, row.task) for row in rows if row.family != "control"))
    figure = Figure(figsize=(5.4 * len(keys), 4.6), layout="constrained")
    marks = {"selection": "o", "eviction": "s", "codec": "^"}
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for family, mark in marks.items():
            mine = [r for r in rows if (r.model, r.task) == key and r.family == family]
            x = [r.held if family == "codec" else r.read for r in mine]
            axes.scatter(x, [max(r.kl, 1e-6) for r in mine], marker=mark, s=28, label=family)
            for share, row in zip(x, mine, strict=True):
                axes.annotate(row.method, (share, max(row.kl, 1e-6)), fontsize=5, xytext=(3, 2),
                              textcoords="offset points")  # fmt: skip
        axes.set(title=f"{key[1]}, {key[0]}", xscale="log", yscale="log",
                 xlabel="share read a step (codecs: share held)", ylabel="KL to the whole cache, nats")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
