"""A training step of a decoder under a plan: seconds by cause, and bytes of the fullest rank.

The backward pass makes two products for each one of the forward pass and repeats its collectives; full recompute
makes the forward pass once more. Columns of candidates, as in `step_time`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PlanError
from .candidates import Candidates
from .columns import Array, as_array
from .memory import attention_weights, ffn_weights
from .shapes import Decoder
from .step_time import CAUSES, Machine, Split, prefill
from .training import activation_bytes, state_bytes

KEEPS = ("none", "full")  # what is computed again in the backward pass
OFFLOADS = ("none", "optimizer", "activations")


@dataclass(frozen=True, slots=True)
class Batch:
    """What one dp rank trains on in a step: sequences of so many tokens, in microbatches of one sequence.

    Args:
        recompute: ``none`` or ``full``; `offload`: what lies in host memory between its uses; `sharded`: ZeRO's stage.
    """

    tokens: int
    microbatches: int = 1
    recompute: str = "none"
    offload: str = "none"
    sharded: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.microbatches < 1 or self.sharded not in (0, 1, 2, 3):
            raise PlanError(
                "a training batch",
                "has no such sizes",
                "use tokens, microbatches >= 1 and sharded 0 to 3",
            )
        for value, known in ((self.recompute, KEEPS), (self.offload, OFFLOADS)):
            if value not in known:
                raise PlanError(
                    f"{value!r} in a training batch", "is not known", f"use one of {known}"
                )


def rank_params(model: Decoder, c: Candidates) -> tuple[Array, Array]:
    """Return parameters of the fullest rank: those every dp rank has, and the experts', which every edp rank has."""
    share = np.ceil(model.layers / c.pp) / model.layers
    routed = sum(
        k.count * k.ffn.experts * k.ffn.expert_params / (c.ep * c.etp) for k in model.kinds
    )
    layers = sum(
        k.count * (attention_weights(k.attention, c) + ffn_weights(k.ffn, c)) for k in model.kinds
    )
    ends = model.embedding_params / c.ffn_tp / np.minimum(c.pp, 2)
    return as_array(layers - routed) * share + ends, as_array(routed * share)


def training_step(model: Decoder, machine: Machine, c: Candidates, batch: Batch) -> Split:
    """Return the seconds of a step: ``(m + p - 1)/p`` microbatches, gradients summed over dp, the optimizer.

    Nothing of the gradients' exchange is taken to hide. What is offloaded crosses the host link once each way and
    hides behind the computing as far as that lasts.
    """
    again = batch.recompute == "full"
    micro = prefill(model, machine, c, batch.tokens, chunk=None)
    for cause in CAUSES:
        times = (2.0 + again) if cause == "communication" else (3.0 + again)
        setattr(micro, cause, getattr(micro, cause) * times)
    head = model.vocab * model.hidden / c.ffn_tp
    micro.add(machine.gemm(2.0 * head * batch.tokens, head, "bf16"), 3.0)
    done = Split()
    done.add(micro, (batch.microbatches + c.pp - 1) / c.pp)
    common, routed = rank_params(model, c)
    net = machine.network
    done.communication = done.communication + net.all_reduce(c.dp, 2.0 * common, c.stage)
    done.communication = done.communication + net.all_reduce(c.edp, 2.0 * routed, c.stage)
    cut = c.dp if batch.sharded else 1.0
    state = 12.0 * (common + routed) / cut
    bandwidth = machine.part.memory_bandwidth.value * machine.constants.gemm["bf16"].memory
    done.weights = done.weights + 2 * state / bandwidth
    moved = {"none": 0.0, "optimizer": 2 * state, "activations": 2 * _activations(model, c, batch)}
    link = as_array(moved[batch.offload]) / machine.part.host_link.each_way
    done.floor = done.floor + np.maximum(link - done.total, 0.0)
    return done


def training_bytes(model: Decoder, c: Candidates, batch: Batch) -> dict[str, Array]:
    """Return bytes of the fullest rank: weights, gradients, optimizer, activations, and what lies on the host."""
    common, routed = rank_params(model, c)
    states = state_bytes(1.0, 1, batch.sharded)
    cuts = {name: (c.dp, c.edp) if batch.sharded >= stage else (1.0, 1.0)
            for name, stage in (("weights", 3), ("gradients", 2), ("optimizer", 1))}  # fmt: skip
    found: dict[str, Array] = {
        name: as_array(getattr(states, name) * (common / dp + routed / edp)) for name, (dp, edp) in cuts.items()
    }  # fmt: skip
    found["activations"] = _activations(model, c, batch)
    found["host"] = 0.0 * found["weights"]
    if batch.offload != "none":
        found["host"], found[batch.offload] = found[batch.offload], found["host"]
    return found


def _activations(model: Decoder, c: Candidates, batch: Batch) -> Array:
    """Activations that wait for their backward pass: of at most p microbatches in the first stage (1F1B)."""
    waiting = np.minimum(c.pp, batch.microbatches)
    layers = np.ceil(model.layers / c.pp)
    each = activation_bytes(1, batch.tokens, model.hidden, 1, c.tp, recompute=batch.recompute)
    return as_array(each) * layers * waiting / c.sequence
