"""Activations on disk: bitwise the values and gradients without, under every axis, and less memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memory import Anonymous
from models import tiny, tokens
from plait.parallel import Plan, offload_activations, parallelize
from plait.parallel.activations import OffloadedActivations
from plait.parallel.activations.shelf import Counters
from plait.parallel.explain import run
from threads import appears
from training import batch_of, coordinate, labelled, loss
from world import run_calls, run_world

MMAP_THRESHOLD = -3  # of glibc's mallopt
LEAST, ROOM = 512, "64MiB"

Row = tuple[str, str, bool, dict[str, Any]]  # plan, family, activation checkpointing, changes
PLANS: dict[int, list[Row]] = {
    1: [("", "llama", False, {"layers": 3}), ("", "gemma3", True, {}), ("", "gpt_oss", False, {})],
    2: [
        ("tp2:sp", "qwen3", False, {}),
        ("cp2", "gemma3", False, {}),
        ("dp2:shard", "llama", True, {"layers": 3}),
        ("pp2", "llama", False, {"layers": 4}),
        ("pp2:zero-bubble,microbatches=4", "qwen3", False, {"layers": 4}),
        ("dp2 ep2:fssdp,spare=1", "mixtral", False, {}),
    ],
}  # fmt: skip
MORE: dict[int, list[Row]] = {
    2: [
        ("tp2", "llama", False, {"layers": 3}),
        ("cp2:ulysses", "qwen3", True, {}),
        ("dp2:shard", "qwen3", False, {}),
        ("dp2", "mistral", False, {}),
        ("pp2:interleaved,microbatches=4", "qwen3", False, {"layers": 4}),
        ("pp2", "qwen3", True, {"layers": 4}),
        ("dp2 ep2", "mixtral", False, {}),
        ("tp2 ep2,exchange=tokens", "qwen3_moe", True, {}),
        ("kvp2", "llama", False, {}),
    ],
    4: [
        ("dp2:shard cp2 ep4", "qwen3_moe", False, {}),
        ("pp2 tp2:sp ep2", "mixtral", True, {"layers": 4}),
    ],
}  # fmt: skip


def written(moved: OffloadedActivations) -> None:
    """Wait until everything that was saved is written."""
    assert appears(lambda: not moved.counters.held_bytes), "what was saved is not written"


def step(
    model: Any, at: int, number: int, staged: bool, moved: OffloadedActivations | None = None
) -> dict[str, Tensor]:
    """One step's loss and this rank's gradients; backward waits until everything is written, where it can."""
    model.zero_grad()
    batch = batch_of(at, number, batch=5 if staged else 2)
    value = labelled(model, batch) if staged else loss(model, batch)
    if moved is not None and not staged:
        written(moved)
    value.backward()
    found = {"loss": value.detach().clone()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad: Any = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            found[name] = grad.clone()
    model.zero_grad()
    return found


def made(plan: str, family: str, again: bool, changes: dict[str, Any]) -> Any:
    """A model of one row."""
    model = tiny(family, **changes)
    model = parallelize(model, plan) if plan else model
    model.train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def bitwise(folder: str, *row: Any) -> tuple[list[str], Counters]:
    """Two steps under a plan without offload, two with it, and one after: what differs, and what was moved."""
    model, plan = made(*row), row[0]
    at, staged = coordinate(model) if plan else 0, "pp" in plan
    right = [step(model, at, n, staged) for n in (0, 1, 0)]
    model = made(*row)  # fssdp remembers what it has seen
    with offload_activations(model, folder, disk_bytes=ROOM, least_bytes=LEAST) as moved:
        found = [step(model, at, n, staged, moved) for n in (0, 1)]
        gc.collect()
    found.append(step(model, at, 0, staged))
    wrong: list[str] = []
    for mine, own in zip(found, right, strict=True):
        wrong += sorted(mine.keys() ^ own.keys())
        wrong += [k for k in mine.keys() & own.keys() if not torch.equal(mine[k], own[k])]
    return wrong, moved.counters


def assert_bitwise(rows: list[Row], ranks: int, folder: Path) -> None:
    calls = [(bitwise, str(folder / str(n)), *row) for n, row in enumerate(rows)]
    for answer in run_calls(calls, ranks):
        for (plan, *row), (wrong, counters) in zip(rows, answer, strict=True):
            print(plan, *row, counters)
            assert not wrong, (plan, row)
            assert counters.held_bytes == 0, "nothing is left in memory"
            if "pp" in plan:  # backward may come before a write
                assert counters.written_bytes + counters.taken_back_bytes > 0
            else:
                assert counters.read_bytes >= counters.written_bytes > 0
                assert counters.early > counters.late, "reads run ahead of backward"
    assert not list(folder.rglob("slab*")), "close takes the directory away"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", PLANS)
def test_gradients_are_bitwise_those_without(ranks: int, tmp_path: Path) -> None:
    assert_bitwise(PLANS[ranks], ranks, tmp_path)


@pytest.mark.table
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", MORE)
def test_gradients_under_more_plans(ranks: int, tmp_path: Path) -> None:
    assert_bitwise(MORE[ranks], ranks, tmp_path)


def test_explain_says_what_would_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a real step, counted on meta."""
    monkeypatch.setattr(run, "LEAST_BYTES", LEAST)
    model = tiny("llama", layers=3).train()
    said = Plan().explain(model, batch=2, context=24, backward=True)
    with offload_activations(model, tmp_path, disk_bytes=ROOM, least_bytes=LEAST) as moved:
        loss = model(tokens(2, 24), use_cache=False).logits.sum()
        written(moved)
        loss.backward()
    assert moved.counters.written_bytes > 0
    assert said.step("training").movable_bytes == pytest.approx(
        moved.counters.written_bytes, rel=0.1
    )
    assert "with plait.offload_activations" in str(said)


# --- memory -----------------------------------------------------------------------------------


def peak(folder: str | None) -> tuple[int, Counters | None]:
    """The most anonymous memory that a process's first step adds, where freed memory is given back at once."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    model = tiny("llama", dtype=torch.float32, layers=8, hidden=128, ffn=384, head_dim=16).train()
    ids, moved = tokens(2, 512), None
    if folder is not None:
        moved = offload_activations(
            model, folder, disk_bytes="1GiB", least_bytes="64KiB", queue_bytes="4MiB"
        )
    with Anonymous() as memory:
        model(ids, labels=ids, use_cache=False).loss.backward()
    if moved is not None:
        moved.close()
    return memory.most - memory.first, None if moved is None else moved.counters


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does, with glibc")
def test_memory_shrinks(tmp_path: Path) -> None:
    """Backward's tensors are on disk: what stays are the gradients, the last layer's, and what is on its way."""
    (whole, _), (less, counters) = (
        run_world(peak, 1, folder)[0] for folder in (None, str(tmp_path))
    )
    print(f"{whole:,} without, {less:,} with; {counters}")
    assert less < 0.6 * whole
    assert counters.most_bytes < 0.4 * counters.written_bytes
