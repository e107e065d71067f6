"""Paged and dense attention against brute force in float64, every option, with negative controls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels import (
    Interleave,
    attention_reference,
    dense_attention,
    merge_states,
    paged_attention,
)

SHAPES = {  # heads, kv_heads, head_dim, value_dim, shared
    "mha": (3, 3, 8, 8, False),
    "gqa": (6, 2, 8, 8, False),
    "mqa-odd": (5, 1, 7, 7, False),
    "value-dim": (4, 2, 8, 6, False),
    "mla": (4, 1, 12, 8, True),
    "vectors": (10, 2, 32, 16, False),
    "mla-vectors": (6, 1, 48, 32, True),
}
RULE = Interleave(4, 3, 1)
OPTIONS = ["plain", "softcap", "alibi"]


def options(name: str, heads: int, q_pos: torch.Tensor) -> tuple[dict, dict]:
    """Give an option as the kernel's words and as the oracle's."""
    if name == "softcap":
        return {"softcap": 1.5}, {"softcap": 1.5}
    if name == "alibi":
        slopes = torch.linspace(0.05, 0.4, heads, dtype=torch.float64)
        key_pos = RULE.positions(torch.arange(64))
        ours = {"alibi_slopes": slopes, "q_pos": q_pos, "interleave": RULE}
        return ours, {"slopes": slopes, "q_pos": q_pos, "key_pos": key_pos}
    return {}, {}


class Batch:
    """Three sequences, one of them without rows, one row without keys, in shuffled pages of 4."""

    def __init__(self, shape: str, dtype: torch.dtype = torch.float64) -> None:
        self.heads, kv_heads, d, dv, shared = SHAPES[shape]
        torch.manual_seed(11)
        self.value_dim = dv
        self.k_pages = torch.randn(30, 4, kv_heads, d, dtype=torch.float64).to(dtype)
        self.v_pages = torch.randn(30, 4, kv_heads, dv, dtype=torch.float64).to(dtype)
        if shared:
            self.v_pages = self.k_pages
        self.q_indptr = torch.tensor([0, 3, 3, 7])
        self.kv_indptr = torch.tensor([0, 9, 11, 17], dtype=torch.int32)
        self.kv_indices = torch.randperm(30)[:17].int()
        self.q = torch.randn(7, self.heads, d, dtype=torch.float64).to(dtype)
        self.lo = torch.tensor([0, 3, 0, 0, 7, 20, 5])
        self.hi = torch.tensor([33, 34, 35, 21, 22, 23, 5])
        self.q_pos = torch.tensor([103, 104, 105, 60, 61, 62, 63])

    def paged(self, **kw):
        """Run the kernel under test."""
        return paged_attention(
            self.q, self.k_pages, self.v_pages, self.q_indptr, self.kv_indptr, self.kv_indices,
            self.lo, self.hi, 0.3, value_dim=self.value_dim, **kw,
        )  # fmt: skip

    def sequences(self):
        """Give rows, keys and values of each sequence in order."""
        for s in range(3):
            pages = self.kv_indices[self.kv_indptr[s] : self.kv_indptr[s + 1]].long()
            k, v = self.k_pages[pages].flatten(0, 1), self.v_pages[pages].flatten(0, 1)
            yield (
                slice(int(self.q_indptr[s]), int(self.q_indptr[s + 1])),
                k,
                v[..., : self.value_dim],
            )

    def answer(self, brute, **kw):
        """Give the oracle's output for the whole batch."""
        parts = []
        for rows, k, v in self.sequences():
            mine = {**kw, "q_pos": kw["q_pos"][rows]} if "q_pos" in kw else kw
            parts.append(brute(self.q[rows], k, v, self.lo[rows], self.hi[rows], 0.3, **mine))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_paged_equals_brute_force(shape, option, brute, assert_close) -> None:
    batch = Batch(shape)
    ours, oracle = options(option, batch.heads, batch.q_pos)
    o, lse = batch.paged(**ours)
    want_o, want_lse = batch.answer(brute, **oracle)
    assert_close(o, want_o)
    assert_close(lse, want_lse)
    assert o[6].eq(0).all()
    assert lse[6].eq(-math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["gqa", "vectors"])
