"""Models that are not transformers': inputs are compared, attention is reached through scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..collectives.primitive import Group
from ..cuda_kernels.dense_attention import dense_attention
from ..cuda_kernels.scores import Interleave
from .agreement import agree, tensor_digest
from .attention.exchange import connected, exchange_partials
from .edits import AddHook, Edit, SetAttribute
from .errors import PlanError
from .ranks import ModelRanks


def module_edits(model: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Compare the ranks' inputs at every forward.

    Collective: all ranks of the model copy; one all-gather of 4 KiB a forward.
    """

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if not any(t.device.type == "meta" for t in tensors):
            agree(ranks.all, {"input": tensor_digest(*tensors)})

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
        if attn_mask is not None or dropout_p:
            what = "dropout" if dropout_p else "an explicit attn_mask"
            raise PlanError(f"{what} in scaled_dot_product_attention", "is not known to Helix", "use is_causal=True, or kvp=1")
        (batch, heads, rows, width), keys = q.shape, k.shape[2]
        if is_causal and rows != keys:
            raise PlanError(
                f"is_causal=True with {rows} queries and {keys} keys",
                "is aligned to the first key by torch, which is not what a cache means",
                "pass is_causal=False for one query on a cache, or all queries with all keys",
            )
        every = torch.arange(keys, device=q.device)
        own = every[every // self.rule.run % self.rule.shards == self.rule.shard]
        hi = torch.searchsorted(own, torch.arange(rows, device=q.device), right=True) if is_causal else None
        hi = torch.full((rows,), len(own), device=q.device) if hi is None else hi
        parts = [
            dense_attention(
                q[b].transpose(0, 1), k[b].transpose(0, 1).index_select(0, own), v[b].transpose(0, 1).index_select(0, own),
                torch.zeros_like(hi), hi, width**-0.5 if scale is None else scale,
            )
            for b in range(batch)
        ]  # fmt: skip
        o = torch.cat([o for o, _ in parts])
        o = o if len(own) else connected(o, q, k, v)
        merged = exchange_partials(o, torch.cat([lse for _, lse in parts]), self.group)
        return merged.view(batch, rows, -1, merged.shape[-1]).transpose(1, 2)


class _Intercept(TorchFunctionMode):
    """Answer calls of scaled_dot_product_attention with Helix, and nothing else."""

    def __init__(self, split: KeySplit) -> None:
        super().__init__()
        self.split = split

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.split.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def key_split_edits(module: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Run a module's forward with its scaled_dot_product_attention under Helix."""
    split = KeySplit(ranks.kvp_group, Interleave(ranks.plan.kvp.interleave, ranks.kvp, ranks.k))
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Intercept(split):
            return original(*args, **kwargs)

    return [SetAttribute(module, "forward", forward)]
