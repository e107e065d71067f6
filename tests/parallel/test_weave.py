"""Woven pieces of a prefill are exact, send what the whole sends, and leave decode steps alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from exactness import Case, Pair, far, train
from models import tiny, tokens
from plait.collectives import primitive
from plait.collectives.autograd import regions
from plait.collectives.primitive import Started
from plait.collectives.trace import Trace
from plait.parallel import Plan, PlanError, parallelize, weave
from world import run_calls, run_world

LENGTH = 50  # over two requests: 100 rows, which three pieces do not divide


@torch.no_grad()
def woven(family: str, plan: str, around: Callable[[], AbstractContextManager[Any]]) -> Any:
    """Error of a prefill and a decode step in float64, their all-reduces, and what was computed piece by piece."""
    reference = tiny(family)
    model = parallelize(copy.deepcopy(reference), plan)
    ids = tokens(2, LENGTH + 1, reference.config.vocab_size)
    model(ids[:, :5])  # the first forward finds out whose sum can wait
    with around(), Trace(model._plait.ranks.groups.axis_of) as trace:
        out = model(ids[:, :LENGTH], use_cache=True)
        prefill = [e.shape for e in trace.events if e.op == "all_reduce"]
        last = model(ids[:, LENGTH:], past_key_values=out.past_key_values, use_cache=True)
        step = [e.shape for e in trace.events if e.op == "all_reduce"][len(prefill) :]
        spans = {each.name for each in trace.spans}
        alone = model(ids[:, :LENGTH], use_cache=False).logits
    logits = torch.cat([out.logits, last.logits], 1)
    error = max(far(logits, reference(ids).logits), far(alone, out.logits))
    return error, prefill, step, spans


def reversed_pieces() -> AbstractContextManager[Any]:
    """Each piece is added to another piece's stream."""
    original = weave.pieces_of
    calls: list[int] = []

    def pieces(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        cut = original(x, count)
        return cut if len(calls) % 2 else (cut[1], cut[0], *cut[2:])

    return patch.object(weave, "pieces_of", pieces)


def unsummed() -> AbstractContextManager[Any]:
    """Pieces are taken before they are summed over the ranks."""
    return patch.object(weave, "start_all_reduce", lambda x, group: Started(None, x, x))


def unread() -> AbstractContextManager[Any]:
    """Whoever reads a layer's output does not wait for its pieces."""

    def gather(self: weave.Woven) -> None:
        pieces, self.pieces = self.pieces, None
        if pieces is not None:
            torch.cat([piece.total for piece in pieces], 1, out=self)

    return patch.object(weave.Woven, "_gather", gather)


def without_mask() -> AbstractContextManager[Any]:
    """A later piece attends as if it were the first."""
    true = weave.part_of

    def part(given: dict[str, Any], *places: int) -> dict[str, Any]:
        return {**true(given, *places), "attention_mask": None}

    return patch.object(weave, "part_of", part)


CASES: list[tuple[str, str, Any]] = [
    ("qwen3", "tp2,weave=2", nullcontext),
    ("qwen2", "tp2,weave=3", nullcontext),
    ("mistral", "tp2,weave=2", nullcontext),
    ("mistral", "kvp2 tp1,weave=2", nullcontext),
    ("qwen3", "kvp2 tp1,weave=2", reversed_pieces),
    ("qwen3", "tp2,weave=2", unsummed),
    ("qwen3", "tp2,weave=2", unread),
    ("qwen3", "tp2,weave=2", without_mask),
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
            inside = [shape for shape in prefill if shape != (2, LENGTH, hidden)]
            assert len(inside) == 2 * 2 * pieces  # layers, halves of a layer
            assert sum(shape[0] * shape[1] for shape in inside) == 2 * 2 * 2 * LENGTH
            assert {shape[2] for shape in inside} == {hidden}
            assert set(step[-4:]) == {(2, 1, hidden)}  # too few tokens to cut
            # Helix keeps its attention whole, and so does a cache of a window
            halves = ["MLP"] if family == "mistral" or "kvp" in plan else ["MLP", "attention"]
            assert {name for name in spans if "piece" in name} == {
                f"{half}, piece {i}" for half in halves for i in range(pieces)
            }


def landed_too_early() -> AbstractContextManager[Any]:
    """A piece's gradient goes on before it was summed."""

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        for started in ctx.flight:
            started.wait()
        return grad, None

    return patch.object(regions._Land, "backward", staticmethod(backward))


def left_unsummed() -> AbstractContextManager[Any]:
    """Pieces are taken before they are summed over the ranks."""

    def start(x: torch.Tensor, group: Any) -> Started:
        return Started(None, x, x)

    return patch.object(primitive, "start_all_reduce", start)


def trained(family: str, plan: str, around: Callable[[], AbstractContextManager[Any]]) -> Any:
    """Errors of logits and gradients of a training step of a ragged batch, and what was done in pieces."""
    pair = Pair.of(Case(plan, family))
    begin, wait, log = primitive.start_all_reduce, Started.wait, list[str]()

    def noted_start(x: torch.Tensor, group: Any) -> Started:
        log.append("s")
        return begin(x, group)

    def noted_wait(self: Started) -> torch.Tensor:
        log.append("w")
        return wait(self)

    with patch.object(weave, "WOVEN_ROWS", 8):
        train(pair)  # the first forward finds out whose sum can wait
        with (
            patch.object(primitive, "start_all_reduce", noted_start),
            patch.object(Started, "wait", noted_wait),
            around(),
            Trace(pair.model._plait.ranks.groups.axis_of) as trace,
        ):
            errors = train(pair)
    shapes = [e.shape for e in trace.events if e.op == "all_reduce"]
    spans = [each.name for each in trace.spans]
    return max(errors.values()), [s for s in shapes if s[0] == 1], spans, "".join(log)


TRAINED: list[tuple[str, str, Any]] = [
    ("qwen3", "tp2,weave=2", nullcontext),
    ("qwen2", "tp2,weave=3", nullcontext),
    ("qwen3", "tp2,weave=2", left_unsummed),
    ("qwen3", "tp2,weave=2", landed_too_early),
]


def test_woven_training_is_exact_and_wrong_training_is_not() -> None:
    answers = run_calls([(trained, *each) for each in TRAINED], 2)
    for answer in answers:
        for (family, plan, around), (error, shapes, spans, log) in zip(
            TRAINED, answer, strict=True
        ):
            if around is not nullcontext:
                assert not error < 1e-3, around.__name__
                continue
            assert error < 1e-9, (family, plan, error)
            pieces = Plan.parse(plan).tp.weave
            assert spans == 2 * [f"MLP, piece {i}" for i in range(pieces)]  # two layers
            assert (
                len(shapes) == 2 * 3 * pieces
            )  # attention's and the MLP's sums, and the gradients of its input
            forward = "s" * pieces + "ws" * pieces + "w" * pieces
            backward = (
                "s" * pieces + "w" * pieces
            )  # a gradient is waited for when all pieces' MLPs are done
            assert log == 2 * forward + 2 * backward


@torch.no_grad()
def order_of_a_prefill() -> list[str]:
    """What is started, computed and waited for, one after the other."""
    model = parallelize(tiny("qwen3"), "tp2,weave=2")
    ids, log = tokens(2, LENGTH, model.config.vocab_size), []
    model(ids[:, :5])
    true = weave.start_all_reduce

    class Noted(Started):
        def wait(self) -> torch.Tensor:
            log.append("wait")
            return super().wait()

    def start(x: torch.Tensor, group: Any) -> Started:
        started = true(x, group)
        log.append("start")
        return Noted(started.work, started.brought, started.arrived)

    def span(name: str) -> AbstractContextManager[None]:
        log.append(name[0] + name[-1])
        return nullcontext()

    with patch.object(weave, "start_all_reduce", start), patch.object(weave, "span", span):
        model(ids)
    return log


def test_every_sum_but_the_last_is_under_way_behind_something() -> None:
    for log in run_world(order_of_a_prefill, 2):
        first = "a0 start a1 start wait M0 start wait M1 start"
        second = "wait a0 start wait a1 start wait M0 start wait M1 start wait wait"
        assert " ".join(log) == f"{first} {second}"


@torch.no_grad()
def watched() -> dict[str, float]:
    """Those who look between the layers, or write there, find what they find in the untouched model."""
    reference = tiny("qwen3")
    model = parallelize(copy.deepcopy(reference), "tp2,weave=2")
    ids, errors = tokens(2, LENGTH, reference.config.vocab_size), {}
    model(ids[:, :5])
    for name, change in {
        "in place": lambda module, args, out: out.mul_(1.5),
        "anew": lambda module, args, out: out * 1.5,
        "read": lambda module, args, out: errors.update(mean=0 * float(out.mean())),
        "last rows": lambda module, args, out: [out[:, 7:].add_(1.0), out][1],
    }.items():
        handles = [m.model.layers[0].register_forward_hook(change) for m in (reference, model)]
        errors[name] = far(model(ids).logits, reference(ids).logits)
        for handle in handles:
            handle.remove()
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, :9] = 0
    logits = [m(ids, attention_mask=padding).logits[1, 9:] for m in (model, reference)]
    errors["padded"] = far(*logits)
    with torch.inference_mode():
        kept = model.model(ids).last_hidden_state
    errors["inference mode"] = far(kept.clone(), reference.model(ids).last_hidden_state)
    # these leave hooks on every attention, after which sums do not wait
    states = [m(ids, output_hidden_states=True).hidden_states for m in (model, reference)]
    errors["states"] = max(far(a, b) for a, b in zip(*states, strict=True))
    return errors


def test_who_looks_between_the_layers_finds_sums() -> None:
    for errors in run_world(watched, 2):
        assert {name: e for name, e in errors.items() if not e < 1e-9} == {}


def test_weave_is_an_option_of_the_tensor_axis() -> None:
    assert str(Plan.parse("tp2,weave=2")) == "tp2,weave=2"
    for wrong in ("tp2,weave=0", "tp2:sp,weave=2", "tp2,fuse=false,weave=2", "tp2,weave=yes"):
        with pytest.raises(PlanError, match="weave"):
            Plan.parse(wrong)


def test_explain_shows_the_pieces() -> None:
    for plan, pieces in (("tp2", 1), ("tp2,weave=4", 4)):
        said = Plan.parse(plan).explain(tiny("qwen3"), context=512)
        (prefill,) = [step for step in said.steps if step.name == "prefill"]
        rows = [e.shape[1] for e in prefill.events if e.op == "all_reduce"]
        assert rows.count(512 // pieces) >= 2 * 2 * pieces, (plan, rows)
        assert any(f"in {pieces} pieces of its tokens" in note for note in said.notes) == (
            pieces > 1
        )
