"""Precision: bytes of one element in each storage format, scales included."""

from __future__ import annotations

from ..errors import unknown

# Bits an element takes with its share of the scales. Sources: OCP Microscaling 1.0 (mx: one e8m0
# per 32), NVIDIA NVFP4 (one e4m3 per 16). "fp4" is the four bits alone, as the Helix paper counts.
BITS: dict[str, float] = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "fp8": 8.0,
    "int8": 8.0,
    "mxfp8": 8.25,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "fp4": 4.0,
}
# The matrix units that a format is multiplied on, best first; a part that lacks one uses the next.
UNITS: dict[str, tuple[str, ...]] = {
    "fp32": ("bf16",),
    "bf16": ("bf16",),
    "fp16": ("bf16",),
    "fp8": ("fp8", "bf16"),
    "int8": ("fp8", "bf16"),
    "mxfp8": ("fp8", "bf16"),
    "nvfp4": ("fp4", "fp8", "bf16"),
    "mxfp4": ("fp4", "fp8", "bf16"),
    "fp4": ("fp4", "fp8", "bf16"),
}


def element_bytes(precision: str) -> float:
    """Return the bytes of one element.

    >>> element_bytes("bf16"), element_bytes("mxfp4")
    (2.0, 0.53125)

    Raises:
        PlanError: a precision that is not one of ours.
    """
    if precision not in BITS:
        raise unknown("precision", precision, BITS)
    return BITS[precision] / 8
