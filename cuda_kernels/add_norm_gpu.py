"""Residual add and norm on one GPU: a block for each row, which stays in registers between its passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel, run_on
from .gpu.ptx import f32, u32, u64
from .gpu.rows import row_functions
from .gpu.vectors import VECTORS

MOST_PIECES = 4096  # of a row: 64 KiB, eight pieces for each of 512 threads

PLAIN = {"dtype": torch.bfloat16, "layer_norm": False}


@kernel(
    threads=512,
    table=[
        {**PLAIN, "hidden": 4096},
        {**PLAIN, "hidden": 8192},
        {**PLAIN, "hidden": 4096, "layer_norm": True},
        {**PLAIN, "hidden": 4096, "dtype": torch.float32},
    ],
)
def norm_rows(dtype, layer_norm, hidden, threads):
    """Add row `block` of x to the residual, round, and normalise what was rounded."""
    row_of = row_functions(1, hidden, dtype, layer_norm, False, threads)
    numbers, fetch, add, finish = row_of.numbers, row_of.fetch, row_of.add, row_of.finish
    round_and_store, statistics = row_of.round_and_store, row_of.statistics
    per_row = hidden * dtype.itemsize

    def body(
        x: u64, residual: u64, weight: u64, bias: u64, normed: u64, total: u64, eps: f32,
    ):  # fmt: skip
        at = u64(u32(ptx.block())) * u64(per_row)
        sums = ptx.local(numbers, f32)
        for i in range(numbers):
            sums[i] = f32(0)
        fetch(residual + at, sums)
        add(x + at, sums)
        round_and_store(total + at, sums)
        mean, scale = statistics(sums, eps)
        finish(sums, mean, scale, weight, bias, normed, u64(0), ptx.block())

    return body


def serves(x: Tensor, residual: Tensor, *parameters: Tensor) -> bool:
    """Say whether the kernel takes them: one dtype of `VECTORS`, rows of whole 16-byte pieces, aligned parameters."""
    row_bytes = x.shape[-1] * x.element_size()
    whole = row_bytes % 16 == 0 and row_bytes <= 16 * MOST_PIECES and x.numel() > 0
    alike = all(t.dtype == x.dtype and t.is_cuda == x.is_cuda for t in (residual, *parameters))
    aligned = all(t.data_ptr() % 16 == 0 and t.is_contiguous() for t in parameters)
    return x.dtype in VECTORS and whole and alike and aligned and x.shape == residual.shape


def norm_launch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    normed: Tensor, total: Tensor,
) -> tuple[Variant, int, tuple[Any, ...]]:  # fmt: skip
    """Choose the variant, the grid and the arguments for contiguous tensors at multiples of 16 bytes."""
    hidden = x.shape[-1]
    pieces = hidden * x.element_size() // 16
    threads = min(512, -(-pieces // 32) * 32)
    variant = norm_rows(dtype=x.dtype, layer_norm=bias is not None, hidden=hidden, threads=threads)
    offset = weight if bias is None else bias
    pointers = tuple(t.data_ptr() for t in (x, residual, weight, offset, normed, total))
    return variant, x.numel() // hidden, (*pointers, eps)


def add_norm_cuda(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Add and normalise in one launch on the current stream; what the kernel takes, see `serves`."""
    x, residual = (
        t.contiguous() if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
        for t in (x, residual)
    )
    normed, total = torch.empty_like(x), torch.empty_like(x)
    run_on(norm_launch(x, residual, weight, bias, eps, normed, total), x)
    return normed, total
