"""Sending and receiving: messages between two ranks stay in order, and are matched by tag."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..shown_call import is_on
from ..work import Finished
from .calls import KINDS, code_of, describe, dtype_of, view_of
from .channel import BYTES, CODE, TAG, look, pull, push
from .members import Members
from .progress import Progress
from .steps import DONE
from .work import Pending

SEND = KINDS.index("send")


@dataclass(eq=False)
class Letter:
    """A message on its way into a tensor.

    Attributes:
        early: the message, where it came before this receive was called.
        refused: the receive that this message does not suit; it ends when all of the message is out of the ring, or its
            sender would wait for room.
    """

    source: int | None
    tag: int
    tensor: Tensor
    view: Any
    cursor: Any = field(default_factory=lambda: np.zeros(1, np.int64))
    done: bool = False
    code: int = 0
    error: Exception | None = None
    early: Letter | None = None
    refused: Letter | None = None


class Mailbox:
    """The sends and receives of one rank in a group.

    A message that no receive waits for stays in its ring; the ring is full after 256 KiB, and then the sender
    waits. Only if a receive waits for a later message of the same sender are those before it taken aside.
    """

    def __init__(self, members: Members, progress: Progress, state: Any) -> None:
        self._members, self._progress, self._state = members, progress, state
        self._sends: dict[int, deque[Pending]] = {}
        self._posted: list[Letter] = []  # receives in the order they were called
        self._coming: dict[int, Letter] = {}  # by source: the message that is half out of its ring
        self._aside: list[Letter] = []
        self._header = np.zeros(3, np.int64)
        self._compares = is_on()

    def send(self, x: Tensor, to: int, tag: int) -> Finished | Pending:
        """Put a message into the ring to a rank, after those sent to it before."""
        ring = self._ring(self._members.rank, to)
        view, cursor, count = view_of(x), np.zeros(1, np.int64), x.numel()
        code = code_of(SEND, x.dtype)

        def advance(patience: int) -> bool:
            return push(self._state, ring, view, cursor, count, tag, code, patience) == DONE

        what = f"{describe(code, count)}, tag {tag}, to rank {self._members.called(to)}"
        line = self._sends.setdefault(to, deque())
        with self._progress.lock:
            self._progress.check_open()
            if not line and advance(0):
                return Finished([x])
            work = Pending(self._progress, what, advance, lambda: [to], [x])
            self._progress.add(line, work)
        self._progress.wake()
        return work

    def receive(self, x: Tensor, source: int | None, tag: int) -> Pending:
        """Take the first message with this tag from a rank, or from any (None)."""
        letter = Letter(source, tag, x, view_of(x))
        sources = [source] if source is not None else self._others()

        def advance(patience: int) -> bool:
            for rank in sources:
                self._drain(rank, letter, patience if source is not None else 0)
                if letter.done:
                    break
            work.source = -1 if letter.source is None else letter.source
            if letter.done and letter.error is not None:
                raise letter.error
            return letter.done

        place = "any rank" if source is None else f"rank {self._members.called(source)}"
        what = f"receive of {describe(code_of(SEND, x.dtype), x.numel())}, tag {tag}, from {place}"
        work = Pending(self._progress, what.replace("send of ", ""), advance, lambda: sources, [x])
        with self._progress.lock:
            self._progress.check_open()
            self._post(letter)
            self._progress.add(deque(), work)
        self._progress.wake()
        return work

    def _ring(self, sender: int, receiver: int) -> int:
        return self._members.segment.address + self._members.layout.ring(sender, receiver)

    def _others(self) -> list[int]:
        return [r for r in range(self._members.ranks) if r != self._members.rank]

    def _post(self, letter: Letter) -> None:
        for early in self._aside:
            if early.tag == letter.tag and letter.source in (early.source, None):
                self._aside.remove(early)
                letter.early = early
                return
        self._posted.append(letter)

    def _drain(self, source: int, wanted: Letter, patience: int) -> None:
        """Take messages out of a ring until the wanted one is there, or the ring is empty."""
        ring = self._ring(source, self._members.rank)
        while not wanted.done:
            if wanted.early is not None and wanted.early.done:
                self._deliver(wanted, wanted.early)
                return
            letter = self._coming.get(source)
            if letter is None:
                if not look(ring, self._header, patience):
                    return
                letter = self._coming[source] = self._match(source)
            if pull(ring, letter.view, letter.cursor, letter.tensor.numel(), patience) != DONE:
                return
            letter.done = True
            if letter.refused is not None:
                letter.refused.done = True
            del self._coming[source]

    def _match(self, source: int) -> Letter:
        """Find the receive for the message at the head of a ring; set the message aside if there is none."""
        tag, size, code = (int(self._header[word]) for word in (TAG, BYTES, CODE))
        for letter in self._posted:
            if letter.tag == tag and letter.source in (source, None):
                self._posted.remove(letter)
                letter.source = source
                if size == letter.tensor.numel() * letter.tensor.element_size() and self._same(
                    letter, code
                ):
                    return letter
                return self._refuse(letter, source, size, code)
        early = self._buffer(source, tag, size, code)
        self._aside.append(early)
        return early

    def _same(self, letter: Letter, code: int) -> bool:
        """In debug mode: say whether a message is of the dtype that is waited for."""
        return not self._compares or dtype_of(code) == letter.tensor.dtype

    def _buffer(self, source: int, tag: int, size: int, code: int) -> Letter:
        memory = torch.empty(size, dtype=torch.uint8)
        return Letter(source, tag, memory, view_of(memory), code=code)

    def _deliver(self, letter: Letter, early: Letter) -> None:
        letter.source, size = early.source, early.tensor.numel()
        if size != letter.tensor.numel() * letter.tensor.element_size() or not self._same(
            letter, early.code
        ):
            self._refuse(letter, early.source or 0, size, early.code)
            letter.done = True
            return
        letter.tensor.copy_(early.tensor.view(letter.tensor.dtype).view(letter.tensor.shape))
        letter.done = True

    def _refuse(self, letter: Letter, source: int, size: int, code: int) -> Letter:
        """Fail a receive whose tensor is not as long as the message, which is dropped."""
        x = letter.tensor
        sent = describe(code, size // dtype_of(code).itemsize)
        letter.error = ValueError(
            f"rank {self._members.called(source)} sent {size} bytes ({sent}) with tag {letter.tag}, but the receive "
            f"is for {x.numel() * x.element_size()} bytes ({x.numel()} {x.dtype})"
        )
        dropped = self._buffer(source, letter.tag, size, code)
        dropped.refused = letter
        return dropped
