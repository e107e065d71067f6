"""Several works as one: waited for together, and no longer together than was asked."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from plait.collectives.work import Finished, Several


class Long(dist.Work):
    """Work that takes a while, and remembers how long it was waited for at most."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[timedelta | None] = []

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.given.append(timeout)
        time.sleep(0.02)
        return True


def test_the_time_that_one_took_is_not_there_for_the_next() -> None:
    works = [Long(), Long(), Long()]
    Several(works).wait(timedelta(seconds=0.03))
    first, second, third = (work.given[0].total_seconds() for work in works)  # type: ignore[union-attr]
    assert first <= 0.03
    assert second <= first - 0.02
    assert 0 < third <= max(second - 0.02, 1e-3)  # and never 0, which is for ever


def test_without_a_timeout_all_are_waited_for() -> None:
    works = [Long(), Long()]
    Several(works).wait()
    Several(works).wait(timedelta(0))
    Several(works).synchronize()
    assert [work.given for work in works] == [[None] * 3] * 2


def test_outputs_are_those_of_the_whole() -> None:
    assert Several([Finished(), Finished()], []).get_future().wait() == []
