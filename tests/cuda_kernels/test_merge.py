"""merge_states: exact against one softmax over all keys, with negative controls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels import merge, merge_states
from plait.cuda_kernels.merge import merge_states_reference

INF = math.inf


def shards_of(seed: int, sizes: list[int], rows: int = 3, heads: int = 2, d: int = 5):
    """Draw scores and values, and give per-shard partials beside the answer over all keys."""
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randn(rows, heads, n, dtype=torch.float64, generator=g) * 3 for n in sizes]
    values = [torch.randn(n, d, dtype=torch.float64, generator=g) for n in sizes]
    o = torch.stack([s.softmax(-1) @ v for s, v in zip(scores, values, strict=True)])
    lse = torch.stack([s.logsumexp(-1) for s in scores])
    o[[n == 0 for n in sizes]] = math.nan  # what real kernels leave for a shard without keys
    everything = torch.cat(scores, -1)
    return o, lse, everything, torch.cat(values)


def check(merge, sink=None) -> None:
    """The one check that the right merge passes and every mutation must fail."""
    o, lse, scores, values = shards_of(7, [4, 0, 3, 9])
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None].expand(3, 2, 1)], -1)
        values = torch.cat([values, torch.zeros(1, 5, dtype=torch.float64)])
    got, got_lse = merge(o, lse, sink)
    torch.testing.assert_close(got, scores.softmax(-1) @ values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def wrong_base(o, lse, sink):
    """Take a log2 lse (FlashInfer's) for a natural one."""
    return merge_states(o, lse * math.log2(math.e), sink)


def unmasked_empty(o, lse, sink):
    """Trust a zero weight to silence a NaN."""
    weight = torch.softmax(lse, 0)
    return (weight.unsqueeze(-1) * o).sum(0), lse.logsumexp(0)


def unweighted(o, lse, sink):
    """Average instead of weighing by lse."""
    return o.nan_to_num().mean(0), lse.logsumexp(0)


def sink_per_shard(o, lse, sink):
    """Count the sink in every shard and merge without it."""
    parts = [merge_states(o[i : i + 1], lse[i : i + 1], sink) for i in range(o.shape[0])]
    return merge_states(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))


SINK = torch.tensor([0.7, -1.2], dtype=torch.float64)


@pytest.mark.parametrize("merge", [merge_states, merge_states_reference])
@pytest.mark.parametrize("sink", [None, SINK])
def test_merge_equals_one_softmax(merge, sink) -> None:
    check(merge, sink)


@pytest.mark.parametrize(
    ("mutated", "sink"),
    [(wrong_base, None), (unmasked_empty, None), (unweighted, None), (sink_per_shard, SINK)],
)
def test_mutated_merge_fails(mutated, sink) -> None:
    with pytest.raises(AssertionError):
        check(mutated, sink)


def test_flagged_shards_leave_no_trace() -> None:
    o, lse, scores, values = shards_of(3, [4, 5])
    poison = torch.full_like(o[:1], math.nan)
    o, lse = torch.cat([o, poison]), torch.cat([lse, poison[..., 0]])  # lse is NaN too
    flagged = torch.tensor([False, False, True])[:, None].expand(3, 3)
    got, got_lse = merge_states(o, lse, empty=flagged)
    torch.testing.assert_close(got, scores.softmax(-1) @ values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    assert merge_states(o, lse)[0].isnan().all(), "an unflagged NaN lse must stay visible"


def test_all_empty_rows_are_zero_and_minus_inf() -> None:
    o = torch.full((3, 2, 2, 4), math.nan)
    lse = torch.full((3, 2, 2), -INF)
    for count in (1, 3):
        got, got_lse = merge_states(o[:count], lse[:count])
        assert torch.equal(got, torch.zeros(2, 2, 4))
        assert torch.equal(got_lse, torch.full((2, 2), -INF))
    got, got_lse = merge_states(o, lse, SINK.float())
    assert torch.equal(got, torch.zeros(2, 2, 4))
    torch.testing.assert_close(got_lse, SINK.float().expand(2, 2))


def test_gradients_through_o_lse_and_sink() -> None:
    o, lse, _, _ = shards_of(5, [4, 0, 2])
    o = o.nan_to_num().requires_grad_()
    keep = torch.tensor([0, 2])

    def merged(o, lse_kept, sink):
        full = torch.full_like(lse, -INF).index_copy(0, keep, lse_kept)
        return merge_states(o, full, sink)

    inputs = (o, lse[keep].clone().requires_grad_(), SINK.clone().requires_grad_())
    assert torch.autograd.gradcheck(merged, inputs, atol=1e-8)
    poisoned = torch.where(torch.isinf(lse)[..., None], math.nan, o.detach()).requires_grad_()
    merge_states(poisoned, lse)[0].sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    sizes=st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any),
    data=st.data(),
)
def test_order_and_grouping_do_not_matter(seed, sizes, data) -> None:
    o, lse, scores, values = shards_of(seed, sizes)
    order = data.draw(st.permutations(range(len(sizes))))
    cut = data.draw(st.integers(1, len(sizes) - 1))
    o, lse = o[list(order)], lse[list(order)]
    left, right = merge_states(o[:cut], lse[:cut]), merge_states(o[cut:], lse[cut:])
    pair = [torch.stack(two) for two in zip(left, right, strict=True)]
    for got, got_lse in (merge_states(o, lse), merge_states(*pair)):
        torch.testing.assert_close(got, scores.softmax(-1) @ values, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got_lse, scores.logsumexp(-1), rtol=1e-11, atol=1e-11)


