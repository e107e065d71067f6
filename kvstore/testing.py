"""Conformance: a store against a plain dictionary of lists, under random traffic.

Subclass `StoreMachine`, override `make_store`, and run its `TestCase` in your own suite:

    class MyMachine(StoreMachine):
        def make_store(self, spec): return MyStore(spec)

    TestMyStore = MyMachine.TestCase

Needs hypothesis.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from ..cuda_kernels import attention_reference
from .errors import PoolExhausted, SequenceClosed
from .sequence import Sequence
from .spec import KVSpec
from .step import Step
from .store import KVStore

TENANTS = st.sampled_from([None, "", "../a\0"])
# Prompts that share beginnings: a run of zeros, then a few that differ.
PROMPTS = st.builds(
    lambda zeros, tail: [0] * zeros + tail,
    st.integers(0, 20),
    st.lists(st.integers(0, 1), max_size=5),
)


@dataclass
class ModelSequence:
    """What the dictionary knows of one sequence: per layer the tensors of every token.

    `ids` are the token ids told so far (a prompt's may run ahead of its tokens), None if none are.
    """

    tokens: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    ids: list[int] | None = None
    tenant: str | None = None

    def copy(self) -> ModelSequence:
        """Copy the lists; the tensors of a token never change."""
        ids = None if self.ids is None else list(self.ids)
        return ModelSequence([list(layer) for layer in self.tokens], ids, self.tenant)

    @property
    def length(self) -> int:
        """Committed tokens."""
        return len(self.tokens[0])


class StoreMachine(RuleBasedStateMachine):
    """Random opens, prompts, steps, forks, truncations, evictions and closes on store and dictionary.

    The keys and values of a token whose id is known are a function of its tenant and of all ids up to
    it, as a model's would be: a page shared where it must not be has the wrong content.
    """

    spec: ClassVar[KVSpec] = KVSpec(
        layers=2, kv_heads=2, head_dim=3, value_dim=2, page_tokens=4, dtype=torch.float64
    )
    heads: ClassVar[int] = 4
    policy: ClassVar[str] = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.store = self.make_store(self.spec)
        self.model: dict[Sequence, ModelSequence] = {}
        self.closed: list[Sequence] = []
        self.step: Step | None = None
        self.pending: dict[Sequence, ModelSequence] = {}
        self.draws = torch.Generator().manual_seed(0)
        self.content = torch.Generator()

    def make_store(self, spec: KVSpec) -> KVStore:
        """Make the store under test; small, so that it fills and grows."""
        most = 24 * spec.bytes_per_page
        return KVStore(spec, num_pages=2, device_bytes=most, evict=self.policy)

    def _rows(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.draws)

    def _model_rows(self, mine: ModelSequence, layer: int, first: int, stop: int) -> list[Any]:
        """Compute the keys and values of tokens; what is unknown is random."""
        rows = []
        for at in range(first, stop):
            if mine.ids is not None:
                text = f"{mine.tenant!r} {layer} {mine.ids[: at + 1]}"
                self.content.manual_seed(zlib.crc32(text.encode()))
            draws = self.draws if mine.ids is None else self.content
            shape = (self.spec.kv_heads, self.spec.head_dim + self.spec.v_dim)
            row = torch.randn(*shape, dtype=torch.float64, generator=draws)
            rows.append(row.split([self.spec.head_dim, self.spec.v_dim], -1))
        return rows

    def _pick(self, data: Any, least: int = 1) -> list[Sequence]:
        free = [s for s in self.model if self.step is None or s not in self.step.seqs]
        if len(free) < least:
            return []
        places = st.lists(_place(free), min_size=least, max_size=4, unique=True)
        return [free[place] for place in data.draw(places)] if free else []

    @rule(count=st.integers(1, 3))
    def open(self, count: int) -> None:
        """Open empty sequences."""
        for seq in self.store.open_batch(count):
            assert seq.length == 0
            assert seq.cached_tokens == 0
            self.model[seq] = ModelSequence([[] for _ in range(self.spec.layers)])

    @rule(data=st.data(), tenant=TENANTS)
    def open_prompts(self, data: Any, tenant: str | None) -> None:
        """Open prompts that often begin alike; what is cached has the content of their tokens."""
        self._open(data, tenant)

    def _open(self, data: Any, tenant: str | None) -> list[Sequence]:
        prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=3))
        found = self.store.match(prompts, tenant)
        seqs = self.store.open_batch(prompts, tenant)
        self.check_found([seq.cached_tokens for seq in seqs], found)
        for seq, prompt in zip(seqs, prompts, strict=True):
            assert seq.cached_tokens == seq.length <= max(len(prompt) - 1, 0)
            mine = ModelSequence([], list(prompt), tenant)
            layers = range(self.spec.layers)
            mine.tokens = [self._model_rows(mine, layer, 0, seq.length) for layer in layers]
            self.model[seq] = mine
        return seqs

    def check_found(self, cached: list[int], matched: list[int]) -> None:
        """What `open` found is what `match` said a moment before; with tiers it may be less or more."""
        assert cached == matched

    @precondition(lambda self: self.step is None)
    @rule(data=st.data(), tenant=TENANTS, more=st.integers(0, 5), close=st.booleans())
    def serve(self, data: Any, tenant: str | None, more: int, close: bool) -> None:
        """Open prompts, compute them and some generated tokens, and mostly close them."""
        seqs = self._open(data, tenant)
        left = [len(self.model[s].ids or []) - s.length for s in seqs]
        self._reserve(data, seqs, [max(count, 0) + more for count in left])
        if self.step is not None:
            self.commit()
        if close:
            self._close(seqs)

    @precondition(lambda self: self.step is None and self.model)
    @rule(data=st.data())
    def reserve_and_append(self, data: Any) -> None:
        """Open a step over some sequences and write all its layers."""
        seqs = self._pick(data)
        self._reserve(data, seqs, [data.draw(st.integers(0, 9)) for _ in seqs])

    # What is drawn may not depend on lengths and free pages: tiers and their threads decide what is found.

    def _reserve(self, data: Any, seqs: list[Sequence], counts: list[int]) -> None:
        new_ids = random.Random(data.draw(st.integers(0, 2**32)))
        before = self.store.counters()
        try:
            step = self.store.reserve(seqs, counts)
        except PoolExhausted as full:
            if full.needed <= full.free:
                raise AssertionError("the pool refused although it had room") from full
            assert self.store.counters() == before
            return
        self.pending = {seq: self.model[seq].copy() for seq in seqs}
        for seq, count in zip(seqs, counts, strict=True):
            mine = self.pending[seq]
            if mine.ids is not None:
                more = mine.length + count - len(mine.ids)
                mine.ids += [new_ids.randint(0, 1) for _ in range(more)]
        for layer in range(self.spec.layers):
            rows: list[Any] = []
            for seq, count in zip(seqs, counts, strict=True):
                mine = self.pending[seq]
                first = len(mine.tokens[layer])
                mine.tokens[layer] += self._model_rows(mine, layer, first, first + count)
                rows += mine.tokens[layer][first:]
            k, v = (torch.stack(column) for column in zip(*rows, strict=True)) if rows else (
                self._rows(0, self.spec.kv_heads, self.spec.head_dim),
                self._rows(0, self.spec.kv_heads, self.spec.v_dim),
            )  # fmt: skip
            self.store.append(step, layer, k, v)
        self.step = step
        for seq in seqs:
            self._compare(seq, self.pending[seq], step)

    @precondition(lambda self: self.step is None and self.model)
    @rule(data=st.data())
    def write(self, data: Any) -> None:
        """Reserve, append and commit in one go: most of real traffic."""
        self.reserve_and_append(data)
        if self.step is not None:
            self.commit()

    @precondition(lambda self: self.step is not None)
    @rule()
    def commit(self) -> None:
        """Commit the open step; ids go with it if all its sequences have them, else after it."""
        assert self.step is not None
        told = {}
        for seq, mine in self.pending.items():
            before = self.model[seq]
            if mine.ids is not None and before.ids is not None:
                told[seq] = mine.ids[before.length : mine.length], mine.ids[len(before.ids) :]
        if len(told) == len(self.pending):
            self.store.commit(self.step, [rows for rows, _ in told.values()])
        else:
            self.store.commit(self.step)
            for seq, (_, new) in told.items():
                self.store.tell(seq, new)
        self.model.update(self.pending)
        self.step, self.pending = None, {}

    @precondition(lambda self: self.step is not None)
    @rule()
    def abort(self) -> None:
        """Abort the open step."""
        assert self.step is not None
        self.store.abort(self.step)
        self.step, self.pending = None, {}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        """Fork any sequence, also one with an open step: the fork has its committed tokens."""
        seq = list(self.model)[data.draw(_place(self.model))]
        self.model[self.store.fork(seq)] = self.model[seq].copy()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        """Forget a tail."""
        for seq in self._pick(data)[:1]:
            length = data.draw(st.integers(0, 2**16)) % (self.model[seq].length + 1)
            self.store.truncate(seq, length)
            mine = self.model[seq]
            for layer in mine.tokens:
                del layer[length:]
            if mine.ids is not None:
                del mine.ids[length:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        """Reorder as a beam search does."""
        seqs = self._pick(data)
        if not seqs:
            return
        order = data.draw(st.lists(st.integers(0, len(seqs) - 1), min_size=1, max_size=4))
        kept = [self.model.pop(seq) for seq in seqs]
        for seq, i in zip(self.store.reorder(seqs, order), order, strict=True):
            self.model[seq] = kept[i].copy()
        self.closed.extend(seq for seq in seqs if seq not in self.model)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data: Any) -> None:
        """Close some sequences; a prompt that goes on from one finds all of it."""
        self._close(self._pick(data))

    def _close(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.store.close(seq)
            mine = self.model.pop(seq)
            self.closed.append(seq)
            if mine.ids is not None:
                prompt = [*mine.ids[: mine.length], 0]
                assert self.store.match([prompt], mine.tenant) == [mine.length]

    @rule(count=st.integers(1, 9) | st.none())
    def evict(self, count: int | None) -> None:
        """Lose some cached pages, or all."""
        cached = self.store.counters()["pages_cached"]
        assert self.store.evict(count) == (cached if count is None else min(count, cached))

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def use_closed(self, data: Any) -> None:
        """A closed handle is refused by every call."""
        seq = self.closed[data.draw(_place(self.closed))]
        calls = (
            lambda: self.store.close(seq),
            lambda: self.store.fork(seq),
            lambda: self.store.truncate(seq, 0),
            lambda: self.store.reserve([seq], [1]),
            lambda: self.store.keys_values(seq, 0),
            lambda: self.store.tell(seq, [1]),
        )
        for call in calls:
            try:
                call()
            except SequenceClosed:
                continue
            raise AssertionError("a closed sequence was accepted")

    @rule()
    def grow(self) -> None:
        """Grow by hand, in or out of a step."""
        try:
            self.store.grow(self.store.counters()["pages"] + 3)
        except PoolExhausted:
            assert self.store.counters()["pages"] + 3 > 24

    @invariant()
    def integrity(self) -> None:
        """The store proves itself after every move."""
        self.store.check_integrity()
        assert self.store.counters()["sequences"] == len(self.model)

    @invariant()
    def same_as_dictionary(self) -> None:
        """Every committed token reads back; no uncommitted one shows."""
        for seq, mine in self.model.items():
            if self.step is None or seq not in self.step.seqs:
                self._compare(seq, mine, None)
            else:
                assert seq.length == mine.length

    def _compare(self, seq: Sequence, mine: ModelSequence, step: Step | None) -> None:
        spec, layer = self.spec, self.spec.layers - 1
        k_want = torch.stack([t[0] for t in mine.tokens[layer]]) if mine.length else None
        v_want = torch.stack([t[1] for t in mine.tokens[layer]]) if mine.length else None
        k, v = self.store.keys_values(seq, layer, step=step)
        assert k.shape == (mine.length, spec.kv_heads, spec.head_dim)
        if k_want is None or v_want is None:
            return
        assert torch.equal(k, k_want)
        assert torch.equal(v, v_want)
        q = self._rows(2, self.heads, spec.head_dim)
        o, lse = self.store.attend([seq], layer, q, q_indptr=[0, 2], step=step)
        hi = torch.tensor([mine.length - 1, mine.length])
        want = attention_reference(q, k_want, v_want, torch.zeros_like(hi), hi, spec.head_dim**-0.5)
        torch.testing.assert_close(o, want[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, want[1], rtol=1e-12, atol=1e-12)

    def teardown(self) -> None:
        """Closing everything gives every page back."""
        if self.step is not None:
            self.store.abort(self.step)
        self.store.close(list(self.model))
        counters = self.store.counters()
        assert counters["pages_free"] + counters["pages_cached"] == counters["pages"]
        self.store.evict()
        counters = self.store.counters()
        assert counters["pages_free"] == counters["pages"]
        assert counters["pages_allocated"] == counters["pages_freed"]
        assert counters["tenants_cached"] == 0
        self.store.check_integrity()


def _place(things: Sized) -> st.SearchStrategy[int]:
    """One of several things, by its place: hypothesis keeps strategies, and with a sequence its store."""
    return st.integers(0, len(things) - 1)
