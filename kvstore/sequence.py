"""Handles: a sequence of the store, and one step of writing to some sequences."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, Self

import numpy as np

from .errors import SequenceClosed, StepError
from .table import PageTable

if TYPE_CHECKING:
    from .store import KVStore


class Sequence:
    """A sequence kept in the store; made by `KVStore.open` and `fork`, ended by `close`.

    Use one sequence from one thread at a time; different sequences are independent.

    Attributes:
        length: committed tokens.
        cached_tokens: tokens that `open` found already in the store (0 until a prefix index is set).
        tenant: whose sequence this is; prefixes are never shared between tenants.
    """

    __slots__ = ("cached_tokens", "closed", "length", "number", "pages", "step", "store", "tenant")

    def __init__(self, store: KVStore, number: int, tenant: str | None = None) -> None:
        self.store = store
        self.number = number
        self.tenant = tenant
        self.cached_tokens = 0
        self.length = 0
        self.pages: np.ndarray = np.empty(0, np.int32)
        self.step: Step | None = None
        self.closed = False

    def close(self) -> None:
        """Give the sequence's pages back; the same as `store.close(seq)`."""
        self.store.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.closed:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.length} tokens, {len(self.pages)} pages"
        return f"Sequence({self.number}: {state})"

    def step_alone(self) -> Step | None:
        """Give the open step if this sequence is all of it: then the handle is as good as the step."""
        return self.step if self.step is not None and len(self.step.seqs) == 1 else None

    def require_open(self) -> None:
        """Raise if the sequence was closed.

        Raises:
            SequenceClosed: naming the sequence.
        """
        if self.closed:
            raise SequenceClosed(f"sequence {self.number} is closed; open or fork a new one")


class Step:
    """Room for some more tokens of some sequences, reserved once and written layer by layer.

    Between `reserve` and `commit` its tokens are visible only through the step itself.

    State: open -> committed | aborted. One open step per sequence.

    Attributes:
        seqs: the sequences, in the order of the ragged rows of `append`.
        counts: new tokens of each sequence, `[seqs]`.
        bases: committed length of each before the step, `[seqs]`.
        table: pages of the sequences including this step's, lengths including its tokens.
    """

    def __init__(
        self, seqs: Listing[Sequence], counts: np.ndarray, bases: np.ndarray, table: PageTable,
        fresh: list[np.ndarray], copied: list[tuple[int, int, int] | None],
    ) -> None:  # fmt: skip
        self.seqs = tuple(seqs)
        self.counts = counts
        self.bases = bases
        self.table = table
        self.fresh = fresh  # new pages per sequence
        self.copied = copied  # per sequence (place, shared page, private copy), or None
        self.slots = table.slots(bases, counts)
        self.runs = _runs(self.slots)
        self.written: set[int] = set()
        self.state = "open"

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences in this step."""
        return len(self.slots)

    @property
    def pages(self) -> np.ndarray:
        """Pages this step holds in its own name: the new ones and the private copies."""
        copies = np.array([c[2] for c in self.copied if c is not None], np.int32)
        return np.concatenate([*self.fresh, copies]).astype(np.int32, copy=False)

    def require_open(self) -> None:
        """Raise if the step was committed or aborted.

        Raises:
            StepError: saying which.
        """
        if self.state != "open":
            raise StepError(f"this step is already {self.state}; reserve a new one")

    def find(self, seq: Sequence) -> int:
        """Give the place of a sequence in this step.

        Raises:
            StepError: if it is not part of it.
        """
        for at, mine in enumerate(self.seqs):
            if mine is seq:
                return at
        raise StepError(f"sequence {seq.number} is not part of this step; reserve it together")


def _runs(slots: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut slots into pieces that are consecutive in memory: (row, slot, tokens)."""
    if not len(slots):
        return []
    cuts = np.flatnonzero(slots[1:] - slots[:-1] != 1) + 1
    starts = np.concatenate([[0], cuts])
    stops = np.concatenate([cuts, [len(slots)]])
    return [(int(a), int(slots[a]), int(b - a)) for a, b in zip(starts, stops, strict=True)]
