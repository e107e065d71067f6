"""Summaries of a sequence's keys that grow with it, and scores by them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...cuda_kernels import summarise, unit_scores
from .selector import KeyView


class Summaries:
    """Ranges (or sums) of the keys of each `unit` tokens of one sequence in one layer.

    Shape: low, high `[room, kv_heads, head_dim]`, of which `units` are in use; high is None for sums.
    """

    def __init__(self, view: KeyView, unit: int, ranges: bool = True) -> None:
        self.unit, self.shift, self.tokens = unit, 0, 0
        kind = view.keys.dtype
        kind = kind if ranges else torch.promote_types(kind, torch.float32)
        self.low = view.keys.new_empty(0, *view.keys.shape[2:], dtype=kind)
        self.high = self.low if ranges else None

    @classmethod
    def of_rows(cls, view: KeyView, rows: Tensor, unit: int) -> Summaries:
        """Ranges of some keys in the place of all tokens so far; those that come are added behind them.

        Shape: rows `[n, kv_heads, head_dim]`
        """
        count, keys = len(rows), rows[:, None].contiguous()  # pages of one token
        made = cls(view, unit).extend(
            replace(view, keys=keys, pages=torch.arange(count), tokens=count)
        )
        made.tokens, made.shift = view.tokens, count - view.tokens
        return made

    @property
    def units(self) -> int:
        """Units there are, the last one perhaps not full."""
        return -(-(self.tokens + self.shift) // self.unit)

    def extend(self, view: KeyView) -> Summaries:
        """Add the tokens that came since."""
        if view.tokens > self.tokens:
            need = -(-(view.tokens + self.shift) // self.unit)
            if need > len(self.low):
                self.low = _longer(self.low, need)
                self.high = None if self.high is None else _longer(self.high, need)
            keys, pages = view.reach(self.tokens)
            summarise(
                keys, pages, self.tokens, view.tokens, self.unit, self.low, self.high, self.shift
            )
            self.tokens = view.tokens
        return self

    def rewind(self, tokens: int) -> None:
        """Forget all but the first tokens, whose keys are what they were."""
        whole = (min(tokens, self.tokens) + self.shift) // self.unit * self.unit - self.shift
        self.tokens = max(0, whole)

    def sizes(self) -> Tensor:
        """Tokens of each unit. Shape: `[units]`"""
        sizes = torch.full((self.units,), self.unit, device=self.low.device)
        sizes[-1:] -= self.units * self.unit - (self.tokens + self.shift)
        return sizes

    def bounds(self, q: Tensor) -> Tensor:
        """The most that any key within a unit's ranges can give with q; at least what each of its own gives.

        Shape: q `[kv_heads, queries, head_dim]` -> `[kv_heads, queries, units]`

        Source: Quest (arXiv 2406.10774), section 3.3.
        """
        return self.products(q.clamp(min=0), q.clamp(max=0))

    def products(self, q: Tensor, q_low: Tensor | None = None) -> Tensor:
        """``q . high + q_low . low``, or of sums ``q . sum``. Shape: as `bounds`"""
        where = torch.arange(self.units)
        if self.high is None or q_low is None:
            return unit_scores(q, self.low[:, None], where, self.units)
        return unit_scores(q, self.high[:, None], where, self.units, q_low, self.low[:, None])


def ranges(view: KeyView, unit: int) -> Summaries:
    """The ranges of a view's units, brought up to date and remembered."""
    held = view.own.get("ranges")
    if held is None or held.unit != unit:
        held = view.own["ranges"] = Summaries(view, unit)
    return held.extend(view)


def sums(view: KeyView, unit: int) -> Summaries:
    """The sums of a view's units, brought up to date and remembered."""
    held = view.own.get("sums")
    if held is None or held.unit != unit:
        held = view.own["sums"] = Summaries(view, unit, ranges=False)
    return held.extend(view)


def _longer(rows: Tensor, need: int) -> Tensor:
    more = rows.new_empty(max(need + 16, 5 * need // 4), *rows.shape[1:])
    more[: len(rows)] = rows
    return more
