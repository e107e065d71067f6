"""The page table of a batch: which pages hold which sequence, and where a token lies.

The words are FlashInfer's: `kv_indptr`, `kv_indices`, `kv_last_page_len`.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..cuda_kernels.kernel_cache import njit


class PageTable:
    """A frozen CSR view of the pages of a batch of sequences.

    Built once per step and used by every layer. Arrays are copies: later changes of the sequences
    do not show.

    Shape: kv_indptr `[seqs + 1]`, kv_indices `[pages]`, kv_last_page_len `[seqs]` (all int32),
        lengths `[seqs]` int64.
    """

    def __init__(self, pages: Listing[np.ndarray], lengths: np.ndarray, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.lengths = np.asarray(lengths, np.int64)
        counts = np.fromiter((len(p) for p in pages), np.int64, len(pages))
        self.indptr = np.zeros(len(pages) + 1, np.int64)
        np.cumsum(counts, out=self.indptr[1:])
        self.indices = np.concatenate(pages) if pages else np.empty(0, np.int32)

    @cached_property
    def kv_indptr(self) -> Tensor:
        """Where each sequence's pages begin in `kv_indices`."""
        return torch.from_numpy(self.indptr.astype(np.int32))

    @cached_property
    def kv_indices(self) -> Tensor:
        """Page numbers of all sequences, end to end."""
        return torch.from_numpy(self.indices.astype(np.int32, copy=False))

    @cached_property
    def kv_last_page_len(self) -> Tensor:
        """Tokens in each sequence's last page (0 for an empty sequence)."""
        counts = np.diff(self.indptr)
        rest = self.lengths - (counts - 1) * self.page_tokens
        return torch.from_numpy(np.where(counts > 0, rest, 0).astype(np.int32))

    def pages(self, at: int) -> np.ndarray:
        """Page numbers of the sequence at one place in the batch."""
        return self.indices[self.indptr[at] : self.indptr[at + 1]]

    def slots(self, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Token slots of `counts[s]` tokens from position `first[s]` of each sequence.

        A slot is `page * page_tokens + offset`: the row of a token in a layer's flat region.

        Shape: first, counts `[seqs]` -> `[sum(counts)]` int64, in sequence order.
        """
        return _slots(self.indptr, self.indices, first, counts, self.page_tokens)


@njit()
def _slots(indptr, indices, first, counts, page_tokens):
    slots = np.empty(counts.sum(), np.int64)
    n = 0
    for s in range(len(counts)):
        for token in range(first[s], first[s] + counts[s]):
            page = np.int64(indices[indptr[s] + token // page_tokens])
            slots[n] = page * page_tokens + token % page_tokens
            n += 1
    return slots


def consecutive(pages: np.ndarray) -> bool:
    """Say whether page numbers rise by one, so that their memory is one piece."""
    return len(pages) < 2 or bool((pages[1:] - pages[:-1] == 1).all())
