"""What happens to one layer of one sequence once its queries were seen: choose, keep, free the rest."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .choice import Chooser, Heads
from .chosen import rewind
from .coded import CodedLayer
from .coder import PageCoder
from .compression import Compression
from .lanes import LanePool
from .sequence import KeptSequence, KeptStep
from .shard import Shard
from .view import LayerView, attention_columns


class LayerKeeper:
    """Moves tokens of a layer into pages, as many as its composition keeps.

    Attributes:
        choices: how often a layer of a sequence was chosen among.
        windows: tokens that rows of a layer see, of layers that do not see all: older ones are not kept.
    """

    def __init__(
        self, pool: LanePool, what: Listing[Compression | None], chooser: Chooser,
        coder: PageCoder | None, windows: Mapping[int, int],
    ) -> None:  # fmt: skip
        self.coder, self.windows = coder, windows
        self.pool, self.what, self.chooser, self.shard = pool, what, chooser, chooser.shard
        self.choices = 0

    def joined(self, shard: Shard) -> LayerKeeper:
        """The same, of a part of sequences that other ranks share."""
        chooser = replace(self.chooser, shard=shard)
        return LayerKeeper(self.pool, self.what, chooser, self.coder, self.windows)

    def finish(self, step: KeptStep, at: int, layer: int, q: Tensor) -> None:
        """See the queries of a step's new tokens; choose if it is a prompt.

        Shape: q `[rows, heads, head_dim]`
        """
        seq, what = step.seqs[at], self.what[layer]
        whole = step.whole.pop((at, layer), None)
        step.done.setdefault(layer, set()).add(at)
        if what is not None and what.cadence and not what.scorer.received:
            seq.see(layer, q, what.scorer.queries(1 << 40))
        if whole is None and len(q) == 1:
            return
        text = seq.text + len(q)
        keep = text if what is None else what.keeps(text, text)
        if whole is not None:
            heads = self._whole(*whole)
            if what is not None and what.scorer.received and not what.scorer.waits:
                heads = self._heard(self._gathered(heads), q)
        else:
            heads = self._held(seq, layer)
        ranked = self.coder is not None and self.coder.tiers.ranked
        if self.coder is not None and whole is None:
            return  # later prompts are added whole, and coded as they grow old
        if what is not None and what.scorer.waits:
            if whole is not None:
                self._store(seq, layer, heads, text)
        elif what is not None and (keep < text or what.rule.open or ranked):
            if whole is None:
                step.evicted.add(at)
            self._choose(seq, layer, heads, q, what, keep, text)
        elif whole is not None:
            self._store(seq, layer, heads, text)

    def choose(self, seq: KeptSequence, layer: int) -> None:
        """Choose now, for a scorer that waited to be told."""
        what = self.what[layer]
        if what is None or not what.scorer.waits:
            return
        keep = what.keeps(seq.text, seq.text)
        seq.chosen[layer] = seq.text
        if keep < seq.text or what.rule.open:
            self._choose(
                seq, layer, self._held(seq, layer), torch.empty(0, 1, 1), what, keep, seq.text
            )

    def again(self, seq: KeptSequence, layer: int) -> None:
        """Choose among what a layer holds if enough tokens were decoded since it last did."""
        what = self.what[layer]
        if what is None or not what.cadence or seq.text - seq.chosen[layer] < what.cadence:
            return
        keep = what.keeps(seq.prompt, seq.text)
        seq.chosen[layer] = seq.text
        if keep < seq.text or what.rule.open:
            q = seq.queries[layer]
            heads = self._held(seq, layer)
            empty = torch.empty(0, 1, 1) if q is None else q
            self._choose(seq, layer, heads, empty, what, keep, seq.text)

    def _choose(
        self, seq: KeptSequence, layer: int, heads: Heads, q: Tensor, what: Compression, keep: int,
        text: int,
    ) -> None:  # fmt: skip
        heads = self._gathered(heads).squared()
        if not len(q):  # a scorer of keys alone
            q = torch.empty(0, len(heads.positions), self.pool.pool.spec.head_dim)
        self.choices += 1
        self._store(seq, layer, self.chooser.choose(heads, q, what, layer, keep), text)

    def slide(self, seq: KeptSequence) -> None:
        """Let go of whole pages, and of runs, that no later row of a layer with a window sees."""
        for layer in self.windows:
            first, coded = self._seen_from(layer, seq.text), seq.coded[layer]
            if first <= 0:
                continue
            place = self.shard.rule.local_length(first)
            gone = self.pool.leave(seq.lanes[layer], place)
            runs = [run for run in coded.runs if run.last >= place]
            if gone or len(runs) < len(coded.runs):
                loose = min(coded.loose, int(seq.lanes[layer].counts.min()))
                seq.coded[layer] = CodedLayer(runs, loose)
                seq.memory.pop(layer, None)
                seq.left = seq.text

    def _seen_from(self, layer: int, text: int) -> int:
        """The first token that rows after a text of so many see."""
        window = self.windows.get(layer)
        return 0 if window is None else text - window + 1

    def _store(self, seq: KeptSequence, layer: int, heads: Heads, text: int) -> None:
        """Keep this rank's part of some tokens of a text instead of what the layer held."""
        old, first = seq.lanes[layer], self._seen_from(layer, text)
        if first > 0:
            seq.left = text
        own = [
            torch.from_numpy(np.flatnonzero(self.shard.own(p) & (p >= first)))
            for p in heads.positions
        ]
        mine = heads.take(own) if self.shard.rule.shards > 1 or first > 0 else heads
        if self.coder is not None:
            mine = self._code(seq.coded[layer], self.coder.layers[layer], mine)
        places = [self.shard.places(positions) for positions in mine.positions]
        seq.lanes[layer] = self.pool.fill(list(mine.k), list(mine.v), places, mine.received)
        self.pool.release(old)
        seq.memory.pop(layer, None)

    def _code(self, coded: CodedLayer, coder: PageCoder, heads: Heads) -> Heads:
        """Code what tiers hold in fewer bits; give the exact rest."""
        scores = heads.scores if coder.tiers.ranked else None
        levels = heads.levels
        parts = [
            coder.tiers.assign(
                len(own), None if scores is None else scores[head], self.pool.size,
                None if levels is None else levels[head],
            )
            for head, own in enumerate(heads.positions)
        ]  # fmt: skip
        for tier in range(len(coder.tiers.codecs)):
            self._encode(coded, coder, tier, heads.take([part[1 + tier] for part in parts]))
        if scores is None:
            coded.loose = min(len(part[0]) for part in parts)
        return heads.take([part[0] for part in parts])

    def _encode(self, coded: CodedLayer, coder: PageCoder, tier: int, heads: Heads) -> None:
        places = [self.shard.places(positions) for positions in heads.positions]
        run = coder.encode(tier, list(heads.k), list(heads.v), places)
        if run is not None:
            coded.runs.append(run)

    def age(self, seq: KeptSequence, layer: int, tokens: int) -> None:
        """Code whole pages of the tokens that came after the choice, once they are older than the tail."""
        if self.coder is None:
            return
        coded, size = seq.coded[layer], self.pool.size
        coded.loose += tokens
        old = max(0, coded.loose - self.coder.tiers.tail) // size * size
        if not old:
            return
        held = self._held(seq, layer)
        index = [torch.arange(len(own)) for own in held.positions]
        first = [len(own) - coded.loose for own in held.positions]
        taken = [own[a : a + old] for own, a in zip(index, first, strict=True)]
        left = [torch.cat([own[:a], own[a + old :]]) for own, a in zip(index, first, strict=True)]
        last = len(self.coder.tiers.codecs) - 1
        rewind(seq.memory.get(layer, {}), coded.counts(len(first)))
        self._encode(coded, self.coder.layers[layer], last, held.take(taken))
        coded.loose -= old
        rest, lanes = held.take(left), seq.lanes[layer]
        places = [self.shard.places(positions) for positions in rest.positions]
        seq.lanes[layer] = self.pool.fill(list(rest.k), list(rest.v), places, rest.received)
        self.pool.release(lanes)

    def _whole(self, k: Tensor, v: Tensor) -> Heads:
        """A first prompt's. Shape: k `[tokens, kv_heads, head_dim]`"""
        positions = self.shard.positions(np.arange(len(k)))
        return Heads(k.transpose(0, 1), v.transpose(0, 1), [positions] * k.shape[1])

    def _held(self, seq: KeptSequence, layer: int) -> Heads:
        """What the layer's pages hold."""
        lanes = seq.lanes[layer]
        rows = [self.pool.read(lanes, head) for head in range(len(lanes.counts))]
        heard = [row[3] for row in rows if row[3] is not None]
        return Heads(
            [row[0] for row in rows], [row[1] for row in rows],
            [self.shard.positions(row[2]) for row in rows], heard or None,
        )  # fmt: skip

    def _gathered(self, heads: Heads) -> Heads:
        """The tokens of all kvp ranks."""
        if self.shard.kvp is None or heads.gathered:
            return heads
        width = heads.k[0].shape[-1]
        rows = [torch.cat([k, v], -1) for k, v in zip(heads.k, heads.v, strict=True)]
        both, positions = self.shard.gather(rows, heads.positions)
        heard = heads.received
        if heard is not None:
            columns = [own[:, None] for own in heard]
            heard = [own[:, 0] for own in self.shard.gather(columns, heads.positions)[0]]
        k, v = [own[:, :width] for own in both], [own[:, width:] for own in both]
        return Heads(k, v, positions, heard, gathered=True)

    def _heard(self, heads: Heads, q: Tensor) -> Heads:
        """With the attention that a first prompt's tokens received from its queries."""
        square = heads.squared()
        assert isinstance(square.k, Tensor)
        assert isinstance(square.v, Tensor)
        view = LayerView(square.k[None], square.v[None])
        columns = attention_columns(view, q.transpose(0, 1)[None]).mean(2)[0]
        square.received = list(columns.unbind(0))
        square.gathered = heads.gathered
        return square
