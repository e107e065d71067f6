"""Every public operator with tensors of odd places and strides: the same answer, or a refusal that names the shape."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import plait.cuda_kernels as kernels
from plait.cuda_kernels.add_rms_norm import add_layer_norm, add_rms_norm
from plait.cuda_kernels.partial_attention import partial_attention, partial_attention_backward
from plait.cuda_kernels.strided import pack, unpack


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def copied(place: Callable[[Tensor], Tensor]) -> Tensor:
    to, of = place(torch.zeros(3, 4, 2, 8)), place(draw(3, 4, 2, 8))
    kernels.copy_pages(
        kernels.Regions([to]), torch.tensor([2, 0]), kernels.Regions([of]), torch.tensor([1, 2])
    )
    return to


def written(place: Callable[[Tensor], Tensor]) -> Tensor:
    region = place(torch.zeros(3, 4, 2, 8))
    kernels.write_tokens(region, torch.tensor([7, 1]).numpy(), place(draw(2, 2, 8)))
    return region


def summed(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    low, high = place(torch.zeros(3, 2, 8)), place(torch.zeros(3, 2, 8))
    pages = place(torch.tensor([2, 0, 1]))
    kernels.summarise(place(draw(3, 4, 2, 8)), pages, 0, 11, 4, low, high)
    return [low, high]


def unpacked(place: Callable[[Tensor], Tensor]) -> Tensor:
    into = place(torch.zeros(3, 4, 16))
    unpack(place(draw(3, 4, 16)), into)
    return into


def attended(place: Callable[[Tensor], Tensor]) -> Any:
    q, k, v = place(draw(3, 4, 8)), place(draw(6, 4, 2, 8)), place(draw(6, 4, 2, 8) + 1)
    whole = [
        place(torch.tensor(n))
        for n in ([0, 1, 3], [0, 2, 5], [3, 0, 1, 5, 2], [0, 0, 2], [7, 5, 12])
    ]
    return kernels.paged_attention(q, k, v, *whole, 0.3)


def attended_dense(place: Callable[[Tensor], Tensor]) -> Any:
    bounds = place(torch.tensor([0, 0, 2])), place(torch.tensor([7, 5, 9]))
    return kernels.dense_attention(
        place(draw(3, 4, 8)), place(draw(9, 2, 8)), place(draw(9, 2, 8) + 1), *bounds, 0.3
    )


CALLS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "merge_states": lambda place: kernels.merge_states(place(draw(3, 4, 2, 8)), place(draw(3, 4, 2))),
    "merge_states, bfloat16": lambda place: kernels.merge_states(
        place(draw(3, 4, 2, 8, dtype=torch.bfloat16)), place(draw(3, 4, 2)), place(draw(2))
    ),
    "add_rms_norm": lambda place: add_rms_norm(
        place(draw(4, 8)), place(draw(4, 8) + 1), place(draw(8)), 1e-5
    ),
    "add_rms_norm, bfloat16": lambda place: add_rms_norm(
        *(place(draw(*s, dtype=torch.bfloat16)) for s in ((4, 8), (4, 8), (8,))), 1e-5
    ),
    "add_layer_norm": lambda place: add_layer_norm(
        place(draw(4, 8)), place(draw(4, 8) + 1), place(draw(8)), place(draw(8) + 1), 1e-5
    ),
    "top_k": lambda place: kernels.top_k(place(draw(3, 40)), 5, place(torch.arange(6).view(3, 2))),
    "unit_scores": lambda place: kernels.unit_scores(
        place(draw(2, 3, 8)), place(draw(5, 4, 2, 8)), place(torch.tensor([4, 1, 0])), 11
    ),
    "attention_mass": lambda place: kernels.attention_mass(
        place(draw(2, 3, 8)), place(draw(2, 9, 8)), place(torch.tensor([9, 1, 4])), 0.3
    ),
    "permute_rows": lambda place: kernels.permute_rows(
        place(draw(4, 8)), place(torch.tensor([3, 0, 7, 2])), 2
    ),
    "unpermute_rows": lambda place: kernels.unpermute_rows(
        place(draw(4, 8)), place(torch.tensor([3, 0, 7, 2])), place(draw(4, 2))
    ),
    "sort_by_expert": lambda place: kernels.sort_by_expert(
        place(torch.tensor([[0, 3], [2, 2], [1, 0]])), 4
    ),
    "paged_attention": attended,
    "dense_attention": attended_dense,
    "copy_pages": copied,
    "write_tokens": written,
    "summarise": summed,
    "pack": lambda place: pack(place(draw(3, 4, 16))),
    "unpack": unpacked,
}  # fmt: skip


def odd_place(x: Tensor) -> Tensor:
    """One element from where its memory begins: not aligned to 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def wide_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


