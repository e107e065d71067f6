"""Collectives and their gradients against what one process computes from all ranks' tensors."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from plait.collectives import autograd, primitive
from plait.collectives.autograd import parts as cut
from plait.collectives.autograd import regions
from plait.collectives.primitive import chunk_sizes
from world import run_calls, run_world

WORLD = 3


def drawn(rank: int, *shape: int, seed: int = 0) -> Tensor:
    """A tensor that every rank can make for any rank."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(1000 * seed + rank), dtype=torch.float64
    )


def group() -> Any:
    return dist.group.WORLD


WRONG: list[
    str
] = []  # collected, not raised at once: a rank that stops early would leave the others waiting


def close(found: Tensor | None, expected: Tensor) -> None:
    try:
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    except AssertionError as error:
        WRONG.append("".join(traceback.format_stack(limit=2)[:1]) + str(error))


def differences(check: Callable[[], None]) -> list[str]:
    """Run a check; gives what was wrong on this rank."""
    WRONG.clear()
    check()
    return list(WRONG)


def every_primitive() -> None:
    r, n = dist.get_rank(), WORLD
    xs = [drawn(k, 4, 5) for k in range(n)]
    x = xs[r].clone()
    close(primitive.all_reduce(x, group()), sum(xs))  # type: ignore[arg-type]
    close(x, sum(xs))  # type: ignore[arg-type]
    close(primitive.all_gather(xs[r], group(), dim=1), torch.cat(xs, 1))
    sizes = [2, 0, 3]
    uneven = [drawn(k, 2, sizes[k], 2) for k in range(n)]
    close(primitive.all_gather(uneven[r], group(), sizes, 1), torch.cat(uneven, 1))
    for length in (7, 6, 2, 1):
        whole = [drawn(k, 2, length, seed=length) for k in range(n)]
        expected = torch.split(sum(whole), chunk_sizes(length, n), 1)[r]  # type: ignore[arg-type]
        close(primitive.reduce_scatter(whole[r], group(), 1), expected)
    send = [[1, 2, 0], [0, 0, 3], [2, 1, 1]]  # send[a][b] rows from a to b
    rows = [drawn(k, sum(send[k]), 2) for k in range(n)]
    receive = [send[k][r] for k in range(n)]
    expected = torch.cat([torch.split(rows[k], send[k])[r] for k in range(n)])
    close(primitive.all_to_all(rows[r], group(), send[r], receive), expected)
    close(
        primitive.all_to_all(drawn(r, 3, 2), group()),
        torch.stack([drawn(k, 3, 2)[r] for k in range(n)]),
    )
    with pytest.raises(ValueError, match="sizes say"):
        primitive.all_gather(x, group(), [1, 1, 1])


def in_a_group_of_one() -> None:
    x = drawn(0, 4, 5).requires_grad_()
    for f in (
        lambda: primitive.all_reduce(x, None),
        lambda: primitive.all_gather(x, None),
        lambda: primitive.reduce_scatter(x, None),
        lambda: primitive.all_to_all(x, None),
        lambda: autograd.enter(x, None),
        lambda: autograd.leave(x, None),
        lambda: autograd.gather(x, None, 0, [4]),
        lambda: autograd.split(x, None, 0),
        lambda: autograd.gather_sequence(x, None, 0, 4),
        lambda: autograd.scatter_sequence(x, None, 0),
        lambda: autograd.all_to_all(x, None),
    ):
        assert f() is x


def region() -> None:
    """Enter, compute a part each, leave: the sum's value, and the whole gradient on every rank."""
    r, n = dist.get_rank(), WORLD
    weights = [drawn(k, 5, 5, seed=2) for k in range(n)]
    x, up = drawn(0, 4, 5), drawn(0, 4, 5, seed=3)
    one = x.clone().requires_grad_()
    own = weights[r].clone().requires_grad_()
    out = autograd.leave((autograd.enter(one, group()) @ own).tanh(), group())
    out.backward(up)
    ref, refs = x.clone().requires_grad_(), [w.clone().requires_grad_() for w in weights]
    expected = sum((ref @ w).tanh() for w in refs)
    expected.backward(up)  # type: ignore[union-attr]
    close(out, expected)  # type: ignore[arg-type]
    close(one.grad, ref.grad)  # type: ignore[arg-type]
    close(own.grad, refs[r].grad)  # type: ignore[arg-type]


def gathers() -> None:
    """Replicated use keeps this rank's part of the gradient; partial use sums the ranks' gradients first."""
    r, n, sizes = dist.get_rank(), WORLD, [2, 0, 3]
    parts = [drawn(k, 2, sizes[k]) for k in range(n)]
    ups = [drawn(k, 2, 5, seed=4) for k in range(n)]
    for partial in (False, True):
        x = parts[r].clone().requires_grad_()
        autograd.gather(x, group(), 1, sizes, partial=partial).backward(
            ups[r] if partial else ups[0]
        )
        whole = sum(ups) if partial else ups[0]
        close(x.grad, torch.split(whole, sizes, 1)[r])  # type: ignore[arg-type]