def test_paged_storage_types(shape, dtype, brute, assert_close) -> None:
    batch = Batch(shape, dtype)
    o, lse = batch.paged()
    want_o, want_lse = batch.answer(brute)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(lse, want_lse, 2e-6)  # sums are float32 whatever the pages hold
    assert_close(o, want_o, {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_keys_are_not_hidden(dtype) -> None:
    batch = Batch("gqa", dtype)
    batch.k_pages[batch.kv_indices[12]] = math.nan  # the third sequence only
    o, lse = batch.paged()
    assert o[:3].isfinite().all()
    assert o[3].isnan().all()
    assert lse[3].isnan().all()


def test_scores_of_any_size_are_exact_in_float32(brute, assert_close) -> None:
    batch = Batch("gqa", torch.float32)
    batch.q *= torch.tensor([1e-6, 1.0, 30.0, 100.0, 1e3, 1e4, 1.0])[:, None, None]
    o, lse = batch.paged()
    want_o, want_lse = batch.answer(brute)
    assert_close(lse, want_lse, 1e-5)
    assert_close(o[:4], want_o[:4], 1e-4)
    assert o.isfinite().all()


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_split_over_threads_changes_nothing(threads, monkeypatch, brute, assert_close) -> None:
    import sys

    module = sys.modules["plait.cuda_kernels.paged_attention"]
    monkeypatch.setattr(module, "MIN_SHARE_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch = Batch("gqa")
    o, lse = batch.paged()
    want_o, want_lse = batch.answer(brute)
    assert_close(o, want_o)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_dense_equals_brute_force(shape, option, sink, grad, brute, assert_close) -> None:
    batch = Batch(shape)
    ours, oracle = options(option, batch.heads, batch.q_pos[:3])
    rows, k, v = next(batch.sequences())
    logits = torch.linspace(-1, 1, batch.heads, dtype=torch.float64) if sink else None
    q = batch.q[rows].clone().requires_grad_(grad)
    lo, hi = torch.tensor([0, 3, 9]), torch.tensor([33, 34, 9])
    o, lse = dense_attention(q, k, v, lo, hi, 0.3, sink=logits, **ours)
    want_o, want_lse = brute(batch.q[rows], k, v, lo, hi, 0.3, sink=logits, **oracle)
    assert_close(o.detach(), want_o)
    assert_close(lse.detach(), want_lse)


def bounds(kind: str, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give visible ranges: the shapes that real callers make and that chunking must respect."""
    i = torch.arange(rows)
    return {
        "causal": (i * 0, i + 1 + tokens - rows),
        "full": (i * 0, i * 0 + tokens),
        "window": ((i + tokens - rows - 5).clamp(min=0), i + 1 + tokens - rows),
        "empty-some": (i * 0, torch.where(i % 3 == 0, 0, i + 1)),
        "shard": (i * 0, torch.tensor([RULE.local_length(int(p) + 1) for p in i + 7])),
        "disjoint": (i // 5 * 4, (i // 5 * 4 + 4).clamp(max=tokens)),
        "descending": (i * 0, tokens - i),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["causal", "full", "window", "empty-some", "shard", "disjoint", "descending"]
)
@pytest.mark.parametrize("workspace", [64, 1 << 28])
def test_dense_chunks_respect_every_bound(
    kind, workspace, monkeypatch, brute, assert_close
) -> None:
    import sys

    module = sys.modules["plait.cuda_kernels.dense_attention"]
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", workspace)
    torch.manual_seed(2)
    q = torch.randn(23, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 31, 2, 8, dtype=torch.float64)
    lo, hi = bounds(kind, 23, 31)
    want_o, want_lse = brute(q, k, v, lo, hi, 0.3)
    o, lse = dense_attention(q, k, v, lo, hi, 0.3)
    assert_close(o, want_o)
    assert_close(lse, want_lse)
    soft, _lse = dense_attention(q, k, v, lo, hi, 0.3, softcap=1e9)  # the chunked math path
    assert_close(soft, want_o, 1e-11)


def test_dense_gradients_through_o_and_lse() -> None:
    torch.manual_seed(4)
    q = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    lo, hi = torch.tensor([0, 1, 0, 2]), torch.tensor([3, 4, 6, 6])

    def run(q, k, v, sink):
        return dense_attention(q, k, v, lo, hi, 0.4, softcap=2.0, sink=sink)

    assert torch.autograd.gradcheck(run, (q, k, v, sink), atol=1e-8)
    o, _lse = dense_attention(q, k, v, lo, hi.clone().fill_(0), 0.4)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(g.eq(0).all() for g in grads), "rows without keys have gradient zero, not NaN"


def verify_check(hi_rule, sink_on=(0,)) -> None:
    """Three query rows over a sequence cut over 4 shards: the answer of an uncut cache.

    `hi_rule(shard, global length, rows, row)` is what a correct and a mutated caller differ in.
    """
    shards, run, rows, length = 4, 4, 3, 38
    torch.manual_seed(8)
    q = torch.randn(rows, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, length, 2, 8, dtype=torch.float64)
    sink = torch.linspace(0, 1, 4, dtype=torch.float64)
    lo, position = torch.zeros(rows).long(), torch.arange(length - rows, length)
    parts = []
    for shard in range(shards):
        rule = Interleave(run, shards, shard)
        mine = rule.positions(torch.arange(rule.local_length(length)))
        hi = torch.tensor([hi_rule(rule, length, rows, i) for i in range(rows)]).clamp(min=0)
        logits = sink if shard in sink_on else None
        parts.append(dense_attention(q, k[mine], v[mine], lo, hi, 0.3, sink=logits))
    o, lse = merge_states(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    want_o, want_lse = attention_reference(q, k, v, lo, position + 1, 0.3, sink=sink)
    torch.testing.assert_close(o, want_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_verify_rows_have_their_own_bound() -> None:
    verify_check(lambda rule, length, rows, i: rule.local_length(length - rows + i + 1))


def test_scalar_verify_bound_fails() -> None:
    with pytest.raises(AssertionError):
        verify_check(lambda rule, length, rows, i: rule.local_length(length) - (rows - 1 - i))


def test_sink_on_every_shard_fails() -> None:
    with pytest.raises(AssertionError):
        verify_check(
            lambda rule, length, rows, i: rule.local_length(length - rows + i + 1),
            sink_on=(0, 1, 2, 3),
        )


def test_wrong_alibi_positions_fail(brute) -> None:
    batch = Batch("gqa")
    ours, oracle = options("alibi", batch.heads, batch.q_pos)
    o, _lse = batch.paged(**{**ours, "interleave": None})  # local indices taken for positions
    with pytest.raises(AssertionError):
        torch.testing.assert_close(o, batch.answer(brute, **oracle)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("run", [1, 2, 16])
def test_interleave_by_counting(run, shards) -> None:
    for length in range(0, 100):
        owned = [[] for _ in range(shards)]
        for p in range(length):
            owned[p // run % shards].append(p)
        for shard in range(shards):
            rule = Interleave(run, shards, shard)
            assert rule.local_length(length) == len(owned[shard])
            assert rule.positions(torch.arange(len(owned[shard]))).tolist() == owned[shard]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_paged_equals_dense_on_random_batches(data) -> None:
    heads, kv = data.draw(st.sampled_from([(1, 1), (4, 2), (8, 1)]))
    size = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    rows = [data.draw(st.integers(0, 3)) for _ in lengths]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    counts = [-(-n // size) for n in lengths]
    total = sum(counts) + 1
    k_pages, v_pages = torch.randn(2, total, size, kv, 4, dtype=torch.float64)
    indices = torch.randperm(total)[: sum(counts)].int()
    q = torch.randn(sum(rows), heads, 4, dtype=torch.float64)
    indptr = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()])
    kv_indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    ends = [
        data.draw(st.integers(0, n)) for n, r in zip(lengths, rows, strict=True) for _ in range(r)
    ]
    hi = torch.tensor(ends, dtype=torch.int64)
    lo = torch.tensor([data.draw(st.integers(0, e)) for e in ends], dtype=torch.int64)
    o, lse = paged_attention(q, k_pages, v_pages, indptr, kv_indptr, indices, lo, hi, 0.5)
    for s, length in enumerate(lengths):
        mine = slice(int(indptr[s]), int(indptr[s + 1]))
        pages = indices[kv_indptr[s] : kv_indptr[s + 1]].long()
        k, v = (t[pages].flatten(0, 1)[:length] for t in (k_pages, v_pages))
        want_o, want_lse = dense_attention(q[mine], k, v, lo[mine], hi[mine], 0.5)
        torch.testing.assert_close(o[mine], want_o, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[mine], want_lse, rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    q, k = torch.zeros(2, 4, 8), torch.zeros(5, 2, 8)
    two = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit"):
        dense_attention(q, torch.zeros(5, 2, 7), k, two, two, 1.0)
    with pytest.raises(ValueError, match="multiple"):
        dense_attention(q, torch.zeros(5, 3, 8), torch.zeros(5, 3, 8), two, two, 1.0)
    with pytest.raises(ValueError, match="bounds"):
        dense_attention(q, k, k, two[:1], two, 1.0)
    with pytest.raises(ValueError, match="q_pos"):
        dense_attention(q, k, k, two, two, 1.0, alibi_slopes=torch.zeros(4))
    with pytest.raises(ValueError, match="shards"):
        Interleave(4, 2, 2)


def test_meta_tensors_flow() -> None:
    q, k = torch.zeros(2, 4, 8, device="meta"), torch.zeros(5, 2, 8, device="meta")
    two = torch.zeros(2, dtype=torch.int64, device="meta")
    o, lse = dense_attention(q, k, k, two, two, 1.0)
    assert o.shape == (2, 4, 8)
    assert lse.shape == (2, 4)
    assert o.is_meta
