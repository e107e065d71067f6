"""`plait plan`: the planner on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Option, Argument = typer.Option, typer.Argument
Model = Annotated[str, Argument(help="A config.json, its directory, or a name we ship (--list).")]
Part = Annotated[str, Option(help="For example gb200, h100 (--list), or a calibrated file.json.")]
Gpus = Annotated[int, Option(help="How many there are.")]
Context = Annotated[str, Option(help="Cached tokens of each request: 4096, 128k, 1M.")]
Ttl = Annotated[str, Option(help="Most time from token to token: 20ms. None: most throughput.")]
Prompt = Annotated[str, Option(help="New tokens of each request, computed here too: 8k.")]
Output = Annotated[int, Option(help="Tokens each request generates, with --prompt.")]
Ftl = Annotated[str, Option(help="Most time to the first token, unloaded, with --prompt: 2s.")]
Weights = Annotated[str, Option(help="Precisions to choose from: fp8,nvfp4. Default: 8 bits.")]
Kv = Annotated[str, Option(help="Precisions of the cache to choose from: bf16,fp8,mxfp4.")]
Draft = Annotated[int, Option(help="Most tokens drafted per step.")]
Acceptance = Annotated[float, Option(help="Chance that a drafted token is accepted.")]
Only = Annotated[str, Option("--plan", help='Price this plan alone, e.g. "kvp8 tp8".')]
Batch = Annotated[int, Option(help="Requests per dp rank, with --plan.")]
NoHelix = Annotated[bool, Option("--no-helix", help="Leave kvp out of the search.")]
Apart = Annotated[bool, Option("--split", help="Also attention and experts on ranks of their own.")]
Top = Annotated[int, Option(help="Rows of the table.")]
Pareto = Annotated[str, Option(help="Draw interactivity against throughput: a PNG or SVG.")]
Layers = Annotated[str, Option(help="Draw time per layer against context: a PNG or SVG.")]
Names = Annotated[bool, Option("--list", help="Name the models and the hardware we ship.")]
Calibrate = Annotated[
    str, Option(metavar="FILE.json", help="Measure this machine into a file for --hardware.")
]
Json = Annotated[bool, Option("--json", help="Print JSON for a program to read.")]


def plan(
    model: Model = "", hardware: Part = "h100", gpus: Gpus = 8, context: Context = "8k", ttl: Ttl = "",
    prompt: Prompt = "0", output: Output = 1024, ftl: Ftl = "", weights: Weights = "", kv: Kv = "bf16",
    draft: Draft = 0, acceptance: Acceptance = 0.7, only: Only = "", batch: Batch = 1,
    no_helix: NoHelix = False, split: Apart = False, top: Top = 10, pareto: Pareto = "",
    layers: Layers = "", list_names: Names = False, calibrate: Calibrate = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Find the best plans of MODEL on some hardware for a latency goal; nothing is launched."""
    from ..errors import PlanError

    if calibrate:
        _calibrate(calibrate)
        return
    if list_names or not model:
        _list()
        return
    words = {
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
        goal = _goal(hardware, words, numbers)
        _answer(model, hardware, goal, only, batch, top, pareto, layers, as_json)
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


def _goal(hardware: str, words: dict[str, str], numbers: dict[str, Any]) -> Any:
    from ..explain.run import token_count
    from .catalogue import hardware as part_named
    from .goals import Goal, seconds_of

    part = part_named(hardware)
    weights = words["weights"] or ("fp8" if part.fp8 else "bf16")
    prompt, context = token_count(words["prompt"]), token_count(words["context"])
    return Goal(
        context=max(context, prompt),
        prompt=prompt,
        ttl=seconds_of(words["ttl"]) if words["ttl"] else None,
        ftl=seconds_of(words["ftl"]) if words["ftl"] else None,
        weights=tuple(weights.split(",")),
        kv=tuple(words["kv"].split(",")),
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
