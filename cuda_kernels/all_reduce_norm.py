"""Sum over ranks, add to the residual, normalise: one launch over peer-mapped buffers, in three schedules.

    total = residual + sum over ranks of x, in rank order, in float32, rounded once;  normed = norm(total)

All ranks hold the same bits. A row stays in registers between its two passes.

* one-shot: every rank pushes its rows to all, each adds all of them up. One crossing; for few rows.
* two-shot: row r belongs to rank r mod world, which adds it up, and sends the sum with its statistics. Two crossings.
* multimem: the same, but the switch adds (NVLink SHARP) and spreads; its sum is rounded before the residual is added.

Source: TokenWeave (arXiv 2505.11329), which leaves the residual with the owner; ours is whole on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .add_rms_norm import rms_norm_reference
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.peers import HEAD, Layout, cross, end_step
from .gpu.ptx import f32, i32, u32, u64
from .gpu.rows import row_functions

STATISTICS = 16  # bytes beside each row of a two-shot sum: mean, scale


def all_reduce_norm_reference(
    xs: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute what every rank gets, from all ranks' x.

    Shape: xs `[world, rows, hidden]`, residual `[rows, hidden]`, weight, bias `[hidden]`
        -> normed, total `[rows, hidden]`
    """
    wide = torch.promote_types(xs.dtype, torch.float32)
    total = (residual.to(wide) + sum(x.to(wide) for x in xs)).to(residual.dtype)
    if bias is None:
        return rms_norm_reference(total, weight, eps), total
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps), total


def _table(**constants: Any) -> list[dict[str, Any]]:
    usual = {"slot_bytes": 1 << 20, "blocks": 64, "dtype": torch.bfloat16, "virtual": False}
    plain = {**usual, "layer_norm": False, "fp8": False, **constants}
    return [
        {**plain, "world": 4, "hidden": 4096},
        {**plain, "world": 8, "hidden": 8192},
        {**plain, "world": 8, "hidden": 8192, "layer_norm": True},
        {**plain, "world": 4, "hidden": 4096, "fp8": True, "arch": 90},
    ]


@kernel(threads=512, table=_table())
def norm_one_shot(world, hidden, dtype, layer_norm, fp8, slot_bytes, blocks, virtual, threads):
    """Push rows to all ranks, then add all of them up; block b has the rows b, b + grid, ...."""
    layout, per_row = Layout(world, slot_bytes, blocks), hidden * dtype.itemsize
    row_of = row_functions(world, hidden, dtype, layer_norm, fp8, threads)
    numbers, add, add_all = row_of.numbers, row_of.add, row_of.add_all
    round_and_store, statistics, finish = row_of.round_and_store, row_of.statistics, row_of.finish
    slots, parity_bytes = layout.slots, layout.parity_bytes
    pieces, each = per_row // 16, -(-per_row // 16 // threads)

    def body(
        peers: u64, rank: i32, x: u64, residual: u64, weight: u64, bias: u64, normed: u64,
        total: u64, scales: u64, rows: i32, eps: f32,
    ):  # fmt: skip
        if virtual:  # one device plays all ranks: x and the results are [world, rows, hidden]
            rank = ptx.block_y()
            ahead = u64(u32(rank)) * u64(u32(rows))
            x, normed = x + ahead * u64(per_row), normed + ahead * u64(hidden if fp8 else per_row)
            total, scales = total + ahead * u64(per_row), scales + ahead * u64(4)
        own = ptx.ld_u64(peers + u64(u32(rank)) * u64(8))
        step = ptx.ld4(own)
        here = u64(slots) + u64(step & u32(1)) * u64(parity_bytes)
        step = u32(step + u32(1))
        bases = ptx.local(world, u64)
        for r in range(world):
            bases[r] = ptx.ld_u64(peers + u64(8 * r))
        mine = here + u64(u32(rank)) * u64(slot_bytes)
        row = ptx.block()
        while row < rows:
            for v in range(each):
                piece = i32(ptx.thread() + i32(v * threads))
                if piece < i32(pieces):
                    at = u64(u32(row)) * u64(per_row) + u64(u32(piece)) * u64(16)
                    a, b, c, d = ptx.ld16_once(x + at)
                    for r in range(world):
                        ptx.st16(bases[r] + mine + at, a, b, c, d)
            row = i32(row + ptx.blocks())
        flags = u64(HEAD) + u64(u32(ptx.block())) * u64(4 * world)
        cross(peers, own, rank, world, flags, step)
        row = ptx.block()
        while row < rows:
            at = u64(u32(row)) * u64(per_row)
            sums = ptx.local(numbers, f32)
            for i in range(numbers):
                sums[i] = f32(0)
            add_all(own + here + at, u64(slot_bytes), sums)
            add(residual + at, sums)
            round_and_store(total + at, sums)
            mean, scale = statistics(sums, eps)
            finish(sums, mean, scale, weight, bias, normed, scales, row)
            row = i32(row + ptx.blocks())
        end_step(own, step)

    return body


