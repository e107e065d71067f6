"""Seconds of one decode step and of one prefill, for columns of candidates, split by cause.

One layer is: norms; q, k, v; attention over this rank's cache; Helix's exchange; the output projection and its
all-reduce; the feed-forward with its all-reduce, or the dispatch to experts. The head and a fixed time per step
come once. Every GEMM is priced over all tokens of the step at once, as engines run it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .attention_cost import decode_flops, kv_bytes_on_rank, prefill_flops
from .candidates import Candidates
from .columns import Array, as_array
from .communication import Network, all_gather_bytes, helix_payload
from .efficiency import Efficiency, Kernel
from .ffn_cost import Coverage, dispatch_payload, expert_bytes, expert_flops, uniform, zipf
from .hardware import Hardware
from .helix_roofline import overlapped
from .memory import HEAD_BYTES, attention_weights, cut_qkv
from .precision import element_bytes
from .shapes import Attention, Decoder, Ffn, LayerKind

CAUSES = ("weights", "kv", "compute", "communication", "floor")


@dataclass(slots=True)
class Split:
    """Seconds by cause; a bucket that kernels are poured into."""

    weights: Any = 0.0
    kv: Any = 0.0
    compute: Any = 0.0
    communication: Any = 0.0
    floor: Any = 0.0

    @property
    def total(self) -> Array:
        """All seconds."""
        return as_array(self.weights + self.kv + self.compute + self.communication + self.floor)

    def add(self, other: Split, times: Any = 1.0) -> None:
        """Pour in another split, so many times."""
        for cause in CAUSES:
            setattr(self, cause, getattr(self, cause) + getattr(other, cause) * times)

    def rows(self, index: Any, size: int) -> Split:
        """Return some of `size` rows."""
        return Split(*(np.broadcast_to(getattr(self, cause), size)[index] for cause in CAUSES))

    def named(self, row: int) -> dict[str, float]:
        """Return one row's seconds by cause."""
        size = np.shape(self.total)
        return {cause: float(np.broadcast_to(getattr(self, cause), size)[row]) for cause in CAUSES}


