"""Train a parallel model and the untouched one side by side: the rank's side of the tests of dp, pp and clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from exactness import Case, Pair, assert_exact, far, loss_of, worst
from models import StayFloat64, tokens
from plait.parallel import clip_grad_norm_
from world import PATIENCE_S, run_calls

Loss = Callable[[Any, tuple[Tensor, Tensor]], Tensor]


def batch_of(d: int, step: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """The padded batch of dp coordinate d; its length differs from the others'."""
    ids = tokens(batch, 9 + 4 * d, seed=10 * step + d)
    mask = torch.ones_like(ids)
    mask[1, : 2 + d] = 0
    return ids, mask


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss of the logits."""
    ids, mask = batch
    return loss_of(model(ids, attention_mask=mask, use_cache=False).logits, mask) / 300


def token_loss(logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
    """transformers' loss of a causal model, which it computes in float32 whatever it is given."""
    ignored = given.get("ignore_index", -100)
    shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:].reshape(-1)
    total = F.cross_entropy(
        logits.reshape(-1, vocab_size), shifted, reduction="sum", ignore_index=ignored
    )
    count = given.get("num_items_in_batch")
    return total / ((shifted != ignored).sum() if count is None else count)


def labels_of(batch: tuple[Tensor, Tensor], ignored: int = -100) -> Tensor:
    """Labels of the tokens that are not padding."""
    ids, mask = batch
    return ids.masked_fill(mask == 0, ignored)


def labelled(model: Any, batch: tuple[Tensor, Tensor], **given: Any) -> Tensor:
    """The model's own loss, of the tokens that are not padding."""
    ids, mask = batch
    model.loss_function = token_loss
    labels = labels_of(batch, given.get("ignore_index", -100))
    return model(ids, attention_mask=mask, labels=labels, **given).loss


def own_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss that the model computes from labels by its own code, in float64: what cp and pp cut is in it."""
    ids, mask = batch
    with StayFloat64():
        return model(ids, attention_mask=mask, labels=labels_of(batch), use_cache=False).loss


def coordinate(model: Any, axis: str = "dp") -> int:
    """This rank's place along an axis."""
    groups = model._plait.ranks.groups
    return groups.folding.coords(groups.rank)[axis]


def backward(pair: Pair, step: int = 0, loss: Loss = loss, batch: int = 2) -> float:
    """One step's gradients: one process accumulates over the dp batches, the parallel model has its own.

    Gives the error of this rank's loss.
    """
    dp, right = pair.model._plait.plan.dp.size, []
    for d in range(dp):
        right.append(loss(pair.reference, batch_of(d, step, batch)))
        (right[d] / dp).backward()
    d = coordinate(pair.model)
    found = loss(pair.model, batch_of(d, step, batch))
    found.backward()
    return far(found, right[d])


def parts(pair: Pair, of: Callable[[Any], Tensor | None]) -> dict[str, tuple[Any, Any]]:
    """What the parallel and the untouched model hold, by parameter: each rank's own part, whole along dp."""
    done = pair.model._plait
    cuts = {e.path: e for e in done.parameters()}
    right = dict(pair.reference.named_parameters(remove_duplicate=False))
    found = {}
    for name, p in pair.model.named_parameters():
        mine, whole = of(p), of(right[name])
        mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
        if name in cuts and whole is not None:
            whole = cuts[name].take(whole, done.ranks)
        found[name] = mine, whole
    return found


def gradient_errors(pair: Pair) -> dict[str, float]:
    """Error of each gradient on this rank; a missing one counts as zeros."""
    return {
        name: _error(mine, whole) for name, (mine, whole) in parts(pair, lambda p: p.grad).items()
    }


def _error(mine: Tensor | None, whole: Tensor | None) -> float:
    if whole is None or not whole.numel():
        return 0.0 if mine is None or not mine.abs().sum() else float("inf")
    return far(torch.zeros_like(whole) if mine is None else mine, whole)


def parameter_errors(pair: Pair) -> dict[str, float]:
    """Error of each parameter on this rank."""
    return {
        name: far(mine, whole)
        for name, (mine, whole) in parts(pair, lambda p: p.detach()).items()
        if whole.numel()
    }


def trained(
    each: Case,
    steps: int = 10,
    *,
    loss: Loss = loss,
    batch: int = 2,
    max_norm: float | None = None,
) -> dict[str, float]:
    """Losses, gradients of the first step, and parameters after one and more steps of SGD, clipped or not."""
    pair = Pair.of(each)
    rate = 0.05 if max_norm is None else 20.0  # clipped steps are short
    optimizers = [torch.optim.SGD(m.parameters(), lr=rate) for m in (pair.reference, pair.model)]
    errors = {"losses": 0.0}
    before = {n: p.detach().clone() for n, p in pair.reference.named_parameters()}
    for step in range(steps):
        errors["losses"] = max(errors["losses"], backward(pair, step, loss, batch))
        if step == 0:
            errors["gradients"] = max(gradient_errors(pair).values())
        if max_norm is not None:
            right = torch.nn.utils.clip_grad_norm_(pair.reference.parameters(), max_norm)
            assert right > 1.5 * max_norm, "clipping must do something"
            found = clip_grad_norm_(pair.model, max_norm)
            errors["norm"] = max(errors.get("norm", 0.0), far(found, right))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            errors["parameters after one"] = max(parameter_errors(pair).values())
    moved = [far(before[n], p) for n, p in pair.reference.named_parameters()]
    assert min(moved) > 1e-6, "the steps must move every parameter"
    return errors | {"parameters": max(parameter_errors(pair).values())}


def composed(each: Case, steps: int) -> dict[str, float]:
    """What `trained` gives for any plan: with the model's own loss, over rows for microbatches, clipped."""
    return trained(each, steps, loss=own_loss, batch=3, max_norm=0.05)


def assert_as_one_process(
    measure: Callable[..., dict[str, float]],
    cases: Sequence[Case | tuple[Any, ...]],
    ranks: int,
    timeout: float = PATIENCE_S,
) -> None:
    """Run ``measure`` of every case, with its further arguments, on all ranks; all errors must be exact."""
    rows = [each if isinstance(each, tuple) else (each,) for each in cases]
    answers = run_calls([(measure, *row) for row in rows], ranks, timeout=timeout)
    for i, (each, *_) in enumerate(rows):
        print(each.name)
        assert_exact(worst([answer[i] for answer in answers]))


def by_hand(index: Tensor, weights: Tensor, experts: int, most: int, policy: str) -> Tensor:
    """The pairs of token and expert that a capacity keeps, one after another."""
    keep = torch.zeros_like(index, dtype=torch.bool)
    for expert in range(experts):
        pairs = [
            (t, k)
            for t in range(len(index))
            for k in range(index.shape[1])
            if index[t, k] == expert
        ]
        if policy == "probs":
            pairs.sort(key=lambda pair: -float(weights[pair]))
        for pair in pairs[:most]:
            keep[pair] = True
    return keep
