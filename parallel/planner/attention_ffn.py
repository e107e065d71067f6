"""Attention and feed-forward on ranks of their own (AFD): three microbatches in a three-stage pipeline.

While one microbatch is in attention, the second is on the wire and the third in the experts; a layer takes as long as
the slowest stage, and a token three of those. Source: Step-3 (arXiv 2507.19427) section 4.
"""

from __future__ import annotations

import numpy as np

from .candidates import Candidates, crossed
from .columns import Array, as_array
from .goals import Goal
from .memory import HEAD_BYTES, attention_weights, request_bytes
from .points import Partner, Points
from .precision import element_bytes
from .search import BATCHES
from .shapes import Decoder, LayerKind
from .step_time import CAUSES, Machine, Split, attention_half, routed_half

STAGES = 3
DERATE = 0.95  # aiconfigurator 0.12's practical share of an ideal split


def split_points(model: Decoder, machine: Machine, goal: Goal) -> Points:
    """Price every division of the ranks into attention (dp x tp) and experts (ep), at every batch."""
    experts = model.shape.experts or 0
    pairs = [
        (tp, dp, ep)
        for ep in (2**n for n in range(10))
        if experts and experts % ep == 0
        for tp in (1, 2, 4, 8)
        if (model.shape.heads or 1) % tp == 0
        and (model.is_mla or (model.shape.kv_heads or 1) % tp == 0)
        for dp in [(goal.ranks - ep) // tp]
        if dp >= 1
    ]
    ones = np.ones(len(pairs))
    tp, dp, ep = as_array(pairs).reshape(-1, 3).T
    attention = crossed(np.stack([tp, ones, ones, dp, ones, ones, ones], axis=1), BATCHES)
    ep = np.repeat(ep, len(BATCHES))
    one = np.ones(len(attention))
    ffn = Candidates(one, one, one, ep, one, ep, one, attention.batch, one, 0 * one, 0 * one, one)
    memory = _bytes(model, machine, goal, attention, ffn)
    inside = memory <= machine.part.memory.value
    return _priced(model, machine, goal, attention.take(inside), ffn.take(inside), memory[inside])


def _bytes(
    model: Decoder, machine: Machine, goal: Goal, attention: Candidates, ffn: Candidates
) -> Array:
    """Bytes of the fuller kind of rank."""
    weight = element_bytes(machine.weight)
    held = sum(k.count * attention_weights(k.attention, attention) for k in model.kinds) * weight
    head = model.embedding_params * HEAD_BYTES / attention.tp
    cache = (
        request_bytes(model, attention, goal.context, element_bytes(machine.kv))
        * attention.batch
        * STAGES
    )
    whole = sum(
        k.count * (k.ffn.experts * k.ffn.expert_params or k.ffn.expert_params) for k in model.kinds
    )
    shared = sum(
        k.count * (k.ffn.shared_params + k.ffn.router_params) for k in model.kinds if k.ffn.experts
    )
    theirs = (whole / ffn.ep + shared) * weight
    return np.maximum(held + head + cache, theirs) + machine.constants.memory_floor


def _priced(
    model: Decoder, machine: Machine, goal: Goal, attention: Candidates, ffn: Candidates, memory: Array
) -> Points:  # fmt: skip
    total = Split()
    for kind in model.kinds:
        total.add(_slowest(kind, machine, attention, ffn, goal.context), STAGES * kind.count)
    head = model.vocab * model.hidden / attention.tp
    total.add(machine.gemm(2.0 * head * attention.batch, head, "bf16"))
    total.floor = total.floor + machine.constants.step
    seconds = [getattr(total, cause) for cause in CAUSES] + [0.0]  # no prompts here
    causes = np.stack([np.broadcast_to(column, len(attention)) for column in seconds])
    ttl = causes.sum(axis=0) / DERATE
    partner = tuple(
        Partner(f"experts on {int(ep)} more ranks, as 'dp{int(ep)} ep{int(ep)} etp1'")
        for ep in ffn.ep
    )
    return Points(
        "attention-ffn", machine.weight, machine.kv, machine.comm, attention, ttl, np.zeros(len(ttl)),
        STAGES * attention.batch * attention.dp / ttl, float(goal.ranks), attention.ranks + ffn.ep, memory, causes,
        ttl, np.zeros(len(ttl)), partner=partner,
    )  # fmt: skip


def _slowest(
    kind: LayerKind, machine: Machine, attention: Candidates, ffn: Candidates, context: int
) -> Split:
    """The slowest of the three stages of one layer."""
    here = attention_half(kind.attention, machine, attention, context)
    rows = attention.batch * attention.dp / ffn.ep  # tokens of all attention ranks, per expert rank
    if kind.ffn.experts:
        there = routed_half(kind.ffn, machine, ffn, rows)
    else:
        there = machine.gemm(2.0 * kind.ffn.expert_params * rows, kind.ffn.expert_params)
    places = np.minimum(kind.ffn.per_token or 1, ffn.ep)
    width = (machine.dispatch_bytes + machine.wire_bytes) * kind.attention.hidden
    own = attention.batch / attention.tp * places * width
    theirs = rows * places * width
    wire = Split(
        communication=machine.network.seconds(np.maximum(own, theirs), attention.ranks + ffn.ep)
    )
    stages = [here, wire, there]
    times = np.stack([np.broadcast_to(stage.total, len(attention)) for stage in stages])
    longest = times.argmax(axis=0)
    picked = Split()
    for cause in CAUSES:
        columns = np.stack(
            [np.broadcast_to(getattr(stage, cause), len(attention)) for stage in stages]
        )
        setattr(picked, cause, np.take_along_axis(columns, longest[None], axis=0)[0])
    return picked
