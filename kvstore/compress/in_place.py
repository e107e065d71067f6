"""Coded pages of one layer of one sequence read where they lie, by a kernel: all of them, or what a selector chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.code_rows import CodeTable
from ...cuda_kernels.coded_pages import attend_codes, score_codes
from ..attention import ScoreOptions
from ..codecs.places import code_table

if TYPE_CHECKING:
    from .coded import CodedLayer
    from .coder import PageCoder


class HeldCodes(NamedTuple):
    """The coded pages of a tier, each head a sequence of its own.

    Attributes:
        runs: that were there when they were looked for.

    Shape: pages `[kv_heads]` of `[n]` int32 rows of the tables, in the order of coding; places likewise, of their
        tokens, `[tokens]`.
    """

    runs: int
    keys: CodeTable
    values: CodeTable
    pages: list[np.ndarray]
    places: list[np.ndarray]


def held_codes(coder: PageCoder, layer: CodedLayer, tier: int) -> HeldCodes | None:
    """Find the pages of a tier; None if kernels do not read its codec's.

    State: remembered in the layer until it has more runs.
    """
    held = layer.held.get(tier)
    if held is not None and held.runs == len(layer.runs):
        return held
    codec, runs = coder.tiers.codecs[tier], [run for run in layer.runs if run.tier == tier]
    sides = (codec.keys, [run.keys for run in runs]), (codec.values, [run.values for run in runs])
    keys, values = (
        code_table(part, layout, data)
        for (part, data), layout in zip(sides, coder.layouts, strict=True)
    )
    if keys is None or values is None:
        return None
    heads = np.concatenate([np.empty(0, np.int32), *(run.heads for run in runs)])
    size = coder.spec.page_tokens
    places = np.concatenate([np.empty((0, size), np.int32), *(run.places for run in runs)])
    own = [np.flatnonzero(heads == head).astype(np.int32) for head in range(coder.spec.kv_heads)]
    held = HeldCodes(len(layer.runs), keys, values, own, [places[at].ravel() for at in own])
    layer.held[tier] = held
    return held


def attend_held(
    held: HeldCodes, q: Tensor, lo: np.ndarray, hi: np.ndarray, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Attend with a few rows to all pages of a tier; lo, hi are places in the text.

    Shape: q `[rows, heads, head_dim]` -> `[kv_heads * rows, group, value_dim]`, lse
    """
    heads, rows = len(held.pages), len(q)
    first, stop = (
        np.stack([np.searchsorted(own, bound) for own in held.places]).ravel() for bound in (lo, hi)
    )
    asked = q.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)
    return _attend(held, asked, np.arange(heads + 1) * rows, held.pages, first, stop, options, 0)


def attend_chosen(
    held: HeldCodes, q: Tensor, tokens: list[np.ndarray], options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Attend with one row to some tokens of each head, counted in the order of coding.

    Shape: q `[kv_heads, group, head_dim]` -> o likewise, lse `[kv_heads, group]`
    """
    size = held.keys.form.page_tokens
    slots = [
        own[index // size].astype(np.int64) * size + index % size
        for own, index in zip(held.pages, tokens, strict=True)
    ]
    counts = np.array([len(own) for own in slots])
    indptr = np.arange(len(slots) + 1)
    return _attend(held, q, indptr, slots, np.zeros_like(counts), counts, options, 1)


def _attend(
    held: HeldCodes, q: Tensor, indptr: np.ndarray, lists: list[np.ndarray], lo: np.ndarray,
    hi: np.ndarray, options: ScoreOptions, list_tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ends = np.cumsum([0, *(len(own) for own in lists)]).astype(np.int32)
    q_indptr, kv_indptr, kv_indices, first, stop = map(
        torch.from_numpy, (indptr, ends, np.concatenate(lists), lo, hi)
    )
    return attend_codes(
        q, held.keys, held.values, q_indptr, kv_indptr, kv_indices, first, stop, options.scale,
        options.softcap, list_tokens,
    )  # fmt: skip


def score_held(held: HeldCodes, head: int, q: Tensor) -> Tensor:
    """Give dot products with all keys of a head. Shape: q `[1, queries, head_dim]` -> `[1, queries, tokens]`"""
    pages = held.pages[head]
    return score_codes(
        q, held.keys, torch.from_numpy(pages), len(pages) * held.keys.form.page_tokens
    )
