"""The tier contract: a place that keeps pages under keys, and may forget them, but never alters them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from .errors import TierClosed

Page = bytes | bytearray | memoryview | np.ndarray | torch.Tensor
MAX_KEY_BYTES = 64


class Tier(ABC):
    """Pages by key, in batches.

    Keys are 1 to 64 bytes, hashes that the caller made of everything the page depends on. So a page is
    immutable: a put under a key that is held changes nothing. To replace a page, remove it first.

    A tier may forget any page at any time (eviction, damage, a full disk): `get` then says None. It never
    gives bytes that were not put under that key. What a missed page's buffer holds afterwards is not defined.

    State: thread-safe; every call does its whole batch before it returns. `Moves` runs calls behind the
    caller's back.
    """

    closed = False

    @abstractmethod
    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Keep pages; say for each whether it is held now. Durable only after `commit`.

        Raises:
            ValueError: a page that can never fit, or a key that is none; nothing is kept.
        """

    @abstractmethod
    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Read pages into the caller's buffers; give each one's length in bytes, or None for a miss.

        Raises:
            ValueError: a buffer shorter than its page, or one that cannot be written.
        """

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say which pages are held, without reading them: a `get` may still miss."""

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget pages; say which were held. Final only after `commit`."""

    def commit(self) -> None:
        """Make durable all that was put or removed before: what `contains` says after it returns.

        Raises:
            TierError: if it cannot be; pages that may be lost are no longer held.
        """
        self.require_open()

    def counters(self) -> dict[str, float]:
        """What the tier did since it was opened, by name; all numbers only grow, but `pages`."""
        return {}

    def close(self) -> None:
        """Commit and let go. A second close does nothing."""
        self.closed = True

    def require_open(self) -> None:
        """Raise if the tier was closed.

        Raises:
            TierClosed: always then.
        """
        if self.closed:
            raise TierClosed(f"this {type(self).__name__} is closed; open another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def byte_view(page: Page, writable: bool = False) -> np.ndarray:
    """See a page's memory as bytes, without a copy.

    Raises:
        ValueError: if it is empty, not contiguous, not in host memory, or must be written and cannot be.
    """
    if isinstance(page, torch.Tensor):
        if page.device.type != "cpu" or not page.is_contiguous():
            raise ValueError(
                f"a page must be contiguous in host memory, not on {page.device} with strides "
                f"{page.stride()}; copy it there first"
            )
        page = page.detach().reshape(-1).view(torch.uint8).numpy()
    if isinstance(page, np.ndarray) and not page.flags.c_contiguous:
        raise ValueError(f"a page must be contiguous, not of strides {page.strides}; copy it first")
    size = page.nbytes if isinstance(page, np.ndarray) else memoryview(page).nbytes
    if size == 0:
        raise ValueError("a page of no bytes cannot be kept")
    view = np.frombuffer(page, np.uint8)
    if writable and not view.flags.writeable:
        raise ValueError("a page can only be read into memory that can be written")
    return view


def byte_views(
    keys: Sequence[bytes], pages: Sequence[Page], writable: bool = False
) -> list[np.ndarray]:
    """Check a batch of keys and pages before anything is done with it.

    Raises:
        ValueError: naming what is wrong.
    """
    if len(keys) != len(pages):
        raise ValueError(f"{len(keys)} keys need as many pages, got {len(pages)}")
    check_keys(keys)
    return [byte_view(page, writable) for page in pages]


def check_keys(keys: Sequence[bytes]) -> None:
    """Refuse what is no key.

    Raises:
        ValueError: if a key is not 1 to 64 bytes.
    """
    for key in keys:
        if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"a key is 1 to {MAX_KEY_BYTES} bytes, not {key!r:.80}")
