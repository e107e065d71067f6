"""Hugging Face transformers over the store: `generate` with pages, and with prefixes that outlive a call.

    store = make_store(model, device_bytes="4GiB")
    with PlaitCache(store, ids) as cache:
        out = model.generate(ids, past_key_values=cache, max_new_tokens=64)
        cache.tell(out)                      # so that generated tokens are found too
    # the next PlaitCache(store, ids that begin alike) starts from what is cached

Attention is the model's own (eager, sdpa, ...): it is given each layer's keys and values in order, a
view of the pages where they follow each other, else a copy. `pages` has one that reads pages in place.

`generate_batch` (continuous batching) makes a cache of its own and takes no other: it cannot use a store.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..identity import Identity
from ..sequence import Sequence
from ..spec import KVSpec
from ..step import Step
from ..store import KVStore
from .pages import InPages
from .rows import RowCache

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def make_store(
    model: Any, page_tokens: int = 16, weights: str | None = None, **options: Any
) -> KVStore:
    """Make a store of a model's shape and identity; runs the model on one token to see what it keeps.

    Args:
        model: a transformers model for text.
        page_tokens: tokens per page.
        weights: digest of the weights; None: computed here, about a second per GB.
        options: of `KVStore`.

    Raises:
        ValueError: if its layers keep something else than keys and values of all tokens.
    """
    spec, config = spec_of(model, page_tokens)
    rope = {k: v for k, v in sorted(config.to_dict().items()) if "rope" in k or "window" in k}
    identity = Identity(weights=weights or weights_digest(model), rope=repr(rope))
    return KVStore(spec, identity=identity, **options)


def spec_of(model: Any, page_tokens: int) -> tuple[KVSpec, Any]:
    """The shape of what a model's layers keep, seen by running it on one token; and the config of its text part.

    Raises:
        ValueError: if that is something else than keys and values of all tokens.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "is_encoder_decoder", False) or kinds - _KINDS:
        raise ValueError(
            f"{type(model).__name__} has {sorted(kinds - _KINDS) or 'cross attention'} layers, which do "
            "not fit in pages; use the cache transformers makes for it"
        )
    kept = _kept_for_a_token(model)
    shapes = {(k.shape[1], v.shape[1], k.shape[3], v.shape[3], k.dtype, k.device) for k, v in kept}
    if len(shapes) != 1 or (kv_heads := kept[0][0].shape[1]) != kept[0][1].shape[1]:
        raise ValueError(
            f"the layers of {type(model).__name__} keep keys and values of {len(shapes)} shapes or places; the pages "
            "of a store have one: use the cache transformers makes for it"
        )
    k, v = kept[0]
    width, value_width = k.shape[3], v.shape[3]
    spec = KVSpec(
        len(kept), kv_heads, width, page_tokens, k.dtype, value_width, device=str(k.device)
    )
    return spec, config


