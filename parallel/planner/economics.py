"""Economics of splitting attention from FFN: cost per token by part, and what the network allows.

Source: Step-3 (arXiv 2507.19427) sections 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from .attention_cost import PerToken
from .hardware import Hardware

CARDS = 8  # network cards of a server, which serve its FFN side together
HIDEABLE_SECONDS = 50e-3 / 3  # one of three stages of a 50 ms token
BYTES_EACH_WAY = 3  # FP8 in, BF16 out


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars per FLOP and per byte of memory traffic."""

    flop: float
    byte: float


def price(part: Hardware, precision: str = "fp8") -> Price:
    """Return what one FLOP and one byte cost when a part does nothing else.

    Raises:
        ValueError: a part whose price no source gave.
    """
    if part.price is None:
        raise ValueError(f"{part.title} has no price in the catalogue")
    second = part.price.value / 3600
    return Price(second / part.peak(precision), second / part.memory_bandwidth.value)


def attention_dollars(cost: PerToken, part: Hardware, tokens: float = 1e6) -> float:
    """Return ``max(FLOP_attn U_flop, KV U_byte) + FLOP_linear U_flop`` for so many tokens."""
    unit = price(part)
    core = max(cost.attention_flops * unit.flop, cost.kv_bytes * unit.byte)
    return tokens * (core + cost.linear_flops * unit.flop)


def ffn_dollars(cost: PerToken, part: Hardware, tokens: float = 1e6) -> float:
    """Return ``FLOP_ffn U_flop`` for so many tokens."""
    return tokens * cost.ffn_flops * price(part).flop


def stage_seconds(token_seconds: float, layers: int, stages: int = 3) -> float:
    """Return the time of one layer in one of the overlapped stages: 50 ms, 61 layers, 3 stages: 272 us."""
    return token_seconds / stages / layers


def least_sparsity(part: Hardware, hidden: int, layers: int) -> float:
    """Return the sparsest MoE whose exchange still hides: ``S >= h F L / (Net W 11.1 ms)``.

    The batch that hides (`hideable_batch`) must not be less than the compute-bound one, ``F / (2 S W)``.
    """
    ridge = part.peak("fp8") / part.memory_bandwidth.value
    return ridge / (2 * hideable_batch(part, hidden, layers))


def hideable_batch(part: Hardware, hidden: int, layers: int) -> float:
    """Return the largest FFN batch whose exchange hides: ``3 h B / Net <= 16.6 ms / L``."""
    return HIDEABLE_SECONDS / layers * CARDS * part.scale_out.each_way / (BYTES_EACH_WAY * hidden)


def scaled_throughput(measured: float, attention_instances: int, ffn_instances: int = 2) -> float:
    """Return tokens/s per GPU when only attention instances grow with the context, from 2A2F's.

    ``TGS(nA, 2F) = TGS(2A, 2F) 4 / (n + 2)``.
    """
    return measured * (2 + ffn_instances) / (attention_instances + ffn_instances)
