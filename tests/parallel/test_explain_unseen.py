"""What explain says by formula of shards and stages is what real ranks send in a training step."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist

from models import StayFloat64, tiny, tokens
from plait.collectives.trace import Trace
from plait.parallel import Plan, parallelize
from world import run_calls

BATCH, LENGTH = 4, 12
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dp2:shard", "llama", {"layers": 3}),
    ("dp2:shard,param_dtype=bf16", "qwen3", {}),
    ("pp2:gpipe,microbatches=3", "llama", {"layers": 3}),
    ("pp2:interleaved,microbatches=4", "qwen3", {"layers": 4}),
]
FOUR: list[tuple[str, str, dict[str, Any]]] = [
    ("pp2 dp2:shard", "llama", {"layers": 3}),
    ("pp2 cp2", "qwen3", {}),
    ("dp2:shard tp2 ep4", "mixtral", {}),
]


def sends(events: Any) -> Counter[tuple[str, str, int, int]]:
    """How often what is sent, of the kinds that the formulas are about."""
    kinds = {("all_gather", "dp"), ("reduce_scatter", "dp"), ("send", "pp")}
    return Counter(
        (e.op, e.axis, e.payload_bytes, e.sent_bytes) for e in events if (e.op, e.axis) in kinds
    )


def both(plan: str, family: str, changes: dict[str, Any]) -> Any:
    """The trace of a training step of this rank, and what explain says of it."""
    model = tiny(family, **changes)
    said = Plan.parse(plan).explain(
        model, rank=dist.get_rank(), batch=BATCH, context=LENGTH, backward=True
    )
    parallelize(model, plan).train()
    ids = tokens(BATCH, LENGTH)
    trace = Trace(model._plait.ranks.groups.axis_of)
    for _ in range(2):  # a schedule's first step also says hello, in 4 bytes
        trace.events.clear()
        with trace, StayFloat64():
            model(ids, labels=ids, use_cache=False).loss.backward()
    return sends(trace.events), sends(said.beside)


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), (4, FOUR)])
def test_real_ranks_send_what_the_formulas_say(ranks: int, cases: Any) -> None:
    answers = run_calls([(both, *each) for each in cases], ranks)
    for rank, answer in enumerate(answers):
        for each, (found, said) in zip(cases, answer, strict=True):
            assert said, each
            assert found == said, (each, rank)


def test_they_are_in_text_and_json() -> None:
    said = Plan.parse("pp2 dp2:shard").explain(tiny("llama", layers=3), backward=True)
    assert "training, beside the above, by formula" in str(said)
    assert "to stage 1" in str(said)
    assert json.loads(said.to_json())["beside"][0]["op"] == "all_gather"
    assert not Plan.parse("pp2 dp2:shard").explain(tiny("llama", layers=3)).beside
    assert not Plan.parse("tp2 dp2").explain(tiny("llama"), backward=True).beside
