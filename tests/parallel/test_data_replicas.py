"""dp as replicas: gradients are the mean over dp, equal to one process that accumulates over the dp batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from exactness import EXACT, Pair, assert_exact, case, far, worst
from models import tiny, tokens
from plait.collectives.world import CHOSEN
from plait.parallel import parallelize, unparallelize
from plait.parallel.data import replicas
from plait.parallel.data.replicas import Bucket, Reducer
from training import assert_as_one_process, batch_of, coordinate, gradient_errors, loss, trained
from world import run_calls, run_world

CASES = {
    2: [case("dp2", "llama"), case("dp2", "mixtral")],
    4: [
        case("dp2 tp2", "llama"),
        case("dp2 tp2:sp", "qwen3"),
        case("dp2 kvp2", "phi3"),
        case("dp2 tp2 etp2", "mixtral"),
        case("dp4", "gemma3"),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_ten_steps_are_those_of_one_process(ranks: int) -> None:
    assert_as_one_process(trained, CASES[ranks], ranks)


def over_gloo() -> dict[str, float]:
    world = dist.group.WORLD
    assert world is not None
    world._set_group_desc(CHOSEN)
    return trained(case("dp2", "llama"), 1)


def test_over_gloo() -> None:
    assert_exact(worst(run_world(over_gloo, 2)))


# --- what surrounds a step --------------------------------------------------------------------


def accumulated(plan: str) -> dict[str, float]:
    """Two batches a rank: with one reduction at the end, and with one each."""
    errors = {}
    for sync in (False, True):
        pair = Pair.of(case(plan, "llama"))
        dp, d = pair.model._plait.plan.dp.size, coordinate(pair.model)
        for at in range(2):
            for other in range(dp):
                (loss(pair.reference, batch_of(other, at)) / dp).backward()
        if sync:
            loss(pair.model, batch_of(d, 0)).backward()
        else:
            with pair.model.no_sync():
                loss(pair.model, batch_of(d, 0)).backward()
        loss(pair.model, batch_of(d, 1)).backward()
        errors[f"sync {sync}"] = max(gradient_errors(pair).values())
    return errors


def two_forwards(plan: str) -> dict[str, float]:
    """One backward of two forwards, with checkpointing of both kinds."""
    errors = {}
    for reentrant in (None, False, True):
        pair = Pair.of(case(plan, "llama"))
        dp, d = pair.model._plait.plan.dp.size, coordinate(pair.model)
        pair.model.train()
        if reentrant is not None:
            pair.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                pair.model.enable_input_require_grads()
        for other in range(dp):
            both = [loss(pair.reference, batch_of(other, at)) for at in range(2)]
            (sum(both) / dp).backward()  # type: ignore[union-attr]
        sum(loss(pair.model, batch_of(d, at)) for at in range(2)).backward()  # type: ignore[union-attr]
        errors[f"reentrant {reentrant}"] = max(gradient_errors(pair).values())
    return errors


def frozen(plan: str) -> dict[str, float]:
    """Frozen parameters take no gradient and send nothing; unfrozen later, theirs is averaged."""
    pair = Pair.of(case(plan, "llama"))
    dp, d = pair.model._plait.plan.dp.size, coordinate(pair.model)
    errors = {}
    for wanted in (False, True):
        for model in (pair.reference, pair.model):
            model.zero_grad()
            for n, p in model.named_parameters():
                p.requires_grad_(wanted or "mlp" not in n)
        for other in range(dp):
            (loss(pair.reference, batch_of(other)) / dp).backward()
        loss(pair.model, batch_of(d)).backward()
        assert wanted or all(p.grad is None for n, p in pair.model.named_parameters() if "mlp" in n)
        errors[f"wanted {wanted}"] = max(gradient_errors(pair).values())
    return errors


def around() -> list[dict[str, float]]:
    return [accumulated("dp2 tp2"), two_forwards("dp2 tp2"), frozen("dp2 tp2")]


def test_accumulation_checkpointing_and_frozen_parameters() -> None:
    answers = run_world(around, 4)
    for errors in zip(*answers, strict=True):
        assert_exact(worst(errors))


class Branches(nn.Module):
    """A branch for each word, and one that nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.never = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x: Tensor, word: str) -> Tensor:
        return getattr(self, word)(x)


