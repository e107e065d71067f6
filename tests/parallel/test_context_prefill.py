"""cp beside kvp: prefill passes keys around the ring and leaves each rank's own where Helix decodes from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exactness import EXACT, Case, case, measure, worst
from models import tiny, tokens
from plait.collectives.trace import Trace
from plait.parallel import PlanError, parallelize
from world import run_calls

KV = "interleave=2,exchange=kv"
CASES = [
    case(f"cp2 kvp2,{KV}", "llama", ["train", "steps", "generate"]),
    case(f"cp2 kvp2,{KV}", "gpt_oss", ["train", "steps"]),
    case(f"cp2 kvp2,{KV}", "deepseek", ["steps"]),
    case(f"cp3 kvp3,{KV}", "qwen3", ["train", "steps"], heads=6, kv_heads=3),
]


def sent(plan: str) -> dict[str, int]:
    """Messages over kvp of a prefill and of the decode step after it."""
    model = parallelize(tiny("qwen3"), plan)
    axis_of = model._plait.ranks.groups.axis_of
    found: dict[str, int] = {}
    with torch.no_grad():
        with Trace(axis_of) as prefill:
            out = model(tokens(1, 64), use_cache=True)
        with Trace(axis_of) as decode:
            model(tokens(1, 1), past_key_values=out.past_key_values, use_cache=True)
    for name, trace in (("prefill", prefill), ("decode", decode)):
        for (op, axis), count in trace.counts().items():
            if op != "recv" and axis == "kvp":
                found[f"{name} {op}"] = count
    return found


def refused(plan: str) -> str:
    """What is said of a plan."""
    try:
        parallelize(tiny("qwen3"), plan)
    except PlanError as error:
        return str(error)
    return ""


def of_two(each: Case) -> Any:
    """Errors of a case."""
    return measure(each)


@pytest.mark.parametrize("size", [2, 3])
def test_prefill_by_ring_and_decode_are_exact(size: int) -> None:
    cases = [c for c in CASES if c.plan.startswith(f"cp{size}")]
    ranks = run_calls([(of_two, c) for c in cases], size)
    for i, each in enumerate(cases):
        errors = worst([answers[i] for answers in ranks])
        assert max(errors.values()) < EXACT, (each.name, errors)


def test_what_is_sent() -> None:
    plans = (f"cp2 kvp2,{KV}", f"kvp2,{KV}")
    calls = [*((sent, p) for p in plans), (refused, "cp2:ulysses kvp2")]
    for ring, gathered, said in run_calls(calls, 2):
        layers = 2
        assert ring["prefill send"] == layers
        assert gathered["prefill all_gather"] - ring["prefill all_gather"] == layers
        for step in ("prefill all_to_all", "decode all_to_all", "decode all_gather"):
            assert ring[step] == gathered[step]
        assert "use cp2:ring, or kvp alone" in said
