"""The scheduler's side of `PlaitConnector`: which pages there are, which to load and which to save."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .vllm_model import PageKeys, fingerprint
from .vllm_pages import Group, PageAt, Plan, Report


class PageIndex:
    """Pages that every rank holds. A hint: the worker's checks decide.

    Args:
        ranks: how many workers there are.
    """

    def __init__(self, ranks: int) -> None:
        self._all = (1 << ranks) - 1
        self._held: dict[bytes, int] = {}  # key -> a bit per rank
        self._saving: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return self._held.get(key) == self._all

    def add(self, rank: int, keys: Iterable[bytes]) -> None:
        """A rank holds pages."""
        for key in keys:
            self._held[key] = self._held.get(key, 0) | 1 << rank

    def drop(self, rank: int, keys: Iterable[bytes]) -> None:
        """A rank holds them no more."""
        _unmark(self._held, rank, keys)

    def begin_save(self, key: bytes) -> None:
        """All ranks are asked to save a page."""
        self._saving[key] = self._all

    def end_save(self, rank: int, keys: Iterable[bytes]) -> None:
        """A rank saved them, or did not."""
        _unmark(self._saving, rank, keys)

    def saving(self, key: bytes) -> bool:
        """Whether a page is on its way to disk."""
        return key in self._saving

    @property
    def num_saving(self) -> int:
        """Pages on their way to disk."""
        return len(self._saving)


def _unmark(marks: dict[bytes, int], rank: int, keys: Iterable[bytes]) -> None:
    """Take a rank's bit from each key; one without bits is forgotten."""
    for key in keys:
        left = marks.pop(key, 0) & ~(1 << rank)
        if left:
            marks[key] = left


@dataclass(eq=False)
class Known:
    """A request under way.

    Attributes:
        keys: per group, of its full blocks so far.
        offered: what the index was told to give: tokens computed before, and tokens after them.
        looked: blocks per group that were looked at for saving.
        stale: its weights are not those the keys are for: it neither finds nor leaves pages.
    """

    request: Any
    keys: list[list[bytes]]
    offered: tuple[int, int] = (0, 0)
    looked: list[int] = field(default_factory=list)
    stale: bool = False


