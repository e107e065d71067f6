"""`plait experts`: placements from recorded routing, on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .traffic import Traffic

Traces = Annotated[
    list[Path], typer.Argument(metavar="TRACE...", help="Files of plait.record_routing.")
]
Ranks = Annotated[int, typer.Option(min=2, help="The plan's ep.")]
Method = Annotated[
    str, typer.Option(help="eplb (copies by load) or moetuner (two integer programs).")
]
Spare = Annotated[int, typer.Option(min=0, help="Copies on each rank beside its share, for eplb.")]
Seconds = Annotated[float, typer.Option(help="For each integer program, for moetuner.")]
Check = Annotated[
    list[Path] | None, typer.Option(help="Other traces, to measure on. Default: the same.")
]
RowBytes = Annotated[int, typer.Option(help="Bytes of one token as it travels: width * element.")]
Out = Annotated[Path | None, typer.Option(help="Write the placement for ep,placement=FILE.")]


def experts(
    traces: Traces, ranks: Ranks = 8, method: Method = "eplb", spare: Spare = 1, seconds: Seconds = 5.0,
    check: Check = None, row_bytes: RowBytes = 0, out: Out = None,
) -> None:  # fmt: skip
    """Place experts by what routers chose; prints imbalance and rows between ranks, before and after."""
    from ..errors import PlanError, unknown
    from .packing import balanced
    from .placement import Placement, write_placements
    from .routing import Routing
    from .traffic import weigh

    def eplb(routing: Routing) -> Mapping[str, Placement]:
        return {n: balanced(routing.loads(n).tolist(), ranks, spare) for n in routing.experts}

    def moetuner(routing: Routing) -> Mapping[str, Placement]:
        from .tuner import tuned

        return tuned(routing, ranks, seconds=seconds)

    methods: dict[str, Callable[[Routing], Mapping[str, Placement]]] = {
        "eplb": eplb,
        "moetuner": moetuner,
    }
    try:
        if method not in methods:
            raise unknown("method", method, methods)
        routing = Routing.load(*traces)
        other = Routing.load(*check) if check else routing
        made = methods[method](routing)
        even = {n: balanced([0.0] * number, ranks) for n, number in routing.experts.items()}
        if other.experts != routing.experts:
            raise PlanError("--check", "is of another model", "give traces of the same model")
        tables = [weigh(other, placed, routing) for placed in (even, made)]
        if out is not None:
            write_placements(out, made)
    except (PlanError, OSError, ImportError) as error:  # scipy comes with plait[placement]
        typer.echo(f"plait: {error}", err=True)
        raise typer.Exit(2) from None
    _show(tables, method, row_bytes)


def _show(tables: list[dict[str, Traffic]], method: str, row_bytes: int) -> None:
    unit = "bytes" if row_bytes else "rows"
    table = Table(
        "layer", "imbalance, even", f"{method}: predicted", "measured", f"sent {unit}, even", method,
        "layer to layer, even", method, title="max rows of a rank / mean, and what crosses",
    )  # fmt: skip
    for layer, before in tables[0].items():
        after, scale = tables[1][layer], row_bytes or 1
        table.add_row(
            layer, f"{before.measured:.3f}", f"{after.predicted:.3f}", f"{after.measured:.3f}",
            *(f"{rows * scale:,}" for rows in (
                before.sent_rows, after.sent_rows, before.hop_rows, after.hop_rows)),
        )  # fmt: skip
    Console().print(table)
