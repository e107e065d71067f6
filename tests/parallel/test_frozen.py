"""A frozen model can be cut, and a parameter unfrozen afterwards still has its gradient summed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.collectives import primitive
from plait.parallel.tensor import sum_gradient


@pytest.mark.parametrize("parts", [(), ((0, 2),)])
def test_the_sum_of_a_frozen_parameter_waits_until_it_is_unfrozen(
    parts: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primitive, "all_reduce", lambda x, group: x * 3)
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    handle = sum_gradient(parameter, None, 0, parts)
    assert not parameter.requires_grad
    parameter.requires_grad_(True)
    (parameter * 2).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [6, 6]
    handle.remove()
    parameter.grad = None
    (parameter * 2).sum().backward()
    assert parameter.grad.tolist() == [2, 2]
