"""A sequence of which some tokens are kept, and a step of writing to some."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SequenceClosed, StepError
from .coded import CodedLayer
from .lanes import Lanes

if TYPE_CHECKING:
    from .parking import Parking


class KeptSequence:
    """A handle, made by `CompressedStore.open` and `fork`, ended by `close`.

    Attributes:
        tokens: of this rank, the evicted included: places of the next ones follow from it.
        text: tokens over all ranks; prompt: those up to the end of the last prompt; chosen: when each layer last chose.
        left: the text's tokens when some last fell out of a layer's window.
        lanes: what is kept, by layer.
        coded: pages in fewer bits, by layer.
        queries: the newest queries of each layer, as many as its scorer votes with while decoding.
        cached_tokens: those that `open` found kept already; ids, key: the prompt's, if it may be found by others.
        memory: what the selector remembers, by layer and head.
    """

    def __init__(self, store: Parking, number: int, layers: int, kv_heads: int) -> None:
        self.store, self.number = store, number
        self.tokens = self.text = self.prompt = self.left = 0
        self.chosen = [0] * layers
        self.lanes = [Lanes.empty(kv_heads) for _ in range(layers)]
        self.queries: list[Tensor | None] = [None] * layers
        self.coded = [CodedLayer() for _ in range(layers)]
        self.memory: dict[Any, dict[Any, Any]] = {}
        self.step: KeptStep | None = None
        self.closed = self.broken = False
        self.cached_tokens = 0
        self.ids: np.ndarray | None = None
        self.key = b""

    def forget(self) -> None:
        """Be as new; the lanes are the store's to empty."""
        self.tokens = self.text = self.prompt = self.left = 0
        self.chosen = [0] * len(self.chosen)
        self.queries = [None] * len(self.queries)
        self.coded = [CodedLayer() for _ in self.coded]
        self.memory = {}

    def copy(self, other: KeptSequence) -> None:
        """Stand where another stands; the lanes are the store's to share."""
        self.tokens, self.text, self.prompt = other.tokens, other.text, other.prompt
        self.left = other.left
        self.chosen, self.queries = list(other.chosen), list(other.queries)
        self.coded = [layer.copy() for layer in other.coded]

    def add(self, tokens: int, rows: int) -> None:
        """Count a step's tokens, this rank's and all."""
        first = self.text == 0
        self.tokens, self.text = self.tokens + tokens, self.text + rows
        if rows > 1 or first:
            self.prompt = self.text
            self.chosen = [self.text] * len(self.chosen)

    def see(self, layer: int, q: Tensor, count: int) -> None:
        """Remember the newest queries of a layer. Shape: q `[rows, heads, head_dim]`"""
        before = self.queries[layer]
        newest = q if before is None else torch.cat([before, q])
        self.queries[layer] = newest[max(0, len(newest) - count) :].clone() if count else None

    def cut(self, length: int) -> None:
        """Forget the newest tokens, of a sequence on one rank."""
        gone = self.tokens - length
        self.tokens = self.text = length
        self.prompt = min(self.prompt, length)
        self.queries = [None if q is None else q[: max(0, len(q) - gone)] for q in self.queries]
        self.memory.clear()

    @property
    def length(self) -> int:
        """Tokens of this rank, the evicted included."""
        return self.tokens

    @property
    def kept(self) -> np.ndarray:
        """Tokens that each head keeps on this rank. Shape: `[layers, kv_heads]` int64."""
        heads = len(self.lanes[0].counts)
        both = zip(self.lanes, self.coded, strict=True)
        return np.stack([lanes.counts + coded.counts(heads) for lanes, coded in both])

    def require_open(self) -> None:
        """Raise if it was closed, or a forward of it broke off after tokens were evicted.

        Raises:
            SequenceClosed, StepError: saying so.
        """
        if self.closed:
            raise SequenceClosed(f"sequence {self.number} is closed; open or fork a new one")
        if self.broken:
            raise StepError(
                f"a step of sequence {self.number} was aborted after some layers had chosen among its tokens; "
                "close it and begin again"
            )

    def __repr__(self) -> str:
        return (
            f"KeptSequence({self.number}: {int(self.kept.mean())} of {self.tokens} tokens a head)"
        )


class KeptStep:
    """Some more tokens of some sequences.

    Attributes:
        counts: this rank's new tokens of each sequence; rows: new tokens over all ranks, `[seqs]`.
        whole: keys and values of a first prompt that no page holds, by (sequence, layer), until the layer chose.
        evicted: sequences of which tokens were evicted that were there before; listens: scorers that wait for it hear
            the attention of this step's rows.
        written, done: layers that were appended; sequences of each layer whose queries were seen.

    State: open -> committed | aborted.
    """

    def __init__(
        self, seqs: Listing[KeptSequence], counts: np.ndarray, rows: np.ndarray
    ) -> None:  # fmt: skip
        self.seqs, self.counts, self.rows = tuple(seqs), counts, rows
        self.whole: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.written: set[int] = set()
        self.done: dict[int, set[int]] = {}
        self.evicted: set[int] = set()
        self.listens = False
        self.state = "open"

    @property
    def num_tokens(self) -> int:
        """This rank's new tokens."""
        return int(self.counts.sum())

    def require_open(self) -> None:
        """Raise if it was committed or aborted.

        Raises:
            StepError: saying which.
        """
        if self.state != "open":
            raise StepError(f"this step is already {self.state}; reserve a new one")


def listed(seqs: KeptSequence | Iterable[KeptSequence]) -> list[KeptSequence]:
    """Give one sequence or several as a list."""
    return [seqs] if isinstance(seqs, KeptSequence) else list(seqs)
