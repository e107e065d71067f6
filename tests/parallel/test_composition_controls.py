"""Mutations of how axes meet, each of which the exactness of compositions must notice.

Those of one axis stand with its tests: rows not unpermuted, tied copies apart, keys of the wrong head, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from exactness import EXACT, Case, case, worst
from plait.parallel import api, sequence
from plait.parallel.context.binding import ContextBinding
from plait.parallel.context.visible import Visible
from plait.parallel.edits import AddHook, SumGradient
from plait.parallel.experts import role
from training import composed
from world import run_calls

Mutation = Callable[[], AbstractContextManager[Any]]
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def expert_gradients_like_everybodys() -> Any:
    """Experts are summed over edp, and averaged over dp as well, as if its ranks held the same experts."""

    def gradients(self: Any, module: Any, name: str, place: Any) -> list[SumGradient]:
        return [SumGradient(module, name, place.replicas)]

    return patch.object(role.RoutedExperts, "_gradients", gradients)


def mask_off_by_one_at_the_ring_boundary() -> Any:
    """Rows see one key too many of the other ranks."""

    def mask(self: Visible, source: int, rows: slice, keys: slice) -> Tensor:
        other = self.keys[source] is not self.rows
        return self.sees(self.rows[rows], (self.keys[source][keys] - int(other)).clamp_min(0))

    return patch.object(Visible, "mask", mask)


def own_tokens_balanced() -> Any:
    """Under sequence parallelism each rank balances its own tokens, taken as often as makes up for all."""

    def outputs_edit(model: Any, ranks: Any) -> AddHook:
        def repeat(_: Any, args: Any, output: Any) -> None:
            rows, logits = output[0].shape[:2].numel(), output.router_logits
            output["router_logits"] = tuple(r.repeat(ranks.size + 1, 1)[:rows] for r in logits)

        return AddHook(lambda: model.base_model.register_forward_hook(repeat, prepend=True))

    return patch.object(sequence, "outputs_edit", outputs_edit)


def sums_on_modules_that_left() -> Any:
    """A stage hangs cp's sum of its tied parameter on the module that is on the other stage."""
    original = api.gradient_edits
    return patch.object(api, "gradient_edits", lambda *given: original(*given[:3]))


def places_moved_on_arrival() -> Any:
    """Activations that arrive at a stage are taken for tokens further on, on each rank by another distance."""
    original = ContextBinding.cut

    def cut(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
        args, values = original(self, module, args, kwargs)
        passing, state = self.state.passing, self.state
        if passing is not None and passing.length is not None:
            values["position_ids"] = values["position_ids"] + state.rank
        return args, values

    return patch.object(ContextBinding, "cut", cut)


CONTROLS: list[tuple[Mutation, Case]] = [
    (expert_gradients_like_everybodys, case("dp2 cp2 ep2", "mixtral")),
    (own_tokens_balanced, case("tp2:sp dp2 ep4", "qwen3_moe", **AUX)),
    (mask_off_by_one_at_the_ring_boundary, case("pp2 cp2", "llama")),
    (places_moved_on_arrival, case("pp2 cp2", "llama")),
    (sums_on_modules_that_left, case("pp2 cp2", "llama")),
]


def mutated(number: int) -> dict[str, float]:
    mutation, each = CONTROLS[number]
    with mutation():
        return composed(each, 1)


@pytest.fixture(scope="module")
def answers() -> tuple[dict[Case, dict[str, float]], list[dict[str, float]]]:
    """Errors of each case as it is, and of each mutation, measured in one world."""
    cases = list(dict.fromkeys(each for _, each in CONTROLS))
    calls = [(composed, each, 1) for each in cases] + [(mutated, n) for n in range(len(CONTROLS))]
    found = [worst(each) for each in zip(*run_calls(calls, 4), strict=True)]
    return dict(zip(cases, found, strict=False)), found[len(cases) :]


@pytest.mark.parametrize("number", range(len(CONTROLS)), ids=[m.__name__ for m, _ in CONTROLS])
def test_a_mutation_is_noticed(number: int, answers: Any) -> None:
    exact, wrong = answers[0][CONTROLS[number][1]], answers[1][number]
    print("as it is", exact, "mutated", wrong)
    assert max(exact.values()) < EXACT
    assert not wrong["gradients"] < 1e-4, "the check is blind to it"
