"""Scorers x rules x cadence x codecs x selectors: each composes, or is refused with the reason when it is made."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from plait.kvstore import CompressedStore, KVSpec
from plait.kvstore.compress import CompressionError, ModelFacts, Rotary
from plait.kvstore.compress.registry import BUDGETS, SCORERS
from plait.kvstore.select.registry import SELECTORS

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=8, page_tokens=8)
GEN = torch.Generator().manual_seed(0)
FACTS = ModelFacts(
    Rotary(10000.0 ** -(torch.arange(4) / 4)), tuple(torch.randn(2, 16, 32, generator=GEN))
)
SMALL = {"snapkv": "snapkv:window=4", "lagkv": "lagkv:lag=8"}
CODECS = (
    None,
    "int8",
    "none@0.3|int8@0.3|int4:group=8",
    "none|int8|int4:group=8",
    "kivi:bits=4,group=8",
)
PRODUCT = list(
    itertools.product(sorted(SCORERS), sorted(BUDGETS), (0, 3), CODECS, (None, *sorted(SELECTORS)))
)


def made(scorer, rule, every, codec, selector) -> CompressedStore:
    text = SMALL.get(scorer, scorer)
    text += f"{',' if ':' in text else ':'}budget=12,rule={rule},every={every}"
    choice = {"rocket": "rocket:budget=6", "delta": "delta:full=0"}.get(selector, selector)
    return CompressedStore(SPEC, text, codec=codec, selector=choice, facts=FACTS)


def run(store: CompressedStore) -> None:
    """A prompt, decoding, a second prompt, a fork that goes on, and the end: two rows at once."""
    seqs = store.open_batch(2)
    for size in (40, 1, 1, 1, 1, 9, 1):
        step = store.reserve(seqs, size)
        for layer in range(2):
            k, v = torch.randn(2, 2 * size, 2, 8, generator=GEN)
            store.append(step, layer, k, v)
            o, _ = store.attend(
                seqs, layer, torch.randn(2 * size, 4, 8, generator=GEN), step=step,
                q_indptr=[0, size, 2 * size],
            )  # fmt: skip
            assert bool(o.isfinite().all())
        store.commit(step)
        if store.waits and size == 40:
            store.choose(seqs)
    twin = store.fork(seqs[0])
    assert (twin.kept == seqs[0].kept).all()
    assert (seqs[0].kept > 0).all()
    assert (seqs[0].kept <= 54).all()
    store.check_integrity()
    store.close([*seqs, twin])
    store.evict()
    assert store.report()["held_bytes"] == 0


def test_every_composition_is_made_or_refused_with_the_reason() -> None:
    said: dict[str, int] = {}
    good = []
    for parts in PRODUCT:
        try:
            made(*parts)
            good.append(parts)
        except CompressionError as error:
            reason = str(error)
            does = any(word in reason for word in ("use ", "give ", "leave out "))
            assert does, (parts, "says what would do", reason)
            said[reason[:20]] = said.get(reason[:20], 0) + 1
    assert len(good) > 250
    assert len(said) > 20
    for kind, names in ((0, SCORERS), (1, BUDGETS), (3, CODECS), (4, SELECTORS)):
        assert {parts[kind] for parts in good} >= set(names) - {"delta", "hylra", "rocket-mt"}
    pairs = {(parts[0], parts[3]) for parts in good}
    assert {name for name, codec in pairs if codec == "int8"} == set(SCORERS) - {"kvzip"}
    for parts in random.Random(0).sample(good, 60):
        try:
            run(made(*parts))
        except Exception as error:
            error.add_note(f"composition {parts}")
            raise


@pytest.mark.parametrize("scorer", ["expected", "critical", "critical:base=expected"])
def test_what_a_scorer_must_know_is_asked_for_when_the_store_is_made(scorer) -> None:
    with pytest.raises(CompressionError, match=r"which this store does not know; give facts="):
        CompressedStore(SPEC, scorer)
    with pytest.raises(CompressionError, match="needs a rotary embedding"):
        CompressedStore(SPEC, "expected", facts=ModelFacts(None, FACTS.outputs))
    CompressedStore(SPEC, scorer, facts=FACTS)


def test_layers_have_compositions_of_their_own() -> None:
    """By text, by object, or whole; each layer is as it would be in a store of its own kind."""
    spec = KVSpec(layers=3, kv_heads=2, head_dim=8, page_tokens=8)
    own = {0: None, 2: "keydiff:budget=5"}
    stores = [
        CompressedStore(spec, "knorm:budget=9", own), CompressedStore(spec, "knorm:budget=9"),
        CompressedStore(spec, "keydiff:budget=5"),
    ]  # fmt: skip
    k, v = torch.randn(2, 3, 30, 2, 8, generator=GEN)
    q = torch.randn(3, 30, 4, 8, generator=GEN)
    places = []
    for store in stores:
        seq = store.open()
        step = store.reserve([seq], [30])
        for layer in range(3):
            store.append(step, layer, k[layer], v[layer])
            store.attend(seq, layer, q[layer], step=step)
        store.commit(step)
        places.append(
            [[store.pool.read(lanes, head)[2].tolist() for head in range(2)] for lanes in seq.lanes]
        )
    assert places[0] == [[list(range(30))] * 2, places[1][1], places[2][2]]


def test_a_later_turn_votes_with_its_own_queries() -> None:
    """It may be shorter than the window; H2O's sums go on over it though nothing is chosen while decoding."""
    spec = KVSpec(layers=1, kv_heads=2, head_dim=8, page_tokens=8)
    k, v = torch.randn(2, 60, 2, 8, generator=GEN)
    q = torch.randn(60, 4, 8, generator=GEN)
    found = []
    for scorer, turn in (("snapkv", q), ("snapkv", -q), ("h2o:every=0", q), ("h2o:every=0", -q)):
        store = CompressedStore(spec, f"{scorer}{',' if ':' in scorer else ':'}budget=16")
        seq = store.open()
        for first, stop, asked in ((0, 50, q), (50, 55, turn)):
            step = store.reserve([seq], [stop - first])
            store.append(step, 0, k[first:stop], v[first:stop])
            store.attend(seq, 0, asked[first:stop], step=step)
            store.commit(step)
        _, _, places, heard = store.pool.read(seq.lanes[0], 0)
        found.append((places.tolist(), heard))
    assert found[0][0] != found[1][0]
    assert {50, 51, 52, 53, 54} <= set(found[0][0])
    (same, one), (_, other) = found[2:]
    both = [x for x in range(16) if same[x] < 50 and found[3][0][x] == same[x]]
    assert both
    assert not torch.equal(one[both], other[both])
