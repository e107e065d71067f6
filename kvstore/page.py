"""The life of a page: its states and the one table of legal moves."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from .errors import IntegrityError


class PageState(IntEnum):
    """Where a page is in its life.

    FREE: in a run of free pages, owned by nobody. RESERVED: given to one open step, readable only
    through it. LIVE: holds committed tokens, owned by one or more holders (its reference count).
    CACHED: holds committed tokens that the prefix index can find, owned by nobody; may be evicted.
    """

    FREE = 0
    RESERVED = 1
    LIVE = 2
    CACHED = 3


LEGAL_MOVES: dict[PageState, frozenset[PageState]] = {
    PageState.FREE: frozenset({PageState.RESERVED}),
    PageState.RESERVED: frozenset({PageState.LIVE, PageState.FREE}),  # commit, abort
    PageState.LIVE: frozenset({PageState.FREE, PageState.CACHED}),  # the last holder let go
    PageState.CACHED: frozenset({PageState.LIVE, PageState.FREE}),  # pinned again, evicted
}

ALLOWED = np.array([[b in LEGAL_MOVES[a] for b in PageState] for a in PageState])


def move_pages(states: np.ndarray, pages: np.ndarray, to: PageState) -> None:
    """Move pages to a state in place, or raise before changing any.

    Raises:
        IntegrityError: if one of the moves is not in `LEGAL_MOVES`.
    """
    legal = ALLOWED[states[pages], to]
    if not legal.all():
        bad = int(pages[~legal][0])
        raise IntegrityError(
            f"page {bad} may not go from {PageState(states[bad]).name} to {to.name}"
        )
    states[pages] = to
