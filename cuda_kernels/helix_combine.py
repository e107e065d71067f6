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
from .gpu.ptx import f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .merge import merge_function, merge_states_reference

TAIL = 16  # bytes of a record behind the row: its lse


def helix_combine_reference(os: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what every rank gets, from all ranks' partials.

    Shape: os `[kvp, batch, heads, value_dim]`, lses `[kvp, batch, heads]`
        -> o `[kvp, batch, heads/kvp, value_dim]`, lse `[kvp, batch, heads/kvp]`
    """
    o, lse = merge_states_reference(os, lses)
    ranks = os.shape[0]
    return torch.stack(o.chunk(ranks, 1)), torch.stack(lse.chunk(ranks, 1))


def record_bytes(vectors: int) -> int:
    """One row of `vectors` 16-byte pieces with its lse."""
    return vectors * 16 + TAIL


USUAL = {"slot_bytes": 1 << 20, "chunks": 8, "virtual": False, "dtype": torch.bfloat16}
TABLE = [
    {**USUAL, "world": 4, "vectors": 16},
    {**USUAL, "world": 8, "vectors": 16},
    {**USUAL, "world": 8, "vectors": 64},
]


@kernel(threads=128, table=TABLE)
def helix_send(world, vectors, dtype, slot_bytes, chunks, virtual, threads):
    """Send the requests `first + block x` to destination block y; the launch is one chunk."""
    layout, record = Layout(world, slot_bytes, chunks, sets=2), record_bytes(vectors)
    shift = (vectors - 1).bit_length()
    rows_a_turn, lane_mask = threads >> shift, (1 << shift) - 1
    slots, parity_bytes = layout.slots, layout.parity_bytes
    counters = HEAD + layout.set_bytes  # of the blocks that have sent a chunk

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
        request, to = i32(first + ptx.block()), ptx.block_y()
        base = ptx.ld_u64(peers + u64(u32(to)) * u64(8)) + here
        base += u64(u32(rank)) * u64(slot_bytes)
        piece = i32(ptx.thread() & i32(lane_mask))
        head = i32(ptx.thread() >> i32(shift))
        while head < heads:
            row = u64(u32(i32(request * i32(world) + to))) * u64(u32(heads)) + u64(u32(head))
            at = u64(u32(request)) * u64(u32(heads)) + u64(u32(head))
            place = base + at * u64(record)
            if piece < i32(vectors):
                a, b, c, d = ptx.ld16_once(o + (row * u64(vectors) + u64(u32(piece))) * u64(16))
                ptx.st16(place + u64(u32(piece)) * u64(16), a, b, c, d)
            if piece == i32(0):
                ptx.st_f32(place + u64(16 * vectors), ptx.ld_f32(lse + row * u64(4)))
            head = i32(head + i32(rows_a_turn))
        last = ptx.shared(1, i32)
        ptx.barrier()
        if ptx.thread() == i32(0):
            before = ptx.count4(own + u64(counters) + u64(u32(chunk)) * u64(4), u32(1))
            last[0] = i32(before)
        ptx.barrier()
        if last[0] == i32(ptx.blocks() * i32(world) - i32(1)):  # all blocks have sent: say so
            if ptx.thread() == i32(0):
                ptx.st4(own + u64(counters) + u64(u32(chunk)) * u64(4), u32(0))
            if ptx.thread() < i32(world):
                flag = u64(u32(i32(chunk * i32(world) + rank))) * u64(4) + u64(HEAD)
                peer = ptx.ld_u64(peers + u64(u32(ptx.thread())) * u64(8))
                ptx.st4_release(peer + flag, step)

    return body


@kernel(threads=128, table=TABLE)
def helix_combine(world, vectors, dtype, slot_bytes, chunks, virtual, threads):
    """Merge `rows` rows, chunk by chunk of `rows_a_chunk`, as they come."""
    layout, record = Layout(world, slot_bytes, chunks, sets=2), record_bytes(vectors)
    width, _, pack = VECTORS[dtype]
    merge_pieces = merge_function(world, dtype)
    shift, words = (vectors - 1).bit_length(), 4 * world
    rows_a_turn, lane_mask = threads >> shift, (1 << shift) - 1
    slots, parity_bytes = layout.slots, layout.parity_bytes

    def body(peers: u64, rank: i32, out: u64, out_lse: u64, rows: i32, rows_a_chunk: i32):
        if virtual:
            rank = ptx.block_z()
            ahead = u64(u32(rank)) * u64(u32(rows))
            out, out_lse = out + ahead * u64(16 * vectors), out_lse + ahead * u64(4)
        own = ptx.ld_u64(peers + u64(u32(rank)) * u64(8))
        step = ptx.ld4(own)
        here = own + u64(slots) + u64(step & u32(1)) * u64(parity_bytes)
        step = u32(step + u32(1))
        piece = i32(ptx.thread() & i32(lane_mask))
        v, weights = ptx.local(words, u32), ptx.local(world, f32)
        acc = ptx.local(width, f32)
        chunk, begin = i32(0), i32(0)
        while begin < rows:
            if ptx.thread() < i32(world):
                flag = u64(u32(i32(chunk * i32(world) + ptx.thread()))) * u64(4) + u64(HEAD)
                wait_for(own + flag, step)
            ptx.barrier()
            end = min(rows, i32(begin + rows_a_chunk))
            turn = i32(ptx.block() * i32(rows_a_turn) + (ptx.thread() >> i32(shift)))
            row = i32(begin + turn)
            while row < end:
                if piece < i32(vectors):
                    place = here + u64(u32(row)) * u64(record)
                    for s in range(world):
                        first = place + u64(s * slot_bytes)
                        a, b, c, d = ptx.ld16(first + u64(u32(piece)) * u64(16))
                        v[4 * s], v[4 * s + 1], v[4 * s + 2], v[4 * s + 3] = a, b, c, d
                        weights[s] = ptx.ld_f32(first + u64(16 * vectors))
                    lse = merge_pieces(v, weights, f32(-np.inf), acc)
                    a, b, c, d = pack(acc, 0)
                    to = u64(u32(row)) * u64(vectors) + u64(u32(piece))
                    ptx.st16(out + to * u64(16), a, b, c, d)
                    if piece == i32(0):
                        ptx.st_f32(out_lse + u64(u32(row)) * u64(4), lse)
                row = i32(row + ptx.blocks() * i32(rows_a_turn))
            begin, chunk = end, i32(chunk + i32(1))
        end_step(own, step)

    return body


__all__ = ["helix_combine", "helix_combine_reference", "helix_send", "record_bytes"]
