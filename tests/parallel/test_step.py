"""The arithmetic of a Helix step against brute force, without processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels.scores import Interleave
from plait.parallel.attention.exchange import cheaper, kv_elements, partials_elements
from plait.parallel.attention.heads import kv_run, query_run
from plait.parallel.attention.step import local_lengths, make_step


def owners(length: int, run: int, shards: int) -> list[int]:
    """The position rule, one token after another: n to a rank, then n to the next."""
    found: list[int] = []
    while len(found) < length:
        found += [len(found) // run % shards] * run
    return found[:length]


def test_local_lengths_against_brute_force() -> None:
    for shards in (1, 2, 3, 4, 8):
        for run in (1, 2, 16, 32):
            held = owners(300, run, shards)
            for shard in range(shards):
                expected = [held[:length].count(shard) for length in range(300)]
                rule = Interleave(run, shards, shard)
                assert local_lengths(np.arange(300), rule).tolist() == expected
                assert [rule.local_length(length) for length in range(300)] == expected


def test_shards_differ_by_at_most_one_run() -> None:
    for shards in (2, 3, 5):
        for run in (1, 3, 16):
            lengths = np.arange(400)
            held = np.stack(
                [local_lengths(lengths, Interleave(run, shards, s)) for s in range(shards)]
            )
            assert (held.sum(0) == lengths).all()
            assert (held.max(0) - held.min(0) <= run).all()


@st.composite
def batches(draw: Any) -> tuple[list[int], np.ndarray | None, int, int, int]:
    """Lengths before, mask of new columns, and a rule."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    past = draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch))
    valid = None
    if draw(st.booleans()):
        valid = np.array(
            draw(
                st.lists(
                    st.lists(st.booleans(), min_size=length, max_size=length),
                    min_size=batch,
                    max_size=batch,
                )
            )
        )
    return past, valid, length, draw(st.sampled_from([1, 2, 3, 16])), draw(st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(batches())
def test_a_step_against_brute_force(
    drawn: tuple[list[int], np.ndarray | None, int, int, int],
) -> None:
    past, valid, length, run, shards = drawn
    batch = len(past)
    shown = np.ones((batch, length), bool) if valid is None else valid
    rows = [(s, past[s] + i) for s in range(batch) for i in range(int(shown[s].sum()))]
    flat = [s * length + c for s in range(batch) for c in range(length) if shown[s, c]]
    lengths = [past[s] + int(shown[s].sum()) for s in range(batch)]
    for mode in ("partials", "kv"):
        seen = []
        for shard in range(shards):
            rule = Interleave(run, shards, shard)
            step = make_step(batch, length, past, valid, mode, rule)
            own = [i for i, (_, p) in enumerate(rows) if p // run % shards == shard]
            seen += own
            assert step.own.tolist() == own
            assert step.own_flat.tolist() == [flat[i] for i in own]
            assert step.own_counts == tuple(sum(rows[i][0] == s for i in own) for s in range(batch))
            assert step.lengths == tuple(lengths)
            assert step.rows_of_rank[shard] == len(own)
            assert step.keys_of_rank[shard] == sum(
                owners(n, run, shards).count(shard) for n in lengths
            )
            attending = rows if mode == "partials" else [rows[i] for i in own]
            if mode == "partials":  # a row sees the local keys at its position or before
                expected = [owners(p + 1, run, shards).count(shard) for _, p in attending]
            else:
                expected = [p + 1 for _, p in attending]
            assert step.hi.tolist() == expected
            assert not step.lo.any()
            assert step.indptr.tolist() == [
                sum(s < n for s, _ in attending) for n in range(batch + 1)
            ]
            check_orders(step, rows, lengths, run, shards)
            check_places(step, shown)
        assert sorted(seen) == list(range(len(rows)))


def check_orders(
    step: Any, rows: list[tuple[int, int]], lengths: list[int], run: int, shards: int
) -> None:
    """``restore`` sorts rows that arrive by owner; ``key_order`` sorts keys that arrive by shard."""
    arrived = sorted(range(len(rows)), key=lambda i: (rows[i][1] // run % shards, i))
    assert [arrived[i] for i in step.restore.tolist()] == list(range(len(rows)))
    if step.mode == "kv":
        held = [
            (s, p)
            for shard in range(shards)
            for s, n in enumerate(lengths)
            for p in range(n)
            if p // run % shards == shard
        ]
        assert [held[i] for i in step.key_order.tolist()] == [
            (s, p) for s, n in enumerate(lengths) for p in range(n)
        ]


def check_places(step: Any, shown: np.ndarray) -> None:
    """``place`` is the inverse of ``pick`` and fills padding with zeros."""
    x = torch.arange(1.0, shown.size * 2 + 1).view(*shown.shape, 2)
    placed = step.place(step.pick(x))
    assert torch.equal(placed, x * torch.from_numpy(shown)[..., None])


def test_the_scalar_bound_is_wrong_and_ours_is_not() -> None:
    """research/helix.md 1.4: with kvp=4, n=4, M=3 most rows are wrong with len_r(last) - (M - 1 - i)."""
    wrong = right = rows = 0
    for past in range(59):
        for shard in range(4):
            rule = Interleave(4, 4, shard)
            step = make_step(1, 3, [past], None, "partials", rule)
            held = owners(past + 3, 4, 4)
            expected = [held[: past + i + 1].count(shard) for i in range(3)]
            scalar = [rule.local_length(past + 3) - (2 - i) for i in range(3)]
            right += sum(a == b for a, b in zip(step.hi.tolist(), expected, strict=True))
            wrong += sum(a != b for a, b in zip(scalar, expected, strict=True))
            rows += 3
    assert right == rows
    assert wrong > rows / 2


def test_the_cheaper_exchange() -> None:
    """One row on a long context: partials; a whole prompt: keys and values; bytes of partials ignore the context."""
    shape = {"heads": 16, "width": 64, "kv_width": 2 * 4 * 64, "shards": 4}
    assert cheaper(1, 4096, **shape) == "partials"
    assert cheaper(4096, 4096, **shape) == "kv"
    assert partials_elements(3, 16, 64, 4) == 3 * 16 * 65 * 3 / 4
    assert kv_elements(8, 100, 16, 64, 512, 4) == (100 * 512 + 8 * 16 * 64 / 4) * 3 / 4


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_head_runs(per_run: int, runs: int, copies: int) -> None:
    """Runs of query heads are in order and equal; each reads exactly its groups' KV heads."""
    heads, kv_heads = per_run * runs * copies, runs
    if heads % kv_heads:
        return
    count = runs * copies
    seen = [h for c in range(count) for h in range(*query_run(heads, count, c))]
    assert seen == list(range(heads))
    for c in range(count):
        needed = {h // (heads // kv_heads) for h in range(*query_run(heads, count, c))}
        assert set(range(*kv_run(heads, kv_heads, count, c))) == needed
