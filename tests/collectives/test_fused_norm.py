"""All-reduce, add and norm as one kernel: against float64, its other schedule, the unfused path, and autograd."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plait.collectives import CallMismatch, Trace, fused, shm
from plait.collectives.shm import fused as kernel
from plait.cuda_kernels.quantised import quantise_rows, to_e4m3
from world import current_rank, run_calls

EPS = 1e-3
SHAPES = [(1, 8), (3, 5, 64), (67, 1030), (70, 4096), (2, 0, 16)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = (torch.int8, torch.float8_e4m3fn)
SCHEDULES = {"one-shot": 1 << 40, "two-shot": 0}


def open_world(folder: str, size: int) -> None:
    shm.register()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=size)


def drawn(of: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(of)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """This rank's part, and what all ranks hold: residual, weight, bias."""
    shapes = [shape, shape, shape[-1:], shape[-1:]]
    return tuple(
        drawn(s, at, dtype) for s, at in zip((dist.get_rank(), 90, 91, 92), shapes, strict=True)
    )


def norm(
    name: str, x: Any, residual: Any, weight: Any, bias: Any, **options: Any
) -> tuple[Any, Any]:
    group = dist.group.WORLD
    if name == "rms":
        return fused.all_reduce_rms_norm(x, residual, weight, EPS, group, **options)
    return fused.all_reduce_layer_norm(x, residual, weight, bias, EPS, group, **options)


def exact(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _, residual, weight, bias = (t.double() for t in inputs(shape, dtype))
    total = residual + sum(drawn(r, shape, dtype).double() for r in range(dist.get_world_size()))
    if name == "layer":
        return F.layer_norm(total, shape[-1:], weight, bias, EPS), total
    return weight * total / (total.square().mean(-1, keepdim=True) + EPS).sqrt(), total


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 2e-5,
        torch.float16: 4e-3,
        torch.bfloat16: 3e-2,
    }
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance[found.dtype], atol=tolerance[found.dtype]
    )


def force(most: int) -> None:
    """Choose one-shot up to so many bytes."""
    kernel.ONE_SHOT_BYTES = {2: most}
    kernel.form_of.cache_clear()


def computes(schedule: str) -> None:
    force(SCHEDULES[schedule])
    for name, shape, dtype in itertools.product(("rms", "layer"), SHAPES, DTYPES):
        with Trace() as trace:
            normed, total = norm(name, *inputs(shape, dtype))
        assert [e.op for e in trace.events] == ["all_reduce"]
        for found, expected in zip((normed, total), exact(name, shape, dtype), strict=True):
            assert found.dtype == dtype
            near(found, expected)
            everyone = [torch.empty_like(found) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, found)
            assert all(torch.equal(found, other) for other in everyone), "ranks differ"


def quantises(schedule: str) -> None:
    """The same bits as the norm's own output quantised by torch."""
    force(SCHEDULES[schedule])
    for name, dtype, form in itertools.product(("rms", "layer"), DTYPES[:2], FORMATS):
        brought = inputs((9, 70), dtype)
        normed, total = norm(name, *brought)
        (values, scales), again = norm(name, *brought, quantised=form)
        expected = quantise_rows(normed, form)
        assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(scales, expected.scales)
        assert torch.equal(again, total)


def schedules_agree() -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        found = []
        for most in SCHEDULES.values():
            force(most)
            found.append(norm("rms", *inputs(shape, dtype)))
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)


def as_unfused() -> None:
    """In float32 and float64 the sums hold the bits of an all-reduce and an add."""
    for dtype in (torch.float32, torch.float64):
        x, residual, weight, bias = inputs((12, 64), dtype)
        _, total = norm("rms", x, residual, weight, bias)
        dist.all_reduce(x)
        assert torch.equal(total, x + residual)