PLACES = (odd_place, transposed, every_other, wide_rows)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_answer_or_a_refusal_that_names_the_shape(name: str, place) -> None:
    want, found = CALLS[name](lambda x: x.clone()), None
    try:
        found = CALLS[name](place)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal, found = "", found if isinstance(found, list | tuple) else [found]
        want = want if isinstance(want, list | tuple) else [want]
    if refusal:
        assert re.search(r"\[\d+(, \d+)*\]", refusal), refusal
        assert place is not odd_place, "these are contiguous"
        return
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_step_of_ring_attention_too(place) -> None:
    q, k, v, grad = (draw(1, 2, 6, 8) + i for i in range(4))
    o, lse = partial_attention(q, k, v, 0.3)
    want = (o, lse, *partial_attention_backward(grad, q, k, v, o, lse, 0.3))
    q, k, v, grad, o = map(place, (q, k, v, grad, o))
    found = (
        *partial_attention(q, k, v, 0.3),
        *partial_attention_backward(grad, q, k, v, o, lse, 0.3),
    )
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_public_operator_is_asked() -> None:
    asked = {name.split(",")[0] for name in CALLS}
    others = {
        "Regions",
        "Interleave",
        "attention_reference",
        "coded_attention",
    }  # the last has tests of its own
    assert set(kernels.__all__) - others <= asked


WRONG: dict[str, Callable[[], Any]] = {
    "merge_states": lambda: kernels.merge_states(draw(3, 4, 2, 8), draw(3, 4)),
    "add_rms_norm": lambda: add_rms_norm(draw(4, 8), draw(4, 7), draw(8), 1e-5),
    "add_layer_norm": lambda: add_layer_norm(draw(4, 8), draw(4, 8), draw(8), draw(7), 1e-5),
    "top_k": lambda: kernels.top_k(draw(3, 4), 5),
    "top_k of integers": lambda: kernels.top_k(torch.ones(3, 4, dtype=torch.int64), 2),
    "top_k of a number": lambda: kernels.top_k(torch.tensor(1.0), 0),
    "top_k with a hint of floats": lambda: kernels.top_k(draw(3, 4), 2, draw(3, 1)),
    "unit_scores": lambda: kernels.unit_scores(draw(2, 3, 8), draw(5, 4, 2, 7), torch.arange(3), 2),
    "attention_mass": lambda: kernels.attention_mass(draw(2, 3, 8), draw(2, 9, 7), torch.ones(3), 1.0),
    "unpermute_rows": lambda: kernels.unpermute_rows(draw(4, 8), torch.arange(3), draw(4, 2)),
    "dense_attention": lambda: kernels.dense_attention(
        draw(3, 4, 8), draw(9, 3, 8), draw(9, 3, 8), torch.zeros(3), torch.ones(3), 1.0
    ),
    "write_tokens, other heads": lambda: kernels.write_tokens(
        torch.zeros(3, 4, 2, 8), torch.arange(2).numpy(), draw(2, 3, 8)
    ),
    "write_tokens, other dtype": lambda: kernels.write_tokens(
        torch.zeros(3, 4, 2, 8), torch.arange(2).numpy(), draw(2, 2, 8).half()
    ),
    "write_tokens, too few slots": lambda: kernels.write_tokens(
        torch.zeros(3, 4, 2, 8), torch.arange(1).numpy(), draw(2, 2, 8)
    ),
    "summarise": lambda: kernels.summarise(
        draw(3, 4, 2, 8), torch.arange(3), 0, 13, 4, draw(3, 2, 8), draw(3, 2, 8)
    ),
    "unpack": lambda: unpack(draw(3), draw(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_what_would(name: str) -> None:
    with pytest.raises(ValueError, match=r"(use|must|give|multiple|lie in)"):
        WRONG[name]()


def test_every_operator_has_a_fake_and_serves_cuda() -> None:
    """No caller asks for a device: torch chooses, and compilers see shapes."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("plait::")}
    assert len(names) > 10
    for name in names:
        for key in ("CPU", "CUDA", "Meta"):
            served = torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)
            assert served, f"{name} has nothing for {key}"


@pytest.mark.parametrize("name", CALLS)
def test_in_one_compiled_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph breaks, and the compiler sees what the fakes say."""
    inputs: list[Tensor] = []

    def taken(x: Tensor) -> Tensor:
        inputs.append(x.clone())
        return x

    want = CALLS[name](taken)
    monkeypatch.setattr(sys.modules[__name__], "draw", torch.zeros)  # not drawn inside the graph

    def call(*given: Tensor) -> Any:
        left = iter(given)
        return CALLS[name](lambda _: next(left))

    torch._dynamo.reset()
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, want)


def test_page_numbers_are_looked_at_in_a_compiled_graph_too() -> None:
    to, of = torch.zeros(3, 4, 2, 8), draw(3, 4, 2, 8)
    regions = kernels.Regions([to]), kernels.Regions([of])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def copy(places: Tensor, sources: Tensor) -> None:
        kernels.copy_pages(regions[0], places, regions[1], sources)

    copy(torch.tensor([2, 0]), torch.tensor([1, 2]))
    assert torch.equal(to[[2, 0]], of[[1, 2]])
    for wrong in ([2, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
            copy(torch.tensor(wrong), torch.tensor([1, 2]))
