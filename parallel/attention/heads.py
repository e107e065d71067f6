"""Which attention heads a rank holds. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError
from ..layout import Cut, Run


def query_run(heads: int, count: int, number: int) -> Run:
    """Heads of run ``number`` of ``count`` equal runs."""
    return number * heads // count, (number + 1) * heads // count


def kv_run(heads: int, kv_heads: int, count: int, number: int) -> Run:
    """KV heads that the query heads of a run read (grouped-query attention)."""
    start, stop = query_run(heads, count, number)
    group = heads // kv_heads
    return start // group, (stop - 1) // group + 1


def check_heads(path: str, heads: int, kv_heads: int, count: int, axes: str) -> None:
    """Refuse a cut that would give a rank a part of a head or of a group of heads."""
    if heads % count:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise PlanError(
            f"{axes}={count}",
            f"does not divide the {heads} query heads of {path}",
            f"use one of {legal}",
        )
    if kv_heads % count and count % kv_heads:
        legal = [
            n
            for n in range(1, heads + 1)
            if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
        ]
        raise PlanError(
            f"{axes}={count}",
            f"cuts inside a group of heads of {path} (kv_heads={kv_heads})",
            f"use one of {legal}",
        )


def check_runs(path: str, heads: int, count: int) -> None:
    """Refuse ranks that cannot keep equal runs of query heads after Helix's all-to-all."""
    if heads % count:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise PlanError(
            f"kvp * tp = {count}",
            f"does not divide the {heads} query heads of {path}",
            f"use one of {legal}",
        )


def scaled(runs: Sequence[Run], width: int, offset: int = 0) -> list[Run]:
    """Turn runs of heads into runs of rows of ``width`` rows a head, after ``offset`` rows."""
    return [(offset + start * width, offset + stop * width) for start, stop in runs]


def query_cut(heads: int, width: int, count: int, order: Sequence[int], dim: int = 0) -> Cut:
    """Cut a dim of ``heads * width`` by runs of query heads."""
    runs = [tuple(scaled([query_run(heads, count, c)], width)) for c in order]
    return Cut(dim, heads * width, tuple(runs))


def kv_cut(heads: int, kv_heads: int, width: int, count: int, order: Sequence[int]) -> Cut:
    """Cut rows of ``kv_heads * width`` by the KV heads each run of query heads reads; runs may repeat on ranks."""
    runs = [tuple(scaled([kv_run(heads, kv_heads, count, c)], width)) for c in order]
    return Cut(0, kv_heads * width, tuple(runs))


def stacked_cut(heads: int, kv_heads: int, width: int, count: int, order: Sequence[int]) -> Cut:
    """Cut rows that hold all q heads, then all k heads, then all v heads (Phi-3's ``qkv_proj``)."""
    runs = []
    for c in order:
        q, kv = query_run(heads, count, c), kv_run(heads, kv_heads, count, c)
        k_rows, v_rows = heads * width, (heads + kv_heads) * width
        runs.append(
            (*scaled([q], width), *scaled([kv], width, k_rows), *scaled([kv], width, v_rows))
        )
    return Cut(0, (heads + 2 * kv_heads) * width, tuple(runs))
