"""What goes wrong with activations that were put away is an error, never a wrong gradient."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import tiny, tokens
from plait.kvstore.tiers import MemoryTier, Page, TierError, TierWrapper
from plait.parallel import PlanError, offload_activations
from plait.parallel.activations.offload import attached, layers_of
from plait.parallel.activations.shelf import Keep, Shelf
from threads import appears
from world import RankError, run_world


class Block(nn.Module):
    """A layer whose backward needs its input and what it makes of it."""

    def __init__(self, change: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.inner, self.change = nn.Linear(32, 32), change

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(self.inner(x))
        z = torch.exp(y)
        if self.change is not None:
            self.change(z)
        return x + z


class Blocks(nn.Module):
    """Some layers and a head."""

    def __init__(self, *changes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(change) for change in changes])
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).sum()


def settled(counters: Any) -> None:
    """Wait until everything is written."""
    assert appears(lambda: not counters.held_bytes)


class Faulty(TierWrapper):
    """A tier in memory that writes nothing before it is told to, refuses, or raises."""

    def __init__(
        self, pages: int = 64, waits: bool = False, error: Exception | None = None
    ) -> None:
        super().__init__(MemoryTier(pages, 8192, Keep()))
        self.go, self.error = threading.Event(), error
        if not waits:
            self.go.set()

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Keep pages, when told to."""
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return super().put(keys, pages)


class SlowAtFirst(Faulty):
    """The first pages take their time, and others overtake them."""

    first = True

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Keep pages."""
        first, self.first = self.first, False
        if first:
            time.sleep(0.5)
        return super().put(keys, pages)


def on(model: nn.Module, tier: TierWrapper, queue_bytes: int = 1 << 20) -> tuple[Shelf, Any]:
    """Let a model's activations go to a tier."""
    shelf = Shelf(tier, 8192, queue_bytes, "the tier of the test")
    return shelf, attached(*layers_of(model), shelf, 512)


X = torch.linspace(-1, 1, 64 * 32).reshape(64, 32)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def until_it_is_told(loss: Callable[[], Tensor]) -> None:
    """Go on until what goes wrong behind the computation comes to light; graphs that live need their tensors."""
    losses, end = [], time.monotonic() + 60
    while time.monotonic() < end:
        losses.append(loss())
        time.sleep(0.02)


def test_a_full_tier_is_an_error_that_says_what_would_do() -> None:
    model = Blocks(None, None, None)
    shelf, edits = on(model, Faulty(pages=2))
    with pytest.raises(TierError, match=r"no room for 8,192 more bytes; give it more"):
        until_it_is_told(lambda: model(X))
    edits.undo()
    shelf.close()
    model(X).backward()


def test_what_a_tier_raises_is_raised_in_backward_too() -> None:
    model = Blocks(None, None, None)
    tier = Faulty(waits=True, error=OSError("the cable is loose"))
    shelf, edits = on(model, tier)
    loss = model(X)
    tier.go.set()
    assert appears(lambda: shelf._failure is not None)
    with pytest.raises(OSError, match="cable"):
        loss.backward()
    edits.undo()
    shelf.close()


def test_full_disk(tmp_path: Path) -> None:
    model, ids = tiny("llama", layers=4), tokens(2, 32)
    with (
        offload_activations(model, tmp_path, disk_bytes="100KiB", least_bytes=512),
        pytest.raises(TierError, match=r"activations-0 \(100KiB\) has no room"),
    ):
        until_it_is_told(lambda: model(ids, labels=ids, use_cache=False).loss)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["flipped", "gone"])
def test_a_damaged_activation_is_never_used(fault: str, tmp_path: Path) -> None:
    model, ids = tiny("llama", layers=3), tokens(2, 32)
    with offload_activations(model, tmp_path, disk_bytes="16MiB", least_bytes=512) as moved:
        loss = model(ids, use_cache=False).logits.sum()
        settled(moved.counters)
        for slab in tmp_path.rglob("slab-*"):
            if fault == "gone":
                os.truncate(slab, 0)
                continue
            content = bytearray(slab.read_bytes())
            for at in range(8192, len(content), 4096):
                content[at] ^= 1
            slab.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"lost or damaged in .*activations-0"):
            loss.backward()
        again = model(ids, use_cache=False).logits.sum()
        again.backward()  # a later step is not harmed


