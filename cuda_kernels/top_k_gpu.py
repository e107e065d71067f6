"""The k greatest of a row on a GPU: a block for each row, which guesses a threshold, verifies it, and refines.

1. Guess: an order statistic of a sample of the row; if that fails, of the values where the greatest were last time.
2. Verify, in one pass that also keeps what reaches the guess: right if at least k values do, and all have room.
3. Refine: the k-th greatest of those that were kept, by a radix select on bits ordered as the values are.
4. If both guesses fail (many ties, a treacherous hint), the radix select goes over the row itself: four passes more.

Nothing is decided by the host, and no order of threads shows: the answer is set as bits by place, and read off.

Source: Guess-Verify-Refine (arXiv 2604.22312), which is not exact as published; what `top_k.py` says holds here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.radix import (
    BINS,
    count_digit,
    digits_of_kept,
    ordered,
    prefix,
    radix_select,
    value_of,
)
from .gpu.vectors import VECTORS

AT_ONCE = 4  # 16-byte pieces that a thread has in flight
ROOM = 5120  # values that can be kept; the arrays of a block are then 41 KiB
SAMPLE = 4096
MOST = 2048  # k that is served: the room must be more than what a sample mistakes
INF = float("inf")


def _scalar(dtype: torch.dtype) -> Any:
    """What loads one number."""

    @device_function
    def float32(at):
        return ptx.ld_f32(at)

    @device_function
    def bfloat16(at):
        return ptx.bf16_low(ptx.ld2(at))

    @device_function
    def float16(at):
        return ptx.f16_low(ptx.ld2(at))

    return {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: float16}[dtype]


def _sweep(dtype: torch.dtype) -> tuple[Any, Any]:
    """What goes over a row that may begin anywhere: how many pieces there are, and one of them."""
    width, unpack, _ = VECTORS[dtype]
    by_item, by_width = dtype.itemsize.bit_length() - 1, width.bit_length() - 1
    whole = (1 << width) - 1

    @device_function
    def begin(row, n):
        """The 16-byte piece in which the row begins, the elements of it before the row, and the number of pieces."""
        before = i32(u32(row & u64(15))) >> i32(by_item)
        pieces = i32(before + n + i32(width - 1)) >> i32(by_width)
        return row & u64(0xFFFFFFFFFFFFFFF0), before, pieces

    @device_function
    def show(words, j, piece, before, n, v):
        """Numbers of a piece, a bit for each that lies in the row, and the place of the first."""
        unpack(words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3], v, 0)
        first = i32((piece << i32(by_width)) - before)
        there = u32(whole)
        if first < i32(0):
            there = u32(there << u32(-first)) & there
        if i32(first + i32(width)) > n:
            beyond = i32(min(i32(first + i32(width) - n), i32(width)))
            there = u32(there & u32(u32(whole) >> u32(beyond)))
        return there, first

    return begin, show


def _digits_of_row(dtype: torch.dtype) -> Any:
    width = VECTORS[dtype].width
    begin, show = _sweep(dtype)

    @device_function
    def add(held, row, n, key, known, shift, counts):
        start, before, pieces = begin(row, n)
        v, words = ptx.local(width, f32), ptx.local(4, u32)
        base = i32(0)
        while base < pieces:
            piece = i32(base + ptx.thread())
            at = piece if piece < pieces else i32(0)
            words[0], words[1], words[2], words[3] = ptx.ld16_once(start + u64(u32(at)) * u64(16))
            there, _ = show(words, 0, at, before, n, v)
            for i in range(width):
                one = ordered(v[i])
                digit = u32(u32(one >> u32(shift)) & u32(BINS - 1))
                inside = piece < pieces and u32(there & u32(1 << i)) != u32(0)
                count_digit(counts, digit, inside and u32(one & known) == key)
            base = i32(base + ptx.threads())

    return add


def _keep(dtype: torch.dtype, room: int) -> Any:
    """Make the pass that counts what is not less than `least`, and keeps it as long as there is room."""
    width = VECTORS[dtype].width
    begin, show = _sweep(dtype)
    loaded = 4 * AT_ONCE

    @device_function
    def keep(row, n, least, held, places, told):
        start, before, pieces = begin(row, n)
        v, words = ptx.local(width, f32), ptx.local(loaded, u32)
        piece = ptx.thread()
        while piece < pieces:
            for j in range(AT_ONCE):  # all loads first; beyond the end the first piece again
                one = i32(piece + i32(j) * ptx.threads())
                one = one if one < pieces else piece
                words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3] = ptx.ld16_once(
                    start + u64(u32(one)) * u64(16)
                )
            for j in range(AT_ONCE):
                one = i32(piece + i32(j) * ptx.threads())
                if one < pieces:
                    there, first = show(words, j, one, before, n, v)
                    reach = u32(0)
                    for i in range(width):
                        reach = u32(reach | (u32(0) if v[i] < least else u32(1 << i)))
                    reach = u32(reach & there)
                    if reach != u32(0):
                        at = i32(ptx.atomic_add(told, u32(2), u32(ptx.ones(reach))))
                        for i in range(width):
                            if u32(reach & u32(1 << i)) != u32(0):
                                if at < i32(room):
                                    held[u32(at)] = ordered(v[i])
                                    places[u32(at)] = u32(first + i32(i))
                                at = i32(at + i32(1))
            piece = i32(piece + i32(AT_ONCE) * ptx.threads())

    return keep


def _emit(room: int, threads: int) -> Any:
    """Make what reads the answer off: bits of greater values in the first half, of equal ones in the second."""
    each_thread = room // threads

    @device_function
    def emit(held, places, start, out, ties, done, each):
        mine = i32(ptx.thread() * i32(each_thread))
        greater, equal = u32(0), u32(0)
        for j in range(each_thread):
            greater = u32(greater + u32(ptx.ones(held[u32(mine + i32(j))])))
            equal = u32(equal + u32(ptx.ones(places[u32(mine + i32(j))])))
        before, all_greater = prefix(greater, each)
        equals_before, all_equal = prefix(equal, each)
        at = u32(done + before + min(equals_before, ties))
        quota = u32(u32(ties - min(equals_before, ties)))
        for j in range(each_thread):
            more, same = held[u32(mine + i32(j))], places[u32(mine + i32(j))]
            word = u32(more | same)
            while word != u32(0):
                bit = i32(i32(31) - ptx.leading_zeros(u32(word & u32(u32(0) - word))))
                one = u32(u32(1) << u32(bit))
                word = u32(word ^ one)
                taken = u32(more & one) != u32(0)
                if not taken and quota > u32(0):
                    quota = u32(quota - u32(1))
                    taken = True
                if taken:
                    place = u32(start + ((mine + i32(j)) << i32(5)) + bit)
                    ptx.st8(out + u64(at) * u64(8), place, u32(0))
                    at = u32(at + u32(1))
        used = min(all_equal, ties)
        return u32(done + all_greater + used), u32(ties - used)

    return emit


def _guesses(dtype: torch.dtype, sample: int) -> tuple[Any, Any]:
    """Make what takes values to guess by: one of each of `sample` runs of the row, or those at places of a hint."""
    load, item, by_sample = _scalar(dtype), dtype.itemsize, sample.bit_length() - 1

    @device_function
    def take_sample(row, n, held):
        j = ptx.thread()
        while j < i32(sample):
            first = u32((u64(u32(j)) * u64(u32(n))) >> u64(by_sample))
            stop = u32((u64(u32(j + i32(1))) * u64(u32(n))) >> u64(by_sample))
            odd = u32(u32(u32(j) * u32(2654435761)) ^ u32(0x9E3779B9))
            odd = u32(u32(odd ^ u32(odd >> u32(15))) * u32(0x85EBCA6B))
            place = u32(first + ptx.mul_high(odd, u32(stop - first)))
            held[u32(j)] = ordered(load(row + u64(place) * u64(item)))
            j = i32(j + ptx.threads())

    @device_function
    def take_hint(row, n, hint, hints, held, told):
        j = ptx.thread()
        while j < min(hints, i32(sample)):
            place = ptx.ld_u64(hint + u64(u32(j)) * u64(8))
            if place < u64(u32(n)):
                at = ptx.atomic_add(told, u32(2), u32(1))
                held[u32(at)] = ordered(load(row + place * u64(item)))
            j = i32(j + ptx.threads())

    return take_sample, take_hint


def _marks(dtype: torch.dtype, room: int) -> tuple[Any, Any]:
    """Make what sets bits of the places from `first` on: of what was kept, or of the row."""
    width = VECTORS[dtype].width
    begin, show = _sweep(dtype)
    window, by_width = 32 * room, width.bit_length() - 1

    @device_function
    def mark(key, kth, apart, held, places):
        bit = u32(u32(1) << u32(apart & u32(31)))
        if key > kth:
            ptx.atomic_add(held, u32(apart >> u32(5)), bit)
        else:
            ptx.atomic_add(places, u32(apart >> u32(5)), bit)

    @device_function
    def mark_kept(key, place, first, kth, held, places):
        apart = u32(place - first)
        if place >= first and apart < u32(window) and key >= kth:
            mark(key, kth, apart, held, places)

    @device_function
    def mark_row(row, n, first, kth, held, places):
        start, before, pieces = begin(row, n)
        v, words = ptx.local(width, f32), ptx.local(4, u32)
        piece = i32(ptx.thread() + ((first + before) >> i32(by_width)))
        end = i32((first + i32(window) + before + i32(width)) >> i32(by_width))
        while piece < min(end, pieces):
            words[0], words[1], words[2], words[3] = ptx.ld16_once(
                start + u64(u32(piece)) * u64(16)
            )
            there, at = show(words, 0, piece, before, n, v)
            for i in range(width):
                key, apart = ordered(v[i]), i32(at + i32(i) - first)
                inside = apart >= i32(0) and apart < i32(window) and key >= kth
                if inside and u32(there & u32(1 << i)) != u32(0):
                    mark(key, kth, u32(apart), held, places)
            piece = i32(piece + ptx.threads())

    return mark_kept, mark_row


@kernel(
    threads=1024,
    table=[
        {"dtype": torch.float32, "room": ROOM, "sample": SAMPLE},
        {"dtype": torch.bfloat16, "room": ROOM, "sample": SAMPLE},
        {"dtype": torch.float16, "room": ROOM, "sample": SAMPLE},
    ],
)
def top_k_rows(dtype, room, sample, threads):
    """Find the places of the k greatest of row `block`; `rank` is the order statistic of a sample that is guessed."""
    item, each_thread, window = dtype.itemsize, room // threads, 32 * room
    keep, emit = _keep(dtype, room), _emit(room, threads)
    take_sample, take_hint = _guesses(dtype, sample)
    mark_kept, mark_row = _marks(dtype, room)
    kth_of_kept, kth_of_row = radix_select(digits_of_kept), radix_select(_digits_of_row(dtype))

    def body(x: u64, hint: u64, out: u64, n: i32, hints: i32, k: i32, rank: i32):
        held, places = ptx.shared(room, u32), ptx.shared(room, u32)
        counts, each, told = ptx.shared(BINS, u32), ptx.shared(32, u32), ptx.shared(4, u32)
        row = x + u64(u32(ptx.block())) * u64(u32(n)) * u64(item)
        hint = hint + u64(u32(ptx.block())) * u64(u32(hints)) * u64(8)
        out = out + u64(u32(ptx.block())) * u64(u32(k)) * u64(8)
        found, guess = i32(0), i32(0)
        while guess < i32(2) and found == i32(0):
            least, count, by = f32(-INF), i32(sample), u32(rank)
            if n > i32(room):
                if ptx.thread() == i32(0):
                    told[u32(2)] = u32(0)
                ptx.barrier()
                if guess == i32(0):
                    take_sample(row, n, held)
                else:
                    take_hint(row, n, hint, hints, held, told)
                ptx.barrier()
                if guess == i32(1):
                    count = i32(told[u32(2)])
                    by = u32(count - (count >> i32(6)))
                if count > i32(0):
                    key, _ = kth_of_kept(held, row, count, by, counts, told)
                    least = value_of(key)
            ptx.barrier()
            if count > i32(0):
                if ptx.thread() == i32(0):
                    told[u32(2)] = u32(0)
                ptx.barrier()
                keep(row, n, least, held, places, told)
                ptx.barrier()
                count = i32(told[u32(2)])
                found = count if count >= k and count <= i32(room) else i32(0)
                ptx.barrier()
            guess = i32(guess + i32(1))
        if found > i32(0):
            kth, ties = kth_of_kept(held, row, found, u32(k), counts, told)
        else:
            kth, ties = kth_of_row(held, row, n, u32(k), counts, told)
        kept, where = ptx.local(each_thread, u32), ptx.local(each_thread, u32)
        for j in range(each_thread):  # out of the way: the arrays take bits now
            i = i32(ptx.thread() + i32(j * threads))
            kept[j] = held[u32(i)] if i < found else u32(0)
            where[j] = places[u32(i)] if i < found else u32(0xFFFFFFFF)
        ptx.barrier()
        done, first = u32(0), i32(0)
        while first < n:
            for j in range(each_thread):
                held[u32(ptx.thread() + i32(j * threads))] = u32(0)
                places[u32(ptx.thread() + i32(j * threads))] = u32(0)
            ptx.barrier()
            if found > i32(0):
                for j in range(each_thread):
                    mark_kept(kept[j], where[j], u32(first), kth, held, places)
            else:
                mark_row(row, n, first, kth, held, places)
            ptx.barrier()
            done, ties = emit(held, places, first, out, ties, done, each)
            ptx.barrier()
            first = i32(first + i32(window))

    return body


def serves(x: Tensor, k: int) -> bool:
    """Say whether the kernel takes such rows."""
    return x.dtype in VECTORS and 0 < k <= MOST and x.shape[-1] < 1 << 30 and x.numel() > 0


def guessed_rank(n: int, k: int, sample: int) -> int:
    """The order statistic of a sample that k of n values reach, but for one sample in a few hundred."""
    share = k * sample / n
    return min(sample, int(share + 3 * math.sqrt(share) + 2))


def top_k_launch(
    x: Tensor, k: int, hint: Tensor | None, out: Tensor, **constants: Any
) -> tuple[Variant, int, tuple[int, ...]]:
    """Choose the variant, the grid and the arguments for contiguous x, hint and out, int64 both; see `serves`."""
    variant = top_k_rows(**{"dtype": x.dtype, "room": ROOM, "sample": SAMPLE, **constants})
    n = x.shape[-1]
    hints = 0 if hint is None else hint.shape[-1]
    pointers = x.data_ptr(), 0 if hint is None else hint.data_ptr(), out.data_ptr()
    rank = guessed_rank(n, k, variant.constants["sample"])
    return variant, x.numel() // n, (*pointers, n, hints, k, rank)
