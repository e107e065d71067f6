"""Woven pieces of a prefill are exact, send what the whole sends, and leave decode steps alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from exactness import far
from models import tiny, tokens
from plait.collectives.trace import Trace
from plait.parallel import Plan, PlanError, parallelize, residual
from world import run_calls

LENGTH = 50  # over two requests: 100 rows, which three pieces do not divide


@torch.no_grad()
def woven(family: str, plan: str, around: Callable[[], AbstractContextManager[Any]]) -> Any:
    """Error of a prefill and a decode step in float64, and their all-reduces and spans."""
    reference = tiny(family)
    model = parallelize(copy.deepcopy(reference), plan)
    ids = tokens(2, LENGTH + 1, reference.config.vocab_size)
    model(ids[:, :5])  # the first forward finds out whose sum can wait
    with around(), Trace(model._plait.ranks.groups.axis_of) as trace:
        out = model(ids[:, :LENGTH], use_cache=True)
        prefill = [e.shape for e in trace.events if e.op == "all_reduce"]
        last = model(ids[:, LENGTH:], past_key_values=out.past_key_values, use_cache=True)
        step = [e.shape for e in trace.events if e.op == "all_reduce"][len(prefill) :]
    logits = torch.cat([out.logits, last.logits], 1)
    return far(logits, reference(ids).logits), prefill, step, len(trace.spans)


def reversed_pieces() -> AbstractContextManager[Any]:
    """Each piece is added to another piece's stream."""
    original = residual._pieces
    calls: list[int] = []

    def pieces(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        cut = original(x, count)
        return cut if len(calls) % 2 else (cut[1], cut[0], *cut[2:])

    return patch.object(residual, "_pieces", pieces)


def unsummed() -> AbstractContextManager[Any]:
    """Pieces are taken before they are summed over the ranks."""
    from plait.collectives.primitive import Started

    return patch.object(residual, "start_all_reduce", lambda x, group: Started(None, x, x))


CASES: list[tuple[str, str, Any]] = [
    ("qwen3", "tp2,weave=2", nullcontext),
    ("qwen2", "tp2,weave=3", nullcontext),
    ("mistral", "kvp2 tp1,weave=2", nullcontext),
    ("qwen3", "tp2,weave=2", reversed_pieces),
    ("qwen3", "tp2,weave=2", unsummed),
]


def test_woven_pieces_are_exact_and_wrong_ones_are_not() -> None:
    for answers in run_calls([(woven, *each) for each in CASES], 2):
        for (family, plan, around), (error, prefill, step, spans) in zip(
            CASES, answers, strict=True
        ):
            if around is not nullcontext:
                assert not error < 1e-3, around.__name__
                continue
            assert error < 1e-9, (family, plan, error)
            pieces = Plan.parse(plan).tp.weave
            hidden = tiny(family).config.hidden_size
            inside = [shape for shape in prefill if shape[0] == 1 and len(shape) == 3]
            assert len(inside) == 2 * 2 * pieces  # layers, halves of a layer
            assert sum(shape[1] for shape in inside) == 2 * 2 * 2 * LENGTH
            assert {shape[2] for shape in inside} == {hidden}
            assert set(step[-4:]) == {(2, 1, hidden)}  # too few tokens to cut
            assert spans >= 2 * pieces


def test_weave_is_an_option_of_the_tensor_axis() -> None:
    assert str(Plan.parse("tp2,weave=2")) == "tp2,weave=2"
    for wrong in ("tp2,weave=0", "tp2:sp,weave=2", "tp2,fuse=false,weave=2", "tp2,weave=yes"):
        with pytest.raises(PlanError, match="weave"):
            Plan.parse(wrong)