@pytest.mark.parametrize("written", ["at once", "before backward", "after backward"])
@pytest.mark.parametrize("layer", [0, 2])
def test_changes_in_place_are_seen_as_torch_sees_them(layer: int, written: str) -> None:
    """A saved tensor is changed before it is written, or in a layer whose tensors stay: torch's own error, in ours."""
    changes: list[Any] = [None, None, None]
    changes[layer] = lambda z: z.mul_(2)
    wrong = Blocks(*changes)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        wrong(X).backward()
    tier = Faulty(waits=written != "at once")
    shelf, edits = on(wrong, tier)
    loss = wrong(X)
    if written == "before backward":
        tier.go.set()
        settled(shelf.counters)
    if written != "at once" or layer == 2:  # what is written before it is changed is right
        with pytest.raises(RuntimeError, match="modified in place"):
            loss.backward()
    tier.go.set()
    edits.undo()
    shelf.close()


def test_whatever_is_late_is_taken_from_memory() -> None:
    """Backward comes before the writes: nothing waits for them, and nothing is left on the shelf."""
    model = Blocks(None, None, None)
    model(X).backward()
    right = gradients(model)
    model.zero_grad()
    tier = Faulty(waits=True)
    shelf, edits = on(model, tier)
    model(X).backward()
    assert all(map(torch.equal, gradients(model), right))
    assert shelf.counters.taken_back_bytes > 0 == shelf.counters.written_bytes
    dropped = model(X)  # nobody differentiates this one
    del dropped
    gc.collect()
    edits.undo()
    tier.go.set()
    shelf.close()
    assert tier.counters()["pages"] == 0
    assert shelf.counters.held_bytes == 0


def test_what_is_written_and_not_committed_takes_room_too() -> None:
    """A commit waits for the writes under way: beside a slow one others are in memory still, and forward waits."""
    model, most = Blocks(*[None] * 8), 4 * 8192
    shelf, edits = on(model, SlowAtFirst(), most)
    loss = model(X)
    settled(shelf.counters)
    assert shelf.counters.written_bytes > 5 * most
    assert shelf.counters.most_bytes <= most
    loss.backward()
    edits.undo()
    shelf.close()


def test_a_graph_can_be_used_again() -> None:
    model = Blocks(None, None, None)
    shelf, edits = on(model, Faulty())
    loss = model(X)
    settled(shelf.counters)
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    assert all(map(torch.equal, gradients(model), first))
    assert shelf.counters.late > 0
    assert shelf.counters.held_bytes == 0
    edits.undo()
    shelf.close()


def test_a_tensor_saved_twice_is_written_once() -> None:
    model = Blocks(None, None)
    shelf, edits = on(model, Faulty())
    loss = model(X)
    settled(shelf.counters)
    # the first layer saves its input, the sine's input, and its output: 64 x 32 floats each
    assert shelf.counters.written_bytes == 3 * 64 * 32 * 4 + X.untyped_storage().nbytes() - 8192
    loss.backward()
    edits.undo()
    shelf.close()


def killed(folder: str) -> None:
    """Leave activations on disk and die."""
    model, ids = tiny("llama", layers=3), tokens(2, 32)
    moved = offload_activations(model, folder, disk_bytes="16MiB", least_bytes=512)
    out = model(ids, use_cache=False)  # what nobody holds is not written
    settled(moved.counters)
    assert out.logits.requires_grad
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_world(killed, 1, str(tmp_path), backend=None)
    assert list(tmp_path.rglob("slab-*"))
    model, ids = tiny("llama", layers=3), tokens(2, 32)
    with offload_activations(model, tmp_path, disk_bytes="16MiB", least_bytes=512) as moved:
        with pytest.raises(PlanError, match="a directory of its own"):
            offload_activations(tiny("llama"), tmp_path, disk_bytes="16MiB")
        model(ids, use_cache=False).logits.sum().backward()
        assert moved.counters.written_bytes + moved.counters.taken_back_bytes > 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needs to know where to"),
        ({"disk": "x"}, "how much fits there"),
        ({"host_bytes": 1 << 20, "disk_bytes": 1 << 20}, "needs to know where to"),
        ({"host_bytes": 100}, "holds no tensor of"),
    ],
)
def test_refusals(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        offload_activations(tiny("llama"), **given)


def test_a_module_without_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="no list of modules"):
        offload_activations(nn.Linear(2, 2), host_bytes="1MiB")
