"""Routing that leaves experts, or ranks, without work; and mutations that the exactness of experts notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from exactness import EXACT, Case, Pair, case, worst
from plait.collectives.trace import Trace
from plait.parallel.data import replicas
from plait.parallel.edits import SumGradient
from plait.parallel.experts import dispatch, role
from plait.parallel.experts.place import Place
from routing_extremes import nan_logits, one_way, single_token
from training import trained
from world import run_calls

TOKENS = "tp2 ep2,exchange=tokens"
SUMS = "tp2 ep2,exchange=sums"


def sent(plan: str) -> dict[str, float]:
    """Under even routing the trace holds the bytes of the formula."""
    pair = Pair.of(case(plan, "mixtral"))
    layer = pair.model.model.layers[0].mlp.experts
    place: Place = layer._plait_experts.place
    count, top_k, width = 16, 2, 48
    index = (torch.arange(count)[:, None] + torch.arange(top_k)) % place.experts
    hidden = torch.randn(count, width, dtype=torch.float64)
    with torch.no_grad(), Trace() as trace:
        layer(hidden, index, torch.rand(count, top_k, dtype=torch.float64))
    rows = sum(e.sent_bytes for e in trace.events if e.op == "all_to_all")
    own = count // (1 if place.alike is None else place.alike.size)
    formula = 2 * own * top_k * (place.etp - 1 / place.along_ep.size) * width * 8
    return {"bytes": abs(rows - formula)}


def test_routing_without_work_for_all() -> None:
    calls: list[Any] = []
    for plan in (TOKENS, SUMS):
        calls += [(one_way, plan), (single_token, plan, "mixtral"), (nan_logits, plan)]
    calls += [(one_way, "dp2 ep2"), (sent, TOKENS), (sent, "dp2 ep2"), (sent, "dp2 etp2")]
    answers = run_calls(calls, 2)
    for i, call in enumerate(calls):
        errors = worst([answer[i] for answer in answers])
        print(call[0].__name__, call[1], errors)
        assert max(errors.values()) < EXACT, call


# --- mutations --------------------------------------------------------------------------------


def averaged_over_dp() -> Any:
    """Expert gradients are averaged over dp like everybody's, as if its ranks held the same experts."""
    return patch.object(
        role.RoutedExperts, "_gradients", lambda self, m, n, p: [SumGradient(m, n, p.replicas)]
    )


def not_divided() -> Any:
    """Nobody divides the sum of the dp ranks' gradients."""
    return patch.object(replicas, "hook_gradient", lambda parameter, hook: Mock())


@contextmanager
def experts_swapped() -> Iterator[None]:
    """The ranks take the experts for the other way round."""
    with patch.object(
        Place, "first", property(lambda p: p.experts - p.held * (p.along_ep.index + 1))
    ):
        yield


def not_unpermuted() -> Any:
    """Rows are put in order again by the order itself instead of its inverse."""
    return patch.object(dispatch, "inverse", lambda order: order)


def not_sorted() -> Any:
    """Received rows stay in the order (source, expert)."""
    return patch.object(dispatch, "by_expert", lambda received: torch.arange(int(received.sum())))


CONTROLS: list[tuple[Any, Case]] = [
    (averaged_over_dp, case("dp2 ep2", "mixtral")),
    (not_divided, case("dp2 ep2", "gpt_oss")),
    (experts_swapped, case(SUMS, "mixtral")),
    (not_unpermuted, case(TOKENS, "mixtral")),
    (not_sorted, case("dp2 ep2", "qwen3_moe")),
]


def both(number: int) -> tuple[dict[str, float], dict[str, float]]:
    mutation, each = CONTROLS[number]
    exact = trained(each, 1)
    with mutation():
        return exact, trained(each, 1)


def test_a_mutation_is_noticed() -> None:
    answers = run_calls([(both, n) for n in range(len(CONTROLS))], 2)
    for i, (mutation, each) in enumerate(CONTROLS):
        exact, mutated = (worst([answer[i][k] for answer in answers]) for k in range(2))
        print(mutation.__name__, each.name, exact, mutated)
        assert max(exact.values()) < EXACT
        assert not mutated["gradients"] < 1e-3, f"{mutation.__name__}: the check is blind to it"


@pytest.mark.parametrize("rows", [0, 5])
def test_a_formula_that_cannot_fail_is_none(rows: int) -> None:
    """The order of rows and its inverse undo each other."""
    order = torch.randperm(rows)
    assert torch.equal(order[dispatch.inverse(order)], torch.arange(rows))
