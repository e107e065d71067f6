"""Attention to what a selector chose of coded pages: read in place, or decoded as keys are to be summarised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import unit_scores
from ..attention import LayerPages, ScoreOptions, attend_pages, merge_two
from ..select.attend import tokens_of
from ..select.selector import KeyView, Selector
from ..select.summaries import Summaries
from ..table import PageTable
from .coded import CodedLayer
from .coder import PageCoder
from .in_place import HeldCodes, attend_chosen, held_codes, score_held
from .lanes import LanePool, Lanes


@dataclass(frozen=True, kw_only=True)
class CodedKeys(KeyView):
    """One head's keys: those of coded pages, decoded when they are asked for, and behind them the exact ones.

    Attributes:
        coder, runs: of the coded pages; coded: which they are, in order, `[n, 2]` run and page of it.
        held: all heads' coded pages, if kernels read them in place; head: which of them.
    """

    coder: PageCoder
    runs: CodedLayer
    coded: np.ndarray
    held: HeldCodes | None
    head: int

    def reach(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Decode the coded pages from a token on."""
        skip = first // self.keys.shape[1]
        all_ = len(self.coded) + len(self.pages)
        decoded = self.coder.decode_keys(self.runs, self.coded[skip:])
        exact = self.keys[self.pages[max(0, skip - len(self.coded)) :].long()]
        where = (torch.arange(all_) - skip).clamp(min=0).int()
        return torch.cat([decoded, exact]), where

    def logits(self, q: Tensor) -> Tensor:
        """Dot products with every key, coded ones where they lie."""
        if self.held is None:
            return super().logits(q)
        coded = score_held(self.held, self.head, q)
        exact = unit_scores(q, self.keys, self.pages, self.tokens - coded.shape[-1])
        return torch.cat([coded, exact], -1)

    def rows(self, head: int, tokens: Tensor) -> Tensor:
        """Decode the pages of some tokens."""
        size = self.keys.shape[1]
        need, at = np.unique(tokens.numpy() // size, return_inverse=True)
        split = int(np.searchsorted(need, len(self.coded)))
        decoded = self.coder.decode_keys(self.runs, self.coded[need[:split]])
        exact = self.keys[self.pages[torch.from_numpy(need[split:] - len(self.coded))].long()]
        return torch.cat([decoded, exact])[torch.from_numpy(at), tokens % size, head]


@dataclass(frozen=True)
class ChosenReader:
    """Reads what a selector chooses of one layer of one sequence whose pages are coded in part.

    Each head's coded pages stand before its exact ones, in the order in which they were coded: so what is coded later
    moves nothing that is summarised. Memory holds summaries, and decoded keys for as long as one is made.
    """

    selector: Selector
    coder: PageCoder
    pool: LanePool
    layers: int

    def attend(
        self, memory: dict[Any, Any], lanes: Lanes, coded: CodedLayer, layer: int, q: Tensor,
        options: ScoreOptions, shards: int,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Ask the selector for the newest row, and attend to what it chose; None if that is all of all heads.

        Shape: q `[heads, head_dim]` -> o `[heads, value_dim]`, lse `[heads]`
        """
        heads, size = len(lanes.counts), self.pool.size
        asked, held = q.unflatten(0, (heads, -1)), coded.pages(heads)
        plans, lengths = [], []
        codes = self._one_tier(coded)
        for head in range(heads):
            tokens = len(held[head]) * size + int(lanes.counts[head])
            view = CodedKeys(
                self.pool.pool.keys[0], torch.from_numpy(self.pool.row(lanes, head)), tokens, layer,
                self.layers, options.scale, shards, {layer: memory.setdefault(head, {})},
                coder=self.coder, runs=coded, coded=held[head], held=codes, head=head,
            )  # fmt: skip
            plans.append(self.selector.plan(asked[head], view) if tokens else None)
            lengths.append(tokens)
        if all(plan is None for plan in plans):
            return None
        chosen = [
            np.arange(n) if plan is None else tokens_of(plan, n)[0]
            for plan, n in zip(plans, lengths, strict=True)
        ]
        if codes is not None:
            o, lse = self._in_place(lanes, codes, chosen, asked, options)
            return o.flatten(0, 1), lse.flatten()
        regions, rows = self._gathered(lanes, coded, held, chosen)
        counts = np.array([len(own) for own in rows])
        lo, hi = torch.zeros(heads, dtype=torch.int64), torch.from_numpy(counts)
        table = PageTable(rows, counts, 1)
        o, lse = attend_pages(regions, table, asked, np.arange(heads + 1), lo, hi, options)
        return o.flatten(0, 1), lse.flatten()

    def _one_tier(self, coded: CodedLayer) -> HeldCodes | None:
        """The coded pages where they lie, if they are of one codec that kernels read."""
        tiers = {run.tier for run in coded.runs}
        return held_codes(self.coder, coded, *tiers) if len(tiers) == 1 else None

    def _in_place(
        self, lanes: Lanes, codes: HeldCodes, chosen: list[np.ndarray], q: Tensor,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attend to chosen tokens where they lie, coded and exact ones, and merge.

        Shape: q `[kv_heads, group, head_dim]` -> o likewise, lse `[kv_heads, group]`
        """
        few, rows = [], []
        for head, tokens in enumerate(chosen):
            behind = len(codes.pages[head]) * self.pool.size
            split = int(np.searchsorted(tokens, behind))
            few.append(tokens[:split])
            rows.append(self.pool.row_slots(lanes.pages[head], tokens[split:] - behind))
        counts = np.array([len(own) for own in rows])
        pool, width = self.pool.pool, self.pool.pool.spec.v_dim
        keys, values = (x[0].flatten(0, 2)[:, None, None] for x in (pool.keys, pool.values))
        table = PageTable([own.astype(np.int32) for own in rows], counts, 1)
        lo, hi = torch.zeros(len(rows), dtype=torch.int64), torch.from_numpy(counts)
        exact = attend_pages(
            LayerPages(keys, values, width), table, q, np.arange(len(rows) + 1), lo, hi, options
        )
        return merge_two(attend_chosen(codes, q, few, options), exact)

    def _gathered(
        self, lanes: Lanes, coded: CodedLayer, held: list[np.ndarray], chosen: list[np.ndarray]
    ) -> tuple[LayerPages, list[np.ndarray]]:
        """Chosen coded pages decoded and chosen exact rows, end to end; and which rows each head reads."""
        size, pages, rows, exact = self.pool.size, [], [], []
        for head, tokens in enumerate(chosen):
            split = int(np.searchsorted(tokens, len(held[head]) * size))
            need, at = np.unique(tokens[:split] // size, return_inverse=True)
            first = sum(len(own) for own in pages)
            rows.append((first + at) * size + tokens[:split] % size)
            pages.append(held[head][need])
            index = tokens[split:] - len(held[head]) * size
            exact.append(self.pool.row_slots(lanes.pages[head], index))
        asked = np.concatenate(pages)
        k, v = self.coder.decode_pages(coded, asked)
        more = torch.from_numpy(np.concatenate(exact))
        both = [
            torch.cat([x.flatten(0, 1), region[0].flatten(0, 1)[more]])[:, None]
            for x, region in ((k, self.pool.pool.keys), (v, self.pool.pool.values))
        ]
        ends = len(asked) * size + np.cumsum([0, *(len(own) for own in exact)])
        lists = [
            np.concatenate([own, np.arange(a, b)]).astype(np.int32)
            for own, a, b in zip(rows, ends[:-1], ends[1:], strict=True)
        ]
        return LayerPages(both[0], both[1], self.pool.pool.spec.v_dim), lists


def rewind(memory: dict[Any, Any], tokens: np.ndarray) -> None:
    """Let the summaries of heads forget all but their first tokens: those behind were coded now."""
    for head, own in memory.items():
        for held in own.values():
            if isinstance(held, Summaries):
                held.rewind(int(tokens[head]))
