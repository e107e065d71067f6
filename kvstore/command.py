"""`plait kv`: look at a cache directory, verify, repair and compact it, measure its disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .errors import StoreError
from .spec import parse_bytes
from .tiers import check

T = TypeVar("T")
app = typer.Typer(no_args_is_help=True, help="Look after a KV cache directory.")
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The cache directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def inspect(directory: Directory, as_json: AsJson = False) -> None:
    """Show what DIR holds: geometry, pages, and of which models. Reads only."""
    seen = _tried(lambda: check.look(directory))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(seen), indent=2))
        return
    about = Table(title=str(directory), show_header=False)
    for name, value in dataclasses.asdict(seen).items():
        if name not in ("forms", "strange"):
            about.add_row(
                name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)
            )
    if seen.strange:
        about.add_row("not ours", ", ".join(seen.strange))
    Console().print(about)
    forms = Table("identity", "codec", "dtype", "shape", "pages", "bytes")
    for form in seen.forms:
        cells = [str(form.get(name, "?")) for name in ("identity", "codec", "dtype", "shape")]
        forms.add_row(*cells, f"{form['pages']:,}", f"{form['bytes']:,}")
    Console().print(forms)


@app.command()
def verify(directory: Directory, as_json: AsJson = False) -> None:
    """Read every page of DIR and name each damaged slot. Reads only; ends with 1 if there is one."""
    bad = _tried(lambda: _with_bar("verify", as_json, lambda bar: check.verify(directory, bar)))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(slot) for slot in bad], indent=2))
    else:
        _print_bad(bad)
    if bad:
        raise typer.Exit(1)


@app.command()
def repair(directory: Directory, as_json: AsJson = False) -> None:
    """Drop the damaged pages of DIR, and make its index anew from the slots if it is damaged."""
    call = lambda: _with_bar("repair", as_json, lambda bar: check.repair(directory, bar))  # noqa: E731
    bad, rebuilt = _tried(call)
    if as_json:
        said = {"dropped": [dataclasses.asdict(slot) for slot in bad], "index_rebuilt": rebuilt}
        typer.echo(json.dumps(said, indent=2))
        return
    _print_bad(bad)
    typer.echo(
        f"dropped {len(bad)} pages" + ("; made the index anew from the slots" if rebuilt else "")
    )


@app.command()
def compact(directory: Directory, as_json: AsJson = False) -> None:
    """Write the index of DIR anew, as short as it can be, and give back slab files without pages."""
    before, after, slabs = _tried(lambda: check.compact(directory))
    if as_json:
        typer.echo(
            json.dumps({"lines_before": before, "lines_after": after, "slabs_removed": slabs})
        )
    else:
        typer.echo(f"index: {before} lines, now {after}; {slabs} empty slabs removed")


@app.command()
def bench(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A directory on the disk to measure.", exists=True, file_okay=False
        ),
    ],
    page: Annotated[str, typer.Option(help="Bytes of a page.")] = "2MiB",
    total: Annotated[str, typer.Option("--bytes", help="Bytes to move each time.")] = "256MiB",
    as_json: AsJson = False,
) -> None:
    """Measure the disk of DIR: a raw loop, and the disk tier with its checks and syncs."""
    found = _tried(lambda: check.bandwidth(directory, parse_bytes(page), parse_bytes(total)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    way = "O_DIRECT" if found.direct else "through the page cache"
    table = Table(
        "GB/s", "raw", "disk tier", "of raw", title=f"{directory}, pages of {page}, {way}"
    )
    for name, raw, tier in (
        ("store", found.raw_store, found.tier_store),
        ("load", found.raw_load, found.tier_load),
    ):
        table.add_row(name, f"{raw / 1e9:.2f}", f"{tier / 1e9:.2f}", f"{tier / raw:.2f}")
    Console().print(table)


def _tried(call: Callable[[], T]) -> T:
    try:
        return call()
    except (StoreError, OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            said = f"{error.filename}: {error.strerror}"
        typer.echo(f"plait: {said}", err=True)
        raise typer.Exit(2) from None


def _with_bar(title: str, quiet: bool, call: Callable[[check.Progress], T]) -> T:
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(title, total=None)
        return call(lambda done, total: bar.update(task, completed=done, total=total))


def _print_bad(bad: list[Any]) -> None:
    if not bad:
        typer.echo("every page is what was put")
        return
    table = Table("slot", "file", "offset", "key", "what is wrong")
    for slot in bad:
        table.add_row(str(slot.slot), slot.file, f"{slot.offset:,}", slot.key[:16], slot.wrong)
    Console().print(table)
