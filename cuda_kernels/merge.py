"""Merge partial attention outputs by their log-sum-exp (natural log).

Partials over disjoint sets of keys (shards, ranks, splits of one shard) combine exactly:
`m = max lse`, `w = exp(lse - m)`, `o = sum(w * o) / sum(w)`, `lse = m + log(sum(w))`.

Source: FlashDecoding; Helix Parallelism (arXiv 2507.07120) section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from .exp import exp_each, log_rows
from .gpu import ptx
from .gpu.kernel import Variant, kernel, run_on
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.toolchain import usable
from .gpu.vectors import VECTORS
from .kernel_cache import njit
from .numbers import LIKE, LOOKS, addressable
from .room import room_like
from .runs import RUN
from .vectors import LINE, at, fence
from .weighted import SHORT_RUN, blend_far, blend_one, blend_past, blend_run, blend_short
from .workers import run_rows

NEG_INF = float("-inf")
MOST_SHARDS = 16  # that one launch merges: as many 16-byte loads are in flight for each thread
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
LOWEST = f32(-3.0e38)  # finite: an all-empty row must not become inf - inf
ELEMENTS_A_THREAD = 1 << 17  # of the partials: a thread's start costs about 30 us
TILE = 64  # places whose weights are made at once
GONE = -1.0  # the weight of an empty shard, whose numbers are not looked at
FAR = 8 << 20  # bytes of partials that come from memory, not from the caches
BEYOND = 4 << 20  # bytes of a result stored past the cache: measured, with a reader after it too
WIDE = (torch.float32, torch.float64)


def merge_states_reference(
    o: Tensor, lse: Tensor, sink: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partials in plain torch, differentiable in `o`, `lse` and `sink`.

    An empty shard (`lse == -inf`, or flagged in `empty`) has weight zero whatever its `o` and
    `lse` hold, NaN included. A NaN `lse` that is not flagged stays NaN: it is an error to see.

    Shape:
        o `[shards, rows, heads, value_dim]`, lse `[shards, rows, heads]`, sink `[heads]`,
        empty `[shards, rows]` or `[shards, rows, heads]` (bool)
        -> o `[rows, heads, value_dim]`, lse `[rows, heads]`
    """
    if empty is not None:
        if empty.dim() == lse.dim() - 1:
            empty = empty.unsqueeze(-1)
        lse = lse.masked_fill(empty, NEG_INF)
    o = torch.where((lse == NEG_INF).unsqueeze(-1), torch.zeros_like(o), o)
    with torch.no_grad():  # the shift cancels: it has no gradient
        top = lse.amax(0)
        if sink is not None:
            top = torch.maximum(top, sink.to(lse.dtype))
        top = torch.where(top == NEG_INF, torch.zeros_like(top), top)
    weight = torch.exp(lse - top)
    total = weight.sum(0)
    if sink is not None:
        total = total + torch.exp(sink.to(lse.dtype) - top)
    none = total == 0
    total = torch.where(none, torch.ones_like(total), total)
    merged = (weight.unsqueeze(-1) * o.to(lse.dtype)).sum(0) / total.unsqueeze(-1)
    merged_lse = torch.where(none, torch.full_like(top, NEG_INF), top + torch.log(total))
    return merged.to(o.dtype), merged_lse


def direct(x: Tensor) -> bool:
    """Say whether a CPU kernel may be called past torch's dispatcher, which costs 50 us per operator.

    Only with a plain CPU tensor and nothing being compiled: tracers need the operator.
    """
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