@kernel(threads=512, table=_table())
def norm_two_shot(world, hidden, dtype, layer_norm, fp8, slot_bytes, blocks, virtual, threads):
    """Rows r of one run of `world` belong to ranks r; block b has the runs b, b + grid, ....

    In a buffer, slot (parity, source) holds at a row's place what the source sent of that row: to its owner x, and
    from its owner the sum, with the statistics behind the rows.
    """
    layout, per_row = Layout(world, slot_bytes, blocks), hidden * dtype.itemsize
    row_of = row_functions(world, hidden, dtype, layer_norm, fp8, threads)
    numbers, add, add_all, fetch = row_of.numbers, row_of.add, row_of.add_all, row_of.fetch
    copy_row, send, statistics = row_of.copy_row, row_of.send, row_of.statistics
    round_and_store, finish = row_of.round_and_store, row_of.finish
    slots, parity_bytes, set_bytes = layout.slots, layout.parity_bytes, layout.set_bytes
    beside = slot_bytes // (per_row + STATISTICS) * per_row  # where the statistics begin

    def body(
        peers: u64, rank: i32, x: u64, residual: u64, weight: u64, bias: u64, normed: u64,
        total: u64, scales: u64, rows: i32, eps: f32,
    ):  # fmt: skip
        if virtual:
            rank = ptx.block_y()
            ahead = u64(u32(rank)) * u64(u32(rows))
            x, normed = x + ahead * u64(per_row), normed + ahead * u64(hidden if fp8 else per_row)
            total, scales = total + ahead * u64(per_row), scales + ahead * u64(4)
        own = ptx.ld_u64(peers + u64(u32(rank)) * u64(8))
        step = ptx.ld4(own)
        here = u64(slots) + u64(step & u32(1)) * u64(parity_bytes)
        step = u32(step + u32(1))
        mine = here + u64(u32(rank)) * u64(slot_bytes)
        first = i32(ptx.block() * i32(world))
        flags = u64(HEAD) + u64(u32(first)) * u64(4)
        run = first
        while run < rows:
            for r in range(world):
                row = i32(run + i32(r))
                if row < rows:
                    at = u64(u32(row)) * u64(per_row)
                    copy_row(x + at, ptx.ld_u64(peers + u64(8 * r)) + mine + at)
            run = i32(run + ptx.blocks() * i32(world))
        cross(peers, own, rank, world, flags, step)
        sums = ptx.local(numbers, f32)
        row = i32(first + rank)
        while row < rows:
            at = u64(u32(row)) * u64(per_row)
            for i in range(numbers):
                sums[i] = f32(0)
            add_all(own + here + at, u64(slot_bytes), sums)
            add(residual + at, sums)
            round_and_store(total + at, sums)
            mean, scale = statistics(sums, eps)
            beyond = mine + u64(beside) + u64(u32(row)) * u64(STATISTICS)
            for r in range(world):
                if i32(r) != rank:
                    base = ptx.ld_u64(peers + u64(8 * r))
                    send(base + mine + at, sums)
                    if ptx.thread() == i32(0):
                        ptx.st_f32(base + beyond, mean)
                        ptx.st_f32(base + beyond + u64(4), scale)
            finish(sums, mean, scale, weight, bias, normed, scales, row)
            row = i32(row + ptx.blocks() * i32(world))
        cross(peers, own, rank, world, flags + u64(set_bytes), step)
        run = first
        while run < rows:
            for r in range(world):
                row = i32(run + i32(r))
                if row < rows and i32(r) != rank:
                    at = u64(u32(row)) * u64(per_row)
                    source = own + here + u64(r * slot_bytes)
                    beyond = source + u64(beside) + u64(u32(row)) * u64(STATISTICS)
                    fetch(source + at, sums)
                    round_and_store(total + at, sums)
                    mean, scale = ptx.ld_f32(beyond), ptx.ld_f32(beyond + u64(4))
                    finish(sums, mean, scale, weight, bias, normed, scales, row)
            run = i32(run + ptx.blocks() * i32(world))
        end_step(own, step)

    return body


