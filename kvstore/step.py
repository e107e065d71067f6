"""One step of writing to some sequences: reserved once, written layer by layer, committed or not."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing

import numpy as np
import torch
from torch import Tensor

from .errors import StepError
from .pool import PagePool
from .sequence import Sequence
from .spec import KVSpec
from .table import PageTable


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

    def scatter(self, region: Tensor, rows: Tensor) -> None:
        """Write the step's rows into one layer's region, by runs where they are long.

        Shape: region `[pages, page_tokens, kv_heads, d]`, rows `[tokens, kv_heads, d]`.
        """
        flat = region.flatten(0, 1)
        if len(self.runs) <= 4 or len(self.runs) * 8 <= self.num_tokens:
            for row, slot, count in self.runs:
                flat[slot : slot + count] = rows[row : row + count]
        else:
            flat.index_copy_(0, torch.from_numpy(self.slots).to(rows.device), rows)

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


def make_step(
    pool: PagePool,
    seqs: Listing[Sequence],
    counts: np.ndarray,
    allocate: Callable[[int, int], np.ndarray],
) -> Step:
    """Allocate the pages of a step and copy the shared partial last pages it will write into.

    `allocate(count, after)` may raise; nothing is changed then.
    """
    size = pool.spec.page_tokens
    bases = np.fromiter((seq.length for seq in seqs), np.int64, len(seqs))
    held = np.fromiter((len(seq.pages) for seq in seqs), np.int64, len(seqs))
    more = -(-(bases + counts) // size) - held
    lasts = np.fromiter(
        (seq.pages[-1] if len(seq.pages) else 0 for seq in seqs), np.int64, len(seqs)
    )
    copy = (bases % size != 0) & (counts > 0) & (pool.refcounts[lasts] > 1)
    after = int(lasts[0]) if len(seqs) == 1 and held[0] and not copy[0] else -1
    pages = allocate(int(more.sum() + copy.sum()), after)
    private, fresh = pages[: copy.sum()], pages[copy.sum() :]
    pool.copy(lasts[copy], private)
    cuts = np.cumsum(more)[:-1]
    parts = np.split(fresh, cuts) if len(seqs) else []
    copied: list[tuple[int, int, int] | None] = [None] * len(seqs)
    tables = []
    for at, seq in enumerate(seqs):
        mine = np.concatenate([seq.pages, parts[at]])
        if copy[at]:
            target = int(private[copy[:at].sum()])
            copied[at] = (int(held[at]) - 1, int(lasts[at]), target)
            mine[held[at] - 1] = target
        tables.append(mine)
    return Step(seqs, counts, bases, PageTable(tables, bases + counts, size), parts, copied)


def check_rows(spec: KVSpec, step: Step, layer: int, k: Tensor, v: Tensor | None) -> list[Tensor]:
    """Give the tensors to write, or refuse a wrong layer, shape, dtype or device."""
    if not 0 <= layer < spec.layers:
        raise ValueError(f"layer {layer} must be in [0, {spec.layers})")
    if (v is None) != spec.shared_kv:
        raise ValueError(
            "this store keeps K only (shared_kv): give v=None" if spec.shared_kv
            else "v is missing; only a shared_kv store takes k alone"
        )  # fmt: skip
    pieces = [t.detach() for t in (k, v) if t is not None]
    for name, rows, width in zip("kv", pieces, spec.widths, strict=False):
        want = (step.num_tokens, spec.kv_heads, width)
        if tuple(rows.shape) != want:
            raise ValueError(
                f"append: {name} {list(rows.shape)} must be [tokens, kv_heads, d] = {list(want)}"
            )
        if rows.dtype != spec.dtype or rows.device.type != torch.device(spec.device).type:
            raise ValueError(
                f"append: {name} is {rows.dtype} on {rows.device}, the store keeps {spec.dtype} "
                f"on {spec.device}; convert it, or make the KVSpec with its dtype and device"
            )
    return pieces
