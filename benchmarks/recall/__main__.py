"""Recall of a small trained model under every method of the library, and bits per byte of the tiny language model.

    python benchmarks/recall                       # the tables; --json and --picture keep them
    python benchmarks/recall --rows 16 --only first    # a minute or two
    python benchmarks/recall --text 4 --context 8192

See docs/benchmarks/recall.md for what the numbers can say and what they cannot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from caches import Method, coding, evicting, full, mixing, rocket, selecting
from measure import Row, measure, whole_logits
from model import Recall, load
from outliers import inject
from report import draw, show
from rich.console import Console
from tasks import Batch, needles, spans
from text import TextRow, load_model, measure_texts, texts
from train import keep_memory

SEED = 1_000_000_000  # far from those of the training
CONTEXT, FACTS, TURNS, SYMBOLS, SPAN = 512, 64, 8, 448, 64
INJECTED = (12.0, 1)  # factor and pairs of the outliers


def selectors(budget: float) -> list[Method]:
    """What selectors do with a share of the tokens."""
    percent = f"{100 * budget:g}%"
    pages = [
        selecting(f"quest:budget={budget},page={p},dense=0", f"quest page {p} {percent}")
        for p in (4, 16)
    ]
    return [
        selecting(f"exact:budget={budget}", f"exact top-k {percent}"),
        *pages,
        selecting(f"sparq:budget={budget},channels=8", f"sparq 8 channels {percent}"),
        selecting(f"rocket-mt:budget={budget}", f"rocketkv-mt {percent}", turns=True),
        selecting(f"recent:tokens={round(budget * CONTEXT)}", f"newest {percent}"),
    ]


def evictions(budget: float) -> list[Method]:
    """What scorers and rules keep of the prompt."""
    percent = f"{100 * budget:g}%"
    scorers = {
        "streaming": "streaming", "knorm": "knorm", "keydiff": "keydiff", "lagkv": "lagkv:lag=32",
        "tova": "tova", "h2o": "h2o", "expected": "expected", "snapkv": "snapkv:window=16",
    }  # fmt: skip
    made = [
        evicting(f"{text}{',' if ':' in text else ':'}budget={budget}", f"{name} {percent}")
        for name, text in scorers.items()
    ]
    snap = f"snapkv:window=16,budget={budget}"
    return [
        *made,
        evicting(f"{snap},rule=(pyramid:window=16)", f"pyramidkv {percent}"),
        evicting(f"{snap},rule=ada", f"adakv {percent}"),
        rocket(budget, f"rocketkv {percent}"),
    ]


def codecs() -> list[Method]:
    """What bits keep."""
    texts = (
        "fp8", "int8", "int4", "int3", "int2", "kivi:bits=4", "kivi:bits=3", "kivi:bits=2",
        "hadamard+int4/int4", "hadamard+int3/int3", "hadamard+int2/int2", "kivi:bits=4/int2",
        "kivi:bits=2/int4", "turbo:bits=4", "turbo:bits=3", "turbo:bits=2", "vidkv", "mxfp8", "mxfp4",
        "nvfp4",
    )  # fmt: skip
    mixed = [
        mixing("int3", "mikv int3, no balancer", balanced=False),
        mixing("int3", "mikv int3", balanced=True),
        mixing("int2", "mikv int2", balanced=True),
    ]
    return [*map(coding, texts), *mixed]


def controls() -> list[Method]:
    """What must go wrong."""
    quest = "quest:budget=0.1,page=4,dense=0"
    made = [
        selecting(quest, "quest page 4 10%, shuffled", "shuffled"),
        selecting(quest, "quest page 4 10%, stale summaries", "stale"),
        evicting("snapkv:window=16,budget=0.25", "snapkv 25%, wrong positions", shift=-384),
        coding("int2/kivi:bits=4", "K and V codecs swapped"),
        mixing("int3", "mikv int3, balancer not mirrored", balanced=True, mirrored=False),
    ]
    return [Method("control", m.name, m.open, m.shift, m.turns) for m in made]


def run(
    name: str,
    task: str,
    model: Recall,
    batch: Batch,
    methods: list[Method],
    say: Callable[[str], None],
) -> list[Row]:
    """Measure some methods on one model and task."""
    whole, rows = whole_logits(model, batch), []
    for method in methods:
        rows.append(measure(model, batch, whole, method, name, task))
        row = rows[-1]
        say(
            f"{name} {task} {row.method}: {row.first:.3f} {row.later:.3f} KL {row.kl:.5f} read {row.read:.3f}"
        )
    return rows


def recall(
    rows: int, only: str | None, budgets: list[float], say: Callable[[str], None]
) -> list[Row]:
    """The tables of the recall model: looked up in its first layer, in its third, and with outliers in its keys."""
    asked = needles(rows, CONTEXT, FACTS, TURNS, SYMBOLS, SEED)
    copied = spans(rows, CONTEXT, SPAN, SYMBOLS, SEED)
    reading = [m for budget in budgets for m in (*selectors(budget), *evictions(budget))]
    top_p = selecting("top-p:share=0.95,pages=0.98,page=4", "top-p 95%")
    out: list[Row] = []
    for name, silent in (("first", 0), ("third", 2)):
        if only in (None, name):
            methods = [full(), *reading, top_p]
            if name == "third":
                methods += [*codecs(), *controls()]
            out += run(name, "facts", load(silent), asked, methods, say)
    if only in (None, "copy"):
        methods = [full(), *selectors(0.1), *evictions(0.25)]
        out += run("first", "copy", load(), copied, methods, say)
    if only in (None, "outliers"):
        model = load()
        inject(model, *INJECTED)
        spoiled = [m for m in controls() if "mirrored" in m.name or "swapped" in m.name]
        out += run("outliers", "facts", model, asked, [full(), *codecs(), *spoiled], say)
    return out


def read_texts(
    count: int, context: int, scored: int, few: bool, say: Callable[[str], None]
) -> list[TextRow]:
    """The table of the tiny language model; `few` of the methods, where contexts are long."""
    some = [
        full(), selecting("exact:budget=0.05"), selecting("quest:budget=0.05,page=4"),
        selecting(f"recent:tokens={context // 20}"), evicting("streaming:budget=0.05"),
        evicting("snapkv:budget=0.05"), rocket(0.05, "rocketkv 5%"),
        *map(coding, ("int4", "kivi:bits=2", "int2")),
    ]  # fmt: skip
    methods = [
        full(), selecting("exact:budget=0.05"), selecting("quest:budget=0.05,page=4"),
        selecting("quest:budget=0.05"), selecting("rocket-mt:budget=0.05"),
        selecting("top-p:share=0.95"), selecting(f"recent:tokens={context // 20}"),
        evicting("streaming:budget=0.05"), evicting("snapkv:budget=0.05"),
        evicting("snapkv:budget=0.05,rule=ada"), evicting("keydiff:budget=0.05"), rocket(0.05, "rocketkv 5%"),
        *map(coding, ("int8", "int4", "int3", "int2", "kivi:bits=4", "kivi:bits=2",
                      "hadamard+int3/int3", "turbo:bits=3", "mxfp4", "nvfp4")),
    ]  # fmt: skip
    return measure_texts(
        load_model(), texts(count, context + scored), context, some if few else methods, say
    )


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="sequences of each task")
    parser.add_argument("--only", choices=("first", "third", "copy", "outliers"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument(
        "--text", type=int, default=0, help="texts to read; then no recall is measured"
    )
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--scored", type=int, default=256, help="bytes scored after the context")
    parser.add_argument("--few", action="store_true", help="the ten methods that say most, of text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    say = lambda text: console.print(text, style="dim")  # noqa: E731
    if options.text:
        rows: list[Row] = []
        lines = read_texts(options.text, options.context, options.scored, options.few, say)
    else:
        rows, lines = recall(options.rows, options.only, options.budgets, say), []
    show(console, rows, lines)
    if options.json:
        options.json.write_text(
            json.dumps([asdict(row) for row in (*rows, *lines)], indent=1) + "\n"
        )
    if options.picture and rows:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
