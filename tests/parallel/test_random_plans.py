"""Random legal plans on random small models: logits, gradients, cached steps, generation and undo, in float64.

hypothesis draws the cases before any process starts, so that one world measures all cases of its size.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from drawing import draw_one
from hypothesis import strategies as st

from exactness import Case, assert_exact, measure_all, worst
from models import FAMILIES
from plait.parallel import Plan, PlanError
from world import run_world

FEW, MANY = 3, 10  # cases of each world size; PLAIT_RANDOM_CASES asks for more
SIZES = (1, 2, 3, 4, 5, 6, 7, 8)


@st.composite
def cases(draw: Any, ranks: int, family: str) -> Case:
    """A family with random dims, and a plan of this many ranks that is legal for it."""
    tp = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    kvp = ranks // tp
    mla, multi = family == "deepseek", family in {"gpt_neox", "deepseek"}
    if mla and kvp > 1:
        tp, kvp = 1, ranks
    windows = family in {
        "mistral",
        "gemma3",
        "gpt_oss",
    }  # their window layers need whole groups on all ranks
    heads, kv_heads, copied = draw(head_counts(tp, kvp, multi, windows))
    changes: dict[str, Any] = {
        "heads": heads,
        "vocab": draw(st.integers(20, 70)),
        "layers": draw(st.integers(1, 3)),
    }
    changes["ffn"] = draw(st.integers(1, 12)) * draw(st.sampled_from([1, 3, 7])) + 8
    if not mla:
        changes["hidden"] = (
            heads * draw(st.sampled_from([4, 8]))
            if family in {"qwen2", "phi3", "gpt_neox", "olmo"}
            else heads * draw(st.integers(2, 6))
        )
    changes["kv_heads"] = kv_heads
    if family == "gpt_neox":
        del changes["kv_heads"]
    if mla:
        changes["layers"] = draw(st.integers(2, 3))
    if family in {"llama", "qwen3"}:
        changes["tie_word_embeddings"] = draw(st.booleans())
    if family in {"llama", "qwen3"}:
        changes["attention_bias"] = draw(st.booleans())
    if family == "llama":
        changes["mlp_bias"] = draw(st.booleans())
    if "layer_types" in FAMILIES[family][2]:
        kinds = st.sampled_from(["sliding_attention", "full_attention"])
        changes["layer_types"] = draw(
            st.lists(kinds, min_size=changes["layers"], max_size=changes["layers"])
        )
    return Case(draw(texts(tp, kvp, copied, family)), family, tuple(changes.items()))


@st.composite
def head_counts(draw: Any, tp: int, kvp: int, multi: bool, windows: bool) -> tuple[int, int, bool]:
    """Query heads, KV heads, and whether KV heads are copied."""
    if multi:
        heads = tp * kvp * draw(st.integers(1, 2))
        return heads, heads, False
    copied = kvp == 1 and tp > 1 and draw(st.booleans())
    if copied:
        kv_heads = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
    else:
        kv_heads = tp * draw(st.integers(1, 2)) * (kvp if windows else 1)
    step = tp * kvp
    heads = next(n for n in range(kv_heads, 100) if n % kv_heads == 0 and n % step == 0)
    return heads * draw(st.integers(1, 2)), kv_heads, copied and kv_heads < tp


@st.composite
def texts(draw: Any, tp: int, kvp: int, copied: bool, family: str) -> str:
    """The plan's text with random options."""
    words = []
    if kvp > 1:
        words.append(f"kvp{kvp},interleave={draw(st.sampled_from([1, 2, 3, 5, 16]))}")
        words[-1] += f",exchange={draw(st.sampled_from(['auto', 'partials', 'kv']))}"
        if family == "deepseek":
            words[-1] += f",mla={draw(st.sampled_from(['latent', 'value']))}"
    if tp > 1:
        sp = (
            kvp == 1
            and family in {"llama", "qwen2", "qwen3", "gemma3", "phi3"}
            and draw(st.booleans())
        )
        words.append(f"tp{tp}" + (":sp" if sp else "") + (",replicate_kv=true" if copied else ""))
    if tp * kvp > 1 and family in {"mixtral", "deepseek"} and draw(st.booleans()):
        words.append(f"etp{tp * kvp}")
    return " ".join(words) or "tp1"


def drawn(ranks: int, count: int) -> list[Case]:
    """Draw cases, the families in turn; the same in every run unless PLAIT_RANDOM_SEED says otherwise."""
    families, first = sorted(FAMILIES), int(os.environ.get("PLAIT_RANDOM_SEED", "0"))
    return [
        draw_one(cases(ranks, families[(3 * ranks + i) % len(families)]), 1000 * first + i)
        for i in range(count)
    ]


@pytest.mark.parametrize("ranks", SIZES)
def test_random_plans_are_exact(ranks: int) -> None:
    check(ranks, drawn(ranks, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", SIZES[1:])
def test_more_random_plans_are_exact(ranks: int) -> None:
    many = drawn(ranks, int(os.environ.get("PLAIT_RANDOM_CASES", MANY)))
    for at in range(FEW, len(many), MANY - FEW):
        check(ranks, many[at : at + MANY - FEW])


def check(ranks: int, batch: list[Case]) -> None:
    """Measure a batch of cases in one world, and print each: the failing one is the last."""
    answers = run_world(measure_all, ranks, batch)
    for i, each in enumerate(batch):
        print(each)
        found = [answer[i] for answer in answers]
        crashed = [answer for answer in found if isinstance(answer, str)]
        assert not crashed, f"{each} failed:\n{crashed[0]}"
        assert_exact(worst(found))  # type: ignore[arg-type]


def test_the_drawn_plans_are_many_and_legal() -> None:
    """The strategy reaches every family and every option; nothing it draws is refused by legality."""
    names: set[str] = set()
    families: set[str] = set()
    for ranks in SIZES[1:]:
        for each in drawn(ranks, 20):
            plan = Plan.parse(each.plan)
            assert plan.world_size == ranks
            names |= {
                word
                for word in (
                    "sp",
                    "replicate_kv",
                    "exchange=kv",
                    "exchange=partials",
                    "mla=value",
                    "etp",
                    "kvp",
                    "tp",
                )
                if word in each.plan
            }
            families.add(each.family)
    assert families == set(FAMILIES)
    assert len(names) == 8
    with pytest.raises(PlanError):
        Plan.parse("tp2 tp3")
