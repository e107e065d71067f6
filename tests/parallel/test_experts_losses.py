"""The models' own balancing loss under a plan is that of one process that sees all tokens."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch import Tensor

from exactness import EXACT, Pair, case, far, worst
from models import StayFloat64
from plait import BiasBalance
from plait.parallel.context.binding import ContextBinding
from training import backward, trained
from world import run_calls, run_world

AUX = {"router_aux_loss_coef": 0.5, "output_router_logits": True}


def balanced(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss with labels, to which the model adds its balancing loss; in float64 throughout."""
    ids, mask = batch
    with StayFloat64():
        out = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    assert out.aux_loss is not None
    return out.loss


def losses(plan: str, family: str, mutate: bool = False) -> dict[str, float]:
    each = case(plan, family, **AUX)
    if not mutate:
        return trained(each, 2, loss=balanced)
    # every rank takes its own tokens for the 2 * 9 of all
    with patch.object(ContextBinding, "_router", lambda self, logits: logits.repeat(3, 1)[:18]):
        return trained(each, 2, loss=balanced)


CASES = [("tp2 ep2,exchange=tokens", "mixtral"), ("dp2 ep2", "qwen3_moe"), ("cp2 ep2", "mixtral")]


def test_the_balancing_loss_sees_all_tokens() -> None:
    answers = run_calls([(losses, *each) for each in CASES], 2)
    for i, each in enumerate(CASES):
        errors = worst([answer[i] for answer in answers])
        print(each, errors)
        assert max(errors.values()) < EXACT, each


def test_a_balancing_loss_of_own_tokens_is_noticed() -> None:
    errors = worst(run_world(losses, 2, "cp2 ep2", "mixtral", True))
    assert not errors["gradients"] < 1e-4, errors


def biased(plan: str) -> dict[str, float]:
    """Selection biases after two steps, against one process that counts the tokens of all batches."""
    pair = Pair.of(case(plan, "deepseek"))
    both = (pair.reference, pair.model)
    balances = [BiasBalance(model.train(), rate=0.05) for model in both]
    before = router_bias(pair.reference).clone()
    for step in range(2):
        backward(pair, step)
        for balance in balances:
            balance.step()
    assert far(before, router_bias(pair.reference)) > 1e-3, "nothing moved"
    balances[1].close()
    return {"bias": far(router_bias(pair.model), router_bias(pair.reference))}


def router_bias(model: Any) -> Tensor:
    return model.model.layers[1].mlp.gate.e_score_correction_bias


def test_selection_biases_move_as_in_one_process() -> None:
    plans = ["dp2 ep2", "tp2 ep2,exchange=tokens", "cp2 ep2"]
    for answers in run_calls([(biased, plan) for plan in plans], 2):
        for plan, errors in zip(plans, answers, strict=True):
            assert errors["bias"] < EXACT, (plan, errors)
