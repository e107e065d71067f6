"""One all-reduce for routed and shared experts, in blocks that are seen to add the two."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from exactness import EXACT, Pair, case, measure, worst
from models import tiny, tokens
from plait.collectives.trace import Trace
from plait.parallel.experts import joint
from plait.parallel.experts.joint import adds
from world import run_calls


def block_of(family: str) -> Any:
    block = tiny(family, dtype=torch.float32).model.layers[1].mlp
    shared = getattr(block, "shared_experts", None) or block.shared_expert
    return block, block.experts, shared.down_proj


class Squashed(nn.Module):
    """A block that does something else than adding."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.down = nn.Identity(), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.experts(x)) + self.down(x)


def test_a_block_is_tried() -> None:
    assert adds(*block_of("deepseek"))
    assert not adds(*block_of("qwen2_moe")), "its gate multiplies the shared expert's result"
    block = Squashed()
    assert not adds(block, block.experts, block.down)


def reduced(plan: str, family: str) -> dict[str, float]:
    """All-reduces of one forward, without gradients and with them."""
    pair, found = Pair.of(case(plan, family)), {}
    for name, mode in (("inference", torch.no_grad()), ("training", nullcontext())):
        with mode, Trace() as trace:
            pair.model(tokens(2, 5), use_cache=False)
        found[name] = float(sum(e.op == "all_reduce" for e in trace.events))
    return found


EXACT_CASES = [
    case("tp2 ep2", "deepseek", ("train", "steps", "undo")),
    case("kvp2 ep1 etp2", "deepseek", ("train", "steps")),
]


def not_summed(plan: str, family: str) -> dict[str, float]:
    """Negative control: the parts' sums wait, and nobody sums."""
    with patch.object(joint.JointBlock, "forward", _forgets):
        return measure(case(plan, family, ("train",)))


def _forgets(self: Any, x: Tensor) -> Tensor:
    with self._plait_joint.waiting():
        return super(joint.JointBlock, self).forward(x)


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    calls: list[Any] = [(measure, each) for each in EXACT_CASES]
    return run_calls(
        [*calls, (reduced, "tp2 ep2", "deepseek"), (not_summed, "tp2 ep2", "deepseek")],
        2,
    )


def test_sums_are_one(answers: list[Any]) -> None:
    """Of two layers: the embedding, two attentions, one dense MLP, and one sum for both kinds of experts."""
    assert answers[0][-2] == {"inference": 5, "training": 5}


def test_and_exact(answers: list[Any]) -> None:
    for i, each in enumerate(EXACT_CASES):
        errors = worst([answer[i] for answer in answers])
        assert max(errors.values()) < EXACT, (each.name, errors)
    control = worst([answer[-1] for answer in answers])
    assert not max(control.values()) < 1e-3, "a sum that is left out is not seen"
