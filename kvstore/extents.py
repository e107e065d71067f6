"""Free pages kept as runs: taken and given back in constant time, numbers consecutive if possible.

A run of free pages carries its length on its first and its last page (boundary tags, Knuth vol. 1,
2.5), so a page that comes back finds its neighbours' runs without a search. Runs hang in lists by
the power of two of their length, so a run that is long enough is found without one either.

State of a pool of pages: `meta` int32 `[6, capacity]`, rows named below; `bins` int32 `[BINS]`, the
first run of each length class or -1.
"""

from __future__ import annotations

import numpy as np

from ..cuda_kernels.kernel_cache import njit
from .page import ALLOWED, PageState

STATE, HOLDERS, PROMISED, SPAN, NEXT, BACK = range(6)
BINS = 32
_TRIES = 8  # runs looked at in the class that may hold one long enough

_FREE = int(PageState.FREE)
_RESERVED = int(PageState.RESERVED)
_CACHED = int(PageState.CACHED)


@njit()
def _bin(length):
    b = 0
    while length > 1:
        length >>= 1
        b += 1
    return b


@njit()
def _link(meta, bins, first, length):
    meta[SPAN, first] = length
    meta[SPAN, first + length - 1] = length
    b = _bin(length)
    head = bins[b]
    meta[NEXT, first] = head
    meta[BACK, first] = -1
    if head >= 0:
        meta[BACK, head] = first
    bins[b] = first


@njit()
def _unlink(meta, bins, first):
    after, before = meta[NEXT, first], meta[BACK, first]
    if before >= 0:
        meta[NEXT, before] = after
    else:
        bins[_bin(meta[SPAN, first])] = after
    if after >= 0:
        meta[BACK, after] = before


@njit()
def add_run(meta, bins, first, length):
    """Join pages that are FREE in `meta`, but in no run yet, to the runs beside them."""
    stop = first + length
    if first > 0 and meta[STATE, first - 1] == _FREE:
        before = meta[SPAN, first - 1]
        first -= before
        length += before
        _unlink(meta, bins, first)
    if stop < meta.shape[1] and meta[STATE, stop] == _FREE:
        after = meta[SPAN, stop]
        _unlink(meta, bins, stop)
        length += after
    _link(meta, bins, first, length)


@njit()
def _fit(meta, bins, need):
    """Find a run of `need` pages, the shortest class first; else the longest class there is."""
    b = _bin(need)
    run = bins[b]
    for _ in range(_TRIES):
        if run < 0:
            break
        if meta[SPAN, run] >= need:
            return run
        run = meta[NEXT, run]
    for c in range(b + 1, BINS):
        if bins[c] >= 0:
            return bins[c]
    for c in range(b, -1, -1):
        if bins[c] >= 0:
            return bins[c]
    return -1


@njit()
def _split(meta, bins, need):
    """Find room to grow for an owner whose neighbour is in its way: the middle of a long run."""
    for c in range(BINS - 1, 0, -1):
        run = bins[c]
        if run >= 0:
            span = meta[SPAN, run]
            if span < 4 * need:
                return -1
            _unlink(meta, bins, run)
            _link(meta, bins, run, span // 2)
            _link(meta, bins, run + span // 2, span - span // 2)
            return run + span // 2
    return -1


@njit()
def take(meta, bins, counts, afters, out):
    """Take `counts[i]` pages for each owner, RESERVED with one holder, after page `afters[i]` if free.

    The caller has made sure that so many are free.
    """
    at = 0
    for i in range(len(counts)):
        need, after = counts[i], afters[i]
        if after >= 0 and meta[STATE, after] == _FREE:
            after = -1  # nobody's page: the next one need not begin a run
        grows = after >= 0
        while need > 0:
            first = after + 1
            if after < 0 or first >= meta.shape[1] or meta[STATE, first] != _FREE:
                first = _split(meta, bins, need) if grows else -1
                if first < 0:
                    first = _fit(meta, bins, need)
                grows = False
            span = meta[SPAN, first]
            got = min(need, span)
            _unlink(meta, bins, first)
            if span > got:
                _link(meta, bins, first + got, span - got)
            for page in range(first, first + got):
                meta[STATE, page] = _RESERVED
                meta[HOLDERS, page] = 1
                out[at] = page
                at += 1
            need -= got
            after = first + got - 1


@njit()
def release(meta, bins, pages, kept):
    """Drop a holder of each page; a page without holders goes FREE, or CACHED if the index wants it.

    Returns (pages written to `kept`, pages freed), or (-1 - i, 0) if page i of `pages` has no
    holder or may not go; nothing is changed then, unless a page is named twice.
    """
    for i in range(len(pages)):
        if meta[HOLDERS, pages[i]] < 1:
            return -1 - i, 0
    cached = freed = 0
    for i in range(len(pages)):
        page = pages[i]
        holders = meta[HOLDERS, page] - 1
        if holders == 0:
            to = _CACHED if meta[PROMISED, page] > 0 else _FREE
            if not ALLOWED[meta[STATE, page], to]:
                return -1 - i, 0
            meta[STATE, page] = to
            if to == _CACHED:
                kept[cached] = page
                cached += 1
            else:
                add_run(meta, bins, page, 1)
                freed += 1
        meta[HOLDERS, page] = holders
    return cached, freed


@njit()
def free_cached(meta, bins, pages):
    """Make CACHED pages FREE; returns the place of the first that is not CACHED, or -1."""
    for i in range(len(pages)):
        if meta[STATE, pages[i]] != _CACHED:
            return i
    for i in range(len(pages)):
        meta[STATE, pages[i]] = _FREE
        meta[PROMISED, pages[i]] = 0
        add_run(meta, bins, pages[i], 1)
    return -1


def listed_runs(meta: np.ndarray, bins: np.ndarray) -> list[tuple[int, int]]:
    """Give all runs that the lists name, (first page, length), sorted; stops at a cycle."""
    runs: list[tuple[int, int]] = []
    for head in bins.tolist():
        run = head
        while run >= 0 and len(runs) <= meta.shape[1]:
            runs.append((run, int(meta[SPAN, run])))
            run = int(meta[NEXT, run])
    return sorted(runs)


def true_runs(meta: np.ndarray) -> list[tuple[int, int]]:
    """Give all runs of FREE pages, (first page, length), from the states alone."""
    free = (meta[STATE] == _FREE).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], free, [0]])))
    starts, stops = edges[::2], edges[1::2]
    return [(int(a), int(b - a)) for a, b in zip(starts, stops, strict=True)]
