"""The edits of pp: what leaves a stage, and the forward that runs over all of them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..axes import Shard
from ..edits import AddHook, Edit, SetAttribute
from ..errors import PlanError
from ..families import decoder_layers, forward_code
from ..ranks import ModelRanks
from .decoder import PipelinedDecoder
from .module import Absent, PipelinedModule
from .passage import Depart, Passage, place_of
from .split import Split


def pipeline_edits(model: Any, split: Split, ranks: ModelRanks) -> tuple[list[Edit], list[Edit]]:
    """Edits that leave this rank its stage: the first to be applied, and the last.

    Collective: making the pp group, here.
    """
    stage = ranks.groups.folding.coords(ranks.groups.rank)["pp"]
    gone = departing(split, stage)
    run: PipelinedDecoder | PipelinedModule
    after: list[Edit]
    if split.rule is not None:
        refuse_units(model, split, ranks)
        run = PipelinedModule(model, split, ranks, split.rule)
        after = [noting(model, run, path) for path in run.chunk_of if split.holds(path, stage)]
        stand_ins = {path: partial(Absent, run, path) for path in gone}
    else:
        refuse(model)
        run = PipelinedDecoder(model, split, ranks, activation_dtype(model, ranks))
        after = [AddHook(lambda: model.base_model.register_forward_hook(run.put_before))]
        stand_ins = {
            path: passage(run, number, split.bounds[stage]) for path, number in gone.items()
        }
    forward = functools.wraps(model.forward)(lambda *a, **k: run.forward(*a, **k))

    def drop(_: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for path in gone:
            for name in [n for n in state if n.startswith(f"{prefix}{path}.")]:
                del state[name]

    edits: list[Edit] = [Depart(*place_of(model, path), stand_ins[path]) for path in gone]
    edits += [
        SetAttribute(model, "forward", forward),
        SetAttribute(model, "_plait_stages", run),
        AddHook(lambda: model.register_load_state_dict_pre_hook(drop)),
    ]
    return edits, after


def passage(
    run: PipelinedDecoder, number: int | None, start: int
) -> Callable[[nn.Module], nn.Module]:
    """What stands in for a module: of a layer, it is where activations come from or go to."""
    if number is None:
        return Passage
    return partial(Passage, number=number, crossing=run.crossing, before=number < start)


def noting(model: nn.Module, run: PipelinedModule, path: str) -> Edit:
    """Take note of what a box returns; after all other hooks, so as the caller sees it."""
    module = model.get_submodule(path)

    def note(_: nn.Module, args: Any, output: Any) -> None:
        run.note(path, output)

    return AddHook(lambda: module.register_forward_hook(note))


def activation_dtype(model: Any, ranks: ModelRanks) -> torch.dtype:
    """The dtype activations travel in: the embedding's, or what dp's shards are gathered in."""
    own, dp = model.get_input_embeddings().weight.dtype, ranks.plan.dp
    if not isinstance(dp, Shard):
        return own
    from ..data.shards import DTYPES  # FSDP2 takes a while to import

    return DTYPES[dp.param_dtype] or own


def departing(split: Split, stage: int) -> dict[str, int | None]:
    """Paths of the modules that other stages run, with the layer's number where it is one."""
    count = split.bounds[-1]
    layers = {f"{split.layers}.{i}": i for i in range(count)}
    every: dict[str, int | None] = {**layers, **dict.fromkeys((*split.first, *split.last))}
    return {path: number for path, number in every.items() if not split.holds(path, stage)}


def refuse_units(model: nn.Module, split: Split, ranks: ModelRanks) -> None:
    """Refuse what dp:shard would gather around a forward that a stage does not run to its end."""
    parents = ["", *accumulate(split.layers.split("."), "{}.{}".format)][:-1]
    held = [p for p in parents if any(True for _ in model.get_submodule(p).parameters(False))]
    if ranks.sharded and held:
        raise PlanError(
            f"dp:shard with pp on {type(model).__name__}",
            f"would gather parameters that stand beside the list of layers, in {held[0]!r}",
            "put them into a module of their own, or use dp without shard",
        )


def refuse(model: Any) -> None:
    """Refuse what would be computed otherwise than in one process."""
    if model.get_output_embeddings() is None:
        raise PlanError(
            f"pp of {type(model).__name__}", "has no head that makes logits", "use a ForCausalLM"
        )
    for kind in {type(layer) for layer in decoder_layers(model)[1]}:
        if not gives_hidden_states(kind):
            raise PlanError(
                f"pp of {type(model).__name__}",
                f"has layers ({kind.__name__}) that give more than hidden states, which stages do not hand on",
                "use pp1",
            )


def gives_hidden_states(kind: type) -> bool:
    """Say whether a layer is called and answers as transformers' layers do today: hidden states, and no tuple."""
    if not any(c.__name__ == "GradientCheckpointingLayer" for c in kind.__mro__):
        return False
    function = forward_code(kind)
    if function is None:
        return False
    nodes = list(ast.walk(function))
    tuples = {
        ast.dump(target).replace("Store", "Load")
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
    }
    given = [node.value for node in nodes if isinstance(node, ast.Return) and node.value]
    return not any(isinstance(value, ast.Tuple) or ast.dump(value) in tuples for value in given)
