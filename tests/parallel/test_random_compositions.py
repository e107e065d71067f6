"""Random legal plans with every axis, on random small models, train as one process does: clipped steps, in float64.

hypothesis draws the cases before any process starts, so that one world measures all cases of its size.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import pytest
from drawing import draw_one
from hypothesis import strategies as st

from exactness import Case
from plait.parallel import Plan
from plait.parallel.legality import divisors
from training import assert_as_one_process, composed

EXPERTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts",
           "gpt_oss": "num_local_experts", "deepseek": "n_routed_experts"}  # fmt: skip
DENSE = ("llama", "qwen3", "gemma3")
WINDOWS = (
    "gemma3",
    "gpt_oss",
)  # their window layers need whole groups of heads on all ranks of kvp
BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe")  # models with a balancing loss
SIZES = (2, 3, 4, 6, 8)
FEW, MANY = {4: 2, 8: 1}, 12  # cases of each world size: in the default suite, and in all


@st.composite
def cases(draw: Any, ranks: int) -> Case:
    """A plan of this many ranks, and a model that it is legal for."""
    left, sizes = ranks, {}
    for axis in draw(st.permutations(["pp", "cp", "dp", "tp"])):
        several = [size for size in divisors(left) if size < max(ranks, 4)]
        sizes[axis] = draw(st.sampled_from(several + [2] * (2 in several)))
        left //= sizes[axis]
    sizes["dp"] *= left
    family = draw(st.sampled_from([*EXPERTS, *EXPERTS, *DENSE]))
    helix = (
        sizes["cp"] > 1 and draw(st.booleans()) and not (family == "deepseek" and sizes["tp"] > 1)
    )
    words, changes = [], dict[str, Any]()
    words += [f"dp{sizes['dp']}" + draw(st.sampled_from(["", ":shard"]))] * (sizes["dp"] > 1)
    heads = draw(context(sizes, helix, words))
    sharded = "shard" in "".join(words)
    words += draw(stages(sizes, sharded, changes, family))
    if sizes["tp"] > 1:
        words.append(f"tp{sizes['tp']}" + (":sp" if not helix and draw(st.booleans()) else ""))
    if family in EXPERTS:
        words += draw(experts(ranks // sizes["pp"], family, changes))
    if family in BALANCED and sizes["pp"] == 1 and draw(st.booleans()):
        changes |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    kv_heads = (
        sizes["tp"] * draw(st.integers(1, 2)) * (sizes["cp"] if helix and family in WINDOWS else 1)
    )
    changes["heads"] = lcm(kv_heads, heads) * draw(st.integers(1, 2))
    changes["kv_heads"] = changes["heads"] if family == "deepseek" else kv_heads
    return Case(" ".join(words) or "tp1", family, tuple(changes.items()))


@st.composite
def context(draw: Any, sizes: dict[str, int], helix: bool, words: list[str]) -> int:
    """Add what cuts the sequence, if anything does; gives a number that must divide the heads."""
    cp = sizes["cp"]
    if cp == 1:
        return sizes["tp"]
    if helix:
        words.append(
            f"kvp{cp},interleave={draw(st.integers(1, 4))}"
            + draw(st.sampled_from(["", f" cp{cp}"]))
        )
        return sizes["tp"] * cp
    ulysses = draw(st.sampled_from(divisors(cp)))
    words.append(f"cp{cp}:ulysses" if ulysses == cp else f"cp{cp}:ring,ulysses={ulysses}")
    return sizes["tp"] * ulysses


@st.composite
def stages(
    draw: Any, sizes: dict[str, int], sharded: bool, changes: dict[str, Any], family: str
) -> list[str]:
    """The pipeline's part of the plan, and enough layers for it."""
    pp = sizes["pp"]
    kinds = ["gpipe", "1f1b", "interleaved"] + ["zero-bubble"] * (not sharded)
    kind = draw(st.sampled_from(kinds))
    chunks = pp * (2 if kind == "interleaved" and pp > 1 else 1)
    count = max(chunks, 2) + draw(st.integers(0, 1))
    changes["layers"] = count
    if family in WINDOWS:
        types = ["sliding_attention", "full_attention"]
        changes["layer_types"] = draw(st.permutations([types[i % 2] for i in range(count)]))
    # one after the other: the interleaved schedules want their microbatches in rounds of the stages
    return [f"pp{pp}:{kind},microbatches={pp * draw(st.integers(1, 2))}"] if pp > 1 else []


@st.composite
def experts(draw: Any, stage: int, family: str, changes: dict[str, Any]) -> list[str]:
    """The experts' part of the plan, and a number of experts for it."""
    ep = draw(st.sampled_from(divisors(stage)))
    etp = draw(st.sampled_from(divisors(stage // ep)))
    changes[EXPERTS[family]] = lcm(ep, 2) * draw(st.integers(2, 3))
    if ep * etp == 1:
        return []
    return [f"ep{ep}" + draw(st.sampled_from(["", ",exchange=tokens"])), f"etp{etp}"]


def drawn(ranks: int, count: int) -> list[Case]:
    """Draw cases, the same in every run."""
    return [draw_one(cases(ranks), 1000 * ranks + number) for number in range(count)]


@pytest.mark.parametrize("ranks", FEW)
def test_random_plans_train_as_one_process(ranks: int) -> None:
    assert_as_one_process(composed, [(each, 2) for each in drawn(ranks, FEW[ranks])], ranks)


@pytest.mark.table
@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("part", range(3))
def test_more_random_plans_train_as_one_process(ranks: int, part: int) -> None:
    some = drawn(ranks, MANY)[part::3]
    assert_as_one_process(composed, [(each, 4) for each in some], ranks, timeout=500)


def test_the_drawn_plans_are_legal_and_reach_everything() -> None:
    plans = [Plan.parse(each.plan) for ranks in SIZES for each in drawn(ranks, MANY)]
    assert {plan.world_size for plan in plans} == set(SIZES)
    said = " ".join(map(str, plans))
    for word in (
        "shard",
        "sp",
        "ulysses",
        "kvp",
        "interleaved",
        "zero-bubble",
        "gpipe",
        "exchange=tokens",
        "etp2",
    ):
        assert word in said, word
    axes = ("tp", "cp", "dp", "pp", "ep", "etp")
    several = [sum(plan.size(axis) > 1 for axis in axes) for plan in plans]
    assert sum(count >= 4 for count in several) >= 5, several
