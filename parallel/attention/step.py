"""One forward step under Helix: which new tokens there are, who owns them, and what each query row may see.

Made once per step on the host and shared by all layers. Ownership follows the position rule: token p of a sequence
belongs to rank ``(p // interleave) % kvp`` (Helix Parallelism section 2.3; vLLM and SGLang use the same rule).
Padding is never a token: it is neither owned nor stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.scores import Interleave
from ..context.visible import Visible


@dataclass(frozen=True)
class Part:
    """Some requests of a step that follow each other: a chunk, or all of them.

    Shape: indptr [requests + 1] on the host, lo, hi [rows] as in ``Step``.
    """

    requests: slice
    rows: slice
    indptr: Tensor
    lo: Tensor
    hi: Tensor


@dataclass(frozen=True)
class Step:
    """The tokens of one step. "Rows" are the valid new tokens of the batch, sequence after sequence.

    ``mode`` is ``"partials"`` (all rows attend to the local keys, partial outputs are exchanged) or ``"kv"`` (each rank
    computes its own rows only and gathers the others' keys and values).

    Shape:
        rows [num_rows] index into batch * length, or None when nothing is padded; own [own rows] index into rows;
        indptr [batch + 1] on the host; lo, hi [num_rows] (partials: local key range;
        kv: of own rows, global key range); restore [num_rows];
        key_order [all keys]
    """

    batch: int
    length: int
    mode: str
    rule: Interleave
    past: tuple[int, ...]
    counts: tuple[int, ...]
    own_counts: tuple[int, ...]
    rows: Tensor | None
    own: Tensor
    own_flat: Tensor
    indptr: Tensor
    lo: Tensor
    hi: Tensor
    rows_of_rank: tuple[int, ...]
    restore: Tensor
    keys_of_rank: tuple[int, ...]
    key_order: Tensor

    @cached_property
    def visible(self) -> Visible:
        """What own rows see of the keys of every rank, where keys travel (mode "kv")."""
        lengths, device = np.asarray(self.lengths), self.hi.device
        longest = int(lengths.max(initial=1))
        shards = [Interleave(self.rule.run, self.rule.shards, s) for s in range(self.rule.shards)]
        keys = [torch.from_numpy(_key_places(lengths, shard)).to(device) for shard in shards]
        number = torch.arange(self.batch).repeat_interleave(torch.tensor(self.own_counts))
        rows = number.to(device) * longest + self.hi - 1

        def sees(row: Tensor, key: Tensor) -> Tensor:
            same = row[:, None] // longest == key[None, :] // longest
            return (same & (row[:, None] >= key[None, :]))[None, None]

        return Visible(rows, keys, sees)

    @property
    def num_rows(self) -> int:
        """Valid new tokens in the batch."""
        return sum(self.counts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence after this step."""
        return tuple(p + c for p, c in zip(self.past, self.counts, strict=True))

    def parts(self, count: int) -> tuple[Part, ...]:
        """Cut the requests into at most ``count`` runs of about equal attention, none without rows.

        Made from what all ranks know, so that they cut alike whatever each of them holds.
        """
        counts = np.asarray(self.counts)
        busy = np.flatnonzero(counts)
        count = max(1, min(count, len(busy)))
        work = np.cumsum((counts * np.asarray(self.lengths))[busy])
        inner = np.arange(1, count)
        ends = np.searchsorted(work, work[-1:] * inner / count) + 1
        ends = np.maximum.accumulate(ends - inner) + inner
        ends = np.minimum(ends, len(busy) - count + inner)
        bounds = [0, *(int(busy[e]) for e in ends), self.batch]
        return tuple(self._part(a, b) for a, b in pairwise(bounds))

    def _part(self, first: int, stop: int) -> Part:
        at = self.indptr[first : stop + 1]
        rows = slice(int(at[0]), int(at[-1]))
        return Part(slice(first, stop), rows, at - at[0], self.lo[rows], self.hi[rows])

    def pick(self, x: Tensor) -> Tensor:
        """Take the valid rows out of a padded batch: [batch, length, ...] -> [num_rows, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def place(self, x: Tensor) -> Tensor:
        """Put rows into a batch padded with zeros: [num_rows, ...] -> [batch, length, ...]. Undoes ``pick``."""
        if self.rows is not None:
            x = x.new_zeros((self.batch * self.length, *x.shape[1:])).index_copy(0, self.rows, x)
        return x.view(self.batch, self.length, *x.shape[1:])


def local_lengths(lengths: np.ndarray, rule: Interleave) -> np.ndarray:
    """Tokens one shard holds of sequences of these lengths (closed form of the position rule)."""
    base = lengths // (rule.run * rule.shards) * rule.run
    return base + np.clip(lengths - base * rule.shards - rule.shard * rule.run, 0, rule.run)


def make_step(
    batch: int,
    length: int,
    past: Sequence[int],
    valid: np.ndarray | None,
    mode: str,
    rule: Interleave,
    device: torch.device | str = "cpu",
) -> Step:
    """Work out a step from the lengths before it and the mask of its valid tokens ``[batch, length]``."""
    counts = np.full(batch, length) if valid is None else valid.sum(1)
    full = valid is None or bool(valid.all())
    sequence = np.repeat(np.arange(batch), counts)
    before = np.asarray(past, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    position = before[sequence] + np.arange(len(sequence)) - starts[sequence]
    owner = position // rule.run % rule.shards
    own = np.nonzero(owner == rule.shard)[0]
    flat = np.arange(batch * length) if full else np.nonzero(np.asarray(valid).reshape(-1))[0]

    def tensor(a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)).to(device)

    own_counts = np.bincount(sequence[own], minlength=batch)
    order = np.argsort(owner, kind="stable")
    shown = local_lengths(position + 1, rule) if mode == "partials" else position[own] + 1
    widths = counts if mode == "partials" else own_counts
    after = before + counts
    shards = [Interleave(rule.run, rule.shards, s) for s in range(rule.shards)]
    return Step(
        batch=batch,
        length=length,
        mode=mode,
        rule=rule,
        past=tuple(int(p) for p in past),
        counts=tuple(int(c) for c in counts),
        own_counts=tuple(int(c) for c in own_counts),
        rows=None if full else tensor(flat),
        own=tensor(own),
        own_flat=tensor(flat[own]),
        indptr=torch.from_numpy(np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)),
        lo=tensor(np.zeros(len(shown))),
        hi=tensor(shown),
        rows_of_rank=tuple(int(n) for n in np.bincount(owner, minlength=rule.shards)),
        restore=tensor(np.argsort(order, kind="stable")),
        keys_of_rank=tuple(int(local_lengths(after, s).sum()) for s in shards),
        key_order=tensor(_key_order(after, shards)) if mode == "kv" else tensor(np.zeros(0)),
    )


def _key_order(lengths: np.ndarray, shards: Sequence[Interleave]) -> np.ndarray:
    """Order that sorts gathered keys (shard, sequence, local index) by (sequence, position)."""
    return np.argsort(np.concatenate([_key_places(lengths, shard) for shard in shards]))


def _key_places(lengths: np.ndarray, shard: Interleave) -> np.ndarray:
    """Place of each key of a shard, ``sequence * longest + position``, in the order in which it holds them."""
    longest = int(lengths.max(initial=1))
    held = [shard.positions(torch.arange(int(n))).numpy() for n in local_lengths(lengths, shard)]
    return np.concatenate([number * longest + each for number, each in enumerate(held)])