@dataclass(frozen=True, slots=True)
class Machine:
    """A part, what is reached of it, and the precisions a step uses.

    Args:
        wire: precision of payloads that are moved and not added up (Helix' partial outputs, tokens on their way to
            experts and back); empty: as activations. What is summed on the way (all-reduce) stays as activations.
        dispatch: precision of tokens on their way to the experts; empty: FP8 unless weights are wider.
        arithmetic: precision attention multiplies in; empty: 16 bits unless the cache is 8 bits wide or less.
        cover: which share of experts a number of tokens touches; None: `zipf` of the constants' exponent.
    """

    part: Hardware
    constants: Efficiency
    weight: str = "bf16"
    kv: str = "bf16"
    activation: str = "bf16"
    dispatch: str = ""
    wire: str = ""
    arithmetic: str = ""
    cover: Coverage | None = None
    network: Network = field(init=False)
    coverage: Coverage = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", Network(self.part, self.constants))
        exponent = self.constants.zipf
        object.__setattr__(
            self, "coverage", self.cover or (zipf(exponent) if exponent else uniform)
        )

    @property
    def dispatch_bytes(self) -> float:
        """Bytes per element on the way to the experts: FP8 unless weights are wider."""
        if self.dispatch:
            return element_bytes(self.dispatch)
        return min(self.wire_bytes, max(1.0, element_bytes(self.weight)))

    @property
    def comm(self) -> str:
        """Precision of what is moved and not added up."""
        return self.wire or self.activation

    @property
    def wire_bytes(self) -> float:
        """Bytes per element of what is moved and not added up."""
        return element_bytes(self.comm)

    def gemm(self, flops: Any, weights: Any, precision: str = "", grouped: bool = False) -> Split:
        """Price a matrix product that reads `weights` elements once."""
        precision = precision or self.weight
        kernel = self.constants.gemm[self.part.unit_of(precision)]
        if grouped:
            share = self.constants.grouped
            kernel = Kernel(kernel.compute * share, kernel.memory * share, 2 * kernel.fixed)
        memory = (
            as_array(weights)
            * element_bytes(precision)
            / (kernel.memory * self.part.memory_bandwidth.value)
        )
        compute = as_array(flops) / (kernel.compute * self.part.peak(precision))
        return Split(weights=memory, compute=np.maximum(compute - memory, 0.0), floor=kernel.fixed)

    def attend(self, flops: Any, read_bytes: Any) -> Split:
        """Price an attention kernel; it multiplies in 16 bits unless the cache is 8 bits wide."""
        kernel = self.constants.attention
        peak = self.part.peak(self.arithmetic or ("fp8" if element_bytes(self.kv) <= 1 else "bf16"))
        memory = as_array(read_bytes) / (kernel.memory * self.part.memory_bandwidth.value)
        compute = as_array(flops) / (kernel.compute * peak)
        return Split(kv=memory, compute=np.maximum(compute - memory, 0.0), floor=kernel.fixed)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompts that pass beside decodes: new tokens of each, and tokens cached before them."""

    new: int
    past: int = 0


def decode_step(
    model: Decoder, machine: Machine, c: Candidates, context: Any, prompt: Prompt | None = None
) -> Split:
    """Return the seconds of one step in which every request reads `context` tokens and adds one (plus drafts).

    Where `c.beside` is not 0 the same products carry a part of a prompt: the mean of its parts is priced.
    """
    step = Split()
    for kind in model.kinds:
        step.add(_decode_layer(kind, machine, c, context, prompt), kind.count)
    _ends(step, model, machine, c, c.tokens)
    step.floor = step.floor + machine.constants.step
    return step


def _ends(step: Split, model: Decoder, machine: Machine, c: Candidates, rows: Any) -> None:
    """Add the embedding's all-reduce, the head with the gather of its logits, and the hand-overs between stages."""
    head = model.vocab * model.hidden / c.ffn_tp
    step.add(machine.gemm(2.0 * head * rows, head, "bf16"))
    rows, net = as_array(rows), machine.network
    logits = all_gather_bytes(c.ffn_tp, rows * model.vocab / c.ffn_tp * HEAD_BYTES)
    carried = (rows + c.beside) * model.hidden * element_bytes(machine.activation) / c.ffn_tp
    embedded = _reduce(machine, c, rows + c.beside, model.hidden)
    ends = embedded + net.seconds(logits, c.ffn_tp)
    step.communication = step.communication + ends + (c.pp - 1) * net.seconds(carried, 2 * c.stage)


def _decode_layer(
    kind: LayerKind, machine: Machine, c: Candidates, context: Any, prompt: Prompt | None
) -> Split:
    layer = attention_half(kind.attention, machine, c, context)
    if prompt is not None:
        layer.add(_prompt_attention(kind.attention, machine, c, prompt))
    layer.add(_ffn(kind.ffn, machine, c, c.rows))
    return layer


def _prompt_attention(
    attention: Attention, machine: Machine, c: Candidates, prompt: Prompt
) -> Split:
    """The mean part of a prompt over its own cache; MLA decompresses what earlier parts cached once more."""
    parts = np.ceil(prompt.new / np.maximum(c.beside, 1.0))
    flops = prefill_flops(attention, prompt.new, prompt.past) / (parts * c.tp)
    earlier = prompt.past + (parts - 1) / 2 * c.beside
    again = 2.0 * attention.up_params / c.tp * earlier
    read = kv_bytes_on_rank(attention, earlier + c.beside, element_bytes(machine.kv), c.tp, 1.0)
    return machine.attend(flops + again, read)


def attention_half(attention: Attention, machine: Machine, c: Candidates, context: Any) -> Split:
    """Return the seconds of a layer up to its feed-forward."""
    layer = Split(floor=machine.constants.layer)
    before, after = _projections(attention, c)
    layer.add(machine.gemm(2.0 * before * c.rows, before))
    layer.add(_attention_and_exchange(attention, machine, c, context))
    layer.add(machine.gemm(2.0 * after * c.rows, after))
    layer.communication = layer.communication + _reduce(machine, c, c.rows, attention.hidden)
    return layer


