"""HOP-B is exact: chunks of any number, on any backend, give what one piece gives; wrong pipelines are noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from exactness import Case, Pair, Table, assert_exact, case, far, same, worst
from models import tiny, tokens
from plait.collectives import primitive
from plait.collectives.trace import Trace
from plait.collectives.world import CHOSEN
from plait.cuda_kernels.scores import Interleave
from plait.parallel import Plan, parallelize
from plait.parallel.attention import exchange, helix, hopb
from plait.parallel.attention.step import make_step
from world import run_calls, run_world

P = "exchange=partials"
CASES = [
    case(f"kvp2,interleave=2,chunks=2,{P}", "llama", ["steps", "generate"]),
    case(f"kvp2,interleave=16,chunks=5,{P}", "gpt_oss", ["steps", "generate"]),
    case(f"kvp2,interleave=3,chunks=2,{P}", "gemma3", ["steps", "generate"]),
    case(f"kvp2,interleave=2,chunks=2,{P},mla=latent", "deepseek", ["steps", "generate"]),
    case(f"kvp2,interleave=2,chunks=2,{P},mla=value", "deepseek", ["steps", "generate"]),
    case("kvp2,chunks=2", "qwen3", ["train", "undo"]),
    case(f"kvp2,interleave=1,chunks=2,{P} tp2", "gpt_oss", ["steps", "generate"]),
]
TABLE = Table(CASES)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_chunks_are_exact(each: Case) -> None:
    assert_exact(TABLE.errors(each))


def test_on_a_gpu_chunks_are_chosen_by_bytes() -> None:
    kib, mib, gib = 1 << 10, 1 << 20, 1 << 30
    assert hopb.chunks_by_bytes(4 * gib, 900 * kib, 32) == 1  # a few microseconds on the wire
    assert hopb.chunks_by_bytes(10 * mib, 10 * kib, 32) == 1
    assert hopb.chunks_by_bytes(2 * gib, 256 * mib, 32) > 2
    assert hopb.chunks_by_bytes(2 * gib, 256 * mib, 2) == 2
    assert hopb.chunks_by_bytes(2 * gib, 256 * mib, 1) == 1


# --- ragged batches, over every backend ------------------------------------------------------

# New tokens of each request in each step: they prefill, decode, verify several tokens and pause in one batch.
SCHEDULE = ((5, 1, 3, 0), (1, 9, 0, 2), (1, 1, 1, 1), (0, 0, 7, 0), (4, 0, 17, 1), (1, 1, 1, 1))


@torch.no_grad()
def ragged(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Feed the prompts by the schedule, left aligned; gives each request's logits."""
    cache, past = model.kv_cache(), [0] * len(prompts)
    mask = torch.zeros(len(prompts), 0, dtype=torch.long)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for counts in SCHEDULE:
        ids, at, new = (torch.zeros(len(prompts), max(counts)).long() for _ in range(3))
        for row, count in enumerate(counts):
            new[row, :count] = 1
            ids[row, :count] = prompts[row][past[row] : past[row] + count]
            at[row, :count] = torch.arange(past[row], past[row] + count)
            past[row] += count
        mask = torch.cat([mask, new], 1)
        logits = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits
        for row, count in enumerate(counts):
            found[row].append(logits[row, :count])
    return [torch.cat(parts) for parts in found]


# transformers counts a window in columns, of which a ragged batch has some that hold nothing
CHANGES: dict[str, dict[str, Any]] = {"gpt_oss": {"sliding_window": 500}}


def prompts_of() -> list[torch.Tensor]:
    return [tokens(1, sum(c[row] for c in SCHEDULE), seed=20 + row)[0] for row in range(4)]


def as_backend(name: str) -> None:
    """Have plans make their groups of this backend: shared memory by default, gloo where it was chosen."""
    if name == "gloo":
        assert dist.group.WORLD is not None
        dist.group.WORLD._set_group_desc(f"{CHOSEN}: gloo")


def in_chunks(backend: str, family: str, options: str) -> dict[str, float]:
    """Logits in 2, 3 and 9 chunks against the untouched model, and against one piece, bit for bit."""
    as_backend(backend)
    pair = Pair.of(case(f"kvp2,chunks=1,{options}", family, **CHANGES.get(family, {})))
    group = pair.model._plait.ranks.kvp_group
    assert backend in (group.name() if callable(group.name) else group.name).lower()
    prompts = prompts_of()
    with torch.no_grad():
        expected = [pair.reference(p[None], use_cache=False).logits[0] for p in prompts]
    alone = ragged(pair.model, prompts)
    errors = {
        f"one piece {i}": far(a, e) for i, (a, e) in enumerate(zip(alone, expected, strict=True))
    }
    for chunks in (2, 3, 9):
        model = parallelize(copy.deepcopy(pair.reference), f"kvp2,chunks={chunks},{options}")
        found = ragged(model, prompts)
        for i, (f, a) in enumerate(zip(found, alone, strict=True)):
            # MLA's matrix products round differently on other numbers of rows
            differ = far(f, a) if family == "deepseek" else same(f, a)
            errors[f"{chunks} chunks {i}"] = differ
    return errors


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_ragged_batches_are_the_same_bits(backend: str) -> None:
    calls = [
        (in_chunks, backend, "llama", f"interleave=2,{P}"),
        (in_chunks, backend, "gpt_oss", f"interleave=16,{P}"),
        (in_chunks, backend, "deepseek", f"interleave=4,{P},mla=value"),
    ]
    ranks = run_calls(calls, 2)
    for i in range(len(calls)):
        assert_exact(worst([answers[i] for answers in ranks]))


