"""`plait.trace` names a model's groups by their axes, and its timeline shows what HOP-B hides."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import plait
from models import tiny, tokens
from plait.collectives import Timeline
from plait.collectives.trace import Event
from plait.parallel.attention.exchange import Chunks
from threads import appears
from world import run_world


@torch.no_grad()
def under_several_faces() -> list[set[str]]:
    """The axes that are seen through the model, a wrapper of it, and without it."""
    model = plait.parallelize(tiny("llama"), "kvp2,interleave=2")
    found = []
    for face in (model, torch.nn.Sequential(model), None, torch.nn.Linear(2, 2)):
        cache = model(tokens(3, 9), use_cache=True).past_key_values
        with plait.trace(face) as trace:
            model(tokens(3, 1), past_key_values=cache, use_cache=True)
        found.append({event.axis for event in trace.events})
    return found


def test_axes_have_the_models_names() -> None:
    for model, wrapped, nothing, other in run_world(under_several_faces, 2):
        assert "kvp" in model
        assert model <= {"kvp", "ffn_tp"}
        assert wrapped == model
        assert nothing == other == {"group of 2"}


@torch.no_grad()
def timeline_of_a_step(folder: str, chunks: int) -> list[dict[str, Any]]:
    """Trace a decode step and read the file of it; to its first exchanges rank 1 comes when rank 0 has attended."""
    model = plait.parallelize(tiny("llama"), f"kvp2,chunks={chunks},exchange=partials")
    cache = model(tokens(4, 9), use_cache=True).past_key_values
    store = dist.distributed_c10d._get_default_store()
    attended: list[float] = []
    merge = Chunks.merge

    def told(self: Chunks, *given: Any) -> torch.Tensor:
        attended.append(time.perf_counter())
        store.set(f"attended by {dist.get_rank()}", "")
        return merge(self, *given)

    if chunks > 1 and dist.get_rank() == 1:
        attention = model.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_: store.wait(["attended by 0"]))
    with plait.trace(model) as trace, patch.object(Chunks, "merge", told):
        model(tokens(4, 1), past_key_values=cache, use_cache=True)
    if chunks > 1 and dist.get_rank() == 0:  # another thread may note when an exchange ended
        appears(lambda: min(trace.events, key=is_sent).end >= attended[0])
    path = Path(folder, f"{chunks}-{dist.get_rank()}.json")
    Timeline.gathered(trace, dist.group.WORLD).save(path)
    return json.loads(path.read_text())["traceEvents"]


def is_sent(event: Event) -> tuple[bool, float]:
    """The order in which the first exchange is the least."""
    return event.op != "all_to_all", event.start


def hidden(events: list[dict[str, Any]]) -> bool:
    """Does rank 0 attend something while an exchange of its is under way?"""
    mine = [e for e in events if e["ph"] == "X" and e["pid"] == 0]
    computed = [e for e in mine if e["cat"] == "compute"]
    exchanges = [e for e in mine if e["name"] == "all_to_all"]
    assert computed
    assert exchanges
    for each in exchanges:
        assert each["args"]["axis"] == "kvp"
        assert each["args"]["sent_bytes"] > 0
        assert each["dur"] > 0
    return any(
        sent["ts"] < c["ts"] and c["ts"] + c["dur"] < sent["ts"] + sent["dur"]
        for sent in exchanges
        for c in computed
    )


def test_the_file_shows_what_hop_b_hides(tmp_path: Path) -> None:
    for events in run_world(timeline_of_a_step, 2, str(tmp_path), 2):
        assert hidden(events)
    for events in run_world(timeline_of_a_step, 2, str(tmp_path), 1):
        assert not hidden(events)  # in one piece nothing lies behind anything
