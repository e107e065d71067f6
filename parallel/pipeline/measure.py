"""Measure how long each layer of a model takes, forward and backward, on a real batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..agreement import agree
from ..errors import PlanError
from ..families import decoder_layers, is_transformers
from .split import ends
from .times import LayerTimes


def measure_layers(
    model: Any, batch: Mapping[str, Any], path: str | Path, *, repeats: int = 3
) -> None:
    """Measure every layer of a whole model on a batch, and write the times for ``pp4,times=PATH``.

    The batch should be one microbatch as a stage will see it; with labels the loss is measured too. Forward and
    backward of each part, the best of some repeats. The model, its gradients and the random state stay as they are.

        plait.measure_layers(model, batch, "times.json")
        model = plait.parallelize(model, "pp4:1f1b,times=times.json")

    Collective: all ranks. Rank 0 measures and writes, the others wait; the file must be where all can read it.

    Raises:
        PlanError: on every rank: a model that is cut, on meta, or no decoder; or the file cannot be written.
    """
    failure: Exception | None = None
    world = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    try:
        if world is None or world.rank() == 0:
            refuse(model)
            with torch.random.fork_rng():
                times_of(model, batch, repeats).write(path)
    except Exception as error:
        failure = error
    agree(world, {}, failure)


def refuse(model: Any) -> None:
    """Refuse what cannot be measured."""
    asked = f"measuring {type(model).__name__}"
    if not is_transformers(model):
        raise PlanError(asked, "needs a transformers decoder, whose stages are known", "use pp1")
    if getattr(model, "_plait", None) is not None:
        raise PlanError(
            asked, f"finds it cut ({model._plait.plan})", "measure it before parallelize"
        )
    if any(p.is_meta for p in model.parameters()):
        raise PlanError(asked, "finds it on meta", "measure a model of this config with weights")


def times_of(model: Any, batch: Mapping[str, Any], repeats: int) -> LayerTimes:
    """Run the model once, and each of its parts again where the run comes to it."""
    path, layers = decoder_layers(model)
    parent, _, name = path.rpartition(".")
    sides = [[model.get_submodule(p) for p in side] for side in ends(model, parent, name)]
    found: dict[int, float] = {}
    busy = False

    def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal busy
        if not busy:
            busy = True
            seconds = best(lambda: once(part, part.parameters(), args, kwargs), repeats)
            if part is model.get_output_embeddings() and batch.get("labels") is not None:
                given = {"labels": batch["labels"], "vocab_size": output.shape[-1]}
                seconds += best(lambda: once(model.loss_function, (), (output,), given), repeats)
            found[id(part)] = seconds
            busy = False

    parts = [*sides[0], *layers, *sides[1]]
    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            model(**{**batch, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    before, after = (sum(found.get(id(part), 0.0) for part in side) for side in sides)
    return LayerTimes(before, [found[id(layer)] for layer in layers], after)


def once(part: Callable[..., Any], parameters: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Run forward and backward of a part with inputs of its own; gradients go nowhere."""

    def own(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.is_floating_point())

    with torch.enable_grad():
        args, kwargs = tree_map_only(Tensor, own, (args, kwargs))
        output = part(*args, **kwargs)
        leaves = [*tree_leaves((args, kwargs)), *parameters]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(made, wanted, [torch.ones_like(x) for x in made], allow_unused=True)
    return made[0] if made else None


def best(call: Callable[[], Tensor | None], repeats: int) -> float:
    """The least seconds of some calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        out = call()
        if out is not None and out.device.type != "cpu":
            torch.accelerator.synchronize(out.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