@kernel(threads=512, table=[entry | {"arch": 90} for entry in _table() if not entry["fp8"]])
def norm_multimem(world, hidden, dtype, layer_norm, fp8, slot_bytes, blocks, virtual, threads):
    """As two-shot, with the sum and its spreading done by the switch; `multicast` stands for all buffers at once.

    The first half of a parity's slots holds this rank's rows, the second the sums. bfloat16 only.
    """
    layout, per_row = Layout(world, slot_bytes, blocks), hidden * dtype.itemsize
    row_of = row_functions(world, hidden, dtype, layer_norm, fp8, threads)
    numbers, add, fetch, statistics = row_of.numbers, row_of.add, row_of.fetch, row_of.statistics
    copy_row, add_in_switch, spread = row_of.copy_row, row_of.add_in_switch, row_of.spread
    round_and_store, finish = row_of.round_and_store, row_of.finish
    slots, parity_bytes, set_bytes = layout.slots, layout.parity_bytes, layout.set_bytes
    half = layout.half_bytes
    beside = half // (per_row + STATISTICS) * per_row

    def body(
        peers: u64, multicast: u64, rank: i32, x: u64, residual: u64, weight: u64, bias: u64,
        normed: u64, total: u64, scales: u64, rows: i32, eps: f32,
    ):  # fmt: skip
        if virtual:
            rank = ptx.block_y()
            ahead = u64(u32(rank)) * u64(u32(rows))
            x, normed = x + ahead * u64(per_row), normed + ahead * u64(hidden if fp8 else per_row)
            total, scales = total + ahead * u64(per_row), scales + ahead * u64(4)
        own = ptx.ld_u64(peers + u64(u32(rank)) * u64(8))
        step = ptx.ld4(own)
        here = u64(slots) + u64(step & u32(1)) * u64(parity_bytes)
        step = u32(step + u32(1))
        sums_at = here + u64(half)
        first = i32(ptx.block() * i32(world))
        flags = u64(HEAD) + u64(u32(first)) * u64(4)
        run = first
        while run < rows:
            for r in range(world):
                row = i32(run + i32(r))
                if row < rows:
                    at = u64(u32(row)) * u64(per_row)
                    copy_row(x + at, own + here + at)
            run = i32(run + ptx.blocks() * i32(world))
        ptx.fence_alias()
        cross(peers, own, rank, world, flags, step)
        ptx.fence_alias()
        sums = ptx.local(numbers, f32)
        row = i32(first + rank)
        while row < rows:
            at = u64(u32(row)) * u64(per_row)
            add_in_switch(multicast + here + at, sums)
            add(residual + at, sums)
            round_and_store(total + at, sums)
            mean, scale = statistics(sums, eps)
            spread(multicast + sums_at + at, sums)
            if ptx.thread() == i32(0):
                beyond = multicast + sums_at + u64(beside) + u64(u32(row)) * u64(STATISTICS)
                ptx.multimem_st16(beyond, ptx.as_u32(mean), ptx.as_u32(scale), u32(0), u32(0))
            finish(sums, mean, scale, weight, bias, normed, scales, row)
            row = i32(row + ptx.blocks() * i32(world))
        ptx.fence_alias()
        cross(peers, own, rank, world, flags + u64(set_bytes), step)
        ptx.fence_alias()
        run = first
        while run < rows:
            for r in range(world):
                row = i32(run + i32(r))
                if row < rows and i32(r) != rank:
                    at = u64(u32(row)) * u64(per_row)
                    beyond = own + sums_at + u64(beside) + u64(u32(row)) * u64(STATISTICS)
                    fetch(own + sums_at + at, sums)
                    round_and_store(total + at, sums)
                    mean, scale = ptx.ld_f32(beyond), ptx.ld_f32(beyond + u64(4))
                    finish(sums, mean, scale, weight, bias, normed, scales, row)
            run = i32(run + ptx.blocks() * i32(world))
        end_step(own, step)

    return body
