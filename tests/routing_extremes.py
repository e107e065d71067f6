"""Routing that breaks dispatchers, against one process: every token to one side, one token, NaN."""

from __future__ import annotations

import torch

from exactness import Pair, case, far
from models import tokens
from training import gradient_errors


def one_way(plan: str, steps: int = 1) -> dict[str, float]:
    """All tokens go to the first two of four experts, the others stay empty."""
    pair = Pair.of(case(plan, "gpt_oss"))
    for model in (pair.reference, pair.model):
        for layer in model.model.layers:
            layer.mlp.router.bias.data[:2] += 100.0
    return compared(pair, tokens(2, 9), steps)


def single_token(plan: str, family: str, steps: int = 1) -> dict[str, float]:
    """One token: a rank has none to start from."""
    return compared(Pair.of(case(plan, family)), tokens(1, 1), steps)


def compared(pair: Pair, ids: torch.Tensor, steps: int) -> dict[str, float]:
    """Compare the last of some steps: what an earlier one counted may decide in it."""
    errors: dict[str, float] = {}
    for _ in range(steps):
        logits = []
        for model in (pair.reference, pair.model):
            model.zero_grad()
            out = model(ids, use_cache=False).logits
            (out * torch.linspace(0, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
            logits.append(out)
        errors = {
            "logits": far(logits[1], logits[0]),
            "gradients": max(gradient_errors(pair).values()),
        }
    missing = [n for n, p in pair.model.named_parameters() if p.grad is None]
    assert not missing, f"without a gradient: {missing}"
    return errors


def nan_logits(plan: str, training: bool = False) -> dict[str, float]:
    """NaN in the router makes the same numbers NaN as in one process, and nothing hangs.

    In training a first forward goes before: what it finds out must not matter.
    """
    pair = Pair.of(case(plan, "gpt_oss"))
    for model in (pair.reference, pair.model):
        model.model.layers[1].mlp.router.bias.data[1] = float("nan")
    with torch.set_grad_enabled(training):
        if training:
            pair.model(tokens(2, 9))
        right, found = (m(tokens(2, 9)).logits for m in (pair.reference, pair.model))
    assert right.isnan().any()
    return {"nan": float((right.isnan() != found.isnan()).sum())}
