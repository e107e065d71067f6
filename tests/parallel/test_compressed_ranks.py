"""Eviction over ranks: a plan keeps, on its ranks together, the tokens that one process keeps."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from exactness import EXACT, far
from models import tiny, tokens
from plait.kvstore import CompressedStore, KVSpec
from plait.kvstore.compress.shard import Shard
from plait.kvstore.engines.compressed import CompressedCache, compressed_store, facts_of
from plait.parallel import PlanError, parallelize
from world import run_world

POLICIES = {
    "snapkv": ("snapkv:window=4,budget=0.4", ()),
    "ada over all heads of a layer": ("snapkv:window=4,budget=0.4,rule=(ada:floor=0.1)", ()),
    "tova over all heads, decoding": ("tova:budget=7,every=2", ()),
    "h2o, decoding": ("h2o:budget=8,every=3", ()),
    "keydiff and whole layers": ("keydiff:budget=0.3", (1,)),
    "snapkv, decoding": ("snapkv:window=3,budget=8,every=2", ()),
}
NEW, LAYERS, KV_HEADS = 7, 2, 4


def generated(model: Any, cache: Any) -> torch.Tensor:
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :6] = 0
    ids = tokens(2, 23) * mask
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return torch.stack(out.logits)


def kept(store: CompressedStore, seqs: list[Any]) -> list[list[list[int]]]:
    """Positions by row and layer and head."""
    return [
        [
            store.shard.positions(store.pool.read(seq.lanes[layer], head)[2]).tolist()
            for layer in range(LAYERS)
            for head in range(store.spec.kv_heads)
        ]
        for seq in seqs
    ]


def alone(scorer: str, layers: Any) -> tuple[torch.Tensor, Any]:
    model = tiny("llama", layers=LAYERS)
    store = compressed_store(model, scorer, layers, page_tokens=4)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :6] = 0
    with CompressedCache(store, mask, mask) as cache:
        logits = generated(model, cache)
        cache.commit()
        return logits, kept(store, cache.seqs)


@cache
def alone_kept(scorer: str, whole: tuple[int, ...]) -> Any:
    return alone(scorer, dict.fromkeys(whole))[1]


def over_ranks(plan: str, tp: int, policies: list[tuple[str, tuple[int, ...]]]) -> list[Any]:
    """For each policy: the error of the logits, and what this rank kept."""
    out = []
    for scorer, whole in policies:
        layers = dict.fromkeys(whole)
        want, _ = alone(scorer, layers)
        model = tiny("llama", layers=LAYERS)
        spec = KVSpec(LAYERS, KV_HEADS // tp, 8, page_tokens=4, dtype=torch.float64)
        facts = facts_of(model)
        store = CompressedStore(spec, scorer, layers, facts=facts)
        parallelize(model, plan, store=store)
        cache = model.kv_cache()
        with torch.no_grad():
            error = far(generated(model, cache), want)
        store.check_integrity()
        out.append((error, kept(store, cache.seqs), store.report()["held_bytes"]))
    return out


@pytest.mark.parametrize(
    ("plan", "tp", "kvp"),
    [
        ("kvp2:interleave=3", 1, 2),
        ("tp2", 2, 1),
        ("kvp2:interleave=2 tp2", 2, 2),
        pytest.param("kvp4", 1, 4, marks=pytest.mark.slow),
    ],
)
def test_the_ranks_keep_what_one_process_keeps(plan, tp, kvp) -> None:
    policies = list(POLICIES.values())
    ranks = run_world(over_ranks, tp * kvp, plan, tp, policies)
    for number, policy in enumerate(policies):
        want = alone_kept(*policy)
        assert max(rank[number][0] for rank in ranks) < EXACT, policy
        for row in range(2):
            found: dict[int, list[int]] = {head: [] for head in range(LAYERS * KV_HEADS)}
            for rank, made in enumerate(ranks):
                mine = KV_HEADS // tp
                for at, own in enumerate(made[number][1][row]):
                    layer, head = divmod(at, mine)
                    found[layer * KV_HEADS + rank % tp * mine + head] += own
            assert [sorted(found[head]) for head in found] == want[row], policy


def local_choice(plan: str) -> list[Any]:
    Shard.gather = lambda self, rows, positions: (rows, positions)  # type: ignore[method-assign]
    return over_ranks(plan, 1, [POLICIES["snapkv"]])


def test_choosing_by_own_tokens_alone_is_another_answer() -> None:
    """The control: without the others' keys a rank keeps other tokens."""
    assert all(rank[0][0] > 1e-6 for rank in run_world(local_choice, 2, "kvp2"))