@njit(nogil=True, error_model="numpy")  # no fast math: -inf and NaN mean something
def _weigh(lse, first, sink, place, weights, tops):
    """Give a tile of places weights `[shards, TILE]`, GONE of an empty shard, and in `tops` the merged lse.

    The tile is at `first` in lse; `place`, its number among all places, says the sinks.
    Every loop is over all places of a tile: vector code, without a rest that might round in another way.
    """
    kind, shards, logits = lse.dtype.type, lse.shape[0], sink.shape[0]
    zero, one, nan, least, gone = kind(0), kind(1), kind(np.nan), kind(-np.inf), kind(GONE)
    base, total = np.empty(TILE, lse.dtype), np.zeros(TILE, lse.dtype)
    for t in range(TILE):
        tops[t] = sink[(place + t) % logits] if logits else least
    for s in range(shards):
        held = lse[s, first : first + TILE]
        for t in range(TILE):
            tops[t] = held[t] if (held[t] > tops[t]) | (held[t] != held[t]) else tops[t]
    for t in range(TILE):
        base[t] = zero if tops[t] == least else tops[t]
    if logits:
        for t in range(TILE):
            total[t] = sink[(place + t) % logits] - base[t]
        exp_each(total, TILE, zero)
    for s in range(shards):
        row, held = weights[s], lse[s, first : first + TILE]
        for t in range(TILE):
            row[t] = held[t] - base[t]
        exp_each(row, TILE, zero)
        for t in range(TILE):
            total[t] += row[t]
            row[t] = gone if held[t] == least else row[t]
    for t in range(TILE):
        seen = tops[t] < np.inf  # else infinite or NaN: to be seen
        total[t] = (total[t] if tops[t] > least else one) if seen else nan
        base[t] = one / total[t]
    for s in range(shards):
        row = weights[s]
        for t in range(TILE):
            row[t] *= base[t]
    log_rows(total, TILE)
    for t in range(TILE):
        tops[t] += total[t]


@njit(nogil=True)
def _merge(o, lse, sink, out, out_lse, sizes, far, past, like, wide, start, stop):
    """Places (rows x heads) start..stop: weights tile by tile, as vector code, then one pass over the partials."""
    shards, places, width, logits = sizes
    held, sinks = carray(at(lse, wide), (shards, places)), carray(at(sink, wide), logits)
    merged_lse = carray(at(out_lse, wide), places)
    weights, tops = np.empty((shards, TILE), wide.dtype), np.empty(TILE, wide.dtype)
    item, step = like.itemsize, weights.strides[0]
    apart = places * width * item
    runs = width - width % RUN
    shorts = runs + (width - runs) // SHORT_RUN * SHORT_RUN
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        if count == TILE:
            _weigh(held, first, sinks, first, weights, tops)
        else:
            rest = np.empty((shards, TILE), wide.dtype)
            for s in range(shards):
                for t in range(TILE):
                    rest[s, t] = held[s, first + t] if t < count else -np.inf
            _weigh(rest, 0, sinks, first, weights, tops)
        for t in range(count):
            merged_lse[first + t] = tops[t]
            w = weights.ctypes.data + t * weights.itemsize
            of = o + (first + t) * width * item
            to = out + (first + t) * width * item
            for x in range(0, runs, RUN):
                y = x * item
                if past:
                    blend_past(to + y, of + y, apart, shards, w, step, like, wide)
                elif far:
                    blend_far(to + y, of + y, apart, shards, w, step, like, wide)
                else:
                    blend_run(to + y, of + y, apart, shards, w, step, like, wide)
            for x in range(runs, shorts, SHORT_RUN):
                y = x * item
                blend_short(to + y, of + y, apart, shards, w, step, like, wide)
            for x in range(shorts, width):
                y = x * item
                blend_one(to + y, of + y, apart, shards, w, step, like, wide)
    if past:
        fence()


