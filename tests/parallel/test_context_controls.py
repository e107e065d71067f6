"""Mutations of context parallelism, each of which the exactness check must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from context_exactness import measure
from torch import Tensor

from exactness import EXACT, Case, case, worst
from plait.collectives.ring_exchange import Homecoming
from plait.parallel import api
from plait.parallel.context import attention, ring
from plait.parallel.context.binding import ContextBinding
from plait.parallel.context.order import SequenceOrder
from plait.parallel.context.visible import Visible
from world import run_calls

Mutation = Callable[[], Any]


def mask_off_by_one_at_the_boundary() -> Any:
    """Rows see one key too many of the other ranks, none of their own."""

    def mask(self: Visible, source: int, rows: slice, keys: slice) -> Tensor:
        other = self.keys[source] is not self.rows
        return self.sees(self.rows[rows], (self.keys[source][keys] - int(other)).clamp_min(0))

    return patch.object(Visible, "mask", mask)


def masks_for_contiguous_parts() -> Any:
    """Tokens are held in zig-zag order, and masked as if each rank held a run."""
    starts = lambda self, place: sum(self.counts[:place])  # noqa: E731
    return patch.object(
        SequenceOrder,
        "place_index",
        lambda self, place: torch.arange(self.counts[place]) + starts(self, place),
    )


def positions_of_contiguous_parts() -> Any:
    """Tokens are held in zig-zag order, and turned by RoPE as if each rank held a run."""
    original = SequenceOrder.take

    def take(self: SequenceOrder, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        if x.dim() == 2 and torch.equal(x[0], torch.arange(x.shape[1])):
            return x[:, sum(self.counts[:rank]) :][:, : self.counts[rank]]
        return original(self, x, rank, dim)

    return patch.object(SequenceOrder, "take", take)


def lse_base_2() -> Any:
    """Partials are merged with a base-2 lse."""
    original = ring.partial_attention

    def partial_attention(*args: Any) -> tuple[Tensor, Tensor]:
        o, lse = original(*args)
        return o, lse / math.log(2)

    return patch.object(ring, "partial_attention", partial_attention)


def travelling_gradients_lost() -> Any:
    """The gradients of keys and values are those of this rank's own rows only."""

    def add(self: Homecoming, x: Tensor) -> None:
        self.total = x if self.total is None else self.total

    return patch.object(Homecoming, "add", add)


def travelling_gradients_not_carried_home() -> Any:
    """The sums are kept by the rank they reach last, one place from home."""
    original = Homecoming.add

    def add(self: Homecoming, x: Tensor) -> None:
        original(self, x)
        assert self.passing is not None
        self.total = self.passing.sent

    def home(self: Homecoming) -> Tensor:
        assert self.passing is not None
        size, total = self.passing.wait().numel(), self.total
        assert total is not None
        return torch.cat([total, total])[:size]

    stack = ExitStack()
    stack.enter_context(patch.object(Homecoming, "add", add))
    stack.enter_context(patch.object(Homecoming, "home", home))
    return stack


