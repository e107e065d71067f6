"""One step of writing to some sequences: reserved once, written layer by layer, committed or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Listing

import numpy as np
from torch import Tensor

from ..cuda_kernels import write_tokens
from ..cuda_kernels.kernel_cache import njit
from .errors import StepError
from .pool import PagePool
from .sequence import Sequence
from .spec import KVSpec
from .table import PageTable
from .tokens import TokenIds, as_token_ids


class Step:
    """Room for some more tokens of some sequences, reserved once and written layer by layer.

    Between `reserve` and `commit` its tokens are visible only through the step itself.

    State: open -> committed | aborted. One open step per sequence.

    Attributes:
        seqs: the sequences, in the order of the ragged rows of `append`.
        counts: new tokens of each sequence, `[seqs]`.
        bases: committed length of each before the step, `[seqs]`.
        table: pages of the sequences including this step's, lengths including its tokens.
        slots: where each token goes, `[num_tokens]`.
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
        self.num_tokens = len(self.slots)
        self.written: set[int] = set()
        self.began = time.perf_counter()
        self.state = "open"

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
        """Write the step's rows into one layer's region.

        Shape: region `[pages, page_tokens, kv_heads, d]`, rows `[tokens, kv_heads, d]`.
        """
        write_tokens(region, self.slots, rows)

    def find(self, seq: Sequence) -> int:
        """Give the place of a sequence in this step.

        Raises:
            StepError: if it is not part of it.
        """
        for at, mine in enumerate(self.seqs):
            if mine is seq:
                return at
        raise StepError(f"sequence {seq.number} is not part of this step; reserve it together")


def make_step(
    pool: PagePool,
    seqs: Listing[Sequence],
    counts: np.ndarray,
    allocate: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Step:
    """Allocate the pages of a step and copy the partial last pages it may not write into.

    Those are pages that somebody else holds, or of which the prefix index promises more tokens.
    `allocate` is `PagePool.allocate`, and may raise; nothing is changed then.
    """
    size = pool.spec.page_tokens
    bases = np.fromiter((seq.tokens for seq in seqs), np.int64, len(seqs))
    held = np.fromiter((len(seq.pages) for seq in seqs), np.int64, len(seqs))
    lasts = np.fromiter(
        (seq.pages[-1] if len(seq.pages) else 0 for seq in seqs), np.int64, len(seqs)
    )
    copy, wanted, afters = _needs(bases, counts, held, lasts, pool.refcounts, pool.promised, size)
    pages = allocate(wanted, afters)
    parts = np.split(pages, np.cumsum(wanted)[:-1]) if len(seqs) > 1 else [pages] * len(seqs)
    copied: list[tuple[int, int, int] | None] = [None] * len(seqs)
    tables = []
    for at, seq in enumerate(seqs):
        if copy[at]:  # the first of the new pages stands in for the last of the old
            copied[at] = (int(held[at]) - 1, int(lasts[at]), int(parts[at][0]))
            tables.append(np.concatenate([seq.pages[:-1], parts[at]]))
            parts[at] = parts[at][1:]
        else:
            tables.append(np.concatenate([seq.pages, parts[at]]) if len(parts[at]) else seq.pages)
    if swaps := [c[1:] for c in copied if c is not None]:
        pool.copy(*np.array(swaps, np.int32).T)
    return Step(seqs, counts, bases, PageTable(tables, bases + counts, size), parts, copied)


@njit()
def _needs(bases, counts, held, lasts, holders, promised, size):
    """Say which last pages must be copied, how many pages each sequence needs, and which they would best follow."""
    copy = np.zeros(len(bases), np.bool_)
    wanted, afters = np.empty(len(bases), np.int64), np.full(len(bases), -1, np.int64)
    for s in range(len(bases)):
        written = bases[s] % size
        if written != 0 and counts[s] > 0:
            copy[s] = holders[lasts[s]] > 1 or promised[lasts[s]] > written
        wanted[s] = -(-(bases[s] + counts[s]) // size) - held[s] + copy[s]
        if held[s] > 0 and not copy[s]:
            afters[s] = lasts[s]
    return copy, wanted, afters


def check_rows(
    spec: KVSpec, num_tokens: int, layer: int, k: Tensor, v: Tensor | None
) -> list[Tensor]:
    """Give the tensors to write, or refuse a wrong layer, shape, dtype or device."""
    if not 0 <= layer < spec.layers:
        raise ValueError(f"layer {layer} must be in [0, {spec.layers})")
    if (v is None) != spec.shared_kv:
        raise ValueError(
            "this store keeps K only (shared_kv): give v=None" if spec.shared_kv
            else "v is missing; only a shared_kv store takes k alone"
        )  # fmt: skip
    pieces = [t.detach() if t.requires_grad else t for t in (k, v) if t is not None]
    for name, rows, width in zip("kv", pieces, spec.widths, strict=False):
        want = (num_tokens, spec.kv_heads, width)
        if tuple(rows.shape) != want:
            raise ValueError(
                f"append: {name} {list(rows.shape)} must be [tokens, kv_heads, d] = {list(want)}"
            )
        if rows.dtype != spec.dtype or rows.device.type != spec.device_type:
            raise ValueError(
                f"append: {name} is {rows.dtype} on {rows.device}, the store keeps {spec.dtype} "
                f"on {spec.device}; convert it, or make the KVSpec with its dtype and device"
            )
    return pieces


def fit_ids(step: Step, token_ids: TokenIds | Listing[TokenIds]) -> list[np.ndarray]:
    """Give the ids of a step's tokens that each sequence does not know yet, or refuse them.

    Raises:
        ValueError: if their number is wrong, they differ from what was told, or earlier ones are missing.
    """
    one_row = len(step.seqs) == 1 and not (len(token_ids) and hasattr(token_ids[0], "__len__"))
    rows = [as_token_ids(row) for row in ([token_ids] if one_row else token_ids)]  # type: ignore[arg-type, list-item]
    if [len(row) for row in rows] != step.counts.tolist():
        raise ValueError(
            f"commit: {[len(row) for row in rows]} token ids given for {step.counts.tolist()} tokens"
        )
    told = []
    for seq, row, base in zip(step.seqs, rows, step.bases.tolist(), strict=True):
        known = seq.history.ids[base:] if seq.history is not None else row[:0]
        have = 0 if seq.history is None else seq.history.known
        if have < base:
            raise ValueError(
                f"commit: sequence {seq.number} knows the ids of {have} of its {base} tokens; tell the others first"
            )
        if (known[: len(row)] != row[: len(known)]).any():
            raise ValueError(f"commit: sequence {seq.number} was told other ids for these tokens")
        told.append(row[len(known) :])
    return told
