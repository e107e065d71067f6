"""Strided tensors to contiguous ones and back: what a message is made of, and what it lands in.

`pack` reads runs of memory (`layout`) and writes them end to end; `unpack` does the reverse. torch's own copy does
both on the CPU, and moves an element at a time on a GPU; there the kernel moves 16 bytes where the runs allow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel, run_on
from .gpu.pieces import movers, piece_bytes
from .gpu.ptx import i32, u32, u64
from .gpu.toolchain import usable
from .merge import direct

MOST_BLOCKS = 65535  # of a grid's y and z
LEAST_RUN = 16  # bytes; shorter runs are as well with torch's copy
MOST_STRIDES = 3

Layout = tuple[int, tuple[tuple[int, int], ...]]  # run bytes, and (count, stride bytes) outside in


def layout(t: Tensor) -> Layout:
    """Describe the memory of a tensor canonically: contiguous runs inside nested strides.

    Dims of one element vanish and dims that continue each other merge, so that equal memory has
    one description however it is viewed. The order is the tensor's own, row-major.
    """
    size = t.element_size()
    run, strides = size, []
    for count, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if count == 1:
            continue
        if not strides and stride * size == run:
            run *= count
        elif strides and stride * size == strides[0][0] * strides[0][1]:
            strides[0] = (strides[0][0] * count, strides[0][1])
        else:
            strides.insert(0, (count, stride * size))
    return run, tuple(strides)


@kernel(
    threads=256,
    table=[
        {"size": 16, "lanes": 16, "packs": True},
        {"size": 16, "lanes": 16, "packs": False},
        {"size": 4, "lanes": 256, "packs": True},
    ],
)
def copy_runs(size, lanes, packs, threads):
    """Copy runs of `pieces`: `lanes` threads for each, blocks for runs of the inner dim, y and z for the outer ones."""
    load, store = movers(size)
    shift, lane_mask = (lanes - 1).bit_length(), lanes - 1

    def body(
        strided: u64, packed: u64, pieces: i32, runs: i32, middle: i32, inner_step: u64,
        middle_step: u64, outer_step: u64,
    ):  # fmt: skip
        run = i32(ptx.block() * i32(threads >> shift) + (ptx.thread() >> i32(shift)))
        if run >= runs:
            return
        y, z = u64(u32(ptx.block_y())), u64(u32(ptx.block_z()))
        apart = strided + u64(u32(run)) * inner_step + y * middle_step + z * outer_step
        number = (z * u64(u32(middle)) + y) * u64(u32(runs)) + u64(u32(run))
        dense = packed + number * u64(u32(pieces)) * u64(size)
        piece = i32(ptx.thread() & i32(lane_mask))
        while piece < pieces:
            at = u64(u32(piece)) * u64(size)
            if packs:
                a, b, c, d = load(apart + at)
                store(dense + at, a, b, c, d)
            else:
                a, b, c, d = load(dense + at)
                store(apart + at, a, b, c, d)
            piece = i32(piece + i32(lanes))

    return body


def copy_launch(
    strided: Tensor, packed: Tensor, packs: bool
) -> tuple[Variant, tuple[int, int, int], tuple[int, ...]] | None:
    """Choose the variant, the grid and the arguments; None: a layout that is torch's."""
    run, strides = layout(strided)
    if run < LEAST_RUN or len(strides) > MOST_STRIDES or not strided.numel():
        return None
    (outer, outer_step), (middle, middle_step), (inner, inner_step) = (
        *((1, 0),) * (MOST_STRIDES - len(strides)), *strides
    )  # fmt: skip
    steps = inner_step, middle_step, outer_step
    if max(outer, middle) > MOST_BLOCKS or (not packs and 0 in dict(strides).values()):
        return None
    size = piece_bytes((strided.data_ptr(), packed.data_ptr(), run, *steps))
    pieces = run // size
    lanes = min(256, 1 << (pieces - 1).bit_length())
    variant = copy_runs(size=size, lanes=lanes, packs=packs)
    grid = -(-inner * lanes // variant.threads), middle, outer
    pointers = strided.data_ptr(), packed.data_ptr()
    return variant, grid, (*pointers, pieces, inner, middle, *steps)


@torch.library.custom_op("plait::pack", mutates_args=())
def pack_op(x: Tensor) -> Tensor:
    """Pack behind torch's dispatcher: torch's copy, but on CUDA."""
    return x.clone(memory_format=torch.contiguous_format)


@pack_op.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    found = copy_launch(x, out, True) if usable() else None
    if found is None:
        return out.copy_(x)
    run_on(found, x)
    return out


@pack_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("plait::unpack", mutates_args={"into"})
def unpack_op(packed: Tensor, into: Tensor) -> None:
    """Unpack behind torch's dispatcher: torch's copy, but on CUDA."""
    into.copy_(packed)


@unpack_op.register_kernel("cuda")
def _(packed: Tensor, into: Tensor) -> None:
    near = packed.is_contiguous() and packed.device == into.device
    found = copy_launch(into, packed, False) if near and usable() else None
    if found is None:
        into.copy_(packed)
        return
    run_on(found, into)


@unpack_op.register_fake
def _(packed: Tensor, into: Tensor) -> None:
    return None


def pack(x: Tensor) -> Tensor:
    """Copy a tensor of any strides to a contiguous one. Shape: `[...]` -> `[...]`"""
    return x.clone(memory_format=torch.contiguous_format) if direct(x) else pack_op(x.detach())


def unpack(packed: Tensor, into: Tensor) -> None:
    """Copy a contiguous tensor into one of any strides.

    Shape: packed, into `[...]`

    Raises:
        ValueError: if they differ in shape or dtype.
    """
    if packed.shape != into.shape or packed.dtype != into.dtype:
        raise ValueError(
            f"unpack: {list(packed.shape)} {packed.dtype} cannot go into {list(into.shape)} {into.dtype}; "
            "use one shape and dtype"
        )
    if direct(packed) and direct(into):
        into.copy_(packed)
    else:
        unpack_op(packed, into)
