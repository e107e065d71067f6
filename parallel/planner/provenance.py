"""Provenance: how far a number is from anything that was measured."""

from __future__ import annotations

from functools import cache

from ..plan import Plan
from .anchors import ANCHORS
from .catalogue import hardware
from .hardware import Hardware


@cache
def _measured() -> tuple[frozenset[str], int, int]:
    """Parts, most ranks of one instance and longest context among the anchors."""
    parts = frozenset(anchor.hardware for anchor in ANCHORS)
    ranks = max(anchor.tp * anchor.dp for anchor in ANCHORS)
    return parts, ranks, max(anchor.input_tokens + anchor.output_tokens for anchor in ANCHORS)


def reasons(
    part: Hardware, plan: Plan, context: int, draft: int = 0, comm: str = "bf16"
) -> tuple[str, ...]:
    """Return why a point is beyond the anchors; nothing if it is among them."""
    parts, ranks, longest = _measured()
    found = []
    if part.name not in parts:
        like = f" (kernels as on {hardware(part.like).title})" if part.like else ""
        found.append(f"no measured point on {part.title}{like}")
    if plan.kvp.size > 1:
        found.append("no measured Helix point")
    if plan.pp.size > 1:
        found.append("no measured point with pp")
    if plan.world_size > ranks:
        found.append(f"measured points end at {ranks} ranks")
    if context > longest:
        found.append(f"measured contexts end at {longest:,} tokens")
    if comm != "bf16":
        found.append(f"no measured point with {comm} on the wire")
    if draft:
        found.append("acceptance is yours, not measured")
    return tuple(found)


def provenance(part: Hardware, plan: Plan, context: int, draft: int = 0, comm: str = "bf16") -> str:
    """Return ``calibrated`` or ``extrapolated: why``."""
    found = reasons(part, plan, context, draft, comm)
    return f"extrapolated: {'; '.join(found)}" if found else "calibrated"
