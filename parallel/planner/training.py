"""Training: parameters, FLOPs and time by Megatron's equations, memory, bubbles, and offload by ZeRO-Infinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpt:
    """The shape Megatron's equations speak of: a GPT with an FFN of 4 h."""

    layers: int
    hidden: int
    sequence: int = 2048
    vocab: int = 51200

    @property
    def params(self) -> float:
        """``12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h))``. Source: arXiv 2104.04473 equation 2."""
        l, h = self.layers, self.hidden  # noqa: E741
        return 12 * l * h**2 * (1 + 13 / (12 * h) + (self.vocab + self.sequence) / (12 * l * h))

    def flops(self, batch: int) -> float:
        """Return FLOPs of an iteration with full recompute: ``96 B s l h^2 (1 + s/(6h) + V/(16 l h))``, equation 3."""
        l, h, s = self.layers, self.hidden, self.sequence  # noqa: E741
        return 96 * batch * s * l * h**2 * (1 + s / (6 * h) + self.vocab / (16 * l * h))


def training_days(tokens: float, params: float, ranks: int, rate: float) -> float:
    """Return ``8 T P / (n X)`` in days; equation 4. `rate` is FLOP/s reached per rank."""
    return 8 * tokens * params / (ranks * rate) / 86400


def bubble(stages: int, microbatches: int, interleave: int = 1) -> float:
    """Return idle over ideal time of a pipeline: ``(p-1)/(v m)``; v costs v times the hand-overs."""
    return (stages - 1) / (interleave * microbatches)


def step_flops(params: float, tokens: float, recompute: str = "none") -> float:
    """Return FLOPs of a step: 2 forward, 4 backward, 2 more where the forward is computed again."""
    return (8 if recompute == "full" else 6) * params * tokens


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes a rank holds in training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def state_bytes(params: float, dp: int = 1, sharded: int = 0) -> TrainingMemory:
    """Return mixed-precision Adam's states: 2 weights, 2 gradients, 12 optimizer (fp32 copy, two moments).

    Args:
        params: of this rank, before dp cuts anything.
        sharded: ZeRO's stage, 0 to 3: optimizer, then gradients, then weights cut over dp. Source: arXiv 1910.02054.
    """
    cut = [dp if sharded >= stage else 1 for stage in (3, 2, 1)]
    return TrainingMemory(2 * params / cut[0], 2 * params / cut[1], 12 * params / cut[2], 0.0)


def activation_bytes(
    batch: int,
    tokens: int,
    hidden: int,
    layers: int,
    tp: Any = 1,
    sp: bool = False,
    recompute: str = "none",
) -> Any:
    """Return activations kept for backward in 16 bits, with a fused attention that keeps no scores.

    Without recompute ``s b h (10 + 24/t)`` a layer, ``34/t`` with sequence parallelism; ``full`` keeps each
    layer's input, ``2 s b h``. Source: arXiv 2205.05198 equations 2 and 4, their score terms dropped.
    """
    rows = batch * tokens * hidden
    if recompute == "full":
        return layers * 2 * rows / (tp if sp else 1)
    return layers * rows * (34 / tp if sp else 10 + 24 / tp)


def offload_efficiency(intensity: float, bandwidth: float, peak: float) -> float:
    """Return ``ait bw / (ait bw + peak)``: how much of the peak an unhidden transfer leaves.

    Source: ZeRO-Infinity (arXiv 2104.07857) section 4; peak is what one GPU reaches, 70 TFLOP/s there.
    """
    return intensity * bandwidth / (intensity * bandwidth + peak)


def parameter_intensity(sequence: int, batch: int) -> float:
    """Return FLOP per byte of parameters and gradients: ``seq bsz``."""
    return sequence * batch


def optimizer_intensity(sequence: int, batch: int) -> float:
    """Return FLOP per byte of optimizer states: ``seq bsz / 4``."""
    return sequence * batch / 4


def checkpoint_intensity(hidden: int, interval: int = 1) -> float:
    """Return FLOP per byte of activation checkpoints kept every `interval` layers: ``24 hd ci``."""
    return 24 * hidden * interval


def offload_write_rate(activations: float, step_seconds: float) -> float:
    """Return the B/s at which activations must leave to be gone by half of the step (SSDTrain, arXiv 2408.10013)."""
    return activations / (step_seconds / 2)


def offloaded_step(
    compute: tuple[float, float],
    host: tuple[float, float],
    disk: tuple[float, float],
    cpu_adam: float,
) -> float:
    """Return forward and backward seconds, each the slowest of what overlaps (Fuyou, arXiv 2403.06504).

    Each pair is (forward, backward) seconds of the GPU, of the host link and of the disk; Adam runs during backward.
    """
    forward = max(compute[0], host[0], disk[0])
    return forward + max(compute[1], host[1], disk[1], cpu_adam)


def mlp_memory(hidden: int, batch: int, tokens: int, ranks: int, sequence_cut: bool) -> float:
    """Return elements of an MLP layer with Adam: cut by tensor, or by sequence.

    ``32 H^2/N + 4 B L H/N + B L H`` against ``32 H^2 + 5 B L H/N``; the latter is less once BL > 32 H.
    Source: arXiv 2105.13120 table 1.
    """
    rows = batch * tokens * hidden
    if sequence_cut:
        return 32 * hidden**2 + 5 * rows / ranks
    return 32 * hidden**2 / ranks + 4 * rows / ranks + rows


def attention_memory(
    hidden: int,
    heads: int,
    head_dim: int,
    batch: int,
    tokens: int,
    ranks: int,
    sequence_cut: bool,
    scores: bool = False,
) -> float:
    """Return elements of an attention layer with Adam: cut by tensor, or by sequence; `scores` adds ``B Z L^2/N``.

    A fused kernel keeps no scores, so they are left out unless asked for. Source: arXiv 2105.13120 table 2.
    """
    weights, rows = 16 * head_dim * heads * hidden, 4 * batch * tokens * heads * head_dim / ranks
    kept = batch * heads * tokens**2 / ranks if scores else 0.0
    if sequence_cut:
        return weights + rows + kept + batch * tokens * hidden / ranks
    return weights / ranks + rows + kept + batch * tokens * hidden
