"""Decode of transformers models over the pages of a `PlaitCache`, where they lie.

    read_pages_in_place(model)               # instead of sdpa; other caches go on as before
    with PlaitCache(store, ids, in_place=True) as cache:
        model.generate(ids, past_key_values=cache)

A step of one token a row reads the pages: rows of a batch are not stacked, KV heads are not repeated. Prompts, padded
rows and layers with a mask of their own are gathered and go to sdpa.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from .transformers import PlaitCache

PAGES = "plait_pages"


class InPages(Tensor):
    """Keys or values that stay in the pages of a cache; only `plait_pages` can use them.

    Any other use is a clear error instead of attention to the wrong tokens.
    """

    cache: PlaitCache
    layer: int

    @classmethod
    def of(cls, cache: PlaitCache, layer: int) -> InPages:
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
            "reads: call read_pages_in_place(model) first, or leave in_place out"
        )


def read_pages_in_place(model: Any) -> None:
    """Let a model that attends by sdpa decode from the pages of caches made with `in_place=True`.

    Raises:
        ValueError: if its attention is another one.
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


def pages_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend to pages in place if each row has one query, else as sdpa; registered as ``plait_pages``.

    Shape: query `[batch, heads, queries, head_dim]` -> `[batch, queries, heads, value_dim]`
    """
    if not isinstance(key, InPages):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    cache, layer, window = key.cache, key.layer, kwargs.get("sliding_window")
    own_mask = attention_mask is not None and window is None
    if query.shape[2] != 1 or cache.padded or own_mask:
        k, v = cache.gathered(layer)
        return sdpa_attention_forward(
            module, query, k, v, attention_mask, scaling=scaling, **kwargs
        )
    assert cache.step is not None
    lo = None
    if window is not None:
        lo = torch.from_numpy(cache.step.table.lengths).to(query.device) - window
    o, _ = cache.store.attend(
        cache.seqs, layer, query[:, :, 0], lo=lo, scale=scaling, step=cache.step
    )
    return o[:, None], None
