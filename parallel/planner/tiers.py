"""Tiers: when weights stream from the host (MoE-Lens), and when a prefix is fetched rather than computed."""

from __future__ import annotations

from dataclasses import dataclass


def parallel_tokens(prompt: int, generated: int) -> float:
    """Return MoE-Lens' PME: tokens computed at once per token of KV held over a request's life.

    ``2 (p + g) / ((2p + g) g)``. The closed form counts g terms of a sum that has g + 1.
    """
    return 2 * (prompt + generated) / ((2 * prompt + generated) * generated)


@dataclass(frozen=True, slots=True)
class Streaming:
    """Throughput of a model whose weights stream over the host link every step."""

    kv_tokens: float
    stream_seconds: float
    tokens_per_second: float
    bound: str


def streamed(
    model_bytes: float, kv_memory: float, kv_token_bytes: float, link: float, prompt: int, generated: int,
    gpu_tokens_per_second: float = float("inf"),
) -> Streaming:  # fmt: skip
    """Return ``min(PME M / delta, T_gpu)``. Source: MoE-Lens (arXiv 2504.09345) section 5.2."""
    held, delta = kv_memory / kv_token_bytes, model_bytes / link
    streaming = parallel_tokens(prompt, generated) * held / delta
    bound = "weight stream" if streaming <= gpu_tokens_per_second else "compute"
    return Streaming(held, delta, min(streaming, gpu_tokens_per_second), bound)


def fetch_seconds(
    tokens: float, kv_token_bytes: float, bandwidth: float, latency: float = 0.0
) -> float:
    """Return the seconds to bring a prefix from a tier."""
    return latency + tokens * kv_token_bytes / bandwidth


def cheaper(
    tokens: float,
    kv_token_bytes: float,
    bandwidth: float,
    prefill_seconds: float,
    latency: float = 0.0,
) -> str:
    """Return ``fetch`` or ``recompute`` for a prefix, whichever takes less time."""
    return (
        "fetch"
        if fetch_seconds(tokens, kv_token_bytes, bandwidth, latency) < prefill_seconds
        else "recompute"
    )


def hideable_bytes(step_seconds: float, bandwidth: float) -> float:
    """Return how many bytes a step can bring from a tier without growing."""
    return step_seconds * bandwidth
