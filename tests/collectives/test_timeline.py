"""Times of collectives reach to their end, and a timeline shows what overlaps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plait.collectives.shm import register
from plait.collectives.timeline import Bar, Timeline
from plait.collectives.trace import Trace, span
from world import run_world

LATE = 0.2


def one_comes_late(backend: str) -> list[Bar]:
    """Bars of an asynchronous and of a waiting exchange, to which rank 1 comes when rank 0 has begun, and of spans."""
    if backend == "shm":
        register()
    group, first = dist.new_group([0, 1], backend=backend), dist.get_rank() == 0
    store = dist.distributed_c10d._get_default_store()
    x, out = torch.ones(2, 3), torch.empty(2, 3)
    dist.all_to_all_single(out, x, group=group)
    with Trace(lambda _: "kvp") as trace:
        with span("computing"):
            if not first:
                store.wait(["computes behind it"])
                time.sleep(LATE)
        work = dist.all_to_all_single(out, x, group=group, async_op=True)
        assert work is not None
        with span("behind it"):
            if first:
                store.set("computes behind it", "")
            time.sleep(LATE)
        work.wait()
        if first:
            store.set("begins to wait", "")
        else:
            store.wait(["begins to wait"])
            time.sleep(LATE)
        dist.all_to_all_single(out, x, group=group)
        return list(Timeline.gathered(trace, group).bars)


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_seconds_last_until_the_end(backend: str) -> None:
    zero, one = run_world(one_comes_late, 2, backend)
    assert zero == one  # all ranks gathered all bars
    computed, behind = (bar for bar in zero if bar.rank == 0 and not bar.axis)
    (late, waited), came = ([bar for bar in zero if bar.rank == r and bar.axis][:2] for r in (0, 1))
    assert late.seconds > 0.9 * LATE  # the call returned at once; the exchange lasted
    assert [late.end >= came[0].start, waited.end >= came[1].start] == [True, True]
    assert computed.end <= late.start
    assert late.start <= behind.start <= late.end  # what was computed meanwhile lies beside it


def bars() -> Timeline:
    return Timeline(
        (
            Bar(0, "attention, chunk 0", "", 10.0, 1.0),
            Bar(0, "attention, chunk 1", "", 11.0, 1.0),
            Bar(0, "all_to_all", "kvp", 11.0, 0.5, 64, "layers.0"),
            Bar(0, "all_to_all", "kvp", 11.4, 2.0, 64),
            Bar(1, "all_reduce", "tp", 10.5, 0.5, 32),
        )
    )


def test_lanes_keep_bars_apart() -> None:
    lanes = [(label, len(of)) for label, of in bars().lanes(0)]
    assert lanes == [("computing", 2), ("kvp", 1), ("kvp", 1)]


def test_the_chrome_file(tmp_path: Path) -> None:
    bars().save(tmp_path / "trace.json")
    written: dict[str, Any] = json.loads((tmp_path / "trace.json").read_text())
    full = [e for e in written["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in full] == [
        (0, 0, "attention, chunk 0", 0.0, 1e6),
        (0, 0, "attention, chunk 1", 1e6, 1e6),
        (0, 1, "all_to_all", 1e6, pytest.approx(0.5e6)),
        (0, 2, "all_to_all", pytest.approx(1.4e6), 2e6),
        (1, 0, "all_reduce", 0.5e6, 0.5e6),
    ]
    assert full[2]["args"] == {"axis": "kvp", "sent_bytes": 64, "scope": "layers.0"}
    names = {e["args"]["name"] for e in written["traceEvents"] if e["ph"] == "M"}
    assert names == {"rank 0", "rank 1", "computing", "kvp", "tp"}


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars().picture(tmp_path / "one.png")
    Timeline(()).picture(tmp_path / "none.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").stat().st_size > 1.3 * (tmp_path / "none.png").stat().st_size
