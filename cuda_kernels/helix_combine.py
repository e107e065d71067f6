"""Helix's exchange and merge on CUDA: partials go straight into the slot of the rank that merges them.

Every KV rank holds partial outputs of all heads over its part of the sequence. `helix_send` copies a chunk (a run of
requests) to the ranks that own the heads, each row with its lse in one record, and its last block raises one flag for
each destination: flag (chunk, source). `helix_combine`, launched once, on a few blocks beside attention, waits for the
flags of a chunk, merges it out of its own memory, and goes on to the next. No packing, no grid-wide wait, no barrier.

Two slots: a rank sends for the step after next when its combine of the next is done, which waited for all ranks.

Source: Helix Parallelism (arXiv 2507.07120), sections 2.1.3 (HOP-B) and 2.2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.peers import HEAD, Layout, end_step, wait_for
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .merge import merge_function, merge_states_reference

TAIL = 16  # bytes of a record behind the row: its lse, then the scales of an fp8 payload
SCALED = 32  # 16-byte pieces that share a scale: a warp agrees on it
LOWS = u32(0x5410)


def helix_combine_reference(os: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what every rank gets, from all ranks' partials.

    Shape: os `[kvp, batch, heads, value_dim]`, lses `[kvp, batch, heads]`
        -> o `[kvp, batch, heads/kvp, value_dim]`, lse `[kvp, batch, heads/kvp]`
    """
    o, lse = merge_states_reference(os, lses)
    ranks = os.shape[0]
    return torch.stack(o.chunk(ranks, 1)), torch.stack(lse.chunk(ranks, 1))