def symmetric(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that all ranks see, not at its beginning."""
    wide = shm.symmetric_empty((x.numel() + 24,), x.dtype)
    return wide[24:].view(x.shape).copy_(x)


def reads_x_where_it_lies() -> None:
    """The bits of an ordinary tensor, and x is free again when the call returns."""
    for shape, dtype in (((70, 4096), torch.float32), ((3, 64), torch.bfloat16)):
        x, *others = inputs(shape, dtype)
        force(1 << 40)
        expected = norm("rms", x, *others)
        shared = symmetric(x)
        for _ in range(5):
            shared.copy_(x)
            found = norm("rms", shared, *others)
            shared.fill_(7)  # a rank that still read it would notice
            for one, two in zip(found, expected, strict=True):
                assert torch.equal(one, two)
        found, _ = norm("layer", shared.copy_(x), *others, quantised=torch.int8)
        expected, _ = norm("layer", x, *others, quantised=torch.int8)
        assert torch.equal(found.values, expected.values)


def differentiates() -> None:
    for name in ("rms", "layer"):
        brought = [t.requires_grad_() for t in inputs((6, 10), torch.float64)]
        normed, total = norm(name, *brought)
        (normed.sin().sum() + total.cos().sum()).backward()
        # one process: the residual has the ranks' parts in it
        whole = [t.detach().clone().requires_grad_() for t in brought]
        parts = sum(drawn(r, (6, 10), torch.float64) for r in range(dist.get_world_size()))
        at = whole[1] + parts
        if name == "rms":
            alone = whole[2] * at / (at.square().mean(-1, keepdim=True) + EPS).sqrt()
        else:
            alone = F.layer_norm(at, (10,), whole[2], whole[3], EPS)
        (alone.sin().sum() + at.cos().sum()).backward()
        for mine, theirs in zip(brought[1:], whole[1:], strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(brought[0].grad, whole[1].grad, rtol=1e-12, atol=1e-12)


def refuses() -> list[str]:
    x, residual, weight, bias = inputs((3, 8), torch.float32)
    calls = [
        lambda: norm("rms", x, residual[:2], weight, bias),
        lambda: norm("layer", x, residual, weight, bias[:4]),
        lambda: norm("rms", x, residual, weight, bias, quantised=torch.int16),
        lambda: norm(
            "rms", x.clone().requires_grad_(), residual, weight, bias, quantised=torch.int8
        ),
    ]
    found = []
    for call in calls:
        with pytest.raises(ValueError) as refusal:
            call()
        found.append(str(refusal.value))
    # what the kernel does not take goes the other way
    _, total = norm("rms", x[:, ::2], residual[:, ::2], weight[::2], bias[::2])
    near(
        total,
        sum(drawn(r, (3, 8), torch.float32)[:, ::2].double() for r in range(dist.get_world_size()))
        + residual[:, ::2].double(),
    )
    return found


def mismatch() -> str:
    rows = 3 if dist.get_rank() else 6
    with pytest.raises(CallMismatch) as refusal:
        norm("rms", *inputs((rows, 48 // rows), torch.float32))
    return str(refusal.value)


CALLS = [
    (computes, "one-shot"),
    (computes, "two-shot"),
    (quantises, "one-shot"),
    (quantises, "two-shot"),
]
CALLS += [
    (schedules_agree,),
    (as_unfused,),
    (reads_x_where_it_lies,),
    (differentiates,),
    (refuses,),
    (mismatch,),
]  # type: ignore[list-item]


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_kernel(ranks: int, tmp_path: Path) -> None:
    calls = [(open_world, str(tmp_path), ranks), *CALLS]
    for answers in run_calls(calls, ranks, backend=None, timeout=400):
        told = answers[-2]
        assert "do not fit" in told[0]
        assert "do not fit" in told[1]
        assert "use torch.int8 or torch.float8_e4m3fn" in told[2]
        assert "with gradients" in told[3]
        assert "different calls" in answers[-1] or "given up" in answers[-1]


def over_gloo() -> None:
    mine: Any = dist.new_group([0])  # torch gives the others something else than a group
    x, residual, weight, _ = inputs((2, 8), torch.float32)
    if dist.get_rank():
        with pytest.raises(TypeError, match="no process group of this rank"):
            fused.all_reduce_rms_norm(x, residual, weight, EPS, mine)
    differentiates()
    for name, dtype in itertools.product(("rms", "layer"), DTYPES):
        for found, expected in zip(
            norm(name, *inputs((5, 64), dtype)), exact(name, (5, 64), dtype), strict=True
        ):
            near(found, expected)
    assert (
        norm("rms", *inputs((5, 64), torch.float32), quantised=torch.int8)[0].values.dtype
        == torch.int8
    )


def test_other_backends_compose_it() -> None:
    run_calls([(over_gloo,)], 2)


def test_every_float8() -> None:
    x = torch.cat([torch.linspace(-460, 460, 20_001), torch.linspace(-0.1, 0.1, 20_001)])
    codes = torch.tensor([to_e4m3(v) for v in x.numpy()], dtype=torch.uint8)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), expected.float())


def test_what_fits_a_step() -> None:
    assert kernel.rows_of_a_step(64, 16384, 2) == 32
    assert kernel.rows_of_a_step(3, 8, 2) == 3
    assert kernel.rows_of_a_step(1, 1 << 20, 4) == 0  # the sum of a row has no place
    for rows, row_bytes, ranks in itertools.product((1, 7, 100), (16, 16384, 500_000), (2, 5)):
        n = kernel.rows_of_a_step(rows, row_bytes, ranks)
        assert n * row_bytes <= kernel.SLOT
        assert -(-n // ranks) * (row_bytes + kernel.STAT_BYTES) <= kernel.RESULT
