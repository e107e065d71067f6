"""A plan for another number of ranks, and a killed run that goes on under it with the same loss curve."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs import finish, run_job, start, torchrun
from models import tiny
from plait.parallel import Plan, PlanError
from plait.parallel.shape import ModelShape
from resume import run, uninterrupted
from world import run_world

SHAPE = ModelShape.from_config(tiny("mixtral").config)
PLANS = ["dp2", "dp4:shard tp2", "pp2 tp2", "kvp2 tp2", "cp2:ulysses dp2", "tp2 dp2 ep4 etp1"]


@pytest.mark.parametrize(
    ("plan", "ranks", "found"),
    [
        ("dp4 tp2", 8, "dp4 tp2"),
        ("dp4 tp2", 6, "dp3 tp2"),
        ("dp4 tp2", 16, "dp8 tp2"),
        ("dp2 tp2", 3, "dp3"),
        ("pp2:gpipe,microbatches=4 tp2", 2, "tp2"),
        ("dp2:shard tp4", 2, "tp2"),
        ("dp4:shard tp2", 6, "dp3:shard tp2"),
        ("kvp4,interleave=8 tp2", 4, "kvp2,interleave=8 tp2"),
    ],
)
def test_what_fits(plan: str, ranks: int, found: str) -> None:
    fitted = Plan.parse(plan).fit(ranks, SHAPE)
    assert fitted.world_size == ranks
    for axis in ("tp", "kvp", "cp", "ep", "etp", "dp", "pp"):
        assert fitted.size(axis) == Plan.parse(found).size(axis), (axis, str(fitted))
    assert fitted.dp.kind == Plan.parse(plan).dp.kind
    assert fitted.pp.schedule == Plan.parse(plan).pp.schedule
    assert fitted.kvp.interleave == Plan.parse(plan).kvp.interleave


@given(st.sampled_from(PLANS), st.integers(1, 24))
def test_a_fitted_plan_is_legal_and_stable(plan: str, ranks: int) -> None:
    asked = Plan.parse(plan)
    fitted = asked.fit(ranks, SHAPE)
    fitted.validate(SHAPE, ranks)
    assert fitted.fit(ranks, SHAPE) == fitted
    assert asked.fit(asked.world_size, SHAPE) == asked


def test_what_does_not_fit() -> None:
    with pytest.raises(PlanError, match="not positive"):
        Plan.parse("tp2").fit(0)


# --- a run that was killed --------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the run has written so far."""
    file = folder / "losses.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def curve(folder: Path) -> list[float]:
    """The losses that were written, by step; a step that was made twice must have the same."""
    found: dict[int, float] = {}
    for said in lines(folder):
        assert said["loss"] == pytest.approx(found.get(said["step"], said["loss"]), rel=1e-9)
        found[said["step"]] = said["loss"]
    return [found[step] for step in sorted(found)]


def elastic(port: int, rendezvous: str, ranks: int = 1) -> list[str]:
    """One of at most two hosts; torchrun starts its ranks again when the other is lost, and when the other comes."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"),
        *(f"--rdzv-conf={rendezvous}", f"--nproc-per-node={ranks}"),
        *("--max-restarts=3", "--monitor-interval=0.5", "--local-addr=localhost"),
    ]


def free_port() -> int:
    """A port nobody has now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def wait_for(port: int, seconds: float = 120) -> None:
    """Wait until somebody listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return
        time.sleep(0.1)
    pytest.fail(f"nobody listens at {port}")


# torch 2.13's agents keep the place of an earlier round's store, for which who comes later waits in vain: each round
# gets a store of its own
OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SCRIPT = str(Path(__file__).parent.parent / "resume.py")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_goes_on_with_more_ranks(tmp_path: Path) -> None:
    steps, at = 5, random.randrange(1, 4)
    job = [*torchrun(2), SCRIPT, "dp2:shard", str(tmp_path), str(steps)]
    ended = run_job(job, tmp_path / "reports", TEST_DIES_AFTER=str(at))
    assert ended.code == -signal.SIGKILL, ended.output
    assert len(curve(tmp_path)) == at + 1, ended.output
    run_world(run, 4, "dp2:shard", str(tmp_path), steps)
    as_if_nothing_happened(tmp_path, steps)


def as_if_nothing_happened(folder: Path, steps: int) -> None:
    found, right = curve(folder), uninterrupted(steps)
    print(found)
    assert torch.tensor(found) == pytest.approx(torch.tensor(right), rel=1e-9)
    assert right[-1] < right[0]


@pytest.mark.table
@pytest.mark.filterwarnings("ignore")
def test_torchrun_goes_on_with_the_hosts_that_are_left(tmp_path: Path) -> None:
    """A host dies at a random step; torchrun starts the other's rank again, alone, under the plan that fits."""
    steps, at = 5, random.randrange(1, 4)
    port = free_port()
    wait_for_both = "last_call_timeout=25,keep_alive_interval=1,keep_alive_max_attempt=3"
    job = [*elastic(port, wait_for_both), SCRIPT, "dp2:shard", str(tmp_path), str(steps)]
    # who comes later than that finds the first where it waits, and nothing is lost: see the next test
    first = start(job, tmp_path / "first", TEST_WAITS_AFTER="-1", **OWN_STORES)
    wait_for(port)  # whoever comes first keeps the hosts' common state, and must live
    second = start(job, tmp_path / "second", TEST_DIES_AFTER=str(at), **OWN_STORES)
    lost, ended = (finish(host, tmp_path / "none", timeout=500) for host in (second, first))
    assert lost.code == -signal.SIGKILL, lost.output
    assert ended.code == 0, ended.output
    as_if_nothing_happened(tmp_path, steps)


@pytest.mark.table
@pytest.mark.filterwarnings("ignore")
def test_torchrun_goes_on_with_a_host_that_comes_later(tmp_path: Path) -> None:
    """A host alone trains tp2; when another joins, torchrun starts all ranks again, and they are dp2:shard tp2."""
    steps, at, port = 5, random.randrange(1, 4), free_port()
    job = [
        *elastic(port, "last_call_timeout=1", 2),
        SCRIPT,
        "dp2:shard tp2",
        str(tmp_path),
        str(steps),
    ]
    first = start(job, tmp_path / "first", TEST_WAITS_AFTER=str(at), **OWN_STORES)
    end = time.monotonic() + 400
    while len(lines(tmp_path)) <= at and first.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    second = start(job, tmp_path / "second", **OWN_STORES)
    ends = [finish(host, tmp_path / "none", timeout=500) for host in (first, second)]
    assert [end.code for end in ends] == [0, 0], "\n---\n".join(end.output for end in ends)
    as_if_nothing_happened(tmp_path, steps)
    plans = [said["plan"] for said in lines(tmp_path)]
    assert plans[: at + 1] == ["dp1:shard tp2"] * (at + 1)
    assert set(plans[at + 1 :]) == {"dp2:shard tp2"}


@pytest.mark.filterwarnings("ignore")
def test_stages_go_on_as_shards(tmp_path: Path) -> None:
    """Weights and moments of pp2 tp2, saved in the background, under dp2:shard tp2."""
    run_world(run, 4, "pp2 tp2", str(tmp_path), 2)
    run_world(run, 4, "dp2:shard tp2", str(tmp_path), 4)
    assert torch.tensor(curve(tmp_path)) == pytest.approx(torch.tensor(uninterrupted(4)), rel=1e-9)
