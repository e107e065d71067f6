"""Threads together: who am I, barriers, shuffles, votes, matrix products, arrays, time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..simulator import Trap, lane
from .words import device_function, f32, i32, u32, u64, word


@word("mov.u32 $0, %tid.x;", "i32", pure=True)
def thread() -> Any:
    """The number of this thread in its block."""
    return i32(lane().thread)


@word("mov.u32 $0, %ctaid.x;", "i32", pure=True)
def block() -> Any:
    return i32(lane().block.x)


@word("mov.u32 $0, %ctaid.y;", "i32", pure=True)
def block_y() -> Any:
    return i32(lane().block.y)


@word("mov.u32 $0, %ctaid.z;", "i32", pure=True)
def block_z() -> Any:
    return i32(lane().block.z)


@word("mov.u32 $0, %nctaid.x;", "i32", pure=True)
def blocks() -> Any:
    return i32(lane().block.grid[0])


@word("mov.u32 $0, %ntid.x;", "i32", pure=True)
def threads() -> Any:
    return i32(lane().block.threads)


# ---- arrays; the length and the type are constants


def shared(length: int, dtype: Any, alignment: int = 16) -> Any:
    """Give an array of the block, the same one to each of its threads; at most 48 KiB in all."""
    return lane().shared(length, dtype)


def local(length: int, dtype: Any, alignment: int = 16) -> Any:
    """Give an array of this thread; with constant indices it lives in registers."""
    return np.zeros(length, dtype)


def atomic_add(array: Any, index: Any, value: Any) -> Any:
    """Add to an element of a shared array and return what it was."""
    before = array[index]
    array[index] = before + value
    return before


# ---- together


@word("bar.sync 0;", warp=True)
def barrier() -> None:
    """Wait for all threads of the block; what they wrote is seen by all."""
    lane().barrier()


@word("bar.warp.sync 0xffffffff;", warp=True)
def warp_barrier() -> None:
    lane().exchange(None)


@word("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "f32", "f32 i32", warp=True)
def shuffle_xor(value: Any, mask: Any) -> Any:
    """Give the value of the lane whose number differs from ours by the bits of `mask`."""
    return f32(lane().exchange(value)[lane().number ^ int(mask)])


@word("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "u32", "u32 i32", warp=True)
def shuffle_xor_u32(value: Any, mask: Any) -> Any:
    return u32(lane().exchange(value)[lane().number ^ int(mask)])


@word("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "f32", "f32 i32", warp=True)
def shuffle(value: Any, source: Any) -> Any:
    """Give the value of lane `source` of the warp."""
    return f32(lane().exchange(value)[int(source) & 31])


@word("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "u32", "u32 i32", warp=True)
def shuffle_u32(value: Any, source: Any) -> Any:
    return u32(lane().exchange(value)[int(source) & 31])


@word("shfl.sync.up.b32 $0, $1, $2, 0, 0xffffffff;", "u32", "u32 i32", warp=True)
def shuffle_up_u32(value: Any, distance: Any) -> Any:
    """Give the value of the lane `distance` below, our own where there is none: for prefix sums."""
    source = lane().number - int(distance)
    return u32(lane().exchange(value)[source if source >= 0 else lane().number])


@word(
    "{.reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff;}",
    "u32",
    "u32",
    warp=True,
)
def ballot(flag: Any) -> Any:
    """Give one bit for each lane of the warp: whether its flag is not zero."""
    return u32(sum(1 << i for i, seen in enumerate(lane().exchange(flag)) if seen))


@word("match.any.sync.b32 $0, $1, 0xffffffff;", "u32", "u32", warp=True)
def same(value: Any) -> Any:
    """Give one bit for each lane of the warp that holds our value."""
    return u32(
        sum(1 << i for i, seen in enumerate(lane().exchange(int(value))) if seen == int(value))
    )


@word(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
    "f32 f32 f32 f32",
    "u32 u32 u32 u32 u32 u32 f32 f32 f32 f32",
    warp=True,
)
def mma_bf16(
    a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any
) -> Any:
    """Multiply 16 x 16 by 16 x 8 bfloat16 and add 16 x 8 float32, spread over the warp.

    Lane 4 g + c holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 2c, 2c + 1 (a0, a1) and 8 more (a2, a3); of B
    rows 2c, 2c + 1 (b0) and 8 more (b1) of column g; of C rows g (c0, c1) and g + 8 (c2, c3), columns 2c, 2c + 1.
    """
    held = lane().exchange((a0, a1, a2, a3, b0, b1))
    if held.result is None:
        held.result = _product(np.array(held, u32))
    g, c = lane().number >> 2, 2 * (lane().number & 3)
    product = held.result
    return (
        product[g, c] + c0,
        product[g, c + 1] + c1,
        product[g + 8, c] + c2,
        product[g + 8, c + 1] + c3,
    )


def _product(held: Any) -> Any:
    """Multiply what 32 lanes hold of A and B."""
    pairs = (
        np.stack([held << 16, held & 0xFFFF0000], -1).view(f32).reshape(8, 4, 6, 2)
    )  # g c word half
    a = pairs[:, :, :4].reshape(8, 4, 2, 2, 2)  # g c column-half row-half half
    b = pairs[:, :, 4:]  # g c row-half half
    return a.transpose(3, 0, 2, 1, 4).reshape(16, 16) @ b.transpose(2, 1, 3, 0).reshape(16, 8)


@device_function
def warp_sum(value):
    """Add over the warp; every lane has the sum, added in the same order."""
    for step in (16, 8, 4, 2, 1):
        value += shuffle_xor(value, i32(step))
    return value


@device_function
def warp_max(value):
    for step in (16, 8, 4, 2, 1):
        other = shuffle_xor(value, i32(step))
        value = max(value, other)
    return value


@device_function
def block_sum(value):
    """Add over the block (whole warps); every thread has the sum. Holds two barriers."""
    each = shared(32, f32)
    mine = i32(thread() & i32(31))
    value = warp_sum(value)
    if mine == i32(0):
        each[u32(thread() >> i32(5))] = value
    barrier()
    value = f32(0)
    if mine < i32(threads() >> i32(5)):
        value = each[u32(mine)]
    value = warp_sum(value)
    barrier()
    return value


@device_function
def block_max(value):
    """The largest over the block (whole warps), for every thread. Holds two barriers."""
    each = shared(32, f32)
    mine = i32(thread() & i32(31))
    value = warp_max(value)
    if mine == i32(0):
        each[u32(thread() >> i32(5))] = value
    barrier()
    value = f32(-np.inf)
    if mine < i32(threads() >> i32(5)):
        value = each[u32(mine)]
    value = warp_max(value)
    barrier()
    return value


# ---- time


@word("nanosleep.u32 $0;", "", "u32")
def pause(nanoseconds: Any) -> None:
    """Let others run: in every loop that waits for a flag."""
    lane().pause()


@word("mov.u64 $0, %globaltimer;", "u64", "")
def nanoseconds() -> Any:
    """The device's clock, about a microsecond fine: for time-outs."""
    return u64(time.monotonic_ns())


@word("trap;")
def trap() -> None:
    """End the grid with an error."""
    raise Trap("the kernel called trap")
