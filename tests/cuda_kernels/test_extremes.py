"""Norms and attention with numbers at the ends of what there is, in odd strides, and with nothing: as float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.cuda_kernels import attention_mass, dense_attention, paged_attention
from plait.cuda_kernels.add_rms_norm import add_layer_norm, add_rms_norm
from plait.cuda_kernels.attention_mass import attention_mass_reference
from plait.cuda_kernels.dense_attention import dense_attention_op
from plait.cuda_kernels.merge import merge_states_op
from plait.cuda_kernels.paged_attention import paged_attention_op
from plait.cuda_kernels.scores import Interleave

ENDS = [0.0, -0.0, 1e-40, -1e-45, 1e12, -1e12, torch.inf, -torch.inf, torch.nan]
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "columns": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "odd place": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
seeds, strides = st.integers(0, 99), st.sampled_from(sorted(STRIDES))
ends = st.lists(st.tuples(seeds, st.sampled_from(ENDS)), max_size=4)
finite = st.lists(st.tuples(seeds, st.sampled_from(ENDS[:6])), max_size=4)
no_infinities = st.lists(st.tuples(seeds, st.sampled_from([*ENDS[:6], torch.nan])), max_size=4)


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, put: list, stride: str) -> Tensor:
    """Draw numbers, put some at places, lay them out."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for place, value in put if x.numel() else ():
        x.view(-1)[place % x.numel()] = value
    return STRIDES[stride](x) if x.numel() else x


@pytest.mark.parametrize("layer_norm", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    seeds, st.sampled_from([(0, 8), (1, 1), (3, 33), (2, 2, 64), (5, 130)]), ends, ends, strides,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_norms(layer_norm, seed, shape, in_x, in_residual, stride, dtype) -> None:
    if layer_norm:  # torch's own, whose mean cancels nothing so large
        in_x, in_residual = ([p for p in put if abs(p[1]) != 1e12] for put in (in_x, in_residual))
    x, residual = (
        drawn(seed + i, shape, dtype, put, stride) for i, put in enumerate((in_x, in_residual))
    )
    weight = drawn(seed + 2, shape[-1:], dtype, [], stride)
    if layer_norm:
        normed, total = add_layer_norm(x, residual, weight, -weight, 1e-5)
    else:
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total.nan_to_num(7), (residual + x).nan_to_num(7))
    wide, ones = total.double(), shape[-1:]
    if layer_norm:
        want = torch.nn.functional.layer_norm(wide, ones, weight.double(), -weight.double(), 1e-5)
    else:
        want = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    coarse = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(dtype, 2e-5)
    want = torch.where(want.abs() > torch.finfo(dtype).max, want * torch.inf, want)
    torch.testing.assert_close(normed.double(), want, rtol=coarse, atol=coarse, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(
    seeds, st.sampled_from([(1, 0, 4, 4), (1, 1, 1, 8), (2, 5, 9, 5), (3, 4, 40, 16)]), ends, ends, strides,
    st.booleans(),
)  # fmt: skip
def test_attention_mass(seed, shape, in_q, in_k, stride, wide) -> None:
    heads, rows, tokens, dim = shape
    dtype = torch.float64 if wide else torch.float32
    q = drawn(seed, (heads, rows, dim), dtype, in_q, stride)
    k = drawn(seed + 1, (heads, tokens, dim), dtype, in_k, stride)
    seen = torch.randint(1, tokens + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    found = attention_mass(q, k, seen, 0.3)
    want = torch.zeros(heads, tokens, dtype=torch.float64)
    for r, n in enumerate(seen):  # what a row does not see has no share of its NaN either
        want[:, :n] += attention_mass_reference(
            q[:, r : r + 1].double(), k[:, :n].double(), n[None], 0.3
        )
    coarse = 1e-12 if wide else 1e-4
    torch.testing.assert_close(found.double(), want, rtol=coarse, atol=coarse, equal_nan=True)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seeds, st.sampled_from([(0, 2, 1, 9), (1, 1, 1, 1), (3, 4, 2, 7), (5, 2, 2, 33)]), no_infinities,
    finite, finite, strides,
)  # fmt: skip
def test_dense_attention(brute, seed, shape, in_q, in_k, in_v, stride) -> None:
    """NaN in a query is seen, of few keys too; in keys and values it reaches rows of one mask, as in torch."""
    rows, heads, kv_heads, tokens = shape
    q = drawn(seed, (rows, heads, 8), torch.float64, in_q, stride)
    k = drawn(seed + 1, (tokens, kv_heads, 8), torch.float64, in_k, stride)
    v = drawn(seed + 2, (tokens, kv_heads, 8), torch.float64, in_v, stride)
    g = torch.Generator().manual_seed(seed)
    lo, hi = (torch.randint(0, tokens + 1, (rows,), generator=g) for _ in range(2))
    found, want = dense_attention(q, k, v, lo, hi, 0.3), brute(q, k, v, lo, hi, 0.3)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_operators_agree_with_their_fakes() -> None:
    o, lse = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
    torch.library.opcheck(merge_states_op, (o, lse, torch.randn(2), None))
    q, k = torch.randn(3, 4, 8), torch.randn(6, 4, 2, 8)
    whole = [
        torch.tensor(n) for n in ([0, 1, 3], [0, 2, 5], [3, 0, 1, 5, 2], [0, 0, 2], [7, 5, 12])
    ]
    rule = Interleave()
    rest = (None, None, rule.run, rule.shards, rule.shard)
    torch.library.opcheck(paged_attention_op, (q, k, k + 1, *whole, 0.3, 0.0, *rest, 8))
    dense = k.view(24, 2, 8)
    torch.library.opcheck(dense_attention_op, (q, dense, dense + 1, *whole[3:], 0.3, 0.0, *rest))
    assert paged_attention(q, k, k, *whole, 0.3)[0].isfinite().all()
