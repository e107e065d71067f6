"""parallelize(model, "auto"): a plan without a person in between, the same on every rank, and exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from exactness import EXACT, far
from models import tiny, tokens
from plait.parallel import Plan, PlanError, parallelize
from plait.parallel.planner.goals import Goal
from world import run_world


def chosen() -> tuple[str, float]:
    reference = tiny("qwen3")
    model: Any = parallelize(copy.deepcopy(reference), "auto")
    ids = tokens(2, 9)
    with torch.no_grad():
        return str(model._plait.plan), far(model(ids).logits, reference(ids).logits)


def test_auto_is_a_legal_plan_of_the_world() -> None:
    plans, errors = zip(*run_world(chosen, 2), strict=True)
    assert len(set(plans)) == 1
    plan = Plan.parse(plans[0])
    assert plan.world_size == 2
    assert max(errors) <= EXACT


def test_alone_there_is_nothing_to_choose() -> None:
    model: Any = parallelize(tiny("llama"), "auto")
    assert model._plait.plan == Plan()


def refused() -> str:
    with pytest.raises(PlanError) as error:
        parallelize(torch.nn.Linear(4, 4), "auto")
    return str(error.value)


def test_other_modules_want_a_plan() -> None:
    assert all("Linear" in said for said in run_world(refused, 2))


def test_a_plan_for_hardware_that_is_not_here() -> None:
    plan = Plan.auto("llama-405b", hardware="gb200", goal=Goal(ranks=64, context=1_000_000))
    assert plan.world_size == 64