def _projections(attention: Attention, c: Candidates) -> tuple[Array, Array]:
    """Weights on a rank that are read before attention, and after it."""
    after = cut_qkv(attention)[2] / c.ffn_tp
    return attention_weights(attention, c) - after, after


def _reduce(machine: Machine, c: Candidates, rows: Any, hidden: int) -> Array:
    payload = as_array(rows) * hidden * element_bytes(machine.activation)
    return machine.network.all_reduce(c.ffn_tp, payload)


def _attention_and_exchange(
    attention: Attention, machine: Machine, c: Candidates, context: Any
) -> Split:
    """Attention over this rank's cache, then Helix's all-to-all in `chunks` overlapped pieces."""
    kvp = np.ones_like(c.kvp) if attention.window is not None or attention.state else c.kvp
    read = c.batch * kv_bytes_on_rank(attention, context, element_bytes(machine.kv), c.tp, c.kvp)
    flops = c.tokens * decode_flops(attention, context) / (c.tp * kvp)
    kernel = machine.attend(flops, read)
    width = attention.kv_rank or attention.value_head_dim
    held = helix_payload(c.tokens, attention.heads, width, c.tp, machine.wire_bytes)
    piece = machine.network.all_to_all(kvp, held / c.chunks, c.tp * kvp)
    alone = kernel.total / c.chunks + (c.chunks > 1) * kernel.floor * (1 - 1 / c.chunks)
    hidden_too = overlapped(alone, piece, c.chunks)
    kernel.communication = np.where(kvp > 1, hidden_too - kernel.total, 0.0)
    return kernel


def _ffn(ffn: Ffn, machine: Machine, c: Candidates, rows: Any) -> Split:
    """Dense: two products and an all-reduce. Experts: router, dispatch, grouped products, combine."""
    if not ffn.experts:
        part = ffn.expert_params / c.ffn_tp
        done = machine.gemm(2.0 * part * rows, part)
        done.floor = done.floor * 2
        done.communication = _reduce(machine, c, rows, ffn.hidden)
        return done
    done = routed_half(ffn, machine, c, rows)
    done.communication = done.communication + _expert_exchange(ffn, machine, c, rows)
    return done


def routed_half(ffn: Ffn, machine: Machine, c: Candidates, rows: Any) -> Split:
    """Return the seconds of router, routed and shared experts, without their exchange."""
    done = Split(floor=machine.constants.routed)
    done.add(machine.gemm(2.0 * ffn.router_params * as_array(rows), ffn.router_params, "bf16"))
    cut = c.ep * c.etp > 1  # experts that are whole on every rank read all of its tokens
    entering = np.where(cut, as_array(rows) * c.dp / c.edp, rows)
    touched = expert_bytes(ffn, entering, c.ep, c.etp, 1.0, machine.coverage)
    done.add(machine.gemm(expert_flops(ffn, entering, c.ep, c.etp), touched, grouped=True))
    if ffn.shared_params:
        shared = ffn.shared_params / c.ffn_tp
        done.add(machine.gemm(2.0 * shared * as_array(rows), shared))
    return done


def _expert_exchange(ffn: Ffn, machine: Machine, c: Candidates, rows: Any) -> Array:
    """Seconds of reaching the experts and coming back.

    Where one dp rank's own ranks hold all experts, every rank has every token and one all-reduce sums them; none where
    nothing is cut. Else tokens go by all-to-all, each rank its own part of them, and are gathered after.
    """
    away = c.ep * c.etp > c.ffn_tp
    cut = (c.ep * c.etp > 1) | (ffn.shared_params > 0)
    travel = _dispatch(ffn, machine, c, as_array(rows) / c.ffn_tp)
    gathered = as_array(rows) * ffn.hidden * machine.wire_bytes * (1 - 1 / c.ffn_tp)
    rest = machine.network.seconds(gathered, c.ffn_tp)
    return np.where(away, travel + rest, cut * _reduce(machine, c, rows, ffn.hidden))


