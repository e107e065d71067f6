"""Tensor-parallel layers: what a module's class becomes when its weights are cut.

Weights are plain local tensors, not DTensors: a DTensor costs tens of microseconds per call, a local tensor nothing.
A *region* is what lies between ``enter`` (replicated -> partial gradients) and ``leave`` (partial -> replicated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collectives import autograd, primitive
from ..collectives.primitive import Group
from .layout import Run


@dataclass
class SequenceSpan:
    """The whole sequence length of the running step, kept by the first sequence-parallel layer for the others."""

    length: int = 0


@dataclass(frozen=True)
class Link:
    """How a cut layer talks: its group, and whether activations outside the region are cut along the sequence."""

    group: Group
    span: SequenceSpan | None = None
    enters: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """Bring an activation into the region."""
        if self.span is not None:
            return autograd.gather_sequence(x, self.group, 1, self.span.length)
        return autograd.enter(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Take a partial activation out of the region."""
        if self.span is not None:
            return autograd.scatter_sequence(x, self.group, 1)
        return autograd.leave(x, self.group)


class ColumnLinear(nn.Linear):
    """A linear layer that computes some of its outputs.

    Shape: [..., in] -> [..., out/tp]
    Collective: none forward; one all-reduce of the input's gradient backward (by the layer, or once by its region).
    """

    _plait: Link

    def forward(self, input: Tensor) -> Tensor:
        if self._plait.enters:
            input = self._plait.enter(input)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.weight.shape[0]} of {self.out_features}"


class RowLinear(nn.Linear):
    """A linear layer that holds some of its inputs; the ranks' outputs are summed and the bias added once.

    Shape: [..., in/tp] -> [..., out]
    Collective: one all-reduce of the output forward (a reduce-scatter under sequence parallel); none backward.
    """

    _plait: Link

    def forward(self, input: Tensor) -> Tensor:
        out = self._plait.leave(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]} of {self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the vocabulary this rank holds."""

    group: Group
    start: int
    stop: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]


class VocabEmbedding(nn.Embedding):
    """An embedding that holds some of its rows; rows held elsewhere count as zero and the ranks are summed.

    Shape: [batch, seq] -> [batch, seq, hidden]
    Collective: one all-reduce of the output forward; none backward.
    """

    _plait: Vocabulary

    def forward(self, input: Tensor) -> Tensor:
        here = self._plait
        known = ((input >= 0) & (input < self.num_embeddings)).all()
        torch._assert_async(known, f"ids outside 0 to {self.num_embeddings - 1}")  # no rank's rows
        if self.weight.shape[0] == 0:
            out = self.weight.new_zeros((*input.shape, self.weight.shape[1])) + self.weight.sum()
            return autograd.leave(out, here.group)
        outside = (input < here.start) | (input >= here.stop)
        out = super().forward((input - here.start).masked_fill(outside, 0))
        return autograd.leave(out.masked_fill(outside.unsqueeze(-1), 0), here.group)

    def extra_repr(self) -> str:
        return f"rows {self._plait.start}:{self._plait.stop} of {self.num_embeddings}, {self.embedding_dim}"


class VocabHead(nn.Linear):
    """An output projection that computes some of the logits and gathers the rest, so that all ranks hold them all.

    Shape: [batch, seq, hidden] -> [batch, seq, vocab]
    Collective: one all-gather of the local logits, padded to the largest part; one all-reduce backward.
    """

    _plait: Vocabulary

    def forward(self, input: Tensor) -> Tensor:
        here = self._plait
        local = F.linear(autograd.enter(input, here.group), self.weight, self.bias)
        return gather_parts(local, here)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, outputs {self._plait.start}:{self._plait.stop} of {self.out_features}"


class GatheredLinear(VocabHead):
    """A column-parallel linear whose outputs are gathered (transformers' ``colwise_gather_output``)."""


def gather_parts(local: Tensor, here: Vocabulary) -> Tensor:
    """Gather the last dim in the order of the parts, which under Helix is not the order of the ranks."""
    if here.group is None:
        return local
    dim = local.dim() - 1
    whole = autograd.gather(local, here.group, dim, [here.sizes[c] for c in here.order])
    if list(here.order) == sorted(here.order):
        return whole
    by_rank = torch.split(whole, [here.sizes[c] for c in here.order], dim)
    return torch.cat([by_rank[here.order.index(c)] for c in range(len(by_rank))], dim)


def sum_gradient(
    parameter: nn.Parameter, group: Group, dim: int = 0, parts: Sequence[Run] = ()
) -> Any:
    """Sum a partial gradient over the ranks that hold the same parameter; returns the hook's handle.

    Args:
        parts: ranges of ``dim`` that these ranks hold alike; none means the whole parameter.

    Collective: one all-reduce of the gradient in every backward that reaches the parameter.
    """

    def whole(grad: Tensor) -> Tensor:
        return primitive.all_reduce(grad.contiguous().clone(), group)

    def some(grad: Tensor) -> Tensor:
        shared = torch.cat([grad.narrow(dim, start, stop - start) for start, stop in parts], dim)
        shared = primitive.all_reduce(shared.contiguous(), group)
        grad, at = grad.clone(), 0
        for start, stop in parts:
            grad.narrow(dim, start, stop - start).copy_(shared.narrow(dim, at, stop - start))
            at += stop - start
        return grad

    return hook_gradient(parameter, some if parts else whole)


def hook_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor]) -> Any:
    """Hook the gradient of a parameter that may be frozen now and unfrozen later; returns the handle."""
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(hook)
    parameter.requires_grad_(wanted)
    return handle
