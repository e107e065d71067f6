"""Stages in mixed precision: as one process that computes in it, microbatch by microbatch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from exactness import assert_exact, far, worst
from models import tiny, tokens
from plait.parallel import PlanError, parallelize
from training import coordinate
from world import run_calls

CLOSE = 1e-5  # sums in float32; a wrong dtype on the way would cost bfloat16's 4e-3


def compared(plan: str, cast: bool) -> dict[str, float]:
    """Loss and gradients, against one process that takes the same microbatches."""
    reference = tiny("qwen3", dtype=torch.float32, layers=3)
    model = parallelize(copy.deepcopy(reference), plan)
    batches = [tokens(4, 9, seed=d) for d in range(2)]
    computing = reference if cast else halved(reference)
    found, losses = dict[str, Any](), []
    for ids in batches:
        parts = []
        for rows in ids.split(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = computing(rows, labels=rows, num_items_in_batch=32, use_cache=False).loss
            parts.append(loss.detach())
            for (name, p), g in zip(
                computing.named_parameters(),
                torch.autograd.grad(loss, list(computing.parameters())),
                strict=True,
            ):
                found[name] = found.get(name, torch.zeros_like(p, dtype=torch.float32)) + g / 2
        losses.append(sum(parts))
    d = coordinate(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out: Any = model(batches[d], labels=batches[d])
    out.loss.backward()
    errors = {"loss": far(out.loss.float(), losses[d])}
    for name, p in model.named_parameters():
        grad: Any = p.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        if float(found[name].abs().max()) > 1e-4:  # of the bias of keys it is zero
            errors[name] = far(grad, found[name])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        ids = batches[0]
        errors["logits"] = far(model(ids).logits.float(), computing(ids).logits.float())
    return errors


def halved(model: nn.Module) -> Any:
    """The model with parameters, but not tables, in bfloat16."""
    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.bfloat16()
    return half


def half_refused() -> dict[str, float]:
    """float16 needs a scaled loss, which comes too late; said on every stage."""
    model: Any = parallelize(tiny("llama", dtype=torch.float32), "pp2 dp2:shard,param_dtype=fp16")
    ids = tokens(2, 5)
    with pytest.raises(PlanError, match="float16 under pp"):
        model(ids, labels=ids)
    return {"refused": 0.0}


def test_gradients_are_those_of_one_process() -> None:
    calls: list[Any] = [
        (compared, "pp2 dp2:shard,param_dtype=bf16", False),
        (compared, "pp2 dp2", True),
        (half_refused,),
    ]
    for answers in zip(*run_calls(calls, 4), strict=True):
        assert_exact(worst(answers), CLOSE)
