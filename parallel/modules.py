"""Models that are not transformers': inputs are compared, attention is reached through scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..collectives.primitive import Group
from ..cuda_kernels.dense_attention import dense_attention
from ..cuda_kernels.scores import Interleave
from .agreement import agree, announce, tensor_digest
from .attention.exchange import connected, exchange_partials
from .edits import AddHook, Edit, SetAttribute
from .errors import PlanError
from .ranks import ModelRanks


def module_edits(model: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Compare the ranks' inputs at every forward.

    Collective: all ranks of the model copy; one all-gather of 4 KiB a forward.
    """

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.device.type == "meta" for t in tensors):  # a run for its collectives
            announce(ranks.inputs)
            return
        agree(ranks.inputs, {"input": tensor_digest(*tensors)})

    return [AddHook(lambda: model.register_forward_pre_hook(compare, with_kwargs=True))]


@dataclass(frozen=True)
class KeySplit:
    """Helix inside ``scaled_dot_product_attention``: keys are cut by the position rule, partials are exchanged.

    The caller's own cache stays whole; what is cut is the attention over it, and everything after.
    """

    group: Group
    rule: Interleave

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Attend to this rank's keys and merge with the others'.

        Shape: q [batch, heads/tp, rows, d], k, v [batch, kv_heads/tp, keys, d] -> [batch, heads/(kvp*tp), rows, d]
        Collective: one all-to-all over kvp.
        """
        if dropout_p:
            raise PlanError(
                f"dropout_p={dropout_p} in scaled_dot_product_attention",
                "cannot be exact when keys are spread over ranks",
                "use dropout_p=0, or kvp=1",
            )  # fmt: skip
        (batch, heads, rows, width), keys = q.shape, k.shape[2]
        if is_causal and rows != keys:
            raise PlanError(
                f"is_causal=True with {rows} queries and {keys} keys",
                "is aligned to the first key by torch, which is not what a cache means",
                "pass is_causal=False for one query on a cache, or all queries with all keys",
            )
        own = self.rule.positions(torch.arange(self.rule.local_length(keys), device=q.device))
        hi = (
            torch.searchsorted(own, torch.arange(rows, device=q.device), right=True)
            if is_causal
            else None
        )
        hi = torch.full((rows,), len(own), device=q.device) if hi is None else hi
        factor = width**-0.5 if scale is None else scale
        bias = (
            None if attn_mask is None else self._bias(attn_mask, own, (batch, heads, rows, keys), q)
        )
        parts = []
        for b in range(batch):
            held, values = (t[b].transpose(0, 1).index_select(0, own) for t in (k, v))
            if bias is None:
                parts.append(
                    dense_attention(
                        q[b].transpose(0, 1), held, values, torch.zeros_like(hi), hi, factor
                    )
                )
            else:
                parts.append(biased_attention(q[b].transpose(0, 1), held, values, bias[b], factor))
        o = torch.cat([o for o, _ in parts])
        o = o if len(own) else connected(o, q, k, v)
        merged = exchange_partials(o, torch.cat([lse for _, lse in parts]), self.group)
        return merged.view(batch, rows, -1, merged.shape[-1]).transpose(1, 2)

    def _bias(
        self, mask: Tensor, own: Tensor, shape: tuple[int, int, int, int], q: Tensor
    ) -> Tensor:
        """This rank's keys of an additive or boolean mask: [batch, heads or 1, rows, own keys]."""
        batch, heads, rows, keys = shape
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        if mask.shape[1] not in {1, heads}:
            raise PlanError(
                f"an attn_mask for {mask.shape[1]} heads", f"does not fit the {heads} query heads of this rank",
                "give one mask for all heads, or build it from the module's local head count (see Attention.counts)",
            )  # fmt: skip
        mask = mask.expand(batch, mask.shape[1], rows, keys).index_select(-1, own)
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
                ~mask, float("-inf")
            )
        return mask


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with an additive bias (ALiBi, padding, windows); plain torch, differentiable, heads * rows * keys scores.

    Shape: q [rows, heads, d], k, v [keys, kv_heads, d], bias [heads or 1, rows, keys]
        -> o [rows, heads, d], lse [rows, heads]
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("rhd,khd->hrk", q, k) * scale + bias
    # the shift cancels; a row that sees no key here must not turn its gradient into NaN
    with torch.no_grad():
        top = (
            scores.amax(-1, keepdim=True)
            if scores.shape[-1]
            else scores.new_zeros((*scores.shape[:-1], 1))
        )
        top = top.masked_fill(top == float("-inf"), 0)
    weights = torch.exp(scores - top)
    sums = weights.sum(-1, keepdim=True)
    none = sums == 0
    weights = weights / sums.masked_fill(none, 1)
    lse = (top + torch.log(sums.masked_fill(none, 1))).masked_fill(none, float("-inf")).squeeze(-1)
    return torch.einsum("hrk,khd->rhd", weights, v), lse.transpose(0, 1)


class Intercept(TorchFunctionMode):
    """Answer calls of scaled_dot_product_attention with another function of the same arguments, and nothing else."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def key_split_edits(module: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Run a module's forward with its scaled_dot_product_attention under Helix."""
    split = KeySplit(ranks.kvp_group, Interleave(ranks.plan.kvp.interleave, ranks.kvp, ranks.k))
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with Intercept(split.attend):
            return original(*args, **kwargs)

    return [SetAttribute(module, "forward", forward)]