def record_bytes(vectors: int, fp8: bool = False) -> int:
    """One row of `vectors` 16-byte pieces, or of 8-byte ones, with its lse."""
    return (-(-vectors // 2) if fp8 else vectors) * 16 + TAIL


USUAL = {
    "slot_bytes": 1 << 20, "chunks": 8, "virtual": False, "dtype": torch.bfloat16, "fp8": False,
}  # fmt: skip
TABLE = [
    {**USUAL, "world": 4, "vectors": 16},
    {**USUAL, "world": 8, "vectors": 16},
    {**USUAL, "world": 8, "vectors": 64},
    {**USUAL, "world": 8, "vectors": 16, "fp8": True, "arch": 90},
]


@device_function
def _as_codes(x, scale):
    """Eight numbers as e4m3."""
    by = ptx.reciprocal(scale)
    a, b = ptx.e4m3x2(f32(x[0] * by), f32(x[1] * by)), ptx.e4m3x2(f32(x[2] * by), f32(x[3] * by))
    c, d = ptx.e4m3x2(f32(x[4] * by), f32(x[5] * by)), ptx.e4m3x2(f32(x[6] * by), f32(x[7] * by))
    return ptx.pick_bytes(a, b, LOWS), ptx.pick_bytes(c, d, LOWS)


@device_function
def _of_codes(first, second, scale, x):
    """Undo `_as_codes`."""
    a, b = ptx.f16x2_of_e4m3x2(first), ptx.f16x2_of_e4m3x2(u32(first >> u32(16)))
    c, d = ptx.f16x2_of_e4m3x2(second), ptx.f16x2_of_e4m3x2(u32(second >> u32(16)))
    x[0], x[1] = f32(ptx.f16_low(a) * scale), f32(ptx.f16_high(a) * scale)
    x[2], x[3] = f32(ptx.f16_low(b) * scale), f32(ptx.f16_high(b) * scale)
    x[4], x[5] = f32(ptx.f16_low(c) * scale), f32(ptx.f16_high(c) * scale)
    x[6], x[7] = f32(ptx.f16_low(d) * scale), f32(ptx.f16_high(d) * scale)


@kernel(threads=128, table=TABLE)
def helix_send(world, vectors, dtype, slot_bytes, chunks, virtual, fp8, threads):
    """Send requests `first + block x` to destination block y; the launch is one chunk, o and lse are the chunk's.

    With `fp8` (16-bit dtypes) rows go as e4m3 with a float32 scale for each 512 bytes of them: half the bytes, and an
    error of at most 1/16 of each number, or 2^-18 of the largest.
    """
    layout, record = Layout(world, slot_bytes, chunks, sets=2), record_bytes(vectors, fp8)
    width, unpack, _ = VECTORS[dtype]
    assert not fp8 or width == 8
    shift = (vectors - 1).bit_length()
    rows_a_turn, lane_mask = threads >> shift, (1 << shift) - 1
    slots, parity_bytes = layout.slots, layout.parity_bytes
    counters = HEAD + layout.set_bytes  # of the blocks that have sent a chunk
    tail, steps = record - TAIL, min(shift, 5)

    def body(
        peers: u64, rank: i32, o: u64, lse: u64, chunk: i32, first: i32, batch: i32, heads: i32
    ):
        if virtual:  # block z is the rank; o and lse are [world, batch, world * heads, ...]
            rank = ptx.block_z()
            ahead = u64(u32(rank)) * u64(u32(batch)) * u64(u32(heads)) * u64(world)
            o, lse = o + ahead * u64(16 * vectors), lse + ahead * u64(4)
        own = ptx.ld_u64(peers + u64(u32(rank)) * u64(8))
        step = ptx.ld4(own)
        here = u64(slots) + u64(step & u32(1)) * u64(parity_bytes)
        step = u32(step + u32(1))
        request, to = ptx.block(), ptx.block_y()
        base = ptx.ld_u64(peers + u64(u32(to)) * u64(8)) + here
        base += u64(u32(rank)) * u64(slot_bytes)
        piece = i32(ptx.thread() & i32(lane_mask))
        before = i32(0)
        while before < heads:  # all threads go round alike: those of an fp8 row agree on its scale
            head = i32(before + (ptx.thread() >> i32(shift)))
            here_too = head < heads and piece < i32(vectors)
            head = min(head, i32(heads - i32(1)))
            row = u64(u32(i32(request * i32(world) + to))) * u64(u32(heads)) + u64(u32(head))
            at = u64(u32(i32(first + request))) * u64(u32(heads)) + u64(u32(head))
            place = base + at * u64(record)
            held = min(piece, i32(vectors - 1))
            a, b, c, d = ptx.ld16_once(o + (row * u64(vectors) + u64(u32(held))) * u64(16))
            if fp8:
                x = ptx.local(width, f32)
                unpack(a, b, c, d, x, 0)
                largest = f32(0)
                for i in range(width):
                    largest = ptx.larger(largest, ptx.magnitude(x[i]))
                for i in range(steps):
                    largest = ptx.larger(largest, ptx.shuffle_xor(largest, i32(1 << i)))
                scale = f32(1) if largest == f32(0) else f32(largest * f32(1 / 448))
                if here_too:
                    e, f = _as_codes(x, scale)
                    ptx.st8(place + u64(u32(piece)) * u64(8), e, f)
                    if (piece & i32(SCALED - 1)) == i32(0):
                        to_scale = u64(u32(piece >> i32(5))) * u64(4) + u64(tail + 4)
                        ptx.st_f32(place + to_scale, scale)
            elif here_too:
                ptx.st16(place + u64(u32(piece)) * u64(16), a, b, c, d)
            if here_too and piece == i32(0):
                ptx.st_f32(place + u64(tail), ptx.ld_f32(lse + row * u64(4)))
            before = i32(before + i32(rows_a_turn))
        last = ptx.shared(1, i32)
        ptx.barrier()
        if ptx.thread() == i32(0):
            counted = ptx.count4(own + u64(counters) + u64(u32(chunk)) * u64(4), u32(1))
            last[0] = i32(counted)
        ptx.barrier()
        if last[0] == i32(ptx.blocks() * i32(world) - i32(1)):  # all blocks have sent: say so
            if ptx.thread() == i32(0):
                ptx.st4(own + u64(counters) + u64(u32(chunk)) * u64(4), u32(0))
            if ptx.thread() < i32(world):
                flag = u64(u32(i32(chunk * i32(world) + rank))) * u64(4) + u64(HEAD)
                peer = ptx.ld_u64(peers + u64(u32(ptx.thread())) * u64(8))
                ptx.st4_release(peer + flag, step)

    return body


@kernel(
    threads=128, table=[{**TABLE[0], "sink": True}, *({**one, "sink": False} for one in TABLE[1:])]
)
def helix_combine(world, vectors, dtype, slot_bytes, chunks, virtual, fp8, sink, threads):
    """Merge requests chunk by chunk as they come: those of chunk i end before `ends[i]`.

    A row of the result is a request's head; `sinks` has a logit for each head, which joins the denominator.
    """
    layout, record = Layout(world, slot_bytes, chunks, sets=2), record_bytes(vectors, fp8)
    width, _, pack = VECTORS[dtype]
    merge_pieces = merge_function(world, dtype)
    shift, words = (vectors - 1).bit_length(), 4 * world
    rows_a_turn, lane_mask = threads >> shift, (1 << shift) - 1
    slots, parity_bytes, tail = layout.slots, layout.parity_bytes, record - TAIL

    def body(
        peers: u64, rank: i32, out: u64, out_lse: u64, sinks: u64, ends: u64, count: i32,
        heads: i32, inverse: u32,
    ):  # fmt: skip
        rows = i32(i32(ptx.ld4(ends + u64(u32(i32(count - i32(1)))) * u64(4))) * heads)
        if virtual:
            rank = ptx.block_z()
            ahead = u64(u32(rank)) * u64(u32(rows))
            out, out_lse = out + ahead * u64(16 * vectors), out_lse + ahead * u64(4)
            sinks += u64(u32(rank)) * u64(u32(heads)) * u64(4)
        own = ptx.ld_u64(peers + u64(u32(rank)) * u64(8))
        step = ptx.ld4(own)
        here = own + u64(slots) + u64(step & u32(1)) * u64(parity_bytes)
        step = u32(step + u32(1))
        piece = i32(ptx.thread() & i32(lane_mask))
        v, weights = ptx.local(words, u32), ptx.local(world, f32)
        acc = ptx.local(width, f32)
        chunk, begin = i32(0), i32(0)
        while chunk < count:
            if ptx.thread() < i32(world):
                flag = u64(u32(i32(chunk * i32(world) + ptx.thread()))) * u64(4) + u64(HEAD)
                wait_for(own + flag, step)
            ptx.barrier()
            end = i32(i32(ptx.ld4(ends + u64(u32(chunk)) * u64(4))) * heads)
            turn = i32(ptx.block() * i32(rows_a_turn) + (ptx.thread() >> i32(shift)))
            row = i32(begin + turn)
            while row < end:
                if piece < i32(vectors):
                    place = here + u64(u32(row)) * u64(record)
                    for s in range(world):
                        first = place + u64(s * slot_bytes)
                        if fp8:
                            x = ptx.local(width, f32)
                            e, f = ptx.ld8(first + u64(u32(piece)) * u64(8))
                            of_scale = u64(u32(piece >> i32(5))) * u64(4) + u64(tail + 4)
                            _of_codes(e, f, ptx.ld_f32(first + of_scale), x)
                            a, b, c, d = pack(x, 0)
                        else:
                            a, b, c, d = ptx.ld16(first + u64(u32(piece)) * u64(16))
                        v[4 * s], v[4 * s + 1], v[4 * s + 2], v[4 * s + 3] = a, b, c, d
                        weights[s] = ptx.ld_f32(first + u64(tail))
                    logit = f32(-np.inf)
                    if sink:  # inverse: 2^32 / heads, so that nothing divides
                        head = i32(row - i32(i32(ptx.mul_high(u32(row), inverse)) * heads))
                        head = min(
                            head, i32(heads - i32(1))
                        )  # of one head there is no such inverse
                        logit = ptx.ld_f32(sinks + u64(u32(head)) * u64(4))
                    lse = merge_pieces(v, weights, logit, acc)
                    a, b, c, d = pack(acc, 0)
                    to = u64(u32(row)) * u64(vectors) + u64(u32(piece))
                    ptx.st16(out + to * u64(16), a, b, c, d)
                    if piece == i32(0):
                        ptx.st_f32(out_lse + u64(u32(row)) * u64(4), lse)
                row = i32(row + ptx.blocks() * i32(rows_a_turn))
            begin, chunk = end, i32(chunk + i32(1))
        end_step(own, step)

    return body


def inverse_of(heads: int) -> int:
    """What `helix_combine` multiplies by to divide by the number of heads."""
    return min((1 << 32) // heads + 1, (1 << 32) - 1)


__all__ = [
    "helix_combine",
    "helix_combine_reference",
    "helix_send",
    "inverse_of",
    "record_bytes",
]
