"""Bytes of parameters on every rank of a plan, from a cut twin: by its cuts, its pipeline stages and dp's shards."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ...collectives.primitive import chunk_sizes
from ..edits import SumGradient
from ..pipeline import Split
from ..plan import Plan
from .report import Weights


def weights_of(twin: nn.Module, done: Any, plan: Plan, split: Split | None, whole: int) -> Weights:
    """Count the parameters of this rank, and of the others of its copy without running them.

    A twin holds the layers of all stages, and whole parts: a stage counts its own, and a shard its rows.

    Args:
        plan: as it was asked for; the twin may be cut by less of it.
        split: the stages; None without.
        whole: bytes of the uncut model.
    """
    cuts = {id(c.local): c for c in done.parameters()}
    apart = {
        id(e.module.get_parameter(e.name))
        for e in done.edits.done
        if isinstance(e, SumGradient) and e.over_dp
    }
    names: dict[int, list[str]] = {}
    for name, p in twin.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    shards = plan.dp.size if plan.dp.kind == "shard" else 1

    def held(stage: int, rank: int, shard: int) -> int:
        total = 0
        for p in twin.parameters():
            if split is not None and not any(split.holds(n, stage) for n in names[id(p)]):
                continue
            cut = cuts.get(id(p))
            rows, *rest = (*p.shape, 1) if cut is None else (*cut.local_shape(done.ranks, rank), 1)
            if shards > 1 and id(p) not in apart:
                rows = chunk_sizes(rows, shards)[shard]
            total += rows * math.prod(rest) * p.element_size()
        return total

    at = done.ranks.groups.folding.coords(done.ranks.groups.rank)
    stages = 1 if split is None else split.stages
    every = [
        held(stage, rank, shard)
        for stage in range(stages)
        for rank in done.ranks.members
        for shard in range(shards)
    ]
    own = held(at["pp"] if split is not None else 0, done.ranks.groups.rank, at["dp"] % shards)
    return Weights(own, min(every), max(every), sum(every), whole)