def sequence_pairs() -> None:
    """split/gather are inverse; gather_sequence and scatter_sequence are each other's backward."""
    r, n = dist.get_rank(), WORLD
    for length in (7, 3, 2):
        sizes = chunk_sizes(length, n)
        x = drawn(0, 2, length).requires_grad_()
        part = autograd.split(x, group(), 1)
        close(part, torch.split(x, sizes, 1)[r])
        up = drawn(0, 2, length, seed=5)
        part.backward(torch.split(up, sizes, 1)[r])
        close(x.grad, up)

        parts = [p.contiguous() for p in torch.split(drawn(0, 2, length, seed=6), sizes, 1)]
        ups = [drawn(k, 2, length, seed=7) for k in range(n)]
        own = parts[r].clone().requires_grad_()
        whole = autograd.gather_sequence(own, group(), 1, length)
        close(whole, torch.cat(parts, 1))
        whole.backward(ups[r])
        close(own.grad, torch.split(sum(ups), sizes, 1)[r])  # type: ignore[arg-type]

        partial = [drawn(k, 2, length, seed=8) for k in range(n)]
        mine = partial[r].clone().requires_grad_()
        scattered = autograd.scatter_sequence(mine, group(), 1)
        close(scattered, torch.split(sum(partial), sizes, 1)[r])  # type: ignore[arg-type]
        scattered.backward(torch.split(up, sizes, 1)[r].contiguous())
        close(mine.grad, up)


def exchanges() -> None:
    """The gradient of an uneven exchange travels back with the counts swapped."""
    r, n = dist.get_rank(), WORLD
    send = [[1, 2, 0], [0, 0, 3], [2, 1, 1]]
    receive = [[send[k][j] for k in range(n)] for j in range(n)]
    x = drawn(r, sum(send[r]), 2).requires_grad_()
    ups = [drawn(k, sum(receive[k]), 2, seed=9) for k in range(n)]
    autograd.all_to_all(x, group(), send[r], receive[r]).backward(ups[r])
    close(x.grad, torch.cat([torch.split(ups[j], receive[j])[r] for j in range(n)]))


def without_grad() -> None:
    """No graph, no copies of the input by leave's contract; enter gives its input back."""
    x = drawn(dist.get_rank(), 3)
    with torch.no_grad():
        needs = drawn(0, 3).requires_grad_()
        assert autograd.enter(needs, group()) is needs
    assert autograd.enter(x, group()) is x
    assert not autograd.leave(x, group()).requires_grad


CHECKS: list[Callable[[], None]] = [
    every_primitive,
    in_a_group_of_one,
    region,
    gathers,
    sequence_pairs,
    exchanges,
    without_grad,
]


def test_collectives_and_their_gradients() -> None:
    for answers in run_calls([(checked, i) for i in range(len(CHECKS))], WORLD):
        for wrong in answers:
            assert not wrong, "\n".join(wrong)


def checked(number: int) -> list[str]:
    return differences(CHECKS[number])


def enter_keeps_its_gradient_apart() -> bool:
    """The summed gradient must not be written into a gradient that autograd shares with someone else."""
    x = drawn(0, 3).requires_grad_()
    y = drawn(1, 3).requires_grad_()
    (autograd.enter(x, group()) + y).backward(torch.ones(3, dtype=torch.float64))
    return bool((x.grad == WORLD).all()) and bool((y.grad == 1).all())


def test_summing_does_not_touch_other_gradients() -> None:
    assert all(run_world(enter_keeps_its_gradient_apart, WORLD))


def mutated() -> list[bool]:
    """The checks above, each with the collective's backward broken: every one must fail."""
    breaks: list[tuple[Any, Callable[[], None]]] = [
        (regions._Enter, region),
        (regions._Leave, region),
        (cut._Gather, gathers),
        (cut._Split, sequence_pairs),
        (cut._GatherSequence, sequence_pairs),
        (cut._ScatterSequence, sequence_pairs),
        (cut._AllToAll, exchanges),
    ]
    noticed = []
    for function, check in breaks:
        original = function.backward

        def wrong(ctx: Any, grad: Tensor, original: Any = original) -> Any:
            first, *rest = original(ctx, grad)
            return (first * 1.001, *rest)

        function.backward = staticmethod(wrong)
        noticed.append(bool(differences(check)))
        function.backward = staticmethod(original)
    return noticed


def test_a_broken_backward_is_noticed() -> None:
    # a rank that holds no rows of an uneven tensor has no gradient to be wrong: some rank must notice each
    for found in zip(*run_world(mutated, WORLD), strict=True):
        assert any(found)
