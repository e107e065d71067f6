"""`plait plan`: the planner on the command line."""

from __future__ import annotations

from dataclasses import replace
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
Comm = Annotated[str, Option(help="Precisions of what is sent and not summed: bf16,fp8.")]
Stall = Annotated[str, Option(help="Most time between two tokens, with a prompt beside: 100ms.")]
Idle = Annotated[int, Option(help="Sessions that wait with their cache, for each that runs.")]
Tiers = Annotated[str, Option(help="Where caches may wait: device,host,disk,recompute.")]
Experts = Annotated[str, Option(help="Which experts tokens choose: uniform, zipf or zipf:1.1.")]
Arrivals = Annotated[str, Option(help="Also simulate requests at random: 2/s, with --prompt.")]
Draft = Annotated[int, Option(help="Most tokens drafted per step.")]
Acceptance = Annotated[float, Option(help="Chance that a drafted token is accepted.")]
Only = Annotated[str, Option("--plan", help='Price this plan alone, e.g. "kvp8 tp8".')]
Batch = Annotated[int, Option(min=1, help="Requests per dp rank, with --plan.")]
NoHelix = Annotated[bool, Option("--no-helix", help="Leave kvp out of the search.")]
Apart = Annotated[bool, Option("--split", help="Also attention and experts on ranks of their own.")]
Top = Annotated[int, Option(min=1, help="Rows of the table.")]
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
    comm: Comm = "bf16", stall: Stall = "", idle: Idle = 0, tiers: Tiers = "device,host,disk,recompute",
    experts: Experts = "zipf", arrivals: Arrivals = "",
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
        "ttl": ttl, "ftl": ftl, "stall": stall, "context": context, "prompt": prompt, "weights": weights, "kv": kv,
        "comm": comm, "tiers": tiers,
    }  # fmt: skip
    numbers = {
        "ranks": gpus, "output": output, "draft": draft, "acceptance": acceptance, "helix": not no_helix,
        "split": split, "idle": idle,
    }  # fmt: skip
    try:
        for path in (pareto, layers):
            _writable(path)
        goal = _goal(hardware, words, numbers)
        with Console(stderr=True).status(f"{model} on {hardware}: looking at every plan"):
            said = _found(model, hardware, goal, only, batch, top, experts, arrivals)
        _show(said, model, hardware, top, pareto, layers, as_json)
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
    times = {name: seconds_of(words[name]) for name in ("ttl", "ftl", "stall") if words[name]}
    choices = {name: tuple(words[name].split(",")) for name in ("kv", "comm", "tiers")}
    return Goal(
        context=max(context, prompt), prompt=prompt, weights=tuple(weights.split(",")), **choices, **times, **numbers
    )  # fmt: skip


def _found(
    model: str, hardware: str, goal: Any, only: str, batch: int, top: int, experts: str, arrivals: str
) -> Any:  # fmt: skip
    """Ask the planner; simulate arrivals for the best proposal of each mode if asked to."""
    from ..errors import PlanError
    from ..plan import Plan
    from .answer import answer
    from .catalogue import hardware as part_named
    from .ffn_cost import coverage
    from .given import check
    from .goals import rate_of
    from .loaded import under_load
    from .reading import decoder

    rate, cover = rate_of(arrivals) if arrivals else 0.0, coverage(experts)
    if rate and (only or not goal.prompt):
        raise PlanError(
            f"arrivals {arrivals!r}", "need prompts to be computed here", "give --prompt, without --plan"
        )  # fmt: skip
    if only:
        return check(model, hardware, goal, Plan.parse(only), batch, cover)
    said = answer(model, hardware, goal, top, cover)
    if not rate:
        return said
    part, best = part_named(hardware), {row.mode: row for row in reversed(said.proposals)}
    known = decoder(model)
    return replace(
        said, loaded=tuple(under_load(known, part, goal, row, rate, cover=cover) for row in best.values())
    )  # fmt: skip


def _show(
    said: Any, model: str, hardware: str, top: int, pareto: str, layers: str, as_json: bool
) -> None:
    from .table import show

    if as_json:
        typer.echo(said.to_json())
    else:
        console = Console()
        wide = Console(width=max(console.width, 200)) if not console.is_terminal else console
        show(said, wide, top)
    if pareto or layers:
        from . import pictures

        if pareto:
            pictures.frontier_picture(model, hardware, said.goal, pareto)
        if layers:
            pictures.layer_picture(model, hardware, said.goal, said.proposals[0], layers)
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