def merge_plain(
    o: Tensor, lse: Tensor, sink: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge without autograd: in Numba on the CPU, else torch."""
    if o.shape[0] == 1 and sink is None and empty is None:
        gone = (lse[0] == NEG_INF).unsqueeze(-1)
        return o[0].masked_fill(gone, 0.0), lse[0].clone()
    alike = o.dtype == lse.dtype or o.dtype in LOOKS
    if not (alike and lse.dtype in WIDE and lse.numel() and addressable(o, lse)):
        return merge_states_reference(o, lse, sink, empty)
    if empty is not None:
        lse = lse.masked_fill(empty.unsqueeze(-1) if empty.dim() < lse.dim() else empty, NEG_INF)
    sinks = lse if sink is None else sink.detach().to(lse)
    o, lse, sinks = o.contiguous(), lse.contiguous(), sinks.contiguous()
    merged, merged_lse = room_like(o[0]), torch.empty_like(lse[0])
    shards, width = o.shape[0], o.shape[-1]
    sizes = (shards, merged_lse.numel(), width, 0 if sink is None else sinks.numel())
    past = merged.nbytes >= BEYOND and width % RUN == 0 and merged.data_ptr() % LINE == 0
    far = o.nbytes >= FAR
    addresses = tuple(t.data_ptr() for t in (o, lse, sinks, merged, merged_lse))
    words = (sizes, far, past, LIKE[o.dtype][0], LIKE[lse.dtype][0])

    def part(start: int, stop: int) -> None:
        _merge(*addresses, *words, start, stop)

    run_rows(part, sizes[1], ELEMENTS_A_THREAD // max(1, shards * width))
    return merged, merged_lse


def merge_function(shards: int, dtype: torch.dtype) -> Callable[..., Any]:
    """Make the device function that merges 16 bytes of each shard, by `weights`, their lse."""
    width, unpack, _ = VECTORS[dtype]

    @device_function
    def merge_pieces(words, weights, logit, acc):
        """Leave the merged numbers in `acc`; return the lse. `logit` joins the denominator."""
        top = ptx.larger(LOWEST, logit)
        for s in range(shards):
            top = ptx.larger(top, weights[s])
        total = ptx.exp2(f32(logit - top) * LOG2E)
        x = ptx.local(width, f32)
        for i in range(width):
            acc[i] = f32(0)
        for s in range(shards):
            weight = ptx.exp2(f32(weights[s] - top) * LOG2E)
            unpack(words[4 * s], words[4 * s + 1], words[4 * s + 2], words[4 * s + 3], x, 0)
            total += weight
            for i in range(width):
                # what an empty shard holds may be NaN
                acc[i] += f32(0) if weight == f32(0) else f32(weight * x[i])
        scale = f32(0) if total == f32(0) else ptx.reciprocal(total)
        for i in range(width):
            acc[i] *= scale
        return f32(top + ptx.log2(total) * LN2)

    return merge_pieces


@kernel(
    threads=128,
    table=[
        {"shards": shards, "vectors": vectors, "dtype": dtype, "sink": sink}
        for shards, vectors, dtype, sink in (
            (2, 16, torch.bfloat16, False),
            (8, 16, torch.bfloat16, True),
            (8, 64, torch.bfloat16, False),
            (4, 32, torch.float32, False),
        )
    ],
)
def merge_rows(shards, vectors, dtype, sink, threads):
    """Merge rows of `vectors` 16-byte pieces, one thread for each; block y is a head if there are sinks."""
    width, _, pack = VECTORS[dtype]
    merge_pieces = merge_function(shards, dtype)
    shift = (vectors - 1).bit_length()  # lanes of a row: a power of two, the last may idle
    rows_a_block, lane_mask = threads >> shift, (1 << shift) - 1
    words = 4 * shards

    def body(o: u64, lse: u64, sinks: u64, out: u64, out_lse: u64, rows: i32, heads: i32):
        piece = i32(ptx.thread() & i32(lane_mask))
        row = i32(ptx.block() * i32(rows_a_block) + (ptx.thread() >> i32(shift)))
        if row >= rows or piece >= i32(vectors):
            return
        head = ptx.block_y()
        at = u64(u32(row)) * u64(u32(heads)) + u64(u32(head))
        all_rows = u64(u32(rows)) * u64(u32(heads))
        place = (at * u64(vectors) + u64(u32(piece))) * u64(16)
        v, weights = ptx.local(words, u32), ptx.local(shards, f32)
        for s in range(shards):  # all loads first: shards x 16 bytes in flight
            first = o + place + u64(s) * all_rows * u64(16 * vectors)
            v[4 * s], v[4 * s + 1], v[4 * s + 2], v[4 * s + 3] = ptx.ld16_once(first)
            weights[s] = ptx.ld_f32(lse + (at + u64(s) * all_rows) * u64(4))
        logit = ptx.ld_f32(sinks + u64(u32(head)) * u64(4)) if sink else f32(-np.inf)
        acc = ptx.local(width, f32)
        merged_lse = merge_pieces(v, weights, logit, acc)
        a, b, c, d = pack(acc, 0)
        ptx.st16(out + place, a, b, c, d)
        if piece == i32(0):
            ptx.st_f32(out_lse + at * u64(4), merged_lse)

    return body


@torch.library.custom_op("plait::merge_states", mutates_args=())
def merge_states_op(
    o: Tensor, lse: Tensor, sink: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge behind torch's dispatcher, for tracers and compilers."""
    return merge_plain(o, lse, sink, empty)


@merge_states_op.register_kernel("cuda")
def merge_cuda(
    o: Tensor, lse: Tensor, sink: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge in one launch for each 16 partials; what the kernel does not serve goes to torch."""
    aligned = o.data_ptr() % 16 == 0 and o.shape[-1] * o.element_size() % 16 == 0
    fits = o.dtype in VECTORS and lse.dtype == torch.float32 and aligned and o.shape[-1] <= 1024
    if not fits or o.numel() == 0 or not usable():
        return merge_plain(o, lse, sink, empty)
    if empty is not None:
        lse = lse.masked_fill(empty.unsqueeze(-1) if empty.dim() < lse.dim() else empty, NEG_INF)
    while o.shape[0] > MOST_SHARDS:
        parts = [
            merge_cuda(o[i : i + MOST_SHARDS], lse[i : i + MOST_SHARDS], None, None)
            for i in range(0, o.shape[0], MOST_SHARDS)
        ]
        o, lse = (torch.stack(part) for part in zip(*parts, strict=True))
    o, lse = o.contiguous(), lse.contiguous()
    logits = None if sink is None else sink.float().contiguous()
    merged, merged_lse = o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])
    run_on(merge_launch(o, lse, logits, merged, merged_lse), o)
    return merged, merged_lse


def merge_launch(
    o: Tensor, lse: Tensor, sink: Tensor | None, out: Tensor, out_lse: Tensor
) -> tuple[Variant, tuple[int, int], tuple[int, ...]]:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    shards, rows, heads, _ = o.shape
    vectors = o.shape[-1] * o.element_size() // 16
    variant = merge_rows(shards=shards, vectors=vectors, dtype=o.dtype, sink=sink is not None)
    if sink is None:
        rows, heads = rows * heads, 1
    blocks = -(-rows // (variant.threads >> (vectors - 1).bit_length()))
    sinks = 0 if sink is None else sink.data_ptr()
    pointers = (o.data_ptr(), lse.data_ptr(), sinks, out.data_ptr(), out_lse.data_ptr())
    return variant, (blocks, heads), (*pointers, rows, heads)


@merge_states_op.register_fake
def _(o: Tensor, lse: Tensor, sink: Tensor | None, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])


def merge_states(
    o: Tensor, lse: Tensor, sink: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partial attention outputs over disjoint keys into one.

    Rows that are empty in every shard give `o = 0` and `lse = -inf`. `sink` is a logit per head
    that joins the denominator exactly once, here; the returned lse then includes it, so never
    give a sink both to the partials and to the merge. Differentiable when an input requires grad.

    Shape:
        o `[shards, rows, heads, value_dim]`, lse `[shards, rows, heads]` (natural log),
        sink `[heads]`, empty `[shards, rows]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]`

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if o.dim() != 4 or lse.shape != o.shape[:-1]:
        raise ValueError(
            f"merge_states: o {list(o.shape)} and lse {list(lse.shape)} do not fit; "
            "use o [shards, rows, heads, value_dim] with lse [shards, rows, heads]"
        )
    if sink is not None and sink.shape != o.shape[2:3]:
        raise ValueError(f"merge_states: sink {list(sink.shape)} must be [heads={o.shape[2]}]")
    inputs = (o, lse) if sink is None else (o, lse, sink)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return merge_states_reference(o, lse, sink, empty)
    return (merge_plain if direct(o) else merge_states_op)(o, lse, sink, empty)


__all__ = ["direct", "merge_plain", "merge_states", "merge_states_reference"]
