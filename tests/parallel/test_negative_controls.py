"""Mutations, each of which makes the exactness check fail: what the check is worth.

Every case is measured twice in one world: as it is (exact), then with one thing changed (far off).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import EXACT, Case, case, measure, world_of, worst
from plait.collectives import autograd
from plait.collectives.autograd import regions
from plait.cuda_kernels.scores import Interleave
from plait.parallel import layout, tensor
from plait.parallel.attention import exchange, gradients, heads, helix, mla, role, step
from world import run_calls

Mutation = Callable[[], Any]


def shard_by_rank_number() -> Any:
    """The output projection's shard by rank number, not by head run (NVIDIA/TensorRT-LLM #10350)."""

    def cut(count_heads: int, width: int, count: int, order: Any, dim: int = 0) -> Any:
        return heads.query_cut(count_heads, width, count, range(count) if dim == 1 else order, dim)

    return patch.object(role, "query_cut", cut)


def lse_base_2() -> Any:
    """The exchange takes a base-2 lse for a natural one."""
    original = exchange.merge_states
    return patch.object(
        exchange, "merge_states", lambda o, lse, sink: original(o, lse / math.log(2), sink)
    )


def sink_on_every_shard() -> Any:
    """Each rank counts the sink in its own denominator."""
    original = helix.HelixLayer._exchange

    def exchanged(self: Any, o: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
        if sink is not None:
            with_sink = torch.logaddexp(lse, sink.expand_as(lse))
            o, lse = o * (lse - with_sink).exp().unsqueeze(-1), with_sink
        return original(self, o, lse, None)

    return patch.object(helix.HelixLayer, "_exchange", exchanged)


def unmasked_empty_shard() -> Any:
    """A shard that has nothing for a row answers NaN with a finite lse, as a kernel that does not mask it does."""
    original = helix.HelixLayer._exchange

    def exchanged(self: Any, o: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
        empty = torch.isneginf(lse)
        return original(
            self, o.masked_fill(empty.unsqueeze(-1), math.nan), lse.masked_fill(empty, 0.0), sink
        )

    return patch.object(helix.HelixLayer, "_exchange", exchanged)


def empty_shard_with_weight() -> Any:
    """The same with zeros: no NaN gives it away, only wrong weights."""
    original = helix.HelixLayer._exchange

    def exchanged(self: Any, o: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
        return original(self, o, lse.masked_fill(torch.isneginf(lse), 0.0), sink)

    return patch.object(helix.HelixLayer, "_exchange", exchanged)


def _bounds(bound: Callable[[Any, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Any:
    """Replace every row's bound: ``bound(rule, position, number of the row from the last, last position)``."""
    original = helix.make_step

    def made(
        batch: int, length: int, past: Any, valid: Any, mode: str, rule: Any, device: Any = "cpu"
    ) -> Any:
        right = original(batch, length, past, valid, mode, rule, device)
        assert mode == "partials"
        position = np.concatenate(
            [np.arange(p, p + c) for p, c in zip(right.past, right.counts, strict=True)]
        )
        from_last = np.concatenate([np.arange(c)[::-1] for c in right.counts])
        last = position + from_last
        return replace(
            right,
            hi=torch.from_numpy(
                np.minimum(bound(rule, position, from_last, last), right.hi.numpy() + 99)
            ),
        )

    return patch.object(helix, "make_step", made)


def scalar_verify_bound() -> Any:
    """Row i of M sees len_r(last) - (M - 1 - i) local keys (FlashInfer #4323, vLLM #47181)."""
    return _bounds(
        lambda rule, _, from_last, last: (step.local_lengths(last + 1, rule) - from_last).clip(0)
    )


def bound_one_short() -> Any:
    """Each row sees the keys before it, but not its own."""
    return _bounds(lambda rule, position, *_: step.local_lengths(position, rule))


def interleave_off_by_one() -> Any:
    """The bounds follow a run of n + 1 tokens, the owners one of n."""

    def bound(rule: Interleave, position: np.ndarray, _: Any, last: np.ndarray) -> np.ndarray:
        wrong = step.local_lengths(position + 1, Interleave(rule.run + 1, rule.shards, rule.shard))
        return np.minimum(wrong, step.local_lengths(last + 1, rule))

    return _bounds(bound)


def norm_gradient_not_summed() -> Any:
    """The gradient of a QK norm is only that of this rank's heads."""
    return patch.object(role.Shared, "edits", lambda *_: [])


def latent_gradient_not_summed() -> Any:
    """The gradient of MLA's down projections is only that of this rank's heads."""
    return patch.object(mla.Shared, "edits", lambda *_: [])


def bias_on_every_rank() -> Any:
    """A row-parallel bias is added before the sum, once per rank."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return self._plait.leave(F.linear(input, self.weight, self.bias))

    return patch.object(tensor.RowLinear, "forward", forward)


def copied_heads_not_summed() -> Any:
    """Each copy of a KV head keeps the gradient of its own query heads."""
    return patch.object(role, "held_gradient_edits", lambda *_: [])


def only_whole_copies_summed() -> Any:
    """Copies are seen only where two ranks hold all the same rows, not in a fused projection."""
    original = layout.Cut.shared

    def shared(self: Any, rank: int) -> Any:
        return {} if len(self.runs[rank]) > 1 else original(self, rank)

    return patch.object(layout.Cut, "shared", shared)


def enter_without_sum() -> Any:
    """The gradient that leaves a region backwards stays partial."""
    return patch.object(regions._Enter, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def gathered_keys_not_summed() -> Any:
    """The gradient of gathered keys is only that of this rank's rows."""

    def gather(x: Tensor, group: Any, dim: int, sizes: Any, *, partial: bool = False) -> Tensor:
        return autograd.gather(x, group, dim, sizes, partial=False)

    mutated = type(
        "mutated",
        (),
        {"gather": staticmethod(gather), "all_to_all": staticmethod(autograd.all_to_all)},
    )
    return patch.object(exchange, "autograd", mutated)


def vocabulary_in_rank_order() -> Any:
    """The parts of the logits are put side by side as the ranks are numbered."""

    def gather(local: Tensor, here: Any) -> Tensor:
        return autograd.gather(
            local, here.group, local.dim() - 1, [here.sizes[c] for c in here.order]
        )

    return patch.object(tensor, "gather_parts", gather)


@contextmanager
def halves_cut_as_one() -> Iterator[None]:
    """A fused gate and up projection is cut as if it were one matrix."""
    original = layout.Cut.chunks

    def chunks(dim: int, length: int, order: Any, parts: int = 1) -> Any:
        return original(dim, length, order)

    with patch.object(layout.Cut, "chunks", chunks):
        yield


def keys_in_shard_order() -> Any:
    """Gathered keys stay in the order of the shards, not of their positions."""
    original = helix.make_step

    def made(*args: Any) -> Any:
        right = original(*args)
        return replace(right, key_order=torch.arange(len(right.key_order)))

    return patch.object(helix, "make_step", made)


def rows_not_restored() -> Any:
    """Own rows come back in the order of their owners."""
    original = helix.make_step

    def made(*args: Any) -> Any:
        right = original(*args)
        return replace(right, restore=torch.arange(len(right.restore)))

    return patch.object(helix, "make_step", made)


P = "exchange=partials"
CONTROLS: list[tuple[Mutation, Case]] = [
    (shard_by_rank_number, case("kvp2 tp2", "llama", ["train"])),
    (lse_base_2, case(f"kvp2,interleave=2,{P}", "llama", ["train"])),
    (lse_base_2, case("kvp2,interleave=2", "llama", ["steps"])),
    (sink_on_every_shard, case(f"kvp2,interleave=2,{P}", "gpt_oss", ["train"])),
    (sink_on_every_shard, case(f"kvp2,interleave=2,{P}", "gpt_oss", ["steps"])),
    (unmasked_empty_shard, case(f"kvp2,interleave=16,{P}", "qwen3", ["steps"])),
    (empty_shard_with_weight, case(f"kvp2,interleave=16,{P}", "qwen3", ["steps"])),
    (scalar_verify_bound, case(f"kvp2,interleave=2,{P}", "llama", ["steps"])),
    (scalar_verify_bound, case(f"kvp4,interleave=4,{P}", "llama", ["steps"])),
    (bound_one_short, case(f"kvp2,interleave=2,{P}", "llama", ["steps"])),
    (interleave_off_by_one, case(f"kvp2,interleave=2,{P}", "llama", ["steps"])),
    (norm_gradient_not_summed, case("tp2", "qwen3", ["train"])),
    (norm_gradient_not_summed, case("kvp2", "qwen3", ["train"])),
    (latent_gradient_not_summed, case("tp2", "deepseek", ["train"])),
    (bias_on_every_rank, case("tp2", "llama", ["steps"])),
    (copied_heads_not_summed, case("tp2,replicate_kv=true", "llama", ["train"], kv_heads=1)),
    (copied_heads_not_summed, case(f"kvp2,interleave=2,{P}", "llama", ["train"])),
    (only_whole_copies_summed, case("tp2,replicate_kv=true", "phi3", ["train"], kv_heads=1)),
    (enter_without_sum, case("tp2", "llama", ["train"])),
    (gathered_keys_not_summed, case("kvp2,interleave=2,exchange=kv", "llama", ["train"])),
    (keys_in_shard_order, case("kvp2,interleave=2,exchange=kv", "llama", ["train"])),
    (rows_not_restored, case("kvp2,interleave=2,exchange=kv", "llama", ["train"])),
    (vocabulary_in_rank_order, case("kvp2 tp2", "llama", ["train"])),
    (halves_cut_as_one, case("tp2 etp2", "mixtral", ["steps"])),
]
ANSWERS: dict[int, tuple[dict[str, float], dict[str, float]]] = {}


def both(number: int) -> tuple[dict[str, float], dict[str, float]]:
    """Errors as it is, and mutated."""
    mutation, each = CONTROLS[number]
    return measure(each), measure(each, mutation)


def answer(number: int) -> tuple[dict[str, float], dict[str, float]]:
    """The largest errors over the ranks; controls of one world size share worlds, eight at a time."""
    if number not in ANSWERS:
        size = world_of(CONTROLS[number][1].plan)
        alike = [n for n, (_, each) in enumerate(CONTROLS) if world_of(each.plan) == size]
        at = alike.index(number) // 8 * 8
        batch = alike[at : at + 8]
        ranks = run_calls([(both, n) for n in batch], size)
        for i, n in enumerate(batch):
            ANSWERS[n] = (worst([r[i][0] for r in ranks]), worst([r[i][1] for r in ranks]))
    return ANSWERS[number]


@pytest.mark.parametrize(
    "number", range(len(CONTROLS)), ids=[f"{m.__name__}-{c.name}-{c.parts[0]}" for m, c in CONTROLS]
)
def test_a_mutation_is_noticed(number: int) -> None:
    exact, mutated = answer(number)
    print("as it is", exact, "mutated", mutated)
    assert max(exact.values()) < EXACT
    assert not max(mutated.values()) < 1e-3, "the mutated version passes: the check is blind to it"


def test_every_control_is_different() -> None:
    assert len({(m.__name__, c.name, c.parts) for m, c in CONTROLS}) == len(CONTROLS)
    assert gradients.held_gradient_edits is role.held_gradient_edits  # patched where it is used
