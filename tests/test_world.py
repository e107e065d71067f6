"""The harness itself: results, the first failure, deadlocks, dead ranks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import world
from world import RankError, WorldTimeout, run_calls, run_world


@dataclass
class Point:
    """Defined in the test file: must be the same class on both sides."""

    x: int


def sum_of_ranks(point: Point, t: torch.Tensor) -> tuple[Point, torch.Tensor]:
    t = t + dist.get_rank()
    dist.all_reduce(t)
    return Point(point.x + dist.get_rank()), t


@pytest.mark.parametrize("size", [1, 2, 8])
def test_arguments_and_results_travel(size: int) -> None:
    results = run_world(sum_of_ranks, size, Point(5), torch.zeros(2))
    assert [point for point, _ in results] == [Point(5 + rank) for rank in range(size)]
    for _, total in results:
        assert total.tolist() == [size * (size - 1) / 2] * 2


def threads_and_env() -> tuple[int, str | None, bool]:
    return torch.get_num_threads(), os.environ.get("PLAIT_TEST"), dist.is_initialized()


def test_no_process_group_and_environment() -> None:
    answers = run_world(threads_and_env, 2, backend=None, threads=2, env={"PLAIT_TEST": "x"})
    assert answers == [(2, "x", False)] * 2


def one_fails_while_others_wait(culprit: int) -> None:
    print("before the fall")
    if dist.get_rank() == culprit:
        left, right = [1, 2, 3], [1, 2, 4]
        assert left == right, "the story of this rank"
    dist.barrier()


@pytest.mark.parametrize("culprit", [0, 2])
def test_the_failing_rank_is_shown(culprit: int) -> None:
    with pytest.raises(RankError) as caught:
        run_world(one_fails_while_others_wait, 3, culprit)
    assert caught.value.rank == culprit
    assert caught.value.kind == "AssertionError"  # and no timeout: the others were not waited for
    text = str(caught.value)
    assert "the story of this rank" in text
    assert "[1, 2, 3] == [1, 2, 4]" in text  # pytest's explanation, from inside the rank
    assert "one_fails_while_others_wait" in text
    assert "before the fall" in text


def stuck_here() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def test_a_deadlock_ends_with_every_stack() -> None:
    for seconds in (4, 16, 64):  # both must have come to where they are stuck
        with pytest.raises(WorldTimeout) as caught:
            run_world(stuck_here, 2, timeout=seconds)
        text = str(caught.value)
        if text.count("in stuck_here") == 2:
            break
    assert "ranks [0, 1] of 2" in text
    assert text.count("in stuck_here") == 2
    assert "barrier" in text


def killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankError, match="SIGKILL") as caught:
        run_world(killed, 2)
    assert caught.value.rank == 1


def test_a_death_goes_before_what_the_others_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody looks until all have answered, as on a busy machine."""
    look = world.connection.wait

    def late(*given: Any, **options: Any) -> list[Any]:
        time.sleep(1)
        return look(*given, **options)

    monkeypatch.setattr(world.connection, "wait", late)
    with pytest.raises(RankError, match="SIGKILL") as caught:
        run_world(killed, 2)
    assert caught.value.rank == 1


def skips() -> None:
    pytest.skip("not here")


def test_a_skip_inside_a_rank_is_a_skip() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_world(skips, 2)


def remember(key: str) -> int:
    calls = globals().setdefault("memory", [])
    calls.append(key)
    return len(calls)


def test_several_calls_share_one_world() -> None:
    assert run_calls([(remember, "a"), (remember, "b")], 2) == [[1, 2], [1, 2]]


def test_only_module_level_functions() -> None:
    with pytest.raises(TypeError, match="module-level"):
        run_world(lambda: None, 2)


def prints() -> None:
    print("hello from", dist.get_rank())


def test_what_ranks_print_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run_world(prints, 2)
    assert capsys.readouterr().out == "[rank 0] hello from 0\n[rank 1] hello from 1\n"
