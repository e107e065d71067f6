"""Feed-forward: which experts are read, what they compute, what their dispatch sends."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..errors import PlanError
from .columns import Array, as_array
from .shapes import Ffn

Coverage = Callable[
    [int, int, Any], Array
]  # (experts, per token, tokens) -> share of experts touched


def uniform(experts: int, per_token: int, tokens: Any) -> Array:
    """Return ``1 - (1 - k/E)^T``. More than real traffic touches."""
    return 1.0 - (1.0 - per_token / experts) ** as_array(tokens)


def zipf(exponent: float = 1.25) -> Coverage:
    """Return the coverage of experts whose popularity falls as ``rank^-exponent``.

    The default follows Qwen3-30B-A3B (128 experts, 8 per token): 55 % of them touched by 32 tokens and 86 % by
    128, where uniform routing would touch 87 % and 100 %.
    """

    def cover(experts: int, per_token: int, tokens: Any) -> Array:
        chance = _inclusion(experts, per_token, exponent)
        # a sweep repeats few numbers
        count, where = np.unique(as_array(tokens), return_inverse=True)
        missed = np.mean(np.exp(count[:, None] * np.log1p(-chance)), axis=-1)
        return (1.0 - missed)[where].reshape(np.shape(tokens))

    return cover


def coverage(text: str) -> Coverage:
    """Read a curve by name: ``uniform``, ``zipf`` or ``zipf:1.1``.

    Raises:
        PlanError: neither, or an exponent that is no number of 0 or more.
    """
    name, _, exponent = text.partition(":")
    if name == "uniform" and not exponent:
        return uniform
    try:
        found = float(exponent or 1.25)
    except ValueError:
        found = -1.0
    if name != "zipf" or not 0 <= found < 100:
        raise PlanError(
            f"experts {text!r}", "is no curve of which are touched", "use uniform, zipf or zipf:1.1"
        )
    return zipf(found)


@cache
def _inclusion(experts: int, per_token: int, exponent: float) -> Array:
    """Chance that one token chooses each expert, k of E without replacement.

    Popularity p as rates of an exponential race stopped at the k-th: ``1 - exp(-t p)``, t such that the sum is k.
    """
    popularity = np.arange(1, experts + 1, dtype=float) ** -exponent
    if per_token >= experts:
        return np.full(experts, 1.0 - 1e-15)
    low, high = 0.0, 1.0
    while np.sum(-np.expm1(-high * popularity)) < per_token:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if np.sum(-np.expm1(-middle * popularity)) < per_token:
            low = middle
        else:
            high = middle
    return -np.expm1(-high * popularity)


def expert_bytes(
    ffn: Ffn, tokens: Any, ep: Any, etp: Any, element: float, cover: Coverage
) -> Array:
    """Return the expert weights a rank reads: ``3 h m b (E/EP) cover(T) / ETP``, T of the EP group."""
    held = ffn.expert_params * ffn.experts * element / (as_array(ep) * as_array(etp))
    return held * cover(ffn.experts, ffn.per_token, _chosen_tokens(ffn, tokens))


def _chosen_tokens(ffn: Ffn, tokens: Any) -> Array:
    """Tokens times the share of their choices that compute something (MoE++)."""
    return as_array(tokens) * ffn.experts / (ffn.experts + ffn.zero)


def expert_flops(ffn: Ffn, tokens: Any, ep: Any, etp: Any) -> Array:
    """Return routed FLOPs of a rank, evenly spread: ``2 T k 3 h m / (EP ETP)``."""
    chosen = _chosen_tokens(ffn, tokens) * ffn.per_token
    return 2.0 * chosen * ffn.expert_params / (as_array(ep) * as_array(etp))


def dispatch_payload(ffn: Ffn, tokens: Any, ep: Any, etp: Any, element: float) -> Array:
    """Return what a rank would send if no expert were its own: ``T h min(k, EP) ETP b``.

    Every rank of an expert's etp gets the token. A LatentMoE sends its latent width; zero-computation experts are
    local and send nothing.
    """
    places = np.minimum(ffn.per_token * ffn.experts / (ffn.experts + ffn.zero), as_array(ep))
    return as_array(tokens) * (ffn.latent or ffn.hidden) * places * as_array(etp) * element


def dispatch_bytes(ffn: Ffn, tokens: Any, ep: Any, element: float) -> Array:
    """Return what a rank sends to spread its tokens: ``T h min(k, EP) (EP-1)/EP b``; combine is alike."""
    ep = as_array(ep)
    return dispatch_payload(ffn, tokens, ep, 1.0, element) * (ep - 1) / ep


def sparsity(ffn: Ffn) -> float:
    """Return ``(k + shared) / (E + shared)``, shared experts counted in routed widths."""
    shared = ffn.shared / ffn.width
    return (ffn.per_token + shared) / (ffn.experts + shared)


def compute_bound_batch(ffn: Ffn, peak: float, bandwidth: float, element: float = 1.0) -> float:
    """Return the batch from which a MoE is compute-bound: ``F b / (2 S W)``. Source: Step-3 section 5.3."""
    return peak * element / (2 * sparsity(ffn) * bandwidth)


def zero_expert_work(tau: float, experts: int, zero: int) -> float:
    """Return the work of MoE++ (arXiv 2410.07348) relative to no zero-computation experts."""
    return tau * experts / (tau * experts + zero)


def zero_expert_capacity(
    tau: float, experts: int, zero: int, tokens: int, gamma: float
) -> tuple[float, float]:
    """Return MoE++'s capacity of an FFN expert and of a zero-computation expert."""
    share = gamma * tokens / (tau * experts + zero)
    return tau * share, share


def zero_expert_time(ratio: float) -> float:
    """Return measured time relative to plain MoE: ``0.22 + 0.96 ratio``; a fifth does not shrink."""
    return 0.22 + 0.96 * ratio