# --- wrong pipelines -------------------------------------------------------------------------


@dataclass
class LazyWork:
    """An exchange that happens when it is waited for, and not before: the slowest link there is."""

    begin: Callable[[], Any]

    def wait(self) -> bool:
        self.begin().wait()
        return True


def lazily(x: torch.Tensor, group: Any) -> primitive.Started:
    """Stand in for `start_all_to_all`; until it is waited for, what has arrived is not a number."""
    out = torch.full_like(x, float("nan"))
    options = primitive._options(dist.AllToAllOptions, waits=False)
    work: Any = LazyWork(lambda: group.alltoall_base(out, x, [], [], options))
    return primitive.Started(work, x, out)


def merged_in_wrong_order() -> AbstractContextManager[Any]:
    """The chunks' rows are put together last chunk first."""

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def cat(self, tensors: list[torch.Tensor], *args: Any) -> torch.Tensor:
            return torch.cat(tensors if args else tensors[::-1], *args)

    return patch.object(exchange, "torch", Torch())


def waits_for_the_chunk_before() -> AbstractContextManager[Any]:
    """Each chunk is merged when the one before it has arrived."""
    started: list[primitive.Started] = []

    def start(x: torch.Tensor, group: Any) -> primitive.Started:
        mine = lazily(x, group)
        started.append(mine)
        before = started[-2] if len(started) > 1 else mine
        return replace(mine, work=before.work)

    return patch.object(primitive, "start_all_to_all", start)


def bounds_of_the_first_chunk() -> AbstractContextManager[Any]:
    """Every chunk attends with the first one's bounds."""
    original = helix.Step.parts

    def parts(self: Any, count: int) -> Any:
        right = original(self, count)
        return tuple(
            replace(p, hi=torch.minimum(right[0].hi[:1].expand_as(p.hi), p.hi)) for p in right
        )

    return patch.object(helix.Step, "parts", parts)


def slow_but_right() -> AbstractContextManager[Any]:
    """The lazy link alone: not a mutation."""
    return patch.object(primitive, "start_all_to_all", lazily)


def under(around: Callable[[], AbstractContextManager[Any]]) -> float:
    """The error of a ragged batch in three chunks."""
    with around():
        reference = tiny("llama", dtype=torch.float64)
        model = parallelize(copy.deepcopy(reference), f"kvp2,interleave=2,chunks=3,{P}")
        found = ragged(model, prompts_of())
        return max(
            far(f, reference(p[None], use_cache=False).logits[0])
            for f, p in zip(found, prompts_of(), strict=True)
        )


def test_wrong_pipelines_are_noticed() -> None:
    right = [nullcontext, slow_but_right]
    wrong = [merged_in_wrong_order, waits_for_the_chunk_before, bounds_of_the_first_chunk]
    for answers in run_calls([(under, each) for each in [*right, *wrong]], 2):
        assert max(answers[: len(right)]) < 1e-9
        for mutation, error in zip(wrong, answers[len(right) :], strict=True):
            assert not error < 1e-3, f"{mutation.__name__} passes"


# --- what is sent ----------------------------------------------------------------------------


@torch.no_grad()
def traced(plan: str) -> list[tuple[list[Any], list[str]]]:
    model = parallelize(tiny("llama"), plan)
    cache = model(tokens(5, 9), use_cache=True).past_key_values
    with Trace(model._plait.ranks.groups.axis_of) as trace:
        model(tokens(5, 1), past_key_values=cache, use_cache=True)
    for event in trace.events:
        assert event.seconds > 0
        assert event.end == event.start + event.seconds
    inner = [e for e in trace.events if e.op == "all_to_all"]
    return [(e.shape, e.sent_bytes) for e in inner], [s.name for s in trace.spans]


def test_chunks_send_the_same_bytes_in_more_messages() -> None:
    (one, spans), (two, both) = (run_world(traced, 2, f"kvp2,chunks={n},{P}")[0] for n in (1, 2))
    assert len(one) == len(spans) == 2
    assert len(two) == len(both) == 4
    assert sum(sent for _, sent in one) == sum(sent for _, sent in two)
    assert [shape[1] for shape, _ in one] == [5, 5]
    assert [shape[1] for shape, _ in two] == [3, 2, 3, 2]


