"""Attention over the store's pages: choose the kernel by the number of rows per sequence."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cuda_kernels import Interleave, dense_attention, merge_states, paged_attention
from .step import Step
from .table import PageTable, consecutive

DENSE_ROWS = 6  # from here on matrix multiplication over contiguous keys beats paged dot products


@dataclass(frozen=True)
class LayerPages:
    """One layer's regions, taken together under the store's lock: a growing pool replaces both.

    Shape: keys `[pages, page_tokens, kv_heads, head_dim]`, values likewise with `>= value_dim`.
    """

    keys: Tensor
    values: Tensor
    value_dim: int


@dataclass(frozen=True)
class ScoreOptions:
    """What bends the scores of one attention call; see `KVStore.attend`."""

    scale: float
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    q_pos: Tensor | None = None
    interleave: Interleave | None = None

    def rows(self, rows: slice | Tensor) -> ScoreOptions:
        """Select the options of some rows."""
        if self.q_pos is None:
            return self
        return ScoreOptions(
            self.scale, self.softcap, self.alibi_slopes, self.q_pos[rows], self.interleave
        )


def gather(layer: LayerPages, pages: np.ndarray, tokens: int) -> tuple[Tensor, Tensor]:
    """Give one sequence's K and V in order: a view if its pages are consecutive, else a copy.

    Shape: -> `[tokens, kv_heads, head_dim]`, `[tokens, kv_heads, value_dim]`
    """
    keys, values = layer.keys, layer.values
    if len(pages) == 0:
        k, v = keys[:0].flatten(0, 1), values[:0].flatten(0, 1)
    elif consecutive(pages):
        first, stop = int(pages[0]), int(pages[-1]) + 1
        k, v = keys[first:stop].flatten(0, 1), values[first:stop].flatten(0, 1)
    else:
        index = torch.from_numpy(pages.astype(np.int64)).to(keys.device)
        k = keys.index_select(0, index).flatten(0, 1)
        v = k if values is keys else values.index_select(0, index).flatten(0, 1)
    return k[:tokens], v[:tokens, :, : layer.value_dim]


def attend_pages(
    layer: LayerPages,
    table: PageTable, q: Tensor, q_indptr: np.ndarray,
    lo: Tensor, hi: Tensor, options: ScoreOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with ragged rows: few rows per sequence in place, many over contiguous keys.

    Shape: q `[rows, heads, head_dim]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]`
    """
    rows = q_indptr[1:] - q_indptr[:-1]
    if len(rows) == 0 or rows.max() <= DENSE_ROWS:
        return _attend_paged(layer, table, q, torch.from_numpy(q_indptr), lo, hi, options)
    if len(rows) == 1:
        return _attend_dense(layer, table, 0, q, lo, hi, options)
    many = np.flatnonzero(rows > DENSE_ROWS)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_empty(*q.shape[:2], layer.value_dim)
    lse = q.new_empty(q.shape[:2], dtype=work)
    for s in many:
        mine = slice(int(q_indptr[s]), int(q_indptr[s + 1]))
        o[mine], lse[mine] = _attend_dense(
            layer, table, int(s), q[mine], lo[mine], hi[mine], options.rows(mine)
        )
    few = np.where(rows > DENSE_ROWS, 0, rows)
    if few.any():
        index = torch.from_numpy(np.flatnonzero(np.repeat(few > 0, rows))).to(q.device)
        few_ptr = torch.from_numpy(np.concatenate([[0], np.cumsum(few)]))
        o[index], lse[index] = _attend_paged(
            layer, table, q[index], few_ptr, lo[index], hi[index], options.rows(index)
        )
    return o, lse


def _attend_paged(
    layer: LayerPages,
    table: PageTable, q: Tensor, q_indptr: Tensor,
    lo: Tensor, hi: Tensor, opt: ScoreOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return paged_attention(
        q, layer.keys, layer.values, q_indptr, table.kv_indptr, table.kv_indices,
        lo, hi, opt.scale, opt.softcap, opt.alibi_slopes, opt.q_pos, opt.interleave,
        layer.value_dim,
    )  # fmt: skip


def _attend_dense(
    layer: LayerPages,
    table: PageTable, at: int, q: Tensor, lo: Tensor, hi: Tensor,
    opt: ScoreOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, v = gather(layer, table.pages(at), int(table.lengths[at]))
    return dense_attention(
        q, k.to(q.dtype), v.to(q.dtype), lo, hi, opt.scale, opt.softcap, opt.alibi_slopes,
        opt.q_pos, opt.interleave,
    )  # fmt: skip


def merge_two(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Make one answer of two, each o and lse, to the same rows of different tokens."""
    o, lse = (torch.stack(pair) for pair in zip(one, other, strict=True))
    return merge_states(o, lse)


def with_sink(o: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count a sink once, after all keys."""
    return (o, lse) if sink is None else merge_states(o[None], lse[None], sink)


def row_pointers(
    seqs: int, q: Tensor, q_indptr: Tensor | Listing[int] | None, step: Step | None
) -> np.ndarray:
    """Say which rows belong to which sequence: as given, else by the rules of `KVStore.attend`."""
    if q_indptr is not None:
        given = q_indptr.cpu().numpy() if isinstance(q_indptr, Tensor) else q_indptr
        indptr = np.asarray(given, np.int64)
    elif seqs == 1:
        indptr = np.array([0, q.shape[0]], np.int64)
    elif step is not None and len(step.seqs) == seqs:
        indptr = np.concatenate([[0], np.cumsum(step.counts)])
    else:
        indptr = np.arange(seqs + 1, dtype=np.int64)
    if (
        len(indptr) != seqs + 1
        or indptr[0] != 0
        or indptr[-1] != q.shape[0]
        or (indptr[1:] < indptr[:-1]).any()
    ):
        raise ValueError(
            f"attend: q_indptr {indptr.tolist()} does not cut {q.shape[0]} rows over {seqs} sequences"
        )
    return indptr


def row_bounds(
    lo: Tensor | None, hi: Tensor | None,
    indptr: np.ndarray, lengths: np.ndarray, device: torch.device | str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The local tokens `[lo, hi)` each row sees: as given, else by the rules of `KVStore.attend`.

    Raises:
        ValueError: if a row would see past its sequence's end.
    """
    if hi is None:
        hi = torch.from_numpy(_causal_bounds(indptr, lengths)).to(device)
    elif not hi.is_meta and _past_end(hi, indptr, lengths):
        raise ValueError("attend: hi reaches past a sequence's end (did you forget step=?)")
    return torch.zeros_like(hi) if lo is None else lo.clamp(min=0), hi


def _causal_bounds(indptr: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The last row of each sequence sees all of it, the one before it one token less, ..."""
    rows = indptr[1:] - indptr[:-1]
    left = np.repeat(indptr[1:], rows) - 1 - np.arange(indptr[-1])
    return np.maximum(np.repeat(lengths, rows) - left, 0)


def _past_end(hi: Tensor, indptr: np.ndarray, lengths: np.ndarray) -> bool:
    """Say whether a row's bound lies beyond its sequence; a wrong shape is the kernel's to refuse."""
    if hi.dim() != 1 or hi.numel() != indptr[-1]:
        return False
    return bool((hi.cpu().numpy() > np.repeat(lengths, indptr[1:] - indptr[:-1])).any())
