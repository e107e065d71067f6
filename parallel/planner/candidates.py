"""Candidates: plans and batches as columns of numbers, enumerated by legality first.

One row is one plan with one batch, HOP-B chunk count, draft length and way of passing prompts. The masks below are
the rules of `parallel.legality` in vectorised form; whatever is proposed in the end is still shown to `Plan.validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from ..axes import Helix, Pipeline, Ring, Tensor
from ..legality import divisors
from ..plan import Plan
from ..shape import ModelShape
from .columns import Array, as_array
from .shapes import Decoder

COLUMNS = ("tp", "kvp", "cp", "dp", "pp", "ep", "etp")  # of a row of `grids`


@dataclass(frozen=True, slots=True)
class Candidates:
    """Columns, one row per candidate; floats, because all that follows is arithmetic.

    `cp` is ring attention of a prefill; under Helix it is 1 and `kvp` names the ranks. `batch` is per dp rank and
    per pipeline stage: with pp stages as many batches are in flight. `beside` is how many tokens of a prompt pass
    beside the decodes of a step (0: prompts pass alone), in one of `groups` equal groups of layers.
    """

    tp: Array
    kvp: Array
    cp: Array
    dp: Array
    pp: Array
    ep: Array
    etp: Array
    batch: Array
    chunks: Array
    draft: Array
    beside: Array
    groups: Array

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Candidates:
        """Return some rows."""
        return Candidates(*(getattr(self, f.name)[index] for f in fields(self)))

    def and_those(self, other: Candidates) -> Candidates:
        """Return these rows and others."""
        names = [f.name for f in fields(self)]
        return Candidates(*(np.concatenate((getattr(self, n), getattr(other, n))) for n in names))

    @property
    def sequence(self) -> Array:
        """Ranks along the sequence, whichever axis names them."""
        return self.kvp * self.cp

    @property
    def ffn_tp(self) -> Array:
        """Ranks that cut the dense FFN and the output projection."""
        return self.tp * self.kvp

    @property
    def stage(self) -> Array:
        """Ranks of one pipeline stage."""
        return self.tp * self.sequence * self.dp

    @property
    def ranks(self) -> Array:
        """Ranks of the whole plan."""
        return self.stage * self.pp

    @property
    def edp(self) -> Array:
        """Copies of each expert within a stage."""
        return self.stage / (self.ep * self.etp)

    @property
    def tokens(self) -> Array:
        """Tokens of one dp rank in a decode step, drafted ones included."""
        return self.batch * (1 + self.draft)

    @property
    def rows(self) -> Array:
        """Rows of one dp rank's matrix products in a step: tokens, and those of a prompt beside them."""
        return self.tokens + self.beside

    def passing(self, beside: Array, groups: Array) -> Candidates:
        """Return the same rows with prompts passed in another way."""
        return replace(self, beside=beside, groups=groups)

    def plan(self, row: int, shape: ModelShape) -> Plan:
        """Return one row as a Plan."""
        size = {f.name: int(getattr(self, f.name)[row]) for f in fields(self)}
        copied = (
            shape.attention != "mla"
            and bool(shape.kv_heads)
            and (shape.kv_heads or 1) % size["tp"] != 0
        )
        return Plan(
            dp=size["dp"],
            tp=Tensor(size["tp"], replicate_kv=copied),
            cp=Ring(size["cp"]),
            kvp=Helix(size["kvp"], chunks=size["chunks"] if size["chunks"] > 1 else "auto"),
            pp=Pipeline(size["pp"]),
            ep=size["ep"],
            etp=size["etp"],
        )


def one(plan: Plan, batch: int = 1, draft: int = 0) -> Candidates:
    """Return a plan that is given as a table of one row."""
    sizes = [
        plan.tp.size, plan.kvp.size, plan.size("cp") // plan.kvp.size, plan.dp.size, plan.pp.size, plan.ep.size,
        plan.etp, batch, 1 if plan.kvp.chunks == "auto" else plan.kvp.chunks, draft, 0, 1,
    ]  # fmt: skip
    return Candidates(*(np.array([float(size)]) for size in sizes))


def grids(
    model: Decoder, ranks: int, *, helix: bool = True, ring: bool = False, whole: bool = True
) -> Array:
    """Return legal plans of at most `ranks` ranks: rows of tp, kvp, cp, dp, pp, ep, etp.

    Args:
        helix: whether kvp is searched (decode); `ring` whether cp is (prefill).
        whole: only plans that could not be doubled; else also the small ones, as instances of a pool.
    """
    rows = [
        (tp, kvp, cp, dp, pp, ep, etp)
        for tp, kvp, cp in _attention(model.shape, ranks, helix, ring)
        for pp in _stages(model, ranks // (tp * kvp * cp))
        for dp in _replicas(ranks // (tp * kvp * cp * pp), whole)
        for ep, etp in _experts(model, tp * kvp * cp * dp)
        if whole or dp == 1 or ep * etp > tp * kvp * cp  # else it is several instances
    ]
    return as_array(rows).reshape(-1, 7)


def _replicas(most: int, whole: bool) -> Sequence[int]:
    """Numbers of dp ranks: more than half of those possible, or powers of two for instances of a pool."""
    if whole:
        return range(most // 2 + 1, most + 1)
    return [dp for dp in (2**n for n in range(12)) if dp <= most]


def _attention(
    shape: ModelShape, ranks: int, helix: bool, ring: bool
) -> list[tuple[int, int, int]]:
    """Attention grids (tp, kvp, cp) that the choices of the axes accept."""
    found = []
    heads, mla = shape.heads or 1, shape.attention == "mla"
    for tp in divisors(heads, ranks):
        copies = not mla and (shape.kv_heads or 1) % tp != 0
        if copies and tp % (shape.kv_heads or 1):
            continue
        found.append((tp, 1, 1))
        if helix and not copies and not (mla and tp > 1):
            runs = [kvp for kvp in divisors(heads // tp, ranks // tp) if kvp > 1]
            found += [(tp, kvp, 1) for kvp in runs]
        if ring:
            found += [(tp, 1, cp) for cp in (2, 4, 8, 16, 32, 64) if tp * cp <= ranks]
    return found


def _stages(model: Decoder, most: int) -> list[int]:
    return [pp for pp in (1, 2, 3, 4, 6, 8, 16, 32, 64) if pp <= min(most, model.layers)]


def _experts(model: Decoder, stage: int) -> list[tuple[int, int]]:
    """Folds (ep, etp) of a stage's ranks."""
    experts, width = model.shape.experts or 0, model.shape.moe_ffn
    if not experts:
        return [(1, 1)]
    return [
        (ep, etp)
        for ep in divisors(experts, stage)
        if stage % ep == 0
        for etp in divisors(stage // ep, 64)
        if width % etp == 0
    ]


def crossed(
    plans: Array, batches: Sequence[int], chunks: Sequence[int] = (1,), drafts: Sequence[int] = (0,)
) -> Candidates:
    """Cross plans with batches, HOP-B chunk counts (under kvp, up to the batch) and draft lengths."""
    axes = (np.arange(len(plans)), np.array(batches), np.array(chunks), np.array(drafts))
    rows, batch, chunk, draft = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
    tp, kvp, cp, dp, pp, ep, etp = plans[rows].T
    batch, chunk, draft = as_array(batch), as_array(chunk), as_array(draft)
    all_of = Candidates(tp, kvp, cp, dp, pp, ep, etp, batch, chunk, draft, 0 * batch, 1 + 0 * batch)
    return all_of.take((all_of.chunks == 1) | ((all_of.kvp > 1) & (all_of.chunks <= all_of.batch)))
