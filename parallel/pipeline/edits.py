"""The edits of pp: what leaves a stage, and the forward that runs over all of them."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..edits import AddHook, Edit, SetAttribute
from ..errors import PlanError
from ..ranks import ModelRanks
from .passage import Depart
from .run import PipelinedModel
from .split import Split

DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")


def pipeline_edits(model: Any, split: Split, ranks: ModelRanks) -> list[Edit]:
    """Edits that leave this rank its stage; the first to be applied, after all others are prepared.

    Collective: making the pp group, here.
    """
    refuse(model)
    stage = ranks.groups.folding.coords(ranks.groups.rank)["pp"]
    gone = departing(model, split, stage)
    run = PipelinedModel(model, split, ranks)
    run.pause = lambda: getattr(model, "no_sync", nullcontext)()
    forward = functools.wraps(model.forward)(lambda *a, **k: run.forward(*a, **k))

    def drop(_: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for path in gone:
            for name in [n for n in state if n.startswith(f"{prefix}{path}.")]:
                del state[name]

    edits: list[Edit] = [
        Depart(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], number)
        for path, number in gone.items()
    ]
    return [
        *edits,
        SetAttribute(model, "forward", forward),
        AddHook(lambda: model.register_load_state_dict_pre_hook(drop)),
    ]


def departing(model: nn.Module, split: Split, stage: int) -> dict[str, int | None]:
    """Paths of the modules that other stages run, with the layer's number where it is one."""
    count = split.bounds[-1]
    layers = {f"{split.layers}.{i}": i for i in range(count)}
    every: dict[str, int | None] = {**layers, **dict.fromkeys((*split.first, *split.last))}
    return {path: number for path, number in every.items() if not split.holds(path, stage)}


def refuse(model: Any) -> None:
    """Refuse what would be computed otherwise than in one process."""
    config = model.config.get_text_config(decoder=True)
    for name in DROPOUTS:
        if getattr(config, name, 0):
            raise PlanError(
                f"{name}={getattr(config, name)} under pp",
                "would draw the same masks on every stage",
                f"set {name}=0 in the config",
            )
    if getattr(config, "output_router_logits", False):
        raise PlanError(
            "output_router_logits under pp",
            "needs the routers of all stages for the balancing loss",
            "set it to False, or use pp1",
        )
    if model.get_output_embeddings() is None:
        raise PlanError(
            f"pp of {type(model).__name__}", "has no head that makes logits", "use a ForCausalLM"
        )
