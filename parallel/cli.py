"""The `plait` command: a thin reader of the Python interface."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run one large language model over many ranks, and keep its keys and values.",
)


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
        str, typer.Argument(help="A Hugging Face model name, or a directory with its config.json.")
    ],
    plan: Annotated[str, typer.Argument(help='For example "kvp8 tp8".')],
) -> None:
    """Show the mesh, the bytes of each rank and every collective of MODEL under PLAN; no ranks are started."""
    from .errors import PlanError
    from .plan import Plan

    try:
        typer.echo(Plan.parse(plan).explain(_meta_model(model)))
    except (PlanError, OSError) as error:
        typer.echo(f"plait: {error}", err=True)
        raise typer.Exit(2) from None


def _meta_model(name: str):
    """Build the model of a config without memory for its weights."""
    import torch

    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        typer.echo("plait: a model by name needs transformers: pip install 'plait[hf]'", err=True)
        raise typer.Exit(2) from None
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
