"""The trace sees every collective, forward and backward, with its bytes."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from plait.collectives import autograd, primitive
from plait.collectives.trace import Trace
from world import run_world

N = 3


def traced() -> list[tuple[str, str, int, tuple[int, ...], int, int]]:
    group = dist.group.WORLD
    x = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    with Trace() as trace:
        primitive.all_reduce(x.detach().clone(), group)
        primitive.all_gather(x.detach(), group)
        primitive.reduce_scatter(x.detach(), group)
        primitive.all_to_all(x.detach(), group)
        out = autograd.leave(autograd.enter(x, group) * 2, group)
        autograd.gather_sequence(out, group, 0, 18).sum().backward()
    return [(e.op, e.dtype, e.ranks, e.shape, e.payload_bytes, e.sent_bytes) for e in trace.events]


def test_operations_and_bytes() -> None:
    whole = 6 * 4 * 8
    for events in run_world(traced, N):
        assert events[:4] == [
            ("all_reduce", "float64", N, (6, 4), whole, 2 * whole * 2 // 3),
            ("all_gather", "float64", N, (6, 4), whole, 2 * whole),
            ("reduce_scatter", "float64", N, (6, 4), whole, whole * 2 // 3),
            ("all_to_all", "float64", N, (6, 4), whole, whole * 2 // 3),
        ]
        ops = [op for op, *_ in events[4:]]
        # leave forward, gather forward; then backward: reduce-scatter, nothing for leave, all-reduce for enter
        assert ops == ["all_reduce", "all_gather", "reduce_scatter", "all_reduce"]


def nested() -> tuple[int, int, Counter[tuple[str, str]], set[str]]:
    group = dist.group.WORLD
    with Trace(lambda g: "tp" if g is group else "?") as outer:
        primitive.all_reduce(torch.ones(2), group)
        with Trace(lambda g: "tp") as inner:
            primitive.all_gather(torch.ones(2), group)
        outer.scope = "later"
        primitive.all_reduce(torch.ones(2), group)
    primitive.all_reduce(torch.ones(2), group)  # outside: not recorded
    return len(outer.events), len(inner.events), outer.counts(), {e.scope for e in outer.events}


def test_names_of_axes_and_what_is_outside() -> None:
    for outer, inner, counts, scopes in run_world(nested, 2):
        assert inner == 1
        assert counts[("all_reduce", "tp")] == 2
        assert outer == sum(counts.values())
        assert scopes == {"", "later"}


def test_a_group_of_one_sends_nothing() -> None:
    with Trace() as trace:
        primitive.all_reduce(torch.ones(3), None)
        autograd.gather(torch.ones(3, requires_grad=True), None, 0, [3]).sum().backward()
    assert trace.events == []
    assert trace.sent_bytes() == 0
