"""The ring itself: parts travel and sums come home on every backend; attention equals that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from exactness import far
from plait.collectives.ring_exchange import Homecoming, travel
from plait.collectives.shm import register
from plait.collectives.trace import Trace
from plait.cuda_kernels import partial_attention as kernel
from plait.parallel.context import visible
from plait.parallel.context.order import SequenceOrder
from plait.parallel.context.ring import RingCall, ring_attention
from plait.parallel.context.visible import Visible
from world import run_calls


def group_over(backend: str) -> dist.ProcessGroup:
    """All ranks, over one of the backends that run here."""
    register()
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


def tour(backend: str, sizes: list[int]) -> bool:
    """Every part visits every rank in the order of the ring; what the ranks add comes home summed."""
    group = group_over(backend)
    at, ranks = group.rank(), group.size()
    own = torch.arange(sizes[at], dtype=torch.float64) + 100 * at
    sums = Homecoming(group, sizes)
    order = []
    for source, part in travel(own, group, sizes):
        order.append(source)
        assert torch.equal(part, torch.arange(sizes[source], dtype=torch.float64) + 100 * source)
        sums.add(part * (at + 1))
    assert order == [(at - step) % ranks for step in range(ranks)]
    return torch.equal(sums.home(), own * sum(range(1, ranks + 1)))


def traced(backend: str, sizes: list[int]) -> tuple[int, int]:
    """Messages and bytes that one rank sends in one tour."""
    group = group_over(backend)
    own = torch.zeros(sizes[dist.get_rank()])
    with Trace() as trace:
        for _ in travel(own, group, sizes):
            pass
    return trace.counts()["send", f"group of {len(sizes)}"], trace.sent_bytes()


@pytest.mark.parametrize("size", [2, 3])
def test_parts_travel_and_sums_come_home(size: int) -> None:
    tours = [[5, 7, 3], [0, 4, 2], [3, 0, 0], [200_000, 100_001, 150_000]]
    backends = ["gloo", "shm"]
    calls = [(tour, b, sizes[:size]) for b in backends for sizes in tours]
    calls += [(traced, b, tours[0][:size]) for b in backends]
    for rank, answers in enumerate(run_calls(calls, size)):
        assert answers[:-2] == [True] * 8
        sent = sum(tours[0][:size]) - tours[0][:size][(rank + 1) % size]
        assert answers[-2:] == [(size - 1, 4 * sent)] * 2


def masks(kind: str, length: int) -> Any:
    """Named masks over places, and a padded batch."""

    def sees(rows: Tensor, keys: Tensor) -> Tensor:
        back = rows[:, None] - keys[None, :]
        seen = {
            "causal": back >= 0,
            "full": back > -length,
            "window": (back >= 0) & (back < 9),
            "documents": (back >= 0) & (rows[:, None] // 13 == keys[None, :] // 13),
            "padded": back >= 0,
        }[kind]
        pad = [keys >= 0, keys >= (6 if kind == "padded" else 0)]
        return seen[None, None] & torch.stack(pad)[:, None, None]

    return sees


def attention_of_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sink: Tensor | None
) -> Tensor:
    """Attention as written in a textbook."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -1e30)
    if sink is not None:
        column = sink[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]] * mask
    return weights @ v


def attend(kind: str, length: int, softcap: float, with_sink: bool, tile: int) -> dict[str, float]:
    """Errors of output and gradients, on this rank."""
    group = dist.group.WORLD
    assert group is not None
    visible.TILE = tile
    generator = torch.Generator().manual_seed(3)
    draw = [
        torch.randn(2, heads, length, width, generator=generator, dtype=torch.float64)
        for heads, width in ((6, 8), (3, 8), (3, 5), (6, 5))
    ]
    weight = draw.pop()
    if with_sink:
        draw.append(torch.randn(6, generator=generator, dtype=torch.float64))
    whole = [t.clone().requires_grad_() for t in draw]
    order, rank = SequenceOrder(length, group.size()), group.rank()
    places = [order.place_index(p) for p in range(group.size())]
    sees, every = masks(kind, length), torch.arange(length)
    expected = attention_of_one(*whole[:3], sees(every, every), 0.4, softcap, *whole[3:] or [None])
    (expected * weight).sum().backward()
    own = [t[:, :, places[rank]] if t.dim() == 4 else t.clone() for t in draw]
    own = [t.clone().requires_grad_() for t in own]
    call = RingCall(Visible(places[rank], places, sees), group, 0.4, softcap)
    found = ring_attention(*own[:3], call, *own[3:])
    (found * weight[:, :, places[rank]]).sum().backward()
    errors = {"o": far(found, expected[:, :, places[rank]]) if len(places[rank]) else 0.0}
    for name, mine, all_of_it in zip("qkvs", own, whole, strict=False):
        assert mine.grad is not None
        assert all_of_it.grad is not None
        if name == "s":
            dist.all_reduce(mine.grad)
            errors["sink"] = far(mine.grad, all_of_it.grad)
        elif len(places[rank]):
            errors[name] = far(mine.grad, all_of_it.grad[:, :, places[rank]])
    return errors


@pytest.mark.parametrize("size", [2, 3])
def test_ring_attention_is_attention(size: int) -> None:
    calls = [
        (attend, kind, length, softcap, sink, tile)
        for kind in ("causal", "full", "window", "documents", "padded")
        for length, softcap, sink, tile in (
            (41, 0.0, False, 512),
            (41, 0.0, True, 4),
            (41, 7.0, True, 4),
            (3, 0.0, False, 512),
        )
    ]
    for answers in run_calls(calls, size):
        for call, errors in zip(calls, answers, strict=True):
            assert max(errors.values()) < 1e-12, (call[1:], errors)


def test_both_ways_of_the_kernel_agree() -> None:
    """torch's flash operators and the matrix products that other devices use."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, d).double() for h, n, d in ((6, 9, 8), (3, 11, 8), (3, 11, 5)))
    mask = torch.rand(2, 1, 9, 11) < 0.5
    mask[0, 0, 3] = False
    flash, plain = (
        f(q, k, v, 0.3, mask, *more)
        for f, more in ((kernel.partial_attention, ()), (kernel._by_products, (0.0,)))
    )
    assert far(flash[0], plain[0]) < 1e-14
    assert torch.equal(torch.isneginf(flash[1]), ~mask.any(-1).expand(2, 6, 9))
    assert torch.isneginf(plain[1]).equal(torch.isneginf(flash[1]))
    lse = flash[1].masked_fill(torch.isneginf(flash[1]), 0.0) + 0.1  # as if there were more keys
    given = (torch.randn_like(flash[0]), q, k, v, flash[0], lse, 0.3, mask)
    found = kernel.partial_attention_backward(*given)
    for a, b in zip(found, kernel._backward_by_products(*given, 0.0), strict=True):
        assert far(a, b) < 1e-13
