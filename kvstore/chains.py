"""The prefix index's arrays and the loops over them: a hash table and trees of pages.

State of an index over `capacity` pages:

* `digests` uint64 `[capacity, 4]`: the keyed hash of all tokens from the start through the page.
* `ids` int32 `[capacity, page_tokens]`: the page's own token ids.
* `links` int32 `[6, capacity]`, rows named below: the tree. `PARENT` is -1 at the start of a prefix,
  `ROOT` numbers the tenant, children of a page hang in a list `CHILD` -> `NEXT` -> ....
* `roots` int32 `[2, roots]`: the first child and the number of pages of each tenant.
* `table` int32 `[power of two >= 2 * capacity]`: open addressing by the digest's first word, -1 empty.
"""

from __future__ import annotations

import numpy as np

from ..cuda_kernels.kernel_cache import njit
from .extents import HOLDERS, PROMISED

PARENT, CHILDREN, CHILD, NEXT, BACK, ROOT = range(6)
MOST_SIBLINGS = 64  # children looked at for a partial match, the newest first


@njit()
def _same(digests, page, digest):
    return (
        digests[page, 0] == digest[0]
        and digests[page, 1] == digest[1]
        and digests[page, 2] == digest[2]
        and digests[page, 3] == digest[3]
    )


@njit()
def _home(table, word):
    return np.int64(word & np.uint64(len(table) - 1))


@njit()
def find(table, digests, digest):
    """Find the page with a digest, or -1."""
    at = _home(table, digest[0])
    while table[at] >= 0:
        if _same(digests, table[at], digest):
            return table[at]
        at = (at + 1) & (len(table) - 1)
    return -1


@njit()
def enter(table, digests, page):
    """Put a page into the table by its digest."""
    at = _home(table, digests[page, 0])
    while table[at] >= 0:
        at = (at + 1) & (len(table) - 1)
    table[at] = page


@njit()
def _leave(table, digests, page):
    """Take a page out of the table; later entries move up, so that no search breaks off early."""
    mask = len(table) - 1
    at = _home(table, digests[page, 0])
    while table[at] != page:
        if table[at] < 0:
            return
        at = (at + 1) & mask
    hole = at
    while True:
        at = (at + 1) & mask
        if table[at] < 0:
            break
        home = _home(table, digests[table[at], 0])
        if ((at - home) & mask) >= ((at - hole) & mask):
            table[hole] = table[at]
            hole = at
    table[hole] = -1


@njit()
def walk(links, ids, page, root, want, out):
    """Walk from a page back to its root and compare every token id.

    Shape: want `[n, page_tokens]`, out `[n]` (filled, first page first) -> how many pages are right.
    """
    for i in range(len(want) - 1, -1, -1):
        if page < 0:
            return 0
        out[i] = page
        page = links[PARENT, page]
    if page >= 0 or links[ROOT, out[0]] != root:
        return 0
    for i in range(len(want)):
        for t in range(want.shape[1]):
            if ids[out[i], t] != want[i, t]:
                return i
    return len(want)


@njit()
def best_child(links, roots, meta, ids, parent, root, want):
    """Find the page after `parent` that begins with the most of some tokens: (page, tokens)."""
    if parent < 0 and root < 0:
        return -1, 0
    page = roots[0, root] if parent < 0 else links[CHILD, parent]
    best, most = -1, 0
    for _ in range(MOST_SIBLINGS):
        if page < 0:
            break
        limit = min(meta[PROMISED, page], len(want))
        n = 0
        while n < limit and ids[page, n] == want[n]:
            n += 1
        if n > most:
            best, most = page, n
        page = links[NEXT, page]
    return best, most


@njit()
def adopt(links, roots, page, parent, root):
    """Hang a page below its parent, or below its root if that is -1."""
    links[PARENT, page] = parent
    links[ROOT, page] = root
    links[CHILD, page] = -1
    links[CHILDREN, page] = 0
    head = roots[0, root] if parent < 0 else links[CHILD, parent]
    links[NEXT, page] = head
    links[BACK, page] = -1
    if head >= 0:
        links[BACK, head] = page
    if parent < 0:
        roots[0, root] = page
    else:
        links[CHILD, parent] = page
        links[CHILDREN, parent] += 1
    roots[1, root] += 1


@njit()
def extend(
    table, digests, ids, links, roots, meta, parent, root, pages, new_digests, new_ids, settled
):
    """Index full pages that follow `parent`; a page whose tokens are indexed already gives way.

    Shape: pages, settled `[n]`, new_digests `[n, 4]`, new_ids `[n, page_tokens]` -> how many pages
        are settled: less than n if a digest belongs to other tokens. `settled` is the page of the
        index that holds the tokens: the given one, or the one that was there before.
    """
    size = new_ids.shape[1]
    for i in range(len(pages)):
        old = find(table, digests, new_digests[i])
        if old >= 0:
            if links[PARENT, old] != parent or links[ROOT, old] != root:
                return i
            for t in range(size):
                if ids[old, t] != new_ids[i, t]:
                    return i
            settled[i] = parent = old
            continue
        page = pages[i]
        if meta[PROMISED, page] == 0:
            adopt(links, roots, page, parent, root)
        for t in range(size):
            ids[page, t] = new_ids[i, t]
        for w in range(4):
            digests[page, w] = new_digests[i, w]
        meta[PROMISED, page] = size
        enter(table, digests, page)
        settled[i] = parent = page
    return len(pages)


@njit()
def remove(table, digests, ids, links, roots, meta, pages):
    """Forget pages one by one; returns the place of the first that is held or followed, or -1."""
    size = ids.shape[1]
    for i in range(len(pages)):
        page = pages[i]
        if meta[PROMISED, page] == 0 or meta[HOLDERS, page] > 0 or links[CHILDREN, page] > 0:
            return i
        if meta[PROMISED, page] == size:
            _leave(table, digests, page)
        parent, root = links[PARENT, page], links[ROOT, page]
        after, before = links[NEXT, page], links[BACK, page]
        if after >= 0:
            links[BACK, after] = before
        if before >= 0:
            links[NEXT, before] = after
        elif parent < 0:
            roots[0, root] = after
        else:
            links[CHILD, parent] = after
        if parent >= 0:
            links[CHILDREN, parent] -= 1
        roots[1, root] -= 1
        meta[PROMISED, page] = 0
    return -1
