"""What a rank computes with its experts: rows sorted by expert go through each expert's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _GroupedLinear(Function):
    """A linear layer per run of rows; torch's own autograd would make one gradient of the whole stack per expert."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int], inner: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.inner, ctx.biased = counts, inner, bias is not None
        out = x.new_empty((x.shape[0], weight.shape[3 - inner]))
        for e, start, stop in runs(counts):
            matrix = weight[e] if inner == 1 else weight[e].t()
            if bias is None:
                torch.mm(x[start:stop], matrix, out=out[start:stop])
            else:
                torch.addmm(bias[e], x[start:stop], matrix, out=out[start:stop])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        inner, grad = ctx.inner, grad.contiguous()
        wanted = ctx.needs_input_grad
        of_x = torch.empty_like(x) if wanted[0] else None
        of_weight = torch.empty_like(weight) if wanted[1] else None
        of_bias = weight.new_zeros((weight.shape[0], grad.shape[1])) if ctx.biased else None
        for e, start, stop in runs(ctx.counts):
            rows, part = x[start:stop], grad[start:stop]
            if of_x is not None:
                matrix = weight[e].t() if inner == 1 else weight[e]
                torch.mm(part, matrix, out=of_x[start:stop])
            if of_weight is not None:
                pair = (rows.t(), part) if inner == 1 else (part.t(), rows)
                torch.mm(*pair, out=of_weight[e])
            if of_bias is not None:
                torch.sum(part, 0, out=of_bias[e])
        if of_weight is not None:
            # experts without rows have a gradient of zero, not none: their ranks' collectives must run
            for e, count in enumerate(ctx.counts):
                if not count:
                    of_weight[e].zero_()
        return of_x, of_weight, of_bias, None, None


def runs(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """The runs of rows of the experts that have any: (expert, start, stop)."""
    found, start = [], 0
    for e, count in enumerate(counts):
        if count:
            found.append((e, start, start + count))
        start += count
    return found


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int], inner: int
) -> Tensor:
    """Multiply runs of rows by one matrix each.

    Shape: x [rows, in], sorted by expert; weight [experts, out, in], or [experts, in, out] with ``inner`` 1;
        bias [experts, out] -> [rows, out]
    """
    return _GroupedLinear.apply(x.to(weight.dtype), weight, bias, counts, inner)


@dataclass(frozen=True)
class Packed:
    """Experts whose matrices are stacked in 3-D parameters, as transformers packs them.

    Attributes:
        inner: the dim of a stacked matrix that meets the input: 2, or 1 where matrices are stored transposed.
        adds_bias: whether this rank adds the bias of the down projection; of the ranks along etp one does.
    """

    up: str
    inner: int
    biased: bool
    adds_bias: bool = True

    @classmethod
    def of(cls, module: nn.Module) -> Packed:
        """Read the layout that transformers' decorator notes on the module; stacks without it are plain."""
        up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        transposed = bool(getattr(module, "is_transposed", False))
        return cls(up, 1 if transposed else 2, bool(getattr(module, "has_bias", False)))

    def rows(self, module: Any, x: Tensor, counts: list[int]) -> Tensor:
        """Send rows, sorted by expert, through this rank's experts.

        Shape: [rows, hidden] -> [rows, hidden]; under etp partial sums
        """
        held = module._parameters
        bias = held[f"{self.up}_bias"] if self.biased else None
        hidden = grouped_linear(x, held[self.up], bias, counts, self.inner)
        hidden = module._apply_gate(hidden) if self.up == "gate_up_proj" else module.act_fn(hidden)
        bias = held["down_proj_bias"] if self.biased else None
        if bias is not None and not self.adds_bias:
            bias = bias * 0
        out = grouped_linear(hidden, held["down_proj"], bias, counts, self.inner)
        return (
            module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out
        )


def is_packed(module: nn.Module) -> bool:
    """Say whether a module is laid out, and computes, as transformers' packed experts do."""
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return {up, "down_proj"} <= module._parameters.keys() and hasattr(module, "_apply_gate")
