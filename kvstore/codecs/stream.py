"""Tokens that come one after the other, coded as soon as they may be and never again: a cache's coded history.

run = CodedTokens(find_codec("kivi:bits=2"), tail=128)
run.append(k)                                  # [tokens, kv_heads, head_dim]
run.tokens()                                   # all of them; the newest ones exact
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .codec import Codec, CodecError, PageLayout

RUN_TOKENS = 32  # fewer would cost more in calls than they save in exact tokens


class CodedTokens:
    """Keys, or values, of one sequence in one layer.

    The newest `tail` tokens stay exact, and those before them that do not fill a run yet. Bytes are the same however
    the tokens were cut into calls, because runs are coded by themselves and once.

    Args:
        run: tokens of a run, a multiple of the codec's `tokens_at_once`; default the first one from 32 on.
    """

    def __init__(self, codec: Codec, tail: int = 0, run: int | None = None) -> None:
        fewest = codec.tokens_at_once
        self.run = fewest * -(-RUN_TOKENS // fewest) if run is None else run
        if self.run < 1 or self.run % fewest or tail < 0:
            raise CodecError(
                f"run={run} must be a multiple of {fewest}, which {codec} codes together, "
                f"and tail={tail} not negative"
            )
        self.codec, self.tail = codec, tail
        self.coded: list[np.ndarray] = []
        self._exact: Tensor | None = None

    def append(self, x: Tensor) -> None:
        """Add tokens; code the runs that are older than the tail now. Shape: `[tokens, kv_heads, head_dim]`."""
        if self._exact is not None and (
            x.shape[1:] != self._exact.shape[1:] or x.dtype != self._exact.dtype
        ):
            raise CodecError(
                f"tokens {list(x.shape)} of {x.dtype} after {list(self._exact.shape)} of {self._exact.dtype}"
            )
        exact = x if self._exact is None else torch.cat([self._exact, x])
        runs = max(0, exact.shape[0] - self.tail) // self.run
        for r in range(runs):
            self.coded.append(self.codec.encode(exact[r * self.run : (r + 1) * self.run]))
        self._exact = exact[runs * self.run :].clone()

    def __len__(self) -> int:
        left = 0 if self._exact is None else self._exact.shape[0]
        return len(self.coded) * self.run + left

    def tokens(self) -> Tensor:
        """Decode all. Shape: -> `[tokens, kv_heads, head_dim]`."""
        if self._exact is None:
            raise CodecError("no token was appended yet, so their shape is not known")
        layout = PageLayout((self.run, *self._exact.shape[1:]), self._exact.dtype)
        return torch.cat([*(self.codec.decode(data, layout) for data in self.coded), self._exact])

    @property
    def num_bytes(self) -> int:
        """Bytes that coded and exact tokens really take."""
        left = 0 if self._exact is None else self._exact.numel() * self._exact.element_size()
        return sum(data.size for data in self.coded) + left
