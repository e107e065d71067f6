"""Capacity: what is dropped is what the policy says, under any tp and kvp, and the rest is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from exactness import EXACT, Pair, case, worst
from plait.parallel.experts.capacity import Capacity
from training import backward, by_hand, gradient_errors
from world import run_calls


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 99.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_policy_keeps_what_its_name_says(policy: str, factor: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(23, 5, generator=generator).topk(2).indices
    weights = torch.rand(23, 2, generator=generator)
    weights = torch.full_like(weights, 0.5) if ties else weights
    capacity = Capacity(factor, policy)
    kept = capacity.kept(index, weights, 5)
    right = by_hand(index, weights, 5, capacity.rows(23, 2, 5), policy)
    assert torch.equal(kept, torch.where(right, index, 5))
    assert right.all() == (factor == 99.0) or factor == 1.5


def test_position_means_first_come() -> None:
    """Equal weights decide nothing: the first tokens are kept, not whatever a sort of ties leaves first."""
    index = torch.zeros(64, 1, dtype=torch.long)
    kept = Capacity(0.25, "position").kept(index, torch.rand(64, 1), 1)
    assert (kept[:16] == 0).all()
    assert (kept[16:] == 1).all()


def dropped(plan: str, family: str) -> dict[str, float]:
    """Gradients against one process whose experts drop by hand."""
    pair = Pair.of(case(plan, family))
    choice = pair.model._plait.plan.ep
    drops: list[int] = []

    def drop(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, index, weights = args
        most = Capacity(choice.capacity, choice.drop).rows(*index.shape, module.num_experts)
        keep = by_hand(index, weights, module.num_experts, most, choice.drop)
        drops.append(int((~keep).sum()))
        return hidden, index, weights * keep

    for layer in pair.reference.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(drop)
    backward(pair)
    assert sum(drops) > 3, "nothing was dropped, so nothing is shown"
    return gradient_errors(pair)


CASES = [
    ("tp2 ep2,capacity=0.7,drop=position", "mixtral"),
    ("tp2 ep2,exchange=tokens,capacity=0.7", "qwen3_moe"),
    ("dp2 ep2,capacity=0.6,drop=position", "mixtral"),
    ("tp2 ep1,exchange=tokens,capacity=0.7 etp2", "gpt_oss"),
]


def test_what_is_not_dropped_is_exact() -> None:
    answers = run_calls([(dropped, *each) for each in CASES], 2)
    for i, each in enumerate(CASES):
        errors = worst([answer[i] for answer in answers])
        assert max(errors.values()) < EXACT, (each, max(errors, key=errors.__getitem__))
