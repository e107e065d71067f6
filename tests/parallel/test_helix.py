"""Helix is exact: the table of plans and models, and every shape of step that serving makes, in float64."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from typing import Any

import pytest
import torch

from exactness import Case, Pair, Table, assert_exact, case, check_cache, far, world_of, worst
from models import tiny, tokens
from plait.collectives.trace import Trace
from plait.kvstore import KVStore
from plait.parallel import parallelize
from world import run_calls, run_world

CASES = [
    case("kvp2", "llama"),
    case("kvp2,interleave=1", "qwen2"),
    case("kvp2,interleave=2,exchange=partials", "qwen3"),
    case("kvp2,interleave=2,exchange=kv", "qwen3"),
    case("kvp2", "mistral"),
    case("kvp2,interleave=2", "gemma3"),
    case("kvp2,interleave=3,exchange=partials", "phi3"),
    case("kvp2,interleave=2,exchange=kv", "phi3"),
    case("kvp2,interleave=2", "gpt_neox"),
    case("kvp2,interleave=2,exchange=partials,mla=latent", "deepseek"),
    case("kvp2,interleave=2,exchange=partials,mla=value", "deepseek"),
    case("kvp2,interleave=2,exchange=kv", "deepseek"),
    case("kvp2,interleave=2,exchange=partials etp2", "mixtral"),
    case("kvp2,interleave=2,exchange=partials", "gpt_oss"),
    case("kvp2,interleave=2,exchange=kv", "gpt_oss"),
    case("kvp3,interleave=1,exchange=partials", "llama", heads=6, kv_heads=3),
    case("kvp3,interleave=2", "qwen3", heads=6, kv_heads=2),
    case("kvp3,interleave=16", "llama", heads=6, kv_heads=1),
    case("kvp3,interleave=2,exchange=kv", "gpt_neox", heads=6, hidden=60),
    case("kvp2,interleave=2,exchange=partials tp2", "llama"),
    case("kvp2,interleave=2,exchange=kv tp2", "qwen2"),
    case("kvp2,interleave=4 tp2", "qwen3", kv_heads=2),
    case("kvp2,interleave=2,exchange=partials tp2", "gemma3"),
    case("kvp2,interleave=2,exchange=partials tp2", "gpt_oss"),
    case("kvp2,interleave=2,exchange=kv tp2", "gpt_oss"),
    case("kvp2,interleave=2 tp2", "phi3"),
    case("kvp2,interleave=2 tp2 etp4", "mixtral"),
    case("kvp4,interleave=1,exchange=partials", "gpt_neox"),
    case("kvp4,interleave=2,exchange=partials,mla=value", "deepseek"),
    case("kvp4,interleave=16", "mistral", sliding_window=None),
    case("kvp3,interleave=2,exchange=partials tp2", "llama", heads=12, kv_heads=4),
    case("kvp4,interleave=2,exchange=partials tp2", "llama"),
    case("kvp4,interleave=2,exchange=kv tp2", "qwen3"),
    case("kvp2,interleave=2,exchange=partials tp4", "gemma3"),
]
TABLE = Table(CASES)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_helix_is_exact(each: Case) -> None:
    assert_exact(TABLE.errors(each))


# --- steps as serving makes them -------------------------------------------------------------

# New tokens of each row in each step: rows prefill, decode, verify several tokens and pause in one batch.
SCHEDULE = ((5, 1, 3), (1, 9, 0), (1, 1, 1), (4, 0, 17), (1, 1, 1), (3, 2, 1))


def mixed(plan: str, family: str, **changes: Any) -> dict[str, float]:
    """Steps of mixed batches, their tokens at any columns, against each row alone in one forward."""
    pair = Pair.of(case(plan, family, **changes))
    totals = [sum(counts[row] for counts in SCHEDULE) for row in range(3)]
    prompts = [tokens(1, n, seed=10 + i)[0] for i, n in enumerate(totals)]
    with torch.no_grad():
        expected = [pair.reference(p[None], use_cache=False).logits[0] for p in prompts]
    found = mixed_steps(pair.model, prompts)
    return {f"row {i}": far(f, e) for i, (f, e) in enumerate(zip(found, expected, strict=True))}


@torch.no_grad()
def mixed_steps(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Feed the prompts by the schedule; gives each row's logits."""
    generator = torch.Generator().manual_seed(3)
    cache, past = model.kv_cache(), [0, 0, 0]
    mask = torch.zeros(3, 0, dtype=torch.long)
    found: list[list[torch.Tensor]] = [[], [], []]
    for counts in SCHEDULE:
        width = max(counts) + 2
        new, ids, at = (
            torch.zeros(3, width).long(),
            torch.zeros(3, width).long(),
            torch.zeros(3, width).long(),
        )
        for row, count in enumerate(counts):
            columns = torch.randperm(width, generator=generator)[:count].sort().values
            new[row, columns] = 1
            ids[row, columns] = prompts[row][past[row] : past[row] + count]
            at[row, columns] = torch.arange(past[row], past[row] + count)
            past[row] += count
        mask = torch.cat([mask, new], 1)
        logits = model(
            ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True
        ).logits
        for row in range(3):
            found[row].append(logits[row][new[row].bool()])
        check_cache(cache)
        assert cache.lengths == past
    return [torch.cat(parts) for parts in found]


