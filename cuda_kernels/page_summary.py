"""Summaries of a sequence's keys, `unit` tokens at a time: range (least and greatest value of each channel) or sum.

Tokens are added as they come; what was summarised is not read again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .halves import widen
from .kernel_cache import njit
from .merge import direct
from .numbers import flat, plain
from .page_summary_gpu import serves, summarise_launch


def summarise_reference(
    keys: Tensor, pages: Tensor, first: int, stop: int, unit: int, shift: int, low: Tensor,
    high: Tensor | None = None,
) -> None:  # fmt: skip
    """Summarise in plain torch. Shape: as `summarise`."""
    if stop <= first:
        return
    rows = keys[pages.long()].flatten(0, 1)
    for u in range((first + shift) // unit, (stop - 1 + shift) // unit + 1):
        begin = u * unit - shift
        new = rows[max(first, begin) : min(stop, begin + unit)]
        fresh = first <= begin
        if high is None:
            total = new.to(low.dtype).sum(0)
            low[u] = total if fresh else low[u] + total
        else:
            least, most = new.amin(0), new.amax(0)
            low[u] = least if fresh else torch.minimum(low[u], least)
            high[u] = most if fresh else torch.maximum(high[u], most)


@njit(nogil=True, error_model="numpy")
def _ranges(keys, pages, first, stop, unit, shift, page_tokens, width, low, high):
    """`width` is kv_heads * head_dim: channels of one token."""
    for t in range(first, stop):
        slot = pages[t // page_tokens] * page_tokens + t % page_tokens
        row = keys[slot * width : (slot + 1) * width]
        at = (t + shift) // unit * width
        lows, highs = low[at : at + width], high[at : at + width]
        if (t + shift) % unit == 0:
            for x in range(width):
                lows[x] = row[x]
                highs[x] = row[x]
            continue
        for x in range(width):
            wide, least, most = widen(row[x]), widen(lows[x]), widen(highs[x])
            # Comparisons with NaN are false: it is taken over by hand, and then stays.
            lows[x] = row[x] if wide < least or wide != wide else lows[x]
            highs[x] = row[x] if wide > most or wide != wide else highs[x]


@njit(nogil=True, error_model="numpy")
def _sums(keys, pages, first, stop, unit, shift, page_tokens, width, total):
    for t in range(first, stop):
        slot = pages[t // page_tokens] * page_tokens + t % page_tokens
        row = keys[slot * width : (slot + 1) * width]
        at = (t + shift) // unit * width
        sums = total[at : at + width]
        if (t + shift) % unit == 0:
            for x in range(width):
                sums[x] = widen(row[x])
        else:
            for x in range(width):
                sums[x] += widen(row[x])


def _summarise_cpu(
    keys: Tensor, pages: Tensor, first: int, stop: int, unit: int, shift: int, low: Tensor,
    high: Tensor | None,
) -> None:  # fmt: skip
    width = keys.shape[2] * keys.shape[3]
    args = (flat(keys), plain(pages, torch.int64), first, stop, unit, shift, keys.shape[1], width)
    if high is None:
        _sums(*args, flat(low))
    else:
        _ranges(*args, flat(low), flat(high))


@torch.library.custom_op("plait::summarise", mutates_args=("low", "high"))
def summarise_op(
    keys: Tensor, pages: Tensor, first: int, stop: int, unit: int, shift: int, low: Tensor,
    high: Tensor | None,
) -> None:  # fmt: skip
    """Run it behind torch's dispatcher: Numba on CPU, torch elsewhere."""
    add = _summarise_cpu if keys.device.type == "cpu" else summarise_reference
    add(keys, pages, first, stop, unit, shift, low, high)


@summarise_op.register_kernel("cuda")
def _(
    keys: Tensor, pages: Tensor, first: int, stop: int, unit: int, shift: int, low: Tensor,
    high: Tensor | None,
) -> None:  # fmt: skip
    if stop <= first:
        return
    if not (serves(keys, low, high) and usable()):
        summarise_reference(keys, pages, first, stop, unit, shift, low, high)
        return
    held = pages.to(keys.device, torch.int32).contiguous()
    run_on(summarise_launch(keys, held, first, stop, unit, shift, low, high), keys)


@summarise_op.register_fake
def _(keys, pages, first, stop, unit, shift, low, high):
    return None


def summarise(
    keys: Tensor,
    pages: Tensor,
    first: int,
    stop: int,
    unit: int,
    low: Tensor,
    high: Tensor | None = None,
    shift: int = 0,
) -> None:
    """Add a sequence's tokens `[first, stop)` to the summaries of its units, in place.

    Token t belongs to unit `(t + shift) // unit`, whose first token starts it anew; tokens before
    `first` were added before. With `high` summaries are ranges, exact in the keys' dtype, and NaN
    stays NaN; without they are sums in `low`.

    Shape:
        keys `[pool pages, page_tokens, kv_heads, head_dim]`, pages `[n]` the sequence's in order,
        low, high `[units, kv_heads, head_dim]` of the keys' dtype; low for sums float32 (float64 for float64)

    Raises:
        ValueError: if shapes or dtypes do not belong together, or there is no room for the last unit.
    """
    want = torch.promote_types(keys.dtype, torch.float32) if high is None else keys.dtype
    if low.dtype != want or low.shape[1:] != keys.shape[2:] or not low.is_contiguous():
        raise ValueError(
            f"summarise: keys {list(keys.shape)} {keys.dtype} and summaries {list(low.shape)} {low.dtype} do not fit; "
            f"use contiguous [units, kv_heads, head_dim] of {want}"
        )
    if stop > len(pages) * keys.shape[1] or stop + shift > low.shape[0] * unit or first + shift < 0:
        raise ValueError(
            f"summarise: tokens [{first}, {stop}) of {len(pages)} pages of {keys.shape[1]}, shifted by {shift}, do not "
            f"lie in {low.shape[0]} units of {unit}"
        )
    call = _summarise_cpu if direct(keys) else torch.ops.plait.summarise
    call(keys, pages, first, stop, unit, shift, low, high)
