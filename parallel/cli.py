"""The `plait` command: a thin reader of the Python interface."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from ..kvstore.command import app as kv
from .experts.command import experts
from .planner.command import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run one large language model over many ranks, and keep its keys and values.",
)


app.add_typer(kv, name="kv")
app.command()(plan)
app.command()(experts)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"plait {version('plait')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a program to read.")
    ] = False,
) -> None:
    """Show versions, devices, launcher and backends, and what would add what is missing."""
    from .doctor import examine, table

    findings = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(table(findings))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint directory, a config.json, or a name we ship (plait plan --list)."
        ),
    ],
    plan: Annotated[str, typer.Argument(help='For example "kvp8 tp8".')],
    context: Annotated[
        str,
        typer.Option(help="Cached tokens of each request: 4096, 128k, 1M (thousands, millions)."),
    ] = "1024",
    batch: Annotated[int, typer.Option(help="Requests that decode together.")] = 1,
    rank: Annotated[int, typer.Option(help="Whose view.")] = 0,
    backward: Annotated[bool, typer.Option("--backward", help="Also a training step.")] = False,
    hardware: Annotated[
        str,
        typer.Option(
            help="Whose network the times are for: h100, a calibrated file. Default: the first that fits."
        ),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a program to read.")
    ] = False,
) -> None:
    """Show the mesh, the bytes of each rank, and every collective of MODEL under PLAN with its bytes and predicted
    seconds; no ranks are started."""
    from .errors import PlanError
    from .explain.run import token_count
    from .plan import Plan

    try:
        with Console(stderr=True).status(
            f"{model}: running one rank's part of {plan}, shapes only"
        ):
            said = Plan.parse(plan).explain(
                model,
                context=token_count(context),
                batch=batch,
                rank=rank,
                backward=backward,
                hardware=hardware,
            )
    except (PlanError, OSError) as error:
        typer.echo(f"plait: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(said.to_json() if as_json else str(said))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which one; none lists them.")] = "",
) -> None:
    """List the benchmarks of a checkout, or run one: plait bench tensor_parallel --rounds 5."""
    import ast
    import subprocess
    import sys
    from pathlib import Path

    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    shared = {"contest", "disk_contenders", "netns"}
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem not in shared}
    if not scripts:
        typer.echo("plait: benchmarks come with the repository, not with the package", err=True)
        raise typer.Exit(2)
    if not name:
        for stem, path in scripts.items():
            about = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
            typer.echo(f"{stem:18} {about[0] if about else ''}")
        return
    if name not in scripts:
        typer.echo(
            f"plait: there is no benchmark {name!r}; there are {', '.join(scripts)}", err=True
        )
        raise typer.Exit(2)
    raise typer.Exit(
        subprocess.run([sys.executable, scripts[name], *context.args], check=False).returncode
    )
