"""The handle of a sequence in the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import SequenceClosed

if TYPE_CHECKING:
    from .fetch import Fetch
    from .step import Step
    from .store import KVStore
    from .tokens import History


class Sequence:
    """A sequence kept in the store; made by `KVStore.open` and `fork`, ended by `close`.

    Use one sequence from one thread at a time; different sequences are independent.

    Attributes:
        tokens: those that are there now, without what `open` fetches from tiers; `length` waits for that.
        history: the token ids, as far as the store was told them.
        memory: what the selector remembers, by layer.
        tenant: whose sequence this is; prefixes are never shared between tenants.
    """

    __slots__ = (
        "closed", "fetch", "found_tokens", "history", "memory", "number", "pages", "step", "store",
        "tenant", "tokens",
    )  # fmt: skip

    def __init__(self, store: KVStore, number: int, tenant: str | None = None) -> None:
        self.store = store
        self.number = number
        self.tenant = tenant
        self.found_tokens = 0
        self.fetch: Fetch | None = None
        self.tokens = 0
        self.pages: np.ndarray = np.empty(0, np.int32)
        self.step: Step | None = None
        self.history: History | None = None
        self.memory: dict[int, dict[Any, Any]] = {}
        self.closed = False

    @property
    def length(self) -> int:
        """Committed tokens; waits for what is under way from the tiers, as `cached_tokens` does."""
        self.wait()
        return self.tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens that `open` found already in the store: the caller computes the rest.

        Waits for what is under way from the tiers; `wait` does so with a time limit.
        """
        self.wait()
        return self.found_tokens

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for pages that `open` fetches from tiers; say whether none is under way any more.

        Calls that need them wait by themselves. `wait(0)` asks.
        """
        return self.fetch is None or self.store.wait(self, seconds)

    def close(self) -> None:
        """Give the sequence's pages back; the same as `store.close(seq)`."""
        self.store.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.closed:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.tokens} tokens, {len(self.pages)} pages"
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


def listed(seqs: Sequence | Iterable[Sequence]) -> list[Sequence]:
    """Give one sequence or several as a list."""
    return [seqs] if isinstance(seqs, Sequence) else list(seqs)