def test_bad_shapes_are_refused_and_meta_works() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        merge_states(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="sink"):
        merge_states(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4), torch.zeros(3))
    o, lse = merge_states(
        torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 3, 4, device="meta")
    )
    assert o.shape == (3, 4, 5)
    assert lse.shape == (3, 4)
    o, lse = torch.randn(2, 3, 4, 5).bfloat16(), torch.randn(2, 3, 4)
    assert merge_states(o, lse)[0].dtype == torch.bfloat16


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.integers(1, 19)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    with_sink=st.booleans(),
    flagged=st.booleans(),
)
def test_cpu_kernel_merges_all_dtypes(seed, shape, dtype, with_sink, flagged) -> None:
    g = torch.Generator().manual_seed(seed)
    o = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    lse = torch.randn(shape[:-1], generator=g, dtype=torch.float64) * 20
    lse = lse.to(torch.promote_types(dtype, torch.float32))
    empty = torch.rand(shape[:2], generator=g) < 0.3
    lse[empty], o[empty] = (math.nan if flagged else -INF), math.nan
    sink = torch.randn(shape[2], generator=g).to(lse.dtype) if with_sink else None
    got, got_lse = merge_states(o, lse, sink, empty if flagged else None)
    want, want_lse = merge_states_reference(o.double(), lse.double(), sink, empty)
    coarse = {torch.float64: 1e-12, torch.float32: 1e-5}.get(lse.dtype, 0.0)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=coarse, atol=coarse)
    coarse = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, coarse)
    torch.testing.assert_close(got.double(), want, rtol=coarse, atol=coarse)


def test_infinite_values_of_a_shard_stay_in_their_places() -> None:
    """No shard is multiplied by zero to make up a number."""
    for shards in (2, 3, 5, 7):
        o, lse = torch.ones(shards, 1, 1, 16), torch.zeros(shards, 1, 1)
        o[0, 0, 0, 3], o[-1, 0, 0, 9] = INF, -INF
        want = merge_states_reference(o, lse)[0]
        torch.testing.assert_close(merge_states(o, lse)[0], want)
        assert want.isinf().sum() == 2
        lse[1] = INF
        assert merge_states(o, lse)[0].isnan().all()


def test_a_result_past_the_cache_is_the_same() -> None:
    """It is stored in another way, with a fence at the end; so are rows of 96 not, whose end is not a line's."""
    for width, shards in ((128, 2), (96, 3)):
        places = merge.BEYOND // (4 * width) + 77
        o, lse = torch.randn(shards, places, 1, width), torch.randn(shards, places, 1) * 5
        lse[0, 5], lse[:, 9], o[0, 5] = -INF, -INF, math.nan
        got, got_lse = merge_states(o, lse)
        assert got.nbytes >= merge.BEYOND
        want, want_lse = merge_states_reference(o, lse)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_lse, want_lse, rtol=1e-5, atol=1e-5)
        few = slice(64, 64 + 300)
        assert torch.equal(merge_states(o[:, few], lse[:, few])[0], got[few])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads cut the places anywhere, tiles of weights and all."""
    o, lse = torch.randn(5, 37, 7, 80).to(dtype), torch.randn(5, 37, 7) * 5
    sink = torch.randn(7)
    lse[torch.rand(lse.shape) < 0.2] = -INF
    whole = merge_states(o, lse, sink)
    monkeypatch.setattr(merge, "ELEMENTS_A_THREAD", 1)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for part, other in zip(merge_states(o, lse, sink), whole, strict=True):
                assert torch.equal(part, other)
    finally:
        torch.set_num_threads(before)


# ---- the CUDA kernel, simulated


def simulated(o, lse, sink=None):
    """Merge with the CUDA kernel in the simulator."""
    from plait.cuda_kernels.merge import merge_launch

    out, out_lse = o.new_full(o.shape[1:], math.nan), lse.new_full(lse.shape[1:], math.nan)
    variant, grid, args = merge_launch(o, lse, sink, out, out_lse)
    variant.simulate(grid, *args)
    return out, out_lse


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_sink=st.booleans(),
)
def test_cuda_kernel_merges(seed, shape, dtype, with_sink) -> None:
    g = torch.Generator().manual_seed(seed)
    shards, rows, heads, pieces = shape
    o = torch.randn(shards, rows, heads, pieces * 16 // dtype.itemsize, generator=g).to(dtype)
    lse = torch.randn(shards, rows, heads, generator=g) * 20
    empty = torch.rand(lse.shape, generator=g) < 0.3
    lse[empty], o[empty] = -INF, math.nan
    sink = torch.randn(heads, generator=g) if with_sink else None
    got, got_lse = simulated(o, lse, sink)
    want, want_lse = merge_states_reference(o.double(), lse.double(), sink)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_cuda_kernel_keeps_a_nan_visible_and_fails_when_mutated() -> None:
    o, lse = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2)
    want = merge_states_reference(o, lse)[0]
    torch.testing.assert_close(simulated(o, lse)[0], want)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(simulated(o, lse * math.log2(math.e))[0], want)
    lse[1, 0, 0] = math.nan
    got, got_lse = simulated(o, lse)
    assert got[0, 0].isnan().all()
    assert got_lse.isnan().nonzero().tolist() == [[0, 0]]
