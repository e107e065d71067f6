"""ByShape: run on meta tensors the few calls whose meta form is missing or says something untrue about memory."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What host code asks of values, and the truth for whole, unpadded sequences, which is what is run here.
_ANSWERS = {"find_packed_sequence_indices": True}


class ByShape(TorchFunctionMode):
    """Inside ``with ByShape()``, on meta tensors only:

    ``scaled_dot_product_attention`` has the memory of a fused kernel, which keeps no scores (torch spells it out as
    matrix products on meta, and a million tokens squared would be counted); ``grouped_mm`` takes every dtype; a
    question that transformers' mask code asks of position ids is answered. None of these sends anything.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            rest = [kwargs[n] for n in ("query", "key", "value")[len(args) :]]
            q, k, v = (*args, *rest)[:3]
            if q.device.type == "meta":
                return _Product.apply((*q.shape[:-1], v.shape[-1]), q, k, v)
        elif func is torch._grouped_mm and args[0].device.type == "meta":
            return _Product.apply((args[0].shape[0], args[1].shape[-1]), *args[:2])
        elif func is Tensor.__bool__ and args[0].device.type == "meta":
            asked = sys._getframe(1).f_code.co_name
            if asked in _ANSWERS:
                return _ANSWERS[asked]
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """Something of this shape that depends on these tensors."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty_like(t) for t in ctx.saved_tensors)
