"""A radix select by a block: the k-th greatest of numbers, and what it is made of."""

from __future__ import annotations

from typing import Any

from . import ptx
from .ptx import device_function, i32, u32

BINS = 256


@device_function
def ordered(value):
    """Bits that are ordered as values are; both zeros are one, NaN is above all."""
    bits = ptx.as_u32(value)
    if value != value:
        return u32(0xFFFFFFFF)
    if bits == u32(0x80000000):
        bits = u32(0)
    return u32(bits ^ (u32(0xFFFFFFFF) if bits >= u32(0x80000000) else u32(0x80000000)))


@device_function
def value_of(key):
    """Undo `ordered`."""
    flip = u32(0x80000000) if key >= u32(0x80000000) else u32(0xFFFFFFFF)
    return ptx.as_f32(u32(key ^ flip))


@device_function
def count_digit(counts, digit, inside):
    """Add one to counts[digit] for each lane that is inside; equal digits of a warp by one of its lanes."""
    alike = ptx.same(u32(digit) if inside else u32(BINS))
    below = u32(u32(1) << u32(ptx.thread() & i32(31))) - u32(1)
    if inside and u32(alike & u32(below)) == u32(0):
        ptx.atomic_add(counts, u32(digit), u32(ptx.ones(alike)))


@device_function
def prefix(value, each):
    """Sum of the values of the threads before this one, and of all. Holds two barriers."""
    mine, warp = i32(ptx.thread() & i32(31)), i32(ptx.thread() >> i32(5))
    upto = value
    for step in (1, 2, 4, 8, 16):
        other = ptx.shuffle_up_u32(upto, i32(step))
        upto = u32(upto + other) if mine >= i32(step) else upto
    if mine == i32(31):
        each[u32(warp)] = upto
    ptx.barrier()
    held = each[u32(mine)] if mine < i32(ptx.threads() >> i32(5)) else u32(0)
    before = u32(0)
    total = held
    for step in (1, 2, 4, 8, 16):
        other = ptx.shuffle_up_u32(total, i32(step))
        total = u32(total + other) if mine >= i32(step) else total
    before = ptx.shuffle_u32(u32(total - held), warp)
    total = ptx.shuffle_u32(total, i32(31))
    ptx.barrier()
    return u32(before + upto - value), total


@device_function
def digits_of_kept(held, row, n, key, known, shift, counts):
    base = i32(0)
    while base < n:
        i = i32(base + ptx.thread())
        one = held[u32(i)] if i < n else u32(0)
        digit = u32(u32(one >> u32(shift)) & u32(BINS - 1))
        count_digit(counts, digit, i < n and u32(one & known) == key)
        base = i32(base + ptx.threads())


def radix_select(add_digits: Any) -> Any:
    """Make the radix select of a number of keys: the k-th greatest, and how many of its equals are among the k.

    Args:
        add_digits: `(held, row, n, key, known, shift, counts)`: counts the digits at `shift` of the keys that are `key`
            in the bits that are `known`; called by all threads.
    """

    @device_function
    def greatest(held, row, n, k, counts, told):
        key, known, left = u32(0), u32(0), u32(k)
        shift = i32(24)
        while shift >= i32(0):
            b = ptx.thread()
            while b < i32(BINS):
                counts[u32(b)] = u32(0)
                b = i32(b + ptx.threads())
            ptx.barrier()
            add_digits(held, row, n, key, known, shift, counts)
            ptx.barrier()
            if ptx.thread() < i32(32):  # a lane has eight bins, from the greatest down
                top = i32(i32(BINS - 1) - (ptx.thread() << i32(3)))
                own = u32(0)
                for j in range(8):
                    own = u32(own + counts[u32(top - i32(j))])
                upto = own
                for step in (1, 2, 4, 8, 16):
                    other = ptx.shuffle_up_u32(upto, i32(step))
                    upto = u32(upto + other) if ptx.thread() >= i32(step) else upto
                run = u32(upto - own)
                for j in range(8):
                    here = counts[u32(top - i32(j))]
                    if run < left and left <= u32(run + here):
                        told[u32(0)] = u32(top - i32(j))
                        told[u32(1)] = u32(left - run)
                    run = u32(run + here)
            ptx.barrier()
            key = u32(key | u32(told[u32(0)] << u32(shift)))
            known = u32(known | u32(u32(BINS - 1) << u32(shift)))
            left = told[u32(1)]
            shift = i32(shift - i32(8))
        ptx.barrier()
        return key, left

    return greatest