def branches() -> dict[str, float]:
    """Ranks that use other parameters: zeros count in the mean; what nobody uses keeps no gradient."""
    model = parallelize(Branches(), "dp2")
    right = Branches()
    x = [torch.full((3, 4), 1.0 + r, dtype=torch.float64) for r in range(2)]
    for r, word in enumerate("ab"):
        (right(x[r], word).square().sum() / 2).backward()
    rank = dist.get_rank()
    model(x[rank], "ab"[rank]).square().sum().backward()
    assert model.never.weight.grad is None
    return {
        n: far(p.grad, right.get_parameter(n).grad)  # type: ignore[arg-type]
        for n, p in model.named_parameters()
        if "never" not in n
    }


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise OSError("in backward")


def raised() -> dict[str, float]:
    """After a backward that raised on every rank, the next one is right."""
    model, right = parallelize(Branches(), "dp2"), Branches()
    x = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(OSError, match="in backward"):
        model.b(Raises.apply(model(x, "a"))).sum().backward()
    model.zero_grad()
    model(x, "a").square().sum().backward()
    right(x, "a").square().sum().backward()
    assert right.a.weight.grad is not None
    return {"a": far(model.a.weight.grad, right.a.weight.grad)}


def test_unused_parameters_and_a_backward_that_raised() -> None:
    for answers in zip(*run_calls([(branches,), (raised,)], 2), strict=True):
        assert_exact(worst(answers))


def undone() -> bool:
    model = tiny("llama")
    reference = copy.deepcopy(model)
    hooks = len(model._forward_hooks)
    unparallelize(parallelize(model, "dp2 tp2"))
    assert len(model._forward_hooks) == hooks
    assert "no_sync" not in vars(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss(model, batch_of(dist.get_rank())).backward()  # each rank alone: no collective is left
    return all(
        torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )


def test_undo() -> None:
    assert all(run_world(undone, 4))


def sampled() -> list[list[int]]:
    """Model copies generate from their own prompts, and the ranks of a copy draw the same tokens."""
    model = parallelize(tiny("llama"), "dp2 tp2")
    torch.manual_seed(dist.get_rank())
    d = coordinate(model)
    ids = tokens(1, 5 + d, seed=d)
    return model.generate(ids, max_new_tokens=4 + d, do_sample=True, pad_token_id=0).tolist()


def test_copies_generate_apart() -> None:
    one, same, other, alike = run_world(sampled, 4)
    assert one == same
    assert other == alike
    assert len(one[0]) == 9
    assert len(other[0]) == 11


def overlapped() -> list[int]:
    """How many buckets were on their way when each was filled: all but the last leave before backward ends."""
    replicas.BUCKET_BYTES = 10_000
    model = parallelize(tiny("llama", tie_word_embeddings=False), "dp2")
    sent: list[int] = []
    original = Reducer._finish

    def finish(self: Reducer) -> None:
        sent.append(self._sent)
        sent.append(len(self._buckets))
        original(self)

    Reducer._finish = finish  # type: ignore[method-assign]
    loss(model, batch_of(dist.get_rank())).backward()
    return sent


def test_buckets_are_sent_while_backward_runs() -> None:
    for sent, count in run_world(overlapped, 2):
        assert count > 4
        assert sent == count


# --- negative controls ------------------------------------------------------------------------


def summed() -> dict[str, float]:
    """A mutation: the sum over dp where the mean belongs."""
    original = Bucket.finish
    Bucket.finish = lambda self, ranks: original(self, 1)  # type: ignore[method-assign]
    return trained(case("dp2", "llama"), 1)


def unsent() -> dict[str, float]:
    """A mutation: no reduction at all."""
    Reducer.begin = lambda self: None  # type: ignore[method-assign]
    Reducer.ready = lambda self, p: None  # type: ignore[method-assign]
    return trained(case("dp2", "llama"), 1)


@pytest.mark.parametrize("mutation", [summed, unsent])
def test_a_wrong_reduction_is_seen(mutation: Callable[[], dict[str, float]]) -> None:
    errors = worst(run_world(mutation, 2))
    assert errors["gradients"] > 1e-3
    assert errors["parameters"] > EXACT
