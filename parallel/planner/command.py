"""`plait plan`: the planner on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def plan(
    model: Annotated[
        str, typer.Argument(help="A config.json, its directory, or a name we ship (see --list).")
    ] = "",
    hardware: Annotated[
        str, typer.Option(help="For example gb200, h100 (see --list), or a calibrated file.json.")
    ] = "h100",
    gpus: Annotated[int, typer.Option(help="How many there are.")] = 8,
    context: Annotated[
        str, typer.Option(help="Cached tokens of each request: 4096, 128k, 1M.")
    ] = "8k",
    ttl: Annotated[
        str, typer.Option(help="Most time from token to token: 20ms. None: the most throughput.")
    ] = "",
    prompt: Annotated[
        str, typer.Option(help="New tokens of each request, computed here too: 8k.")
    ] = "0",
    output: Annotated[
        int, typer.Option(help="Tokens each request generates, with --prompt.")
    ] = 1024,
    ftl: Annotated[
        str, typer.Option(help="Most time to the first token, unloaded, with --prompt: 2s.")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="Precisions to choose from: fp8,nvfp4. Default: 8 bits.")
    ] = "",
    kv: Annotated[
        str, typer.Option(help="Precisions of the cache to choose from: bf16,fp8,mxfp4.")
    ] = "bf16",
    draft: Annotated[int, typer.Option(help="Most tokens drafted per step.")] = 0,
    acceptance: Annotated[
        float, typer.Option(help="Chance that a drafted token is accepted.")
    ] = 0.7,
    only: Annotated[
        str, typer.Option("--plan", help='Price this plan alone, e.g. "kvp8 tp8".')
    ] = "",
    batch: Annotated[int, typer.Option(help="Requests per dp rank, with --plan.")] = 1,
    no_helix: Annotated[
        bool, typer.Option("--no-helix", help="Leave kvp out of the search.")
    ] = False,
    split: Annotated[
        bool, typer.Option("--split", help="Also attention and experts on ranks of their own.")
    ] = False,
    top: Annotated[int, typer.Option(help="Rows of the table.")] = 10,
    pareto: Annotated[
        str, typer.Option(help="Draw interactivity against throughput into this PNG or SVG.")
    ] = "",
    layers: Annotated[
        str, typer.Option(help="Draw time per layer against context into this PNG or SVG.")
    ] = "",
    list_names: Annotated[
        bool, typer.Option("--list", help="Name the models and the hardware we ship.")
    ] = False,
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="FILE.json", help="Measure this machine into a file that --hardware reads."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Find the best plans of MODEL on some hardware for a latency goal; nothing is launched."""
    from ..errors import PlanError

    if calibrate:
        _calibrate(calibrate)
        return
    if list_names or not model:
        _list()
        return
    wishes = {
        "ttl": ttl,
        "ftl": ftl,
        "context": context,
        "prompt": prompt,
        "weights": weights,
        "kv": kv,
    }
    numbers = {
        "ranks": gpus, "output": output, "draft": draft, "acceptance": acceptance, "helix": not no_helix,
        "split": split,
    }  # fmt: skip
    try:
        _answer(
            model,
            hardware,
            _goal(hardware, wishes, numbers),
            only,
            batch,
            top,
            pareto,
            layers,
            as_json,
        )
    except PlanError as error:
        typer.echo(f"Refused: {error}", err=True)
        raise typer.Exit(2) from None


def _calibrate(path: str) -> None:
    from .calibration import calibrate, save

    found = calibrate()
    save(found, path)
    for name, figure in found.figures().items():
        typer.echo(f"{name:20} {figure.value:12.4g} {figure.unit:7} {figure.source}")
    typer.echo(f"wrote {path}; use it with --hardware {path}")


def _list() -> None:
    from .catalogue import catalogue
    from .configs import CONFIGS

    typer.echo(f"models:   {', '.join(CONFIGS)}, or a config.json")
    typer.echo(f"hardware: {', '.join(catalogue())}")
    typer.echo(
        "for example: plait plan llama-405b --hardware gb200 --gpus 64 --context 1M --ttl 20ms --kv mxfp4"
    )


def _goal(hardware: str, wishes: dict[str, str], numbers: dict[str, Any]) -> Any:
    from ..explain.run import token_count
    from .catalogue import hardware as part_named
    from .goals import Goal, seconds_of

    part = part_named(hardware)
    weights = wishes["weights"] or ("fp8" if part.fp8 else "bf16")
    prompt, context = token_count(wishes["prompt"]), token_count(wishes["context"])
    return Goal(
        context=max(context, prompt),
        prompt=prompt,
        ttl=seconds_of(wishes["ttl"]) if wishes["ttl"] else None,
        ftl=seconds_of(wishes["ftl"]) if wishes["ftl"] else None,
        weights=tuple(weights.split(",")),
        kv=tuple(wishes["kv"].split(",")),
        **numbers,
    )


def _answer(
    model: str,
    hardware: str,
    goal: Any,
    only: str,
    batch: int,
    top: int,
    pareto: str,
    layers: str,
    as_json: bool,
) -> None:
    from ..plan import Plan
    from .answer import answer, check
    from .table import show

    for path in (pareto, layers):
        _writable(path)
    said = (
        check(model, hardware, goal, Plan.parse(only), batch)
        if only
        else answer(model, hardware, goal, top)
    )
    if as_json:
        typer.echo(said.to_json())
    else:
        console = Console()
        wide = Console(width=max(console.width, 150)) if not console.is_terminal else console
        show(said, wide, top)
    if pareto or layers:
        from . import pictures

        if pareto:
            pictures.frontier_picture(model, hardware, goal, pareto)
        if layers:
            pictures.layer_picture(model, hardware, goal, said.proposals[0], layers)
        typer.echo(f"wrote {' and '.join(path for path in (pareto, layers) if path)}", err=as_json)


def _writable(path: str) -> None:
    from ..errors import PlanError

    if path and Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise PlanError(
            f"picture {path!r}", "is no PNG, SVG or PDF", "end its name in .png, .svg or .pdf"
        )
    if path and not Path(path).resolve().parent.is_dir():
        raise PlanError(
            f"picture {path!r}", "lies in a folder that is not there", "make the folder first"
        )
