"""The host tier: pages in one preallocated region of memory."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Sequence

import numpy as np

from .order import EvictionOrder, Lru
from .tier import Page, Tier, byte_views, check_keys

ALIGNMENT = 4096  # of memory, offsets and lengths, for I/O past the page cache


def aligned_region(count: int, stride: int) -> np.ndarray:
    """Make memory that starts on a page boundary, already touched, in huge pages where the system gives them.

    A disk moves huge pages in few long pieces and without looking up every 4 KiB: twice as fast where we measured.

    Shape: `[count, stride]` bytes
    """
    memory = mmap.mmap(-1, count * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    region = np.frombuffer(memory, np.uint8).reshape(count, stride)
    region.fill(0)
    return region


def round_up(length: int, to: int = ALIGNMENT) -> int:
    """The next multiple of `to`."""
    return -(-length // to) * to


class MemoryTier(Tier):
    """Pages of at most `page_bytes` in host memory, all of it taken at once.

    A slot starts on a page boundary, so a disk tier reads and writes it without a copy.

    Args:
        num_pages: pages it can hold.
        page_bytes: bytes of the largest page.
        evict: which page to forget when it is full.
    """

    def __init__(self, num_pages: int, page_bytes: int, evict: EvictionOrder | None = None) -> None:
        if num_pages < 1 or page_bytes < 1:
            raise ValueError(
                f"MemoryTier needs at least one page of one byte, got {num_pages} of {page_bytes}"
            )
        self.page_bytes = page_bytes
        self._region = aligned_region(num_pages, round_up(page_bytes))
        self._evict = Lru() if evict is None else evict
        self._slots: dict[bytes, tuple[int, int]] = {}  # key -> slot, length
        self._free = list(range(num_pages - 1, -1, -1))
        self._lock = threading.Lock()
        self._evicted = 0

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Copy pages in, forgetting others as the eviction order says."""
        self.require_open()
        views = byte_views(keys, pages)
        for view in views:
            if view.size > self.page_bytes:
                raise ValueError(
                    f"a page of {view.size} bytes does not fit {self.page_bytes}; make the tier with "
                    "a larger page_bytes"
                )
        with self._lock:
            return [self._put(key, view) for key, view in zip(keys, views, strict=True)]

    def _put(self, key: bytes, view: np.ndarray) -> bool:
        if key in self._slots:
            self._evict.used(key)
            return True
        if not self._free:
            victim = self._evict.victim()
            if victim is None:
                return False
            self._drop(victim)
            self._evicted += 1
        slot = self._free.pop()
        self._region[slot, : view.size] = view
        self._slots[key] = slot, view.size
        self._evict.added(key)
        return True

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Copy pages out."""
        self.require_open()
        views = byte_views(keys, out, writable=True)
        with self._lock:
            found = [self._slots.get(key) for key in keys]
            for at, view in zip(found, views, strict=True):
                if at is not None and view.size < at[1]:
                    raise ValueError(
                        f"a page of {at[1]} bytes does not fit a buffer of {view.size}"
                    )
            for key, at, view in zip(keys, found, views, strict=True):
                if at is not None:
                    view[: at[1]] = self._region[at[0], : at[1]]
                    self._evict.used(key)
        return [None if at is None else at[1] for at in found]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say which pages are held."""
        self.require_open()
        check_keys(keys)
        return [key in self._slots for key in keys]

    def remove(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget pages."""
        self.require_open()
        check_keys(keys)
        with self._lock:
            return [self._drop(key) for key in keys]

    def _drop(self, key: bytes) -> bool:
        at = self._slots.pop(key, None)
        if at is None:
            return False
        self._evict.removed(key)
        self._free.append(at[0])
        return True

    def counters(self) -> dict[str, float]:
        """Pages held and pages evicted."""
        with self._lock:
            return {"pages": len(self._slots), "evicted": self._evicted}
