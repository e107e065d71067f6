"""How far context parallel models are from one process: the rank's side of the tests of cp."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from exactness import Case, Pair, far, gradient_errors, loss_of, mask_of
from models import StayFloat64, tiny, tokens
from plait.parallel import unparallelize

LENGTH = 21


def batch_of(kind: str, vocab: int) -> dict[str, Any]:
    """A batch with labels: ragged and padded, packed documents, or as short as can be."""
    if kind == "documents":
        ids = tokens(2, LENGTH, vocab)
        starts = [[0, 4, 5, 13], [0, 9, 17]]
        positions = torch.stack(
            [torch.arange(LENGTH) - max_start(torch.tensor(s), LENGTH) for s in starts]
        )
        return {"input_ids": ids, "position_ids": positions, "labels": ids}
    if kind.startswith("short"):
        ids = tokens(2, int(kind[5:]), vocab)
        return {"input_ids": ids, "labels": ids.clone()}
    ids, mask = tokens(3, LENGTH, vocab), mask_of()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | (ids % 7 == 0), -100),
    }


def max_start(starts: Tensor, length: int) -> Tensor:
    """The start of the document of each token."""
    return starts[torch.searchsorted(starts, torch.arange(length), right=True) - 1]


def whole_outputs(pair: Pair, batch: dict[str, Any]) -> dict[str, float]:
    """Without labels the logits are whole, and any loss of them has the gradients of one process."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = []
    for model in (pair.reference, pair.model):
        logits.append(model(**inputs, use_cache=False).logits)
        loss_of(logits[-1], mask).backward()
    real = mask.bool()
    return {"logits": far(logits[1][real], logits[0][real]), **worst_gradient(pair, "logits")}


def whole_loss(pair: Pair, batch: dict[str, Any]) -> dict[str, float]:
    """With labels every rank has the whole loss; the logits are this rank's."""
    found = [m(**batch, use_cache=False) for m in (pair.reference, pair.model)]
    for out in found:
        out.loss.backward()
    assert found[1].logits.shape[1] < max(2, found[0].logits.shape[1])
    return {"loss": far(found[1].loss, found[0].loss), **worst_gradient(pair, "loss")}


def worst_gradient(pair: Pair, of: str) -> dict[str, float]:
    errors = gradient_errors(pair)
    assert any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in pair.model.parameters())
    name = max(errors, key=errors.__getitem__)
    pair.model.zero_grad()
    pair.reference.zero_grad()
    return {f"gradient of {of} at {name}": errors[name]}


def stepped(pair: Pair, batch: dict[str, Any], steps: int, family: str) -> dict[str, float]:
    """Weights and loss after so many steps of SGD."""
    losses = []
    for model in (pair.reference, pair.model):
        optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.05), torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
        losses.append(loss)
    unparallelize(pair.model)
    expected = dict(pair.reference.named_parameters())
    start = dict(tiny(family).named_parameters())
    moved = min(far(p, start[n]) for n, p in expected.items())
    assert moved > 1e-6, "a weight did not move"
    errors = {n: far(p, expected[n]) for n, p in pair.model.named_parameters()}
    name = max(errors, key=errors.__getitem__)
    return {f"loss after {steps}": far(losses[1], losses[0]), f"{name} after {steps}": errors[name]}


def measure(
    each: Case, batch: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, float]:
    """All errors of one case on this rank. ``around`` is a mutation that a negative control brings."""
    with StayFloat64(), around():
        pair = Pair.of(each)
        for model in (pair.reference, pair.model):
            model.train()
        inputs = batch_of(batch, pair.reference.config.vocab_size)
        errors: dict[str, float] = {}
        if "logits" in each.parts:
            errors |= whole_outputs(pair, inputs)
        if "loss" in each.parts:
            errors |= whole_loss(pair, inputs)
        for part in each.parts:
            if part.startswith("steps"):
                errors |= stepped(pair, inputs, int(part[5:]), each.family)
        return errors
