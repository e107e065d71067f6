"""What kernels and collectives reach of the data sheet: constants fitted from published kernel tables.

A kernel takes ``t0 + max(flops / (e_c peak), bytes / (e_m bandwidth))``. Source of all GEMM, attention and
collective constants here: the tables of the aiconfigurator-core wheel (Apache-2.0), by least median error; the
p90 error is 20-60 %, all of it in small shapes. Fixed costs per layer and per step are fitted to the measured
anchors (`anchors.py`), never to one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import Hardware


@dataclass(frozen=True, slots=True)
class Kernel:
    """Shares of peak and of bandwidth that one kind of kernel reaches, and its fixed seconds."""

    compute: float
    memory: float
    fixed: float = 0.0


# (part, matrix unit) -> GEMM with n, k >= 512. Middle of the fitted ranges; fixed seconds are those of a
# kernel inside a captured graph, not of one alone.
GEMM: dict[tuple[str, str], Kernel] = {
    ("a100", "bf16"): Kernel(0.80, 0.80, 3e-6),
    ("a100", "fp8"): Kernel(0.60, 0.75, 3e-6),
    ("h100", "bf16"): Kernel(0.80, 0.85, 2e-6),
    ("h100", "fp8"): Kernel(0.55, 0.75, 3e-6),
    ("b200", "bf16"): Kernel(0.70, 0.72, 2e-6),
    ("b200", "fp8"): Kernel(0.55, 0.75, 3e-6),
    ("b200", "fp4"): Kernel(0.40, 0.62, 3e-6),
    ("gb200", "bf16"): Kernel(0.68, 0.78, 2e-6),
    ("gb200", "fp8"): Kernel(0.55, 0.78, 3e-6),
    ("gb200", "fp4"): Kernel(0.38, 0.75, 3e-6),
}
ATTENTION: dict[str, Kernel] = {  # (part) -> decode attention over a paged cache
    "a100": Kernel(0.60, 0.80, 4e-6),
    "h100": Kernel(0.60, 0.85, 4e-6),
    "b200": Kernel(0.55, 0.70, 4e-6),
    "gb200": Kernel(0.55, 0.70, 4e-6),
}
# part -> share of the link's bandwidth that large NCCL collectives reach, one rank's ring bytes counted
# (all-gather of 537 MB: H100 383 GB/s of 450 in 7/8 of the bytes; alike for the others).
LINK: dict[str, float] = {"a100": 0.70, "h100": 0.75, "b200": 0.70, "gb200": 0.63}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """All constants the step time uses. Equal ones for every part but the kernels.

    Args:
        layer: seconds of norms, rotary embedding, quantisation and gaps, per layer.
        routed: seconds of routing, permuting and small grouped kernels, per MoE layer.
        step: seconds per step outside the layers (sampling, scheduling).
        grouped: grouped GEMM of the experts, as a share of what a dense GEMM reaches.
        zipf: exponent of the popularity of experts (`coverage`).
        out: share of the network card's bandwidth that is reached.
        memory_floor: bytes a rank keeps for the runtime, workspaces and graphs.
    """

    gemm: dict[str, Kernel]
    attention: Kernel
    link: float
    layer: float = 12e-6
    routed: float = 10e-6
    step: float = 3e-3
    grouped: float = 0.7
    zipf: float = 1.25
    out: float = 0.8
    memory_floor: float = 3.5e9
    source: str = "fitted"


def ideal() -> Efficiency:
    """Return the speed of light: peak everything, nothing fixed. A bound, not a prediction."""
    perfect = Kernel(1.0, 1.0)
    gemm: dict[str, Kernel] = dict.fromkeys(("bf16", "fp8", "fp4"), perfect)
    return Efficiency(
        gemm, perfect, 1.0, layer=0.0, routed=0.0, step=0.0, grouped=1.0, zipf=0.0, out=1.0,
        memory_floor=0.0, source="speed of light",
    )  # fmt: skip


def fitted(part: Hardware) -> Efficiency:
    """Return the constants of a part: calibrated on it, fitted to it, or to the part it is said to be like."""
    if part.constants is not None:
        return part.constants
    like = part.name if part.name in ATTENTION else part.like or "h100"
    gemm = {unit: kernel for (name, unit), kernel in GEMM.items() if name == like}
    gemm.setdefault("fp4", gemm.get("fp8", gemm["bf16"]))
    gemm.setdefault("fp8", gemm["bf16"])
    measured = "fitted" if part.name in ATTENTION else f"fitted on {like}"
    return Efficiency(gemm, ATTENTION[like], LINK[like], source=measured)
