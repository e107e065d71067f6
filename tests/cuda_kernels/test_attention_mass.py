"""Attention received, against softmaxes in plain torch."""

from __future__ import annotations

import pytest
import torch

from plait.cuda_kernels import attention_mass
from plait.cuda_kernels.attention_mass import attention_mass_reference


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_sum_of_softmaxes(dtype, threads, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["plait.cuda_kernels.attention_mass"], "MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 5, generator=rng, dtype=dtype) * 4
    k = torch.randn(33, 2, 5, generator=rng, dtype=dtype).transpose(0, 1)
    seen = torch.tensor([33, 1, 20, 33, 5, 8, 32])
    got, want = (f(q, k, seen, 0.7) for f in (attention_mass, attention_mass_reference))
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-9)
    torch.testing.assert_close(got.sum(-1), torch.full((2,), 7.0, dtype=dtype))
    torch.library.opcheck(torch.ops.plait.attention_mass.default, (q, k, seen, 0.7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_not_hidden(bad) -> None:
    q, k = torch.ones(2, 3, 4), torch.ones(2, 6, 4)
    k[1, 2, 0] = bad
    got = attention_mass(q, k, torch.tensor([6, 2, 6]), 1.0)
    assert got[0].isfinite().all()
    assert got[1, :6].isnan().all()


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        attention_mass(torch.ones(2, 3, 4), torch.ones(2, 6, 5), torch.ones(3), 1.0)