MIXED = [
    ("kvp2,interleave=1,exchange=partials", "llama", {}),
    ("kvp2,interleave=16,exchange=partials", "qwen3", {}),
    ("kvp2,interleave=2,exchange=kv", "gpt_neox", {}),
    ("kvp2,interleave=2,exchange=partials", "deepseek", {}),
    ("kvp2,interleave=2,exchange=kv", "deepseek", {}),
    ("kvp4,interleave=3,exchange=partials", "llama", {}),
    ("kvp2,interleave=2,exchange=kv tp2", "llama", {}),
    ("kvp2,interleave=4 tp2", "qwen2", {}),
]


@pytest.mark.parametrize("size", [2, 4])
def test_mixed_batches_are_exact(size: int) -> None:
    some = [(plan, family, changes) for plan, family, changes in MIXED if world_of(plan) == size]
    ranks = run_calls([(each_mixed, *cell) for cell in some], size)
    for i, (plan, family, _) in enumerate(some):
        print(plan, family)
        assert_exact(worst([answers[i] for answers in ranks]))


def each_mixed(plan: str, family: str, changes: dict[str, Any]) -> dict[str, float]:
    return mixed(plan, family, **changes)


@torch.no_grad()
def over_pages(plan: str, family: str) -> dict[str, float]:
    """Decode over many page boundaries of the shard, and give every page back at the end."""
    pair = Pair.of(case(plan, family))
    ids = tokens(2, 75, seed=4)
    expected = pair.reference(ids, use_cache=False).logits
    found = [pair.model(ids[:, :29], use_cache=True)]
    cache = found[0].past_key_values
    for at in range(29, 75):
        found.append(pair.model(ids[:, at : at + 1], past_key_values=cache, use_cache=True))
        check_cache(cache)
    store = cache.store
    held = store.counters()
    shards = cache.state.ranks.kvp
    spec = store.spec
    assert held["sequences"] == 2
    # what a rank holds is its share of the tokens, up to one interleave run a request, and a page's rounding
    assert (
        abs(cache.kv_bytes - 2 * 75 * spec.bytes_per_token / shards)
        <= 2 * cache.state.rule.run * spec.bytes_per_token
    )
    assert held["pages"] - held["pages_free"] == sum(
        -(-seq.length // spec.page_tokens) for seq in cache.seqs
    )
    errors = {"pages": far(torch.cat([step.logits for step in found], 1), expected)}
    del cache, found
    gc.collect()
    assert store.counters()["pages_free"] == store.counters()["pages"]
    assert store.counters()["sequences"] == 0
    store.check_integrity()
    return errors


def test_pages_are_crossed_and_returned() -> None:
    calls = [
        (over_pages, "kvp2,interleave=1", "llama"),
        (over_pages, "kvp2,interleave=5", "deepseek"),
        (over_pages, "kvp2,interleave=16", "gpt_oss"),
    ]
    for answers in run_calls(calls, 2):
        for errors in answers:
            assert_exact(errors)


@torch.no_grad()
def traced(plan: str, family: str) -> list[tuple[Counter[Any], int]]:
    """Collectives and bytes of one decode step after contexts of several lengths."""
    pair = Pair.of(case(plan, family))
    model, axis_of = pair.model, pair.model._plait.ranks.groups.axis_of
    seen = []
    for length in (3, 40, 400):
        cache = model(tokens(1, length), use_cache=True).past_key_values
        with Trace(axis_of) as trace:
            model(tokens(1, 1), past_key_values=cache, use_cache=True)
        seen.append((trace.counts(), trace.sent_bytes()))
    return seen


def test_collectives_do_not_grow_with_the_context() -> None:
    """Per layer one all-to-all over kvp and two all-reduces; at the ends one all-reduce and one all-gather."""
    for seen in run_world(traced, 4, "kvp2 tp2", "qwen3"):
        assert len({sent for _, sent in seen}) == 1
        for counts, _ in seen:
            assert counts == {
                ("all_to_all", "kvp"): 2,
                ("all_reduce", "ffn_tp"): 2 * 2 + 1,
                ("all_gather", "ffn_tp"): 1,
            }


def bytes_of_partials(plan: str) -> list[int]:
    """Bytes of each all-to-all of one decode step for a batch of three."""
    pair = Pair.of(case(plan, "llama"))
    with torch.no_grad():
        cache = pair.model(tokens(3, 9), use_cache=True).past_key_values
        with Trace(pair.model._plait.ranks.groups.axis_of) as trace:
            pair.model(tokens(3, 1), past_key_values=cache, use_cache=True)
    return [event.sent_bytes for event in trace.events if event.op == "all_to_all"]


def test_bytes_of_the_exchange_are_the_papers() -> None:
    """B * (Q * D / TPA) * (KVP - 1) / KVP outputs, and B * (Q / TPA) * (KVP - 1) / KVP lse, 8 bytes each in float64."""
    batch, heads, width, tp, kvp = 3, 8, 8, 2, 2
    expected = batch * heads // tp * (width + 1) * (kvp - 1) // kvp * 8
    for sent in run_world(bytes_of_partials, 4, "kvp2 tp2"):
        assert sent == [expected, expected]


# --- stores and failures ---------------------------------------------------------------------


@torch.no_grad()
def interrupted() -> tuple[int, int]:
    """A forward that raises half-way leaves its cache as it was."""
    reference = tiny("llama")
    model = parallelize(copy.deepcopy(reference), "kvp2,interleave=2")
    cache = model.kv_cache()
    store: KVStore = cache.store
    model(tokens(1, 6), past_key_values=cache, use_cache=True)
    before = store.counters()
    handle = model.model.layers[1].mlp.register_forward_hook(raise_interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        model(tokens(1, 4), past_key_values=cache, use_cache=True)
    handle.remove()
    store.check_integrity()
    ids = tokens(1, 10)
    model(ids[:, :6], past_key_values=(fresh := model.kv_cache()), use_cache=True)
    out = model(ids[:, 6:], past_key_values=fresh, use_cache=True).logits
    assert far(out, reference(ids).logits[:, 6:]) < 1e-9
    out = model(
        tokens(1, 4), past_key_values=cache, use_cache=True
    ).logits  # the broken step is dropped, not counted
    whole = torch.cat([tokens(1, 6), tokens(1, 4)], 1)
    assert far(out, reference(whole).logits[:, 6:]) < 1e-9
    cache.release()
    fresh.release()
    return before["sequences"], store.counters()["sequences"]


def raise_interrupt(*_: Any) -> None:
    raise RuntimeError("interrupted")


def test_a_forward_that_raises_leaves_the_cache_as_it_was() -> None:
    assert run_world(interrupted, 2) == [(1, 0), (1, 0)]
