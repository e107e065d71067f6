"""The worker's side of `PlaitConnector`: pages between vLLM's blocks and the disk tier."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from ..tiers import DiskTier, Move, Moves, PageForm
from ..tiers.memory import aligned_region, round_up
from .vllm_held import HeldKeys
from .vllm_model import fingerprint
from .vllm_pages import FirstReport, GroupPages, PageAt, Plan, Report

logger = logging.getLogger(__name__)


class Staging:
    """Page-aligned host memory, a row per page. Shape: `[rows, bytes]`."""

    def __init__(self, rows: int, page_bytes: int) -> None:
        self.pages = aligned_region(rows, round_up(page_bytes))
        self._free = list(range(rows))

    def take(self, count: int) -> list[int]:
        """Take up to so many rows."""
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, rows: list[int]) -> None:
        """Give rows back."""
        self._free.extend(rows)


@dataclass(eq=False)
class Transfer:
    """Pages in rows of staging memory, on their way. `requests` names whose each is, for loads."""

    move: Move
    pages: list[PageAt]
    rows: list[int]
    requests: list[str] = field(default_factory=list)


class PageWorker:
    """Saves blocks after a step, and loads pages between steps.

    A save is copied to staging memory at once, so the blocks are vLLM's again, and written behind its back. If the
    staging memory is full, because the disk is slower than prefill, pages are not saved: they count as `unsaved`.

    Args:
        path, max_bytes: of the directory; this worker writes it alone.
        groups: of layers.
        facts: what decides how bytes lie in a page, besides the layers.
        staging_bytes: half of it for loads, half for saves.
        threads: transfers at a time.

    State: called from the worker's one thread.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int | str,
        groups: list[GroupPages],
        facts: list[str],
        rank: int,
        staging_bytes: int,
        threads: int,
    ) -> None:
        self._groups, self._rank = groups, rank
        page_bytes = max(group.bytes for group in groups)
        layers = [[layer.facts for layer in group.layers] for group in groups]
        form = PageForm(identity=fingerprint([facts, layers]).hex(), shape=(page_bytes,))
        self._held = HeldKeys(form)
        self._tier = DiskTier(path, form, page_bytes, max_bytes, evict=self._held)
        rows = max(1, staging_bytes // 2 // round_up(page_bytes))
        self._load_rows, self._save_rows = Staging(rows, page_bytes), Staging(rows, page_bytes)
        self._moves = Moves(self._tier, threads, queue_bytes=1 << 62)  # staging is the bound
        self._waiting: deque[tuple[str, PageAt]] = deque()
        self._loads: list[Transfer] = []
        self._saves: list[Transfer] = []
        self._left: dict[str, int] = {}  # pages to come per request
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._report = Report()
        self.counts: dict[str, int] = dict.fromkeys(("loaded", "not_loaded", "saved", "unsaved"), 0)
        self._held.changed.clear()
        logger.info("plait: %d pages of this layout are in %s", len(self._held), path)

    def first_report(self) -> FirstReport:
        """What the directory holds now."""
        return FirstReport(self._rank, self._held.keys())

    def begin_loads(self, plan: Plan) -> None:
        """Queue a step's loads."""
        for request, pages in plan.loads.items():
            self._left[request] = len(pages)
            self._waiting.extend((request, page) for page in pages)
        self._start_loads()

    def _start_loads(self) -> None:
        rows = self._load_rows.take(len(self._waiting))
        if not rows:
            return
        batch = [self._waiting.popleft() for _ in rows]
        pages = [page for _, page in batch]
        move = self._moves.load(
            [page.key for page in pages], self._views(pages, rows, self._load_rows)
        )
        self._loads.append(Transfer(move, pages, rows, [request for request, _ in batch]))

    def _views(self, pages: list[PageAt], rows: list[int], staging: Staging) -> list[np.ndarray]:
        return [
            staging.pages[row, : self._groups[page.group].bytes]
            for page, row in zip(pages, rows, strict=True)
        ]

    def save(self, plan: Plan) -> None:
        """Copy a step's complete blocks to staging memory, and begin to write them."""
        rows = self._save_rows.take(len(plan.saves))
        pages, dropped = plan.saves[: len(rows)], plan.saves[len(rows) :]
        if dropped:
            self.counts["unsaved"] += len(dropped)
            self._settle([page.key for page in dropped])
        if not pages:
            return
        for group, at in _by_group(pages):
            blocks = [pages[i].block for i in at]
            self._groups[group].read(blocks, self._save_rows.pages, [rows[i] for i in at])
        views = self._views(pages, rows, self._save_rows)
        move = self._moves.store([page.key for page in pages], views)
        self._saves.append(Transfer(move, pages, rows))

    def _settle(self, keys: list[bytes]) -> None:
        self._report.settled.setdefault(self._rank, []).extend(keys)

    def finish(self) -> tuple[set[str], set[str]]:
        """End what is done; give the requests whose loads ended, and those of them that miss a page."""
        for transfer in [t for t in self._loads if t.move.done]:
            self._loads.remove(transfer)
            self._end_load(transfer)
        for transfer in [t for t in self._saves if t.move.done]:
            self._saves.remove(transfer)
            self._end_save(transfer)
        self._start_loads()
        ended = {request for request, left in self._left.items() if not left}
        failed = ended & self._failed_requests
        self._failed_requests -= failed
        for request in ended:
            del self._left[request]
        return ended, failed

    def _end_load(self, transfer: Transfer) -> None:
        pages, rows = transfer.pages, transfer.rows
        held = _held(transfer.move)
        good = [i for i, yes in enumerate(held) if yes]
        for group, at in _by_group([pages[i] for i in good]):
            chosen = [good[i] for i in at]
            blocks = [pages[i].block for i in chosen]
            self._groups[group].write(blocks, self._load_rows.pages, [rows[i] for i in chosen])
        self._load_rows.give(rows)
        lost = [i for i, yes in enumerate(held) if not yes]
        self._failed_blocks.update(pages[i].block for i in lost)
        self._failed_requests.update(transfer.requests[i] for i in lost)
        # told as gone even if still in the directory: a page that cannot be read must not be offered again
        self._report.gone.setdefault(self._rank, []).extend(pages[i].key for i in lost)
        for request in transfer.requests:
            self._left[request] -= 1
        self.counts["loaded"] += len(good)
        self.counts["not_loaded"] += len(lost)

    def _end_save(self, transfer: Transfer) -> None:
        held = _held(transfer.move)
        keys = [page.key for page in transfer.pages]
        self._save_rows.give(transfer.rows)
        self._settle(keys)
        self._held.changed.extend(key for key, yes in zip(keys, held, strict=True) if yes)
        self.counts["saved"] += held.count(True)
        self.counts["unsaved"] += held.count(False)

    def failed_blocks(self) -> set[int]:
        """Blocks that were not filled, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> Report | None:
        """What changed since the last call, for the scheduler."""
        report, self._report = self._report, Report()
        lost = set(report.gone.get(self._rank, ()))
        changed = {self._held.changed.popleft() for _ in range(len(self._held.changed))} - lost
        saving = {page.key for transfer in self._saves for page in transfer.pages}
        for key in changed:
            if key not in self._held:
                report.gone.setdefault(self._rank, []).append(key)
            elif key not in saving:  # not durable yet: told when it is
                report.held.setdefault(self._rank, []).append(key)
        return report if report.held or report.gone or report.settled else None

    def counters(self) -> dict[str, float]:
        """What happened since the start."""
        return {**self._tier.counters(), **self.counts}

    def close(self) -> None:
        """Finish what is queued, commit, and let go of the directory."""
        self._moves.close()
        self._tier.close()


def _held(move: Move) -> list[bool]:
    try:
        move.wait()
    except Exception:
        logger.exception("plait: a transfer failed; its pages are misses")
    return move.held


def _by_group(pages: list[PageAt]) -> list[tuple[int, list[int]]]:
    order = sorted(range(len(pages)), key=lambda i: pages[i].group)
    return [(group, list(at)) for group, at in groupby(order, key=lambda i: pages[i].group)]
