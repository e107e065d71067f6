"""Communication: what each collective sends, and how long it takes on which links.

Volumes are bytes one rank sends, ring algorithms, as `collectives.trace` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .columns import Array, as_array
from .efficiency import Efficiency
from .hardware import Hardware

LSE_BYTES = 4.0


def all_reduce_bytes(ranks: Any, payload: Any) -> Array:
    """Return ``2 (n-1)/n X``."""
    n = as_array(ranks)
    return 2 * (n - 1) / n * as_array(payload)


def all_gather_bytes(ranks: Any, payload: Any) -> Array:
    """Return ``(n-1) X`` for a rank that brings X; reduce-scatter of a whole of n X is the same."""
    return (as_array(ranks) - 1) * as_array(payload)


def all_to_all_bytes(ranks: Any, payload: Any) -> Array:
    """Return ``(n-1)/n X`` for a rank that holds X."""
    n = as_array(ranks)
    return (n - 1) / n * as_array(payload)


def helix_payload(
    rows: Any, heads: int, width: int, tp: Any, element: float, lse: float = LSE_BYTES
) -> Array:
    """Return what a rank holds of partial outputs: ``B Q d / tp`` and a lse per head and row.

    Independent of the context. `width` is the value head dim, or MLA's latent where it is exchanged before W_UV.
    """
    return as_array(rows) * heads / as_array(tp) * (width * element + lse)


def helix_bytes(
    rows: Any, heads: int, width: int, tp: Any, kvp: Any, element: float, lse: float = LSE_BYTES
) -> Array:
    """Return what Helix's all-to-all sends: all of `helix_payload` but the rank's own, ``(kvp-1)/kvp`` of it."""
    return all_to_all_bytes(kvp, helix_payload(rows, heads, width, tp, element, lse))


def helix_bytes_per_peer(
    rows: Any, heads: int, width: int, tp: Any, kvp: Any, element: float
) -> Array:
    """Return the partial outputs sent to one peer: ``B H / (kvp tp)``."""
    return as_array(rows) * heads * width * element / (as_array(tp) * as_array(kvp))


def ring_attention_elements(
    ranks: int, batch: int, heads: int, tokens: int, head_dim: int, backward: bool = False
) -> float:
    """Return elements a rank sends around the ring: forward ``2 (N-1) B Z (L/N) A``, backward 6.

    Source: Sequence Parallelism (arXiv 2105.13120) section 3.2; both together equal Megatron's tensor parallelism.
    """
    return (6 if backward else 2) * (ranks - 1) * batch * heads * (tokens / ranks) * head_dim


def tensor_parallel_elements(
    ranks: int, batch: int, heads: int, tokens: int, head_dim: int
) -> float:
    """Return elements of Megatron tensor parallelism: four all-reduces of ``B L Z A``, forward and backward."""
    return float(4 * all_reduce_bytes(ranks, batch * tokens * heads * head_dim))


def pipeline_bytes(
    batch: int, tokens: int, hidden: int, element: float, tp: int = 1, scattered: bool = True
) -> float:
    """Return one hand-over between stages: ``b s h``, cut by tp with Megatron's scatter/gather."""
    return batch * tokens * hidden * element / (tp if scattered else 1)


@dataclass(frozen=True, slots=True)
class Network:
    """Links of a part with what collectives reach of them."""

    part: Hardware
    constants: Efficiency

    def bandwidth(self, span: Any) -> Array:
        """Return B/s per direction for a group spread over `span` consecutive ranks."""
        inside = as_array(span) <= self.part.domain.value
        fast = self.part.scale_up.each_way * self.constants.link
        return np.where(inside, fast, self.part.scale_out.each_way * self.constants.out)

    def latency(self, span: Any) -> Array:
        """Return the seconds of the smallest collective over `span` ranks; 0 for one rank."""
        span = as_array(span)
        fast, slow = self.part.scale_up_latency.value, self.part.scale_out_latency.value
        return np.where(span <= 1, 0.0, np.where(span <= self.part.domain.value, fast, slow))

    def seconds(self, sent_bytes: Any, span: Any) -> Array:
        """Return ``alpha + bytes / bandwidth``, and nothing for a group of one."""
        span = as_array(span)
        time = self.latency(span) + as_array(sent_bytes) / self.bandwidth(span)
        return np.where(span > 1, time, 0.0)

    def all_reduce(self, ranks: Any, payload: Any, span: Any = None) -> Array:
        """Return the seconds of an all-reduce; hierarchical where the group leaves the domain."""
        span = ranks if span is None else span
        n, domain = as_array(ranks), self.part.domain.value
        flat = self.seconds(all_reduce_bytes(n, payload), span)
        inner = np.minimum(n, domain)
        outer = np.maximum(np.ceil(n / domain), 1.0)
        inside = self.seconds(all_reduce_bytes(inner, payload), inner)
        between = self.seconds(
            all_reduce_bytes(outer, as_array(payload) / inner), np.where(outer > 1, span, 1)
        )
        return np.where(as_array(span) > domain, np.minimum(flat, inside + between), flat)

    def all_to_all(self, ranks: Any, payload: Any, span: Any = None) -> Array:
        """Return the seconds of an all-to-all; only what leaves the domain takes the slow link.

        Of n ranks spread evenly over `span`, ``n domain / span`` share a domain.
        """
        span = ranks if span is None else span
        n = as_array(ranks)
        local = np.clip(np.floor(self.part.domain.value * n / as_array(span)), 1, n)
        far = as_array(payload) * (n - local) / n
        near = as_array(payload) * (local - 1) / n
        slow = far / (self.part.scale_out.each_way * self.constants.out)
        fast = near / (self.part.scale_up.each_way * self.constants.link)
        time = self.latency(span) + np.maximum(slow, fast)
        return np.where(
            n > 1,
            np.where(as_array(span) > self.part.domain.value, time, self.seconds(far + near, span)),
            0.0,
        )

    def collective(self, op: str, ranks: Any, sent_bytes: Any, span: Any) -> Array:
        """Return the seconds of a collective that was recorded: its name, and the bytes this rank sent."""
        n, sent = np.maximum(as_array(ranks), 1.0), as_array(sent_bytes)
        others = np.maximum(n - 1, 1.0)
        if op == "all_reduce":
            return self.all_reduce(n, sent * n / (2 * others), span)
        if op == "all_to_all":
            return self.all_to_all(n, sent * n / others, span)
        return self.seconds(0.0 if op == "recv" else sent, np.where(n > 1, span, 1.0))