def test_explain_shows_the_chunks() -> None:
    said = Plan.parse(f"kvp2,chunks=2,{P}").explain(tiny("llama"), batch=5, context=9)
    assert not said.left_out
    exchanged = [e for e in said.step("decode").events if e.op == "all_to_all"]
    assert [e.shape[1] for e in exchanged] == [3, 2, 3, 2]


# --- cutting, and the choice of the count ----------------------------------------------------


@pytest.mark.parametrize(
    ("past", "counts", "chunks", "expected"),
    [
        ([9, 9, 9, 9], [1, 1, 1, 1], 2, [2, 2]),
        ([9, 9, 9, 9], [1, 1, 1, 1], 9, [1, 1, 1, 1]),
        ([900, 9, 9, 9], [1, 1, 1, 1], 2, [1, 3]),
        ([9, 9, 9, 900], [1, 1, 1, 1], 3, [2, 1, 1]),
        ([9, 9, 9, 9], [0, 1, 0, 1], 4, [3, 1]),
        ([9, 9], [0, 0], 4, [2]),
    ],
)
def test_requests_are_cut_by_their_work(
    past: list[int], counts: list[int], chunks: int, expected: list[int]
) -> None:
    import numpy as np

    valid = np.arange(max(counts) or 1)[None] < np.array(counts)[:, None]
    for shard in range(2):
        step = make_step(
            len(past), valid.shape[1], past, valid, "partials", Interleave(4, 2, shard)
        )
        parts = step.parts(chunks)
        assert [p.requests.stop - p.requests.start for p in parts] == expected
        assert parts[0].requests.start == 0
        assert torch.equal(torch.cat([p.hi for p in parts]), step.hi)
        for part in parts:
            requests = counts[part.requests]
            assert part.indptr.tolist() == np.cumsum([0, *requests]).tolist()
            assert sum(requests) > 0 or not sum(counts)


def test_the_rule_may_answer_one() -> None:
    best = hopb.best_chunks
    assert best(0.065, 0.035, 1e-4, requests=8) > 2  # a slow link
    assert best(1e-3, 5e-5, 4e-5, requests=32) == 1  # all of the exchange is its launch
    assert best(0.065, 0.035, 1e-4, requests=1) == 1
    assert best(0.0, 0.035, 1e-4, requests=8) == 1  # nothing to hide behind
    assert best(0.065, 0.035, 1e-4, requests=8, now=8) == 8  # not given up for a few per cent
    assert best(1e-4, 3e-4, 2.9e-4, requests=32, now=8) == 1
    # two stages of equal length in n chunks: (n + 1) / 2n of the time in one piece
    assert hopb.predicted(1.0, 1.0, 4, 0.0) == pytest.approx(2 * 5 / 8)
    assert hopb.predicted(1.0, 1.0, 1, 0.1) == pytest.approx(2.0)


def paced(attention: float, exchange: float, hidden: float, skew: float) -> list[int]:
    """The counts that steps run with, where times are made up and differ between the ranks."""
    model = parallelize(tiny("llama"), "kvp2")
    pace = model._plait.ranks.attention.pace
    rank = dist.get_rank()
    step = make_step(8, 1, [40] * 8, None, "partials", Interleave(16, 2, rank))
    counts = []
    with (
        patch.object(hopb, "AGAIN", 8),
        patch.object(hopb, "_empty_exchange", lambda group: 1e-5),
    ):
        for number in range(40):
            chunks = pace.chunks(step, torch.device("cpu"))
            counts.append(chunks)
            slower = 1 + skew * rank + 0.3 * (number % 3)
            if chunks == 1:
                pace.note(attention * slower, exchange * slower)
            else:
                pace.note(0.0, (attention + exchange * (1 - hidden)) * slower)
    return counts


def test_all_ranks_choose_alike_and_by_what_they_measure() -> None:
    calls = [
        (paced, 0.06, 0.04, 0.8, 0.5),  # chunks pay
        (paced, 0.06, 0.04, -0.2, 0.5),  # they were predicted to, and do not
        (paced, 0.06, 1e-5, 0.0, 0.5),  # not worth a trial
    ]
    for one, other in zip(*run_calls(calls, 2), strict=True):
        assert one == other
    pays, fails, never = run_calls(calls, 2)[0]
    assert pays[:4] == [1] * 4  # one piece, timed
    assert set(pays[4:]) > {1}
    assert pays[8:16] == [pays[8]] * 8  # settled
    assert pays[8] > 1
    assert 1 in pays[16:24]  # looked at again
    assert pays[24:32] == [pays[8]] * 8
    assert fails[4:16] == [8] * 4 + [4] * 4 + [2] * 4  # each tried
    assert fails[16:24] == [1] * 8
    assert set(never) == {1}
