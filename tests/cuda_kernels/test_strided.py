"""Strided tensors packed and unpacked: the CUDA kernel simulated, beside torch's copy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels.strided import copy_launch, layout, pack, pack_op, unpack, unpack_op


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)


VIEWS = {
    "columns": lambda: numbers(6, 64)[:, 8:24],
    "columns at an odd place": lambda: numbers(6, 65)[:, 1:33],
    "every other row of heads": lambda: numbers(4, 5, 16).transpose(0, 1)[::2],
    "three strides": lambda: numbers(3, 4, 5, 16)[:, ::2, 1:4],
    "one run": lambda: numbers(3, 16),
    "bytes": lambda: torch.arange(210, dtype=torch.uint8).view(5, 42)[1:, 3:40],
    "long runs": lambda: numbers(2, 3, 2100, dtype=torch.float32)[:, 1:, 4:],
    "no elements": lambda: numbers(4, 0, 8),
    "short runs": lambda: numbers(8, 8).t(),
    "four strides": lambda: numbers(3, 3, 3, 3, 16)[::2, ::2, ::2, ::2, :8],
}


@pytest.mark.parametrize("name", VIEWS)
def test_there_and_back(name: str) -> None:
    x = VIEWS[name]()
    packed, back = torch.zeros(x.shape, dtype=x.dtype), VIEWS[name]()
    found = copy_launch(x, packed, True)
    assert (found is None) == (name in ("no elements", "short runs", "four strides"))
    if found is None:
        packed = pack(x)
    else:
        variant, grid, args = found
        variant.simulate(grid, *args)
    assert torch.equal(packed, x)
    around = back.untyped_storage()
    whole = torch.tensor([], dtype=x.dtype).set_(around)
    back.zero_()
    rest = whole.clone()
    found = copy_launch(back, packed, False)
    if found is None:
        unpack(packed, back)
    else:
        variant, grid, args = found
        variant.simulate(grid, *args)
    assert torch.equal(back, x)
    back.zero_()
    assert torch.equal(whole, rest), "nothing beside it was written"


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_view(data) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(16, 40)))
    base = torch.arange(torch.Size(shape).numel() * 2, dtype=torch.int32).to(torch.uint8)
    x = base.view(2, -1)[1].view(shape).permute(*data.draw(st.permutations([0, 1])), 2)
    x = x[:: data.draw(st.integers(1, 2)), :, data.draw(st.integers(0, 9)) :]
    packed = torch.zeros(x.shape, dtype=x.dtype)
    found = copy_launch(x, packed, True)
    if found is not None:
        variant, grid, args = found
        variant.simulate(grid, *args)
        assert torch.equal(packed, x)
        wrong = (*args[:6], args[6] + args[2] * variant.constants["size"], args[7])
        if grid[1] > 1 and layout(x)[1]:
            packed.zero_()
            variant.simulate((grid[0], grid[1] - 1, grid[2]), *wrong)
            assert not torch.equal(packed, x)


def test_operators_are_sound_and_bad_input_is_refused() -> None:
    x = numbers(6, 64)[:, 8:24]
    torch.library.opcheck(pack_op, (x,))
    torch.library.opcheck(unpack_op, (x.contiguous(), torch.zeros(6, 16).bfloat16()))
    assert pack(x).is_contiguous()
    with pytest.raises(ValueError, match="use one shape and dtype"):
        unpack(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="use one shape and dtype"):
        unpack(torch.zeros(3), torch.zeros(3).half())
    assert copy_launch(torch.zeros(32).expand(4, 32), torch.zeros(4, 32), False) is None
