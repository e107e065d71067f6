"""The models' own balancing loss under a plan is that of one process that sees all tokens."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch import Tensor

from exactness import EXACT, case, worst
from models import StayFloat64
from plait.parallel.context.binding import ContextBinding
from training import trained
from world import run_calls

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
    with patch.object(ContextBinding, "_router", lambda self, logits: logits):
        return trained(each, 2, loss=balanced)


CASES = [("tp2 ep2,exchange=tokens", "mixtral"), ("dp2 ep2", "qwen3_moe"), ("cp2 ep2", "mixtral")]


def test_the_balancing_loss_sees_all_tokens() -> None:
    answers = run_calls([(losses, *each) for each in CASES], 2, timeout=300)
    for i, each in enumerate(CASES):
        errors = worst([answer[i] for answer in answers])
        print(each, errors)
        assert max(errors.values()) < EXACT, each
