"""The planner's answer for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .answer import Answer
from .loaded import Loaded
from .proposals import Proposal
from .tiers import tiers_of

SHORT = {
    "weights": "W",
    "kv": "KV",
    "compute": "C",
    "communication": "X",
    "floor": "F",
    "prompts": "P",
}


def show(said: Answer, console: Console, most: int = 10) -> None:
    """Print the heading, the table, the footnotes and the error band."""
    goal = said.goal
    wish = f", {goal.ttl * 1e3:.4g} ms per token" if goal.ttl else ""
    tokens = f"{goal.context:,} tokens of context"
    console.print(
        Text(f"{said.model} on {goal.ranks} x {said.hardware}, {tokens}{wish}", style="bold")
    )
    if not said.reached:
        console.print(Text(f"Out of reach: {said.why}.", style="red"))
        ways = ", ".join(said.remedies) or "nothing that was tried"
        console.print(Text(f"Each of these alone would reach it: {ways}. The nearest plan:"))
    notes: list[str] = []
    console.print(_table(said, said.proposals[:most], notes))
    for row in {row.partner: row for row in said.proposals[:most] if row.partner}.values():
        console.print(Text(f"  '{row.plan}' is served by {row.partner}"))
    for number, note in enumerate(notes, 1):
        console.print(Text(f"  [{number}] {note}"))
    for note in said.notes:
        console.print(Text(f"  {note}"))
    if said.loaded:
        console.print(_loaded(said.loaded))
    console.print(
        Text(
            "  share of a step: W weights read, KV cache read, C compute beyond, X communication, F fixed, P prompts"
        )
    )
    console.print(Text(f"  {said.band}"))


def _table(said: Answer, rows: tuple[Proposal, ...], notes: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    choices = len(said.goal.weights) * len(said.goal.kv) * len(said.goal.comm) > 1
    tiers = len(tiers_of(said.goal)) > 1 or tiers_of(said.goal)[0] != "device"
    modes = (
        choices
        or len({(row.mode, row.weights, row.kv) for row in rows}) > 1
        or rows[0].mode != "decode"
    )
    table.add_column("plan", no_wrap=True, overflow="fold")
    for name in ("batch", "ms/token", "tok/s/user", "tok/s/GPU", "GB/GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("share of a step", no_wrap=True)
    if modes:
        table.add_column("how", no_wrap=True)
    if tiers:
        table.add_column("cache waits in", no_wrap=True)
    if said.goal.prompt:
        table.add_column("prompts pass", no_wrap=True)
        table.add_column("1st token s", justify="right", no_wrap=True)
        table.add_column("stall ms", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for row in rows:
        cells = [
            row.plan, f"{row.batch}{f'+{row.draft}' if row.draft else ''}", f"{row.ttl * 1e3:.2f}",
            f"{row.tokens_per_user:.1f}", f"{row.tokens_per_rank:,.1f}", f"{row.memory / 1e9:.0f}", _shares(row),
        ]  # fmt: skip
        if modes:
            cells.append(
                f"{row.mode} {row.weights}/{row.kv}{'' if row.comm == 'bf16' else f'/{row.comm}'}"
            )
        if tiers:
            cells.append(f"{row.tier} {row.stored / 1e9:,.0f} GB" if row.stored else row.tier)
        if said.goal.prompt:
            cells += [row.prefill, f"{row.ftl:.2f}", f"{row.stall * 1e3:.0f}"]
        table.add_row(*(Text(cell) for cell in [*cells, _from(row, notes)]))
    return table


def _loaded(rows: tuple[Loaded, ...]) -> Table:
    """What users would wait for: another kind of number, in a table of its own."""
    title = f"Under load: simulated, {rows[0].rate:.4g} requests/s at random times (Poisson), all at one plan"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("plan", no_wrap=True, overflow="fold")
    table.add_column("how", no_wrap=True)
    for name in (
        "unloaded 1st token s",
        "p50 s",
        "p99 s",
        "ms/token p50",
        "p99",
        "busy",
        "carries requests/s",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        most = f"{row.capacity:.3g}{': overloaded' if row.overloaded else ''}"
        times = (
            f"{seconds:.3g}" for seconds in (row.unloaded, row.first_token, row.first_token_p99)
        )
        tokens = (f"{seconds * 1e3:.3g}" for seconds in (row.per_token, row.per_token_p99))
        table.add_row(row.plan, row.mode, *times, *tokens, f"{row.busy:.0%}", most)
    return table


def _shares(row: Proposal) -> str:
    large = [(cause, share) for cause, share in row.split.items() if share >= 0.005]
    return " ".join(
        f"{SHORT[cause]}{share:.0%}" for cause, share in sorted(large, key=lambda pair: -pair[1])
    )


def _from(row: Proposal, notes: list[str]) -> str:
    kind, _, why = row.provenance.partition(": ")
    if not why:
        return kind
    if why not in notes:
        notes.append(why)
    return f"{kind} [{notes.index(why) + 1}]"
