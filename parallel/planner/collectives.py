"""The collectives of a decode step as the model prices them: what `explain` finds by running the code.

`step_time` prices these with `communication.Network`; tests hold the list to `plan.explain` and the price to the list.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan
from .candidates import one
from .communication import all_gather_bytes, all_reduce_bytes, helix_bytes
from .memory import HEAD_BYTES
from .precision import element_bytes
from .shapes import Decoder


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a rank: its operation, ranks, bytes this rank sends, and how often in a step."""

    op: str
    ranks: int
    sent_bytes: float
    times: int


def decode_collectives(
    model: Decoder, plan: Plan, rows: int, activation: str = "bf16"
) -> tuple[Collective, ...]:
    """Return the collectives of a step of `rows` tokens under kvp and tp.

    The embedding's all-reduce; per layer Helix's all-to-all, an all-reduce after the output projection and one after
    the feed-forward, unless its experts are whole on every rank; the gather of the logits.

    Raises:
        ValueError: a plan whose experts lie outside one dp rank: their dispatch depends on routing.
    """
    c = one(plan, rows)
    if (c.ep * c.etp > c.ffn_tp)[0]:
        raise ValueError(f"{plan}: the dispatch to experts depends on routing")
    element, ranks = element_bytes(activation), int(c.ffn_tp[0])
    reduced = float(all_reduce_bytes(ranks, rows * model.hidden * element))
    whole = sum(
        k.count
        for k in model.kinds
        if k.ffn.experts and not k.ffn.shared_params and c.ep * c.etp == 1
    )
    found = [Collective("all_reduce", ranks, reduced, 1 + 2 * model.layers - whole)]
    if plan.kvp.size > 1:
        for kind in model.kinds:
            attention = kind.attention
            if attention.window is None and not attention.state:
                width = attention.kv_rank or attention.value_head_dim
                sent = float(
                    helix_bytes(rows, attention.heads, width, plan.tp.size, plan.kvp.size, element)
                )
                found.append(Collective("all_to_all", plan.kvp.size, sent, kind.count))
    gathered = float(all_gather_bytes(ranks, rows * model.vocab / ranks * HEAD_BYTES))
    return (*found, Collective("all_gather", ranks, gathered, 1))
