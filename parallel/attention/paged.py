"""Decode on pages for plans without a KV axis: the same store and kernels as Helix, with nothing to exchange.

transformers' growing cache copies every key and value at every step, and its attention repeats the KV heads; pages are
written once and read in place. What pages cannot do better stays as the model does it: forwards that record gradients,
caches that the caller brings, custom masks, and a prompt's first forward, which torch's flash attention computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..edits import AddHook, Edit
from ..errors import PlanError
from .binding import CacheBinding, helix_mask
from .cache import PagedCache
from .helix import HelixLayer, helix_attention

PAGED = "plait_paged"


class PagedBinding(CacheBinding):
    """Gives a decoder under a plan of tp alone a cache of pages, in every forward that can use one."""

    attention = PAGED
    hands_down = False  # forwards that are recomputed are not ours

    def edits(self) -> list[Edit]:
        """Prepare it; nothing where pages would not serve."""
        chosen = self.config._attn_implementation
        if chosen != "sdpa" and self.store is not None and self.state.layers:
            raise PlanError(
                f"a store with attn_implementation={chosen!r}",
                "has nothing to do: under tp alone pages stand in for 'sdpa' only",
                "load the model with attn_implementation='sdpa', or leave the store out",
            )
        # Pages are read by a CPU kernel; elsewhere they are used when they are asked for.
        device = next(self.model.parameters()).device
        if chosen != "sdpa" or (device.type != "cpu" and self.store is None):
            return []
        edits = super().edits()
        if edits:
            edits.append(
                AddHook(lambda: self.base.register_forward_hook(self.rest, always_call=True))
            )
        return edits

    def register(self) -> None:
        """Register our attention and mask with transformers' registries; again is harmless."""
        AttentionInterface.register(PAGED, paged_attention)
        AttentionMaskInterface.register(PAGED, helix_mask)

    def takes(self, values: dict[str, Any], wants_cache: bool) -> bool:
        """Take forwards on our cache, and those without gradients that want a new one and have no mask of their own."""
        cache, mask = values.get("past_key_values"), values.get("attention_mask")
        ours = isinstance(cache, PagedCache) or (
            cache is None
            and wants_cache
            and not torch.is_grad_enabled()
            and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        )
        self._switch(ours)
        return ours

    def rest(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leave the model's own attention in place, for whatever is recomputed later."""
        self._switch(False)

    def _switch(self, ours: bool) -> None:
        # Masks go by the config, which generate reads outside of forwards too; attention goes by the running step.
        self.private._attn_implementation = PAGED if ours else self.masks_at_rest
        if not ours:
            self.state.step = None

    @property
    def masks_at_rest(self) -> str:
        """The model's own, as forwards on other caches are prepared outside of them."""
        return self.private._plait_attention

    def generates(self, given: Any, generation_config: Any) -> bool:
        """Generate on pages unless another cache is given or named."""
        if given is not None:
            return isinstance(given, PagedCache)
        return generation_config.cache_implementation in {None, "dynamic"}


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend to pages, but to a whole first prompt as the model did before; registered as ``plait_paged``."""
    layer: HelixLayer = module._plait_attention  # type: ignore[assignment]
    step = layer.state.step
    if step is not None and (step.rows is not None or any(step.past)):
        return helix_attention(module, query, key, value, None, **kwargs)
    original = ALL_ATTENTION_FUNCTIONS[module.config._plait_attention]  # type: ignore[union-attr]
    o = original(module, query, key, value, attention_mask, **kwargs)
    if step is not None and layer.state.cache is not None:
        rows = query.transpose(1, 2).flatten(0, 1)
        layer.state.cache.attended(layer.number, rows, kwargs.get("scaling"))
    return o