class PageScheduler:
    """Decides per request; knows nothing of bytes.

    Args:
        groups: of layers; a prefix counts if every group has what it needs of it.
        keys: makes page keys.
        ranks: workers.
    """

    def __init__(self, groups: list[Group], keys: PageKeys, model: bytes, ranks: int) -> None:
        self.groups, self.index = groups, PageIndex(ranks)
        self._keys, self._model = keys, model
        self._unit = math.lcm(*(group.tokens for group in groups))
        self._requests: dict[str, Known] = {}
        self._plan = Plan()
        self.counts: dict[str, int] = dict.fromkeys(("queries", "hit_tokens", "asked_to_save"), 0)

    def _known(self, request: Any) -> Known:
        known = self._requests.get(request.request_id)
        if known is None:
            known = Known(request, [[] for _ in self.groups], looked=[0] * len(self.groups))
            # its name is in the hash, its weights not
            known.stale = request.lora_request is not None
            self._requests[request.request_id] = known
        for number, (group, keys) in enumerate(zip(self.groups, known.keys, strict=True)):
            hashes = request.block_hashes
            for last in range((len(keys) + 1) * group.hashes - 1, len(hashes), group.hashes):
                keys.append(self._keys.make(bytes(hashes[last]), number, request.cache_salt))
        return known

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Say how many tokens after the computed ones are on disk; None: ask again, a page is being saved."""
        known = self._known(request)
        if known.stale:
            return 0, False
        limit = (request.num_tokens - 1) // self._unit * self._unit
        self.counts["queries"] += 1
        end = self._longest(known, computed, limit)
        after = self._keys_between(known, end, min(end + self._unit, limit))
        if any(self.index.saving(key) for key in after):
            return None, False
        known.offered = computed, max(0, end - computed)
        return known.offered[1], known.offered[1] > 0

    def _longest(self, known: Known, computed: int, limit: int) -> int:
        end = computed
        for group, keys in zip(self.groups, known.keys, strict=True):
            if group.window is None:
                run = computed // group.tokens
                while run < min(limit // group.tokens, len(keys)) and keys[run] in self.index:
                    run += 1
                limit = run * group.tokens // self._unit * self._unit
        end = max(limit, computed)
        while end > computed and not self._windows_held(known, computed, end):
            end -= self._unit
        return max(end, computed)

    def _windows_held(self, known: Known, computed: int, end: int) -> bool:
        return all(
            key in self.index
            for group, keys in zip(self.groups, known.keys, strict=True)
            if group.window is not None
            for key in keys[self._first(group, computed, end) : end // group.tokens]
        )

    @staticmethod
    def _first(group: Group, computed: int, end: int) -> int:
        """The first block of a group to load, for a prefix that ends at `end`."""
        first = computed // group.tokens
        return first if group.window is None else max(first, end // group.tokens - group.window)

    def _keys_between(self, known: Known, begin: int, end: int) -> list[bytes]:
        return [
            key
            for group, keys in zip(self.groups, known.keys, strict=True)
            for key in keys[begin // group.tokens : end // group.tokens]
        ]

    def allocated(self, request: Any, blocks: tuple[list[int], ...], external: int) -> None:
        """Blocks are there for the tokens that were offered: load them."""
        if external == 0:
            return
        known = self._known(request)
        computed = known.offered[0]
        end = computed + external
        loads = [
            PageAt(keys[i], number, ids[i])
            for number, (group, keys, ids) in enumerate(
                zip(self.groups, known.keys, blocks, strict=True)
            )
            for i in range(self._first(group, computed, end), end // group.tokens)
            if ids[i] != 0  # vLLM's null block: out of the window
        ]
        self._plan.loads[request.request_id] = loads
        self.counts["hit_tokens"] += external

    def plan(self, output: Any, blocks_of: Any) -> Plan:
        """Make this step's plan: what was allocated is loaded, what will be complete is saved.

        Args:
            output: vLLM's SchedulerOutput.
            blocks_of: gives a request's block ids per group, as they are in this step.
        """
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for name, scheduled in output.num_scheduled_tokens.items():
            known = self._requests.get(name)
            if known is not None and not known.stale:
                self._save(known, computed[name] + scheduled, blocks_of)
        plan, self._plan = self._plan, Plan()
        return plan

    def _save(self, known: Known, computed: int, blocks_of: Any) -> None:
        self._known(known.request)  # tokens may have come since
        for number, (group, keys) in enumerate(zip(self.groups, known.keys, strict=True)):
            begin, end = known.looked[number], min(len(keys), computed // group.tokens)
            if end <= begin:
                continue
            known.looked[number] = end
            missing = [
                i
                for i in range(begin, end)
                if keys[i] not in self.index and not self.index.saving(keys[i])
            ]
            ids = blocks_of(known.request.request_id)[number] if missing else []
            for i in missing:
                if ids[i] != 0:
                    self._plan.saves.append(PageAt(keys[i], number, ids[i]))
                    self.index.begin_save(keys[i])
                    self.counts["asked_to_save"] += 1

    def told(self, report: Report) -> None:
        """Take the workers' report of a step."""
        for rank, keys in report.held.items():
            self.index.add(rank, keys)
        for rank, keys in report.gone.items():
            self.index.drop(rank, keys)
        for rank, keys in report.settled.items():
            self.index.end_save(rank, keys)

    def finished(self, request: Any) -> None:
        """A request ended; a load of it that is planned is done all the same: vLLM waits for it."""
        self._requests.pop(request.request_id, None)

    def forget_weights(self) -> None:
        """The weights in memory may be others now: no page kept so far is one of this model.

        Nor are those of requests under way. Pages from now on are found by this process only; a restart, with
        the weights it was told of, finds the old ones again.
        """
        model = fingerprint([self._model.hex(), os.urandom(16).hex()])
        self._keys = self._keys.for_model(model)
        for known in self._requests.values():
            known.stale = True