def zipped(model: Any, cache: Any) -> torch.Tensor:
    """The logits of a question after the text was repeated and most of it evicted."""
    ids, ask, question = tokens(2, 30), tokens(1, 3, seed=7)[0], tokens(2, 5, seed=4)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        cache.reconstruct(model, ids, ask, chunk=16)
        return model(question, past_key_values=cache, use_cache=True).logits


KVZIP = "kvzip:budget=0.3,rule=ada"


def zipped_alone() -> tuple[torch.Tensor, Any]:
    model = tiny("llama", layers=LAYERS)
    store = compressed_store(model, KVZIP, page_tokens=4)
    with CompressedCache(store, tokens(2, 30)) as cache:
        logits = zipped(model, cache)
        cache.commit()
        return logits, kept(store, cache.seqs)


def zipped_over_ranks(plans: tuple[str, ...]) -> list[Any]:
    """For each plan: the error of the logits, and what this rank kept; a row is parked and resumed."""
    want, out = zipped_alone()[0], []
    for plan in plans:
        model = tiny("llama", layers=LAYERS)
        heads = KV_HEADS // 2 if plan.startswith("tp") else KV_HEADS
        spec = KVSpec(LAYERS, heads, 8, page_tokens=4, dtype=torch.float64)
        store = CompressedStore(spec, KVZIP, facts=facts_of(model), host_bytes="1MiB")
        parallelize(model, plan, store=store)
        cache = model.kv_cache()
        error = far(zipped(model, cache), want)
        store.check_integrity()
        own = kept(store, cache.seqs)
        assert store.park(cache.seqs.pop(0), "talk")
        again = store.resume("talk")
        assert again is not None
        assert kept(store, [again]) == own[:1]
        store.close(again)
        if torch.distributed.get_rank() == 0:
            assert store.below is not None
            store.below.remove(store._parked("talk", None))
        assert store.resume("talk") is None, "lost on one rank: none resumes"
        store.check_integrity()
        out.append((error, own))
    return out


def test_kvzip_keeps_over_ranks_what_one_process_keeps() -> None:
    want = zipped_alone()[1]
    ranks = run_world(zipped_over_ranks, 2, ("kvp2:interleave=3", "tp2"))
    for rank in ranks:
        assert all(error < EXACT for error, _ in rank)
    cut = KV_HEADS // 2
    for row in range(2):
        both = [rank[0][1][row] for rank in ranks]
        assert [sorted(a + b) for a, b in zip(*both, strict=True)] == want[row]
        sides = [rank[1][1][row] for rank in ranks]
        joined = [
            own for layer in range(LAYERS) for side in sides for own in side[layer * cut : (layer + 1) * cut]
        ]  # fmt: skip
        assert joined == want[row]


def refusals() -> list[str]:
    said = []
    for plan, family in (
        ("kvp2 cp2", "llama"),
        ("cp2", "llama"),
        ("pp2", "llama"),
        ("tp2", "mistral"),
        ("kvp2", "mistral"),
    ):
        model = tiny(family)
        spec = KVSpec(2, 4, 8, page_tokens=4, dtype=torch.float64)
        try:
            parallelize(model, plan, store=CompressedStore(spec, "knorm"))
            said.append("")
        except PlanError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_is_said_on_every_rank() -> None:
    for said in run_world(refusals, 2):
        assert all("CompressedStore" in one for one in said[:3]), said
        assert all("every layer sees a window of 7 tokens" in one for one in said[3:]), said