def _dispatch(ffn: Ffn, machine: Machine, c: Candidates, own: Array) -> Array:
    """Seconds of sending this rank's tokens to their experts and bringing the results back."""
    group = c.ep * c.etp
    there = dispatch_payload(ffn, own, c.ep, c.etp, machine.dispatch_bytes)
    back = dispatch_payload(ffn, own, c.ep, c.etp, machine.wire_bytes)
    net = machine.network
    return net.all_to_all(group, there) + net.all_to_all(group, back)


def prefill(
    model: Decoder,
    machine: Machine,
    c: Candidates,
    new: Any,
    past: Any = 0,
    chunk: int | None = 8192,
) -> Split:
    """Return the seconds until one prompt per dp rank has passed, with nobody waiting before it (unloaded).

    The prompt is cut over cp (or kvp) ranks; with pp it travels in chunks, ``(p - 1 + m)/(p m)`` of the whole. In one
    piece (``chunk=None``) that is the work of all stages together, which is what a busy pipeline pays.
    """
    done = Split()
    new = as_array(new)
    rows = new / c.sequence
    for kind in model.kinds:
        done.add(_prefill_layer(kind, machine, c, rows, new, past), kind.count)
    pieces = np.maximum(np.ceil(new / chunk), 1.0) if chunk else 1.0
    share = (c.pp - 1 + pieces) / (c.pp * pieces)
    for cause in CAUSES:
        setattr(done, cause, getattr(done, cause) * share)
    _ends(done, model, machine, c, 1.0)
    done.floor = done.floor + machine.constants.step
    return done


def _prefill_layer(
    kind: LayerKind, machine: Machine, c: Candidates, rows: Any, new: Array, past: Any
) -> Split:
    """One layer over `rows` tokens of this rank; the FFN is cut over tp, tokens over the sequence axis."""
    layer = Split(floor=machine.constants.layer)
    attention, ffn = kind.attention, kind.ffn
    weights = attention_weights(attention, c)
    # all kvp * tp ranks share it in decode; here a rank's tokens meet tp's part
    *_, after = cut_qkv(attention)
    share = weights + after / c.tp - after / c.ffn_tp
    layer.add(machine.gemm(2.0 * share * rows, weights))
    flops = prefill_flops(attention, new, past) / (c.tp * c.sequence)
    flops = flops + 2.0 * attention.up_params * as_array(past) / (c.tp * c.sequence)  # MLA's cache
    read = kv_bytes_on_rank(attention, new + past, element_bytes(machine.kv), c.tp, 1.0)
    kernel = machine.attend(flops, read)
    moved = read * (c.sequence - 1) / c.sequence
    ring = machine.network.seconds(moved, np.where(c.sequence > 1, c.tp * c.sequence, 1.0))
    # the rest hides behind attention
    kernel.communication = np.maximum(ring - (kernel.total - kernel.floor), 0.0)
    layer.add(kernel)
    payload = rows * attention.hidden * element_bytes(machine.activation)
    layer.communication = layer.communication + 2 * machine.network.all_reduce(c.tp, payload)
    if not ffn.experts:
        layer.add(machine.gemm(2.0 * ffn.expert_params / c.tp * rows, ffn.expert_params / c.ffn_tp))
        return layer
    layer.floor = layer.floor + machine.constants.routed
    entering = np.where(c.ep * c.etp > 1, rows * c.dp * c.sequence / c.edp, rows)
    touched = expert_bytes(ffn, entering, c.ep, c.etp, 1.0, machine.coverage)
    layer.add(machine.gemm(expert_flops(ffn, entering, c.ep, c.etp), touched, grouped=True))
    shared = ffn.shared_params / c.tp
    layer.add(machine.gemm(2.0 * shared * rows, shared))
    travel = np.where(c.ep * c.etp > c.tp, _dispatch(ffn, machine, c, rows / c.tp), 0.0)
    layer.communication = layer.communication + travel
    return layer
