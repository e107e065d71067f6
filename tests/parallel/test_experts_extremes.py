"""Routing that breaks dispatchers, in every way of bringing tokens and experts together: exact, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from exactness import EXACT, Pair, case, far, worst
from models import tokens
from plait.parallel.experts.placement import Placement, write_placements
from training import gradient_errors
from world import run_calls

LAYERS = [f"model.layers.{n}.mlp.experts" for n in range(2)]


def one_way(plan: str) -> dict[str, float]:
    """All tokens go to the first two of four experts, the others stay empty."""
    pair = Pair.of(case(plan, "gpt_oss"))
    for model in (pair.reference, pair.model):
        for layer in model.model.layers:
            layer.mlp.router.bias.data[:2] += 100.0
    return compared(pair, tokens(2, 9))


def single_token(plan: str) -> dict[str, float]:
    """One token: ranks of a copy have none of their own."""
    return compared(Pair.of(case(plan, "gpt_oss")), tokens(1, 1))


def compared(pair: Pair, ids: torch.Tensor) -> dict[str, float]:
    """Two steps, so that what the first one counted decides in the second."""
    errors: dict[str, float] = {}
    for _ in range(2):
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


def nan_logits(plan: str) -> dict[str, float]:
    """NaN in the router makes the same numbers NaN as in one process."""
    pair = Pair.of(case(plan, "gpt_oss"))
    for model in (pair.reference, pair.model):
        model.model.layers[1].mlp.router.bias.data[1] = float("nan")
    pair.model(tokens(2, 9))  # what the first forward finds out must not matter
    right, found = (m(tokens(2, 9)).logits for m in (pair.reference, pair.model))
    assert right.isnan().any()
    return {"nan": float((right.isnan() != found.isnan()).sum())}


def test_extremes(tmp_path: Path) -> None:
    copied = str(tmp_path / "copied.json")
    write_placements(copied, {n: Placement(4, ((3, 0, 1), (2, 1))) for n in LAYERS})
    plans = [
        "dp2 ep2,capacity=9.0,pad=true",
        "tp2 ep2,capacity=9.0,pad=true",
        "dp2 ep2,nodes=2",
        "tp2 ep2,nodes=2",
        "dp2 ep2:fssdp,spare=2",
        "tp2 ep2:fssdp,spare=1",
        f"dp2 ep2,placement={copied}",
        f"tp2 ep2,placement={copied}",
    ]
    calls: list[Any] = [(f, plan) for plan in plans for f in (one_way, single_token, nan_logits)]
    answers = run_calls(calls, 2, timeout=400)
    for i, call in enumerate(calls):
        errors = worst([answer[i] for answer in answers])
        print(call[0].__name__, call[1], errors)
        assert max(errors.values()) < EXACT, call
