"""Decode of transformers models over the pages of a `PlaitCache`, where they lie.

    read_pages_in_place(model)               # instead of sdpa; other caches go on as before
    with PlaitCache(store, ids, in_place=True) as cache:
        model.generate(ids, past_key_values=cache)

A step of one token a row reads the pages: rows of a batch are not stacked, KV heads are not repeated. Prompts, padded
rows and layers with a mask of their own are gathered and go to sdpa.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class PageHolder(Protocol):
    """A cache whose keys and values this attention reads."""

    def attend(
        self, module: torch.nn.Module, layer: int, query: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Attend in one layer. Shape: `[batch, heads, queries, head_dim]` -> `[batch, queries, heads, value_dim]`"""
        ...


PAGES = "plait_pages"


class InPages(Tensor):
    """Keys or values that stay in the pages of a cache; only `plait_pages` can use them.

    Any other use is a clear error instead of attention to the wrong tokens.
    """

    cache: PageHolder
    layer: int

    @classmethod
    def of(cls, cache: PageHolder, layer: int) -> InPages:
        """The keys or values of one layer."""
        made = torch.empty(0).as_subclass(cls)
        made.cache, made.layer = cache, layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "PlaitCache(in_place=True) keeps keys and values in pages, which only the attention 'plait_pages' "
            "reads: call read_pages_in_place(model) first, or leave in_place out, as a model must that works on "
            "cached keys before it attends (latent attention)"
        )


def read_pages_in_place(model: Any) -> None:
    """Let a model that attends by sdpa decode from the pages of caches made with `in_place=True`.

    Raises:
        ValueError: if its attention is another one, or cannot be exchanged.
    """
    chosen = model.config._attn_implementation
    if chosen not in ("sdpa", PAGES):
        raise ValueError(
            f"read_pages_in_place stands in for 'sdpa', this model attends by {chosen!r}; load it with "
            "attn_implementation='sdpa', or use PlaitCache without in_place"
        )
    AttentionInterface.register(PAGES, pages_attention)
    AttentionMaskInterface.register(PAGES, sdpa_mask)
    model.set_attn_implementation(PAGES)
    if model.config._attn_implementation != PAGES:
        raise ValueError(
            f"{type(model).__name__} has its attention built in, transformers cannot exchange it; use PlaitCache "
            "without in_place"
        )


def pages_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend as the cache says that keeps the pages, else by sdpa; registered as ``plait_pages``.

    Shape: query `[batch, heads, queries, head_dim]` -> `[batch, queries, heads, value_dim]`
    """
    if not isinstance(key, InPages):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return key.cache.attend(module, key.layer, query, attention_mask, scaling=scaling, **kwargs)
