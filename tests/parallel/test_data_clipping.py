"""The norm of all gradients, over every axis, is one process'; so are the steps that are clipped by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from exactness import assert_exact, case, far, worst
from models import tiny
from plait.parallel import clip_grad_norm_, clipping, parallelize
from training import batch_of, labelled, loss, trained
from world import run_calls, run_world

MOST = 0.002
CASES = [
    case("tp2:sp dp2", "qwen3"),
    case("tp4,replicate_kv=true", "qwen3", kv_heads=2),
    case("kvp2 tp2", "phi3"),
    case("dp2:shard tp2,replicate_kv=true", "qwen3", kv_heads=1),
    case("tp2 dp2 ep4", "mixtral"),
    case("dp2 cp2", "llama"),
]
STAGED = [case("pp2 tp2", "llama"), case("dp2 pp2", "llama")]  # tied over two stages


def test_steps_with_clipping() -> None:
    calls = [(clipped, each, False) for each in CASES] + [(clipped, each, True) for each in STAGED]
    answers = run_calls(calls, 4)
    for i, each in enumerate([*CASES, *STAGED]):
        print(each.name)
        assert_exact(worst([answer[i] for answer in answers]))


def clipped(each: object, staged: bool) -> dict[str, float]:
    return trained(each, 3, loss=labelled if staged else loss, batch=4, max_norm=MOST)  # type: ignore[arg-type]


def infinite() -> list[str]:
    """A number that is not finite on one rank is an error on all, and nothing is scaled."""
    model = parallelize(tiny("llama"), "tp2")
    loss(model, batch_of(0)).backward()
    p = next(p for n, p in model.named_parameters() if "q_proj.weight" in n)
    assert p.grad is not None
    if model._plait.ranks.index == 1:
        p.grad[0, 0] = float("inf")
    before = model.model.norm.weight.grad.clone()
    with pytest.raises(RuntimeError, match="norm of the gradients is inf") as said:
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    assert torch.equal(model.model.norm.weight.grad, before)
    return [str(said.value)]


def test_a_norm_that_is_not_finite() -> None:
    one, other = run_world(infinite, 2)
    assert one == other


def test_without_a_plan() -> None:
    models = [tiny("llama") for _ in range(2)]
    for model in models:
        loss(model, batch_of(0)).backward()
    found = clip_grad_norm_(models[0], MOST)
    right = torch.nn.utils.clip_grad_norm_(models[1].parameters(), MOST)
    assert far(found, right) < 1e-12
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert far(p.grad, q.grad) < 1e-12


def copies() -> dict[str, float]:
    """A mutation: every rank counts what it has."""

    def of(self: clipping.Share, grad: Tensor) -> Tensor:
        return grad.to(torch.float64).square().sum()

    clipping.Share.of = of  # type: ignore[method-assign]
    return clipped(case("tp2:sp dp2", "qwen3"), False)


def twice_tied() -> dict[str, float]:
    """A mutation: both stages count the embedding."""
    clipping.counted_elsewhere = lambda model, done: set()  # type: ignore[assignment]
    return clipped(case("dp2 pp2", "llama"), True)


@pytest.mark.parametrize("mutation", [copies, twice_tied])
def test_a_norm_that_counts_copies_is_seen(mutation: Callable[[], dict[str, float]]) -> None:
    errors = worst(run_world(mutation, 4))
    assert errors["gradients"] < 1e-9
    assert errors["norm"] > 1e-3