def mean_of_means() -> Any:
    """Each rank divides by its own number of labels."""
    original = ContextBinding.cut_labels

    def cut_labels(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
        args, values = original(self, module, args, kwargs)
        own = (values["shift_labels"] != -100).sum()
        return args, {**values, "num_items_in_batch": own * self.state.ranks.cp}

    return patch.object(ContextBinding, "cut_labels", cut_labels)


def labels_shifted_in_each_part() -> Any:
    """Labels are cut first and shifted then: wrong where chunks meet."""
    original = SequenceOrder.take

    def take(self: SequenceOrder, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        if (x[:, -1] == -100).all():  # labels shifted over the whole sequence
            labels = original(self, x.roll(1, 1), rank, dim)
            return torch.cat([labels[:, 1:], labels.new_full((len(x), 1), -100)], 1)
        return original(self, x, rank, dim)

    return patch.object(SequenceOrder, "take", take)


def gradients_not_summed() -> Any:
    """Every rank keeps the gradients of its own tokens."""
    return patch.object(api, "gradient_edits", lambda *_: [])


def balance_of_own_tokens() -> Any:
    """The balancing loss is that of each rank's tokens."""
    return patch.object(ContextBinding, "_router", lambda _, logits: logits)


def sinks_of_the_first_heads() -> Any:
    """Every rank of a Ulysses group takes the sinks of the first run of heads."""
    original = attention.SpreadMask._exchange

    def exchange(self: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Any:
        assert sink is not None
        *found, _ = original(self, q, k, v, sink)
        return (*found, sink[: len(sink) // self.spread.ulysses.size()])

    return patch.object(attention.SpreadMask, "_exchange", exchange)


def key_heads_in_rank_order() -> Any:
    """With fewer KV heads than ranks, rank r gets KV head r modulo their number."""
    return patch.object(
        attention, "key_heads", lambda heads, kv, ranks: [r % kv for r in range(max(kv, ranks))]
    )


def tokens_not_sorted() -> Any:
    """The tokens of a Ulysses group stay in the order of its ranks."""
    return patch.object(
        attention.Spread, "sorting", property(lambda self: torch.arange(sum(self.counts)))
    )


CONTROLS: list[tuple[Mutation, Case, str]] = [
    (mask_off_by_one_at_the_boundary, case("cp2", "qwen3", ["loss"]), "padded"),
    (masks_for_contiguous_parts, case("cp2", "qwen3", ["loss"]), "padded"),
    (positions_of_contiguous_parts, case("cp2", "qwen3", ["loss"]), "padded"),
    (lse_base_2, case("cp2", "qwen3", ["loss"]), "padded"),
    (travelling_gradients_lost, case("cp2", "qwen3", ["loss"]), "padded"),
    (travelling_gradients_not_carried_home, case("cp2", "qwen3", ["loss"]), "padded"),
    (mean_of_means, case("cp2", "qwen3", ["loss"]), "padded"),
    (labels_shifted_in_each_part, case("cp2", "qwen3", ["loss"]), "documents"),
    (gradients_not_summed, case("cp2", "qwen3", ["loss", "steps1"]), "padded"),
    (balance_of_own_tokens, case("cp2", "mixtral", ["loss"], output_router_logits=True), "short20"),
    (sinks_of_the_first_heads, case("cp2:ulysses", "gpt_oss", ["loss"]), "padded"),
    (key_heads_in_rank_order, case("cp4:ulysses", "qwen3", ["loss"], kv_heads=2), "padded"),
    (tokens_not_sorted, case("cp4:ring,ulysses=2", "qwen3", ["loss"]), "padded"),
]
ANSWERS: dict[int, tuple[dict[str, float], dict[str, float]]] = {}


def both(number: int) -> tuple[dict[str, float], dict[str, float]]:
    """Errors as it is, and mutated."""
    mutation, each, batch = CONTROLS[number]
    return measure(each, batch), measure(each, batch, mutation)


@pytest.mark.parametrize(
    "number", range(len(CONTROLS)), ids=[f"{m.__name__}-{c.name}" for m, c, _ in CONTROLS]
)
def test_a_mutation_is_noticed(number: int) -> None:
    if number not in ANSWERS:
        size = int(CONTROLS[number][1].plan[2])
        alike = [n for n, (_, c, _) in enumerate(CONTROLS) if int(c.plan[2]) == size]
        ranks = run_calls([(both, n) for n in alike], size)
        for i, n in enumerate(alike):
            ANSWERS[n] = (worst([r[i][0] for r in ranks]), worst([r[i][1] for r in ranks]))
    exact, mutated = ANSWERS[number]
    print("as it is", exact, "mutated", mutated)
    assert max(exact.values()) < EXACT
    assert not max(mutated.values()) < 1e-4, "the mutated version passes: the check is blind to it"