def _kept_for_a_token(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What each layer that keeps something gives its cache for one token.

    Seen and not read from the config, which says it in as many ways as there are models: layers that share the
    keys of others, one KV head in a flag, latents instead of heads.
    """
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [(x.keys, x.values) for x in layers if x.keys is not None and x.values is not None]


def weights_digest(model: nn.Module) -> str:
    """Hash a model's class, parameters and buffers."""
    hasher = hashlib.blake2b(type(model).__name__.encode(), digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        hasher.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return hasher.hexdigest()


class PlaitCache(RowCache):
    """A transformers cache in pages, which starts from the longest cached prefix of its prompts.

    `generate` skips what is cached: it computes the tokens after `get_seq_length()` only. Rows of a
    batch start from the shortest of their prefixes. Rows with padding are kept, but neither find nor
    leave prefixes. Close it (or use `with`) when the answer is there; what it holds stays cached.

    Args:
        store: see `make_store`.
        input_ids: the prompts, `[batch, tokens]` or one row, as they will be given to `generate`.
        attention_mask: as given to `generate`, if rows are padded.
        tenant: whose prompts these are.
        repeats: rows that `generate` makes of each prompt: its `num_beams` or `num_return_sequences`.
        in_place: decode from the pages where they lie, by a model prepared with `pages.read_pages_in_place`. A store
            with a selector needs it; steps of padded rows or with a mask of their own read everything.

    State: a forward is a step of the store, committed when the next begins or the cache is closed.
    """

    store: KVStore
    seqs: list[Sequence]

    def __init__(
        self,
        store: KVStore,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        tenant: str | None = None,
        repeats: int = 1,
        in_place: bool = False,
    ) -> None:
        if store.selector is not None and not in_place:
            raise ValueError(
                f"the store's selector={store.selector} chooses what is read in the pages: give in_place=True, and "
                "call read_pages_in_place(model)"
            )
        super().__init__(store)
        rows = input_ids[None] if input_ids.dim() == 1 else input_ids
        rows = rows.repeat_interleave(repeats, 0)
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.seqs = store.open_batch(len(rows) if padded else list(rows), tenant)
        self.step: Step | None = None
        self._told, self.padded, self.in_place = not padded, padded, in_place
        start = min((seq.length for seq in self.seqs), default=0)
        for seq, row in zip(self.seqs, rows, strict=True):
            if seq.length > start:
                store.truncate(seq, start)
                store.tell(seq, row[start:])
        self.cached_tokens = start

    @property
    def tokens(self) -> int:
        """Tokens of each row so far, the last forward's included once all its layers ran."""
        step = self.step
        if step is not None and len(step.written) == self.store.spec.layers:
            return int(step.table.lengths[0])
        return self.seqs[0].length if self.seqs else 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new tokens; give all tokens' keys and values."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError(
                "PlaitCache keeps values, not graphs: call the model under torch.no_grad()"
            )
        if layer == 0:
            self.commit()
            if len(k) != len(self.seqs):
                raise ValueError(
                    f"the cache holds {len(self.seqs)} rows, the input {len(k)}; make it from the "
                    "same ids, with repeats=num_beams or num_return_sequences"
                )
            self.step = self.store.reserve(self.seqs, k.shape[2])
        assert self.step is not None
        rows = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
        self.store.append(self.step, layer, *rows)
        if self.in_place:
            return InPages.of(self, layer), InPages.of(self, layer)
        return self.gathered(layer)

    def gathered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Give all tokens' keys and values of one layer. Shape: `[batch, kv_heads, all, d]`"""
        held = [self.store.keys_values(seq, layer, self.step) for seq in self.seqs]
        if len(held) == 1:
            return held[0][0].transpose(0, 1)[None], held[0][1].transpose(0, 1)[None]
        return (
            torch.stack([pair[0] for pair in held]).transpose(1, 2),
            torch.stack([pair[1] for pair in held]).transpose(1, 2),
        )

    def attend(
        self, module: nn.Module, layer: int, query: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Attend to pages in place if each row has one query, else as sdpa; see `pages_attention`."""
        window = kwargs.get("sliding_window")
        own_mask = attention_mask is not None and window is None
        if query.shape[2] != 1 or self.padded or own_mask:
            if not own_mask and self.step is not None:
                rows = query.transpose(1, 2).flatten(0, 1)
                self.store.observe(self.seqs, layer, rows, self.step)
            k, v = self.gathered(layer)
            return sdpa_attention_forward(
                module, query, k, v, attention_mask, scaling=scaling, **kwargs
            )
        assert self.step is not None
        lo = None
        if window is not None:
            lo = torch.from_numpy(self.step.table.lengths).to(query.device) - window
        q = query[:, :, 0]
        o, _ = self.store.attend(self.seqs, layer, q, lo=lo, scale=scaling, step=self.step)
        return o[:, None], None

    def commit(self) -> None:
        """Commit the last forward, or drop it if it did not come to its end."""
        step, self.step = self.step, None
        if step is not None and len(step.written) == self.store.spec.layers:
            self.store.commit(step)
        elif step is not None:
            self.store.abort(step)

    def tell(self, sequences: Tensor) -> None:
        """Say the ids of all tokens, as `generate` returned them: generated ones are found from now on.

        Raises:
            ValueError: if they do not begin with the ids the cache was made from; after a beam search,
                whose rows are not those of the cache any more.
        """
        rows = sequences[None] if sequences.dim() == 1 else sequences
        if len(rows) != len(self.seqs) or not self._told:
            raise ValueError(
                f"tell: {len(rows)} rows do not say the tokens of {len(self.seqs)} kept ones; padded, "
                "reordered or repeated rows cannot be told"
            )
        self.commit()
        ids = [row.cpu().numpy() for row in rows]
        known = [[] if seq.history is None else seq.history.ids for seq in self.seqs]
        if any((row[: len(told)] != told).any() for row, told in zip(ids, known, strict=True)):
            raise ValueError(
                "tell: the sequences do not begin with the ids this PlaitCache was made from; give "
                "PlaitCache and generate the same input_ids, or other prompts will find wrong pages"
            )
        for seq, row, told in zip(self.seqs, ids, known, strict=True):
            self.store.tell(seq, row[len(told) : max(seq.length, len(told))])

    def _select(self, rows: list[int]) -> None:
        self._told = self._told and rows == list(range(len(self.seqs)))
        super()._select(rows)

    def reset(self) -> None:
        """Forget all tokens, of this cache; what is in the store stays cached."""
        self.crop(-self.tokens)
