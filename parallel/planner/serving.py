"""Serving arithmetic: speculation, chunked and layered prefill, rate matching, transfers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from .ffn_cost import Coverage


def accepted_tokens(draft: int, acceptance: float) -> float:
    """Return the mean tokens of a verified step: ``1 + a + ... + a^n = (1 - a^(n+1))/(1 - a)``.

    Source: speculative decoding (arXiv 2211.17192) equation 1.
    """
    if acceptance >= 1:
        return draft + 1.0
    return (1 - acceptance ** (draft + 1)) / (1 - acceptance)


def speculation_gain(tokens_per_step: float, step_ratio: float) -> float:
    """Return the speed-up of speculation: tokens per step over how much longer a step is."""
    return tokens_per_step / step_ratio


def decodes_per_chunk(prompt: int, generated: int, chunk: int) -> float:
    """Return the decode slots that keep one chunk per step busy: ``P:D = C/(B-1)`` gives B - 1.

    Source: SARATHI (arXiv 2308.16369).
    """
    return chunk * generated / prompt


def reread_chunks(tokens: int, chunk: int) -> float:
    """Return how many chunk-lengths of earlier KV a chunked prefill reads again: ``N (N-1)/2``."""
    n = ceil(tokens / chunk)
    return n * (n - 1) / 2


def tile_waste(tokens: int, tile: int = 256) -> float:
    """Return the share of a GEMM's rows that are padding when `tokens` rows meet its tile."""
    return 1 - tokens / (ceil(tokens / tile) * tile)


def layer_groups(tokens: int, step: int = 512) -> int:
    """Return layered prefill's groups: ``max(1, ceil(L / 512))``."""
    return max(1, ceil(tokens / step))


def chunked_expert_reads(
    cover: Coverage, experts: int, per_token: int, tokens: int, chunk: int, decodes: int
) -> float:
    """Return how many times all experts of a layer are read while a prompt passes in chunks beside decodes."""
    full, rest = divmod(tokens, chunk)
    sizes = [chunk] * full + ([rest] if rest else [])
    return float(sum(cover(experts, per_token, size + decodes) for size in sizes))


def layered_expert_reads(
    cover: Coverage, experts: int, per_token: int, tokens: int, decodes: int, step: int = 512
) -> float:
    """Return the same for layered prefill: the prompt passes once, the other steps bring decodes only."""
    others = layer_groups(tokens, step) - 1
    return float(
        cover(experts, per_token, tokens + decodes) + others * cover(experts, per_token, decodes)
    )


@dataclass(frozen=True, slots=True)
class Matched:
    """Instances of prefill and decode whose rates agree."""

    prefill: int
    decode: int
    ranks: int
    requests_per_second: float


def rate_match(
    prefill_rate: float, prefill_ranks: int, decode_rate: float, decode_ranks: int, tolerance: float = 0.03,
    most: int = 64,
) -> Matched:  # fmt: skip
    """Return the smallest whole numbers with ``n_p R_p ~ n_d R_d``: twice the rate, half the instances.

    Rates are requests per second of one instance. Source: the balance equation of arXiv 2506.05508; the published
    pseudo-code takes the numerator of R_p/R_d as *prefill* instances, which is its inverse.
    """
    wanted = decode_rate / prefill_rate  # prefill instances per decode instance
    for n_d in range(1, most + 1):
        n_p = max(1, round(wanted * n_d))
        if abs(n_p / n_d / wanted - 1) <= tolerance:
            break
    else:
        ratio = Fraction(wanted).limit_denominator(most)
        n_p, n_d = max(1, ratio.numerator), ratio.denominator
    rate = min(n_p * prefill_rate, n_d * decode_rate)
    return Matched(n_p, n_d, n_p * prefill_ranks + n_d * decode_ranks, rate)


def egress(kv_request_bytes: float, batch: float, first_token_seconds: float, ranks: int) -> float:
    """Return B/s each prefill rank sends when KV leaves layer by layer during the prefill.

    Count only ranks that share the KV, not copies of it. Source: arXiv 2506.05508 section 5; its last factor is
    bytes per element, not per token.
    """
    return kv_request_bytes * batch / (first_token_seconds * ranks)


def ingress(
    kv_request_bytes: float, batch: float, token_seconds: float, output_tokens: int, ranks: int
) -> float:
    """Return B/s each decode rank receives: a request's KV per `output_tokens` steps and slot."""
    return kv_request_bytes * batch / (token_seconds * output_tokens * ranks)


def connection(
    prefill_tp: int, decode_tp: int, decode_dp: int, decode_rank: int
) -> tuple[int, ...]:
    """Return the prefill ranks from which a decode dp rank takes its KV.

    ``r = tp_p/tp_d, g = dp_d/r``, group ``floor(i/g) tp_d + i_tp``. Source: CloudMatrix (arXiv 2506.12708).
    """
    group = max(1, decode_dp // max(1, prefill_tp // decode_tp))
    return tuple(decode_rank // group * decode_tp + i for i in range(decode_tp))
