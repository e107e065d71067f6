"""Hugging Face transformers over a store that keeps what matters: `generate` with less memory.

    store = compressed_store(model, "snapkv:budget=0.25")
    with CompressedCache(store, ids) as cache:
        model.generate(ids, past_key_values=cache)
        print(store.report())

The model is as it was but for its attention: `plait_pages`, which is sdpa with any other cache.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..compress import CompressedStore, Compression, KeptSequence, KeptStep, ModelFacts, Rotary
from .pages import InPages, read_pages_in_place
from .rows import RowCache
from .transformers import spec_of


def compressed_store(
    model: Any,
    scorer: str | Compression,
    layers: Mapping[int, str | Compression | None] | None = None,
    page_tokens: int = 16,
    **options: Any,
) -> CompressedStore:
    """Make a compressed store of a model's shape, and let the model read it.

    Args:
        model: a transformers model for text that attends by sdpa.
        scorer, layers, options: of `CompressedStore`.

    Raises:
        ValueError: if its layers keep something else than keys and values of all tokens, or it attends otherwise, or
            works on cached keys before it attends.
    """
    spec, config = spec_of(model, page_tokens)
    if spec.layers != config.num_hidden_layers:
        raise ValueError(
            f"{config.num_hidden_layers - spec.layers} layers of {type(model).__name__} read the keys of others, which "
            "would have to choose for them too; use make_store and PlaitCache"
        )
    known = {"facts": facts_of(model), "windows": windows_of(config)}
    store = CompressedStore(spec, scorer, layers, **{**known, **options})
    before = model.config._attn_implementation
    read_pages_in_place(model)
    try:
        _read_a_token(model, CompressedStore(spec, "streaming"))
    except TypeError as error:
        model.set_attn_implementation(before)
        raise ValueError(
            f"{type(model).__name__} works on cached keys before it attends (latent attention), and here they stay in "
            "pages; use make_store and PlaitCache"
        ) from error
    return store


def windows_of(config: Any) -> dict[int, int]:
    """The sliding windows of a model's layers, of those that have one."""
    kinds = getattr(config, "layer_types", None) or ()
    window: int | None = getattr(config, "sliding_window", None)
    sliding = [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    return dict.fromkeys(sliding, window) if window is not None else {}


def _read_a_token(model: Any, store: CompressedStore) -> None:
    """Run the model on one token of a cache of a store."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), CompressedCache(store, token) as cache:
        model(input_ids=token, past_key_values=cache)


def facts_of(model: Any) -> ModelFacts:
    """What scorers may ask of a model: its rotary embedding, if it is of the usual kind, and output projections."""
    attentions = [m for m in model.modules() if hasattr(m, "o_proj") and hasattr(m, "layer_idx")]
    outputs = tuple(m.o_proj.weight for m in sorted(attentions, key=lambda m: m.layer_idx))
    rotaries = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(rotaries) != 1 or not attentions:
        return ModelFacts(None, outputs)
    own = Rotary(rotaries[0].inv_freq.cpu(), float(getattr(rotaries[0], "attention_scaling", 1.0)))
    return ModelFacts(own if _agrees(own, rotaries[0], attentions[0]) else None, outputs)


def _agrees(own: Rotary, module: nn.Module, attention: nn.Module) -> bool:
    """Whether the model rotates a probe as we would."""
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    width, places = int(getattr(attention, "head_dim", 0)), torch.tensor([[0, 3, 70]])
    if turn is None or width < own.width or getattr(module, "rope_type", "default") == "dynamic":
        return False
    device = own.frequencies.device
    probe = torch.linspace(-1, 1, 3 * width, device=device).reshape(1, 1, 3, width)
    with torch.no_grad():
        cos, sin = (x.to(device) for x in module(probe, places))
        theirs, _ = turn(probe, probe, cos, sin)
    return torch.allclose(theirs.float(), own.rotate(probe, places[0]), atol=1e-4)


def repetitions(ids: Tensor, ask: Tensor | None, chunk: int) -> list[Tensor]:
    """What a model reads to repeat its text: the request, then a chunk of it. Shape: ids `[batch, tokens]`"""
    before = ids[:, :0] if ask is None else ask.to(ids.device).expand(len(ids), -1)
    return [torch.cat([before, part], 1) for part in ids.split(chunk, 1)]


class CompressedCache(RowCache):
    """A transformers cache of which each head keeps what matters. Padding is not stored.

    A forward of more than one token is a prompt: its attention is the model's own, then the layer chooses. Close it, or
    use `with`.

    Args:
        store: see `compressed_store`.
        input_ids: the prompts, `[batch, tokens]` or one row. Where the store is not private, they find what was kept
            of texts they begin with, if all rows find equally much.
        attention_mask: as given to `generate`, if rows are padded.
        tenant: whose prompts these are.
        repeats: rows that `generate` makes of each prompt: its `num_beams` or `num_return_sequences`.

    State: a forward is a step of the store, committed when the next begins or the cache is closed.
    """

    store: CompressedStore
    seqs: list[KeptSequence]

    def __init__(
        self,
        store: CompressedStore,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        repeats: int = 1,
        tenant: str | None = None,
    ) -> None:
        super().__init__(store)
        rows = 1 if input_ids.dim() == 1 else len(input_ids)
        self.seqs = self._open(input_ids, attention_mask, rows, repeats, tenant)
        given = None if attention_mask is None else attention_mask.reshape(rows, -1)
        self.mask = None if given is None else given.repeat_interleave(repeats, 0).bool().cpu()
        self.columns = self.cached_tokens = self.seqs[0].tokens if self.seqs else 0
        self.step: KeptStep | None = None
        self.valid = torch.ones(rows * repeats, 0, dtype=torch.bool)  # of the step's columns
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._listens = False

    def _open(
        self, ids: Tensor, mask: Tensor | None, rows: int, repeats: int, tenant: str | None
    ) -> list[KeptSequence]:
        if mask is not None and not bool(mask.all()):
            return self.store.open_batch(rows * repeats)
        prompts = list(ids.reshape(rows, -1).repeat_interleave(repeats, 0))
        seqs = self.store.open_batch(prompts, tenant)
        if len({seq.tokens for seq in seqs}) > 1:  # rows go on from one column together
            self.store.close(seqs)
            return self.store.open_batch(rows * repeats)
        return seqs

    @property
    def tokens(self) -> int:
        """Columns of each row so far, the last forward's included once all its layers ran."""
        step = self.step
        done = step is not None and len(step.done) == self.store.spec.layers
        return self.columns + (self.valid.shape[1] if done else 0)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take one layer's new tokens: [batch, kv_heads, new, d]; attention finds the others in the store."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError(
                "CompressedCache keeps values, not graphs: call the model under torch.no_grad()"
            )
        if layer == 0:
            self._begin(len(k), k.shape[2])
        assert self.step is not None
        self.store.append(self.step, layer, self._rows(k), self._rows(v))
        self._fresh = (k, v)
        return InPages.of(self, layer), InPages.of(self, layer)

    def _begin(self, batch: int, new: int) -> None:
        self.commit()
        if batch != len(self.seqs):
            raise ValueError(
                f"the cache holds {len(self.seqs)} rows, the input {batch}; make it from the same ids, with "
                "repeats=num_beams or num_return_sequences"
            )
        columns = torch.arange(self.columns, self.columns + new)
        self.valid = torch.ones(batch, new, dtype=torch.bool)
        if self.mask is not None:
            known = columns < self.mask.shape[1]
            self.valid[:, known] = self.mask[:, columns[known]]
        self.step = self.store.reserve(self.seqs, self.valid.sum(1).tolist())
        self.step.listens = self._listens

    def _rows(self, x: Tensor) -> Tensor:
        """The valid tokens of all rows, end to end: [batch, heads, new, d] -> [tokens, heads, d]."""
        whole = x.transpose(1, 2)
        return whole.flatten(0, 1) if bool(self.valid.all()) else whole[self.valid.to(x.device)]

    def attend(
        self, module: nn.Module, layer: int, query: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Attend in one layer; see `pages.pages_attention`. A first prompt's attention is the model's own."""
        step, window = self.step, kwargs.get("sliding_window")
        assert step is not None
        assert self._fresh is not None
        self._check_mask(attention_mask, window)
        q = self._rows(query)
        if self.columns == 0:
            o, weights = sdpa_attention_forward(
                module, query, *self._fresh, attention_mask, scaling=scaling, **kwargs
            )
            self.store.finish(step, layer, q, scaling)
            return o, weights
        lo = None
        if window is not None:
            lo = torch.from_numpy(self._places(step)) - window + 1
        o, _ = self.store.attend(self.seqs, layer, q, lo=lo, scale=scaling, step=step)
        batch, new = self.valid.shape
        whole = o.new_zeros(batch, new, *o.shape[1:])
        whole[self.valid.to(o.device)] = o
        return whole, None

    def _places(self, step: KeptStep) -> np.ndarray:
        """Where the step's tokens stand in the text of their rows."""
        return np.concatenate(
            [np.arange(n) + seq.tokens for seq, n in zip(step.seqs, step.counts, strict=True)]
        )

    def _check_mask(self, mask: Tensor | None, window: int | None) -> None:
        """Refuse a mask that is not causal with padding: evicted tokens have no column in it.

        Raises:
            ValueError: saying so.
        """
        if mask is None:
            return
        new, columns = mask.shape[-2:]
        before = torch.ones(len(self.seqs), columns, dtype=torch.bool)
        if self.mask is not None:
            known = min(columns, self.mask.shape[1])
            before[:, :known] = self.mask[:, :known]
        row, column = torch.arange(columns - new, columns)[:, None], torch.arange(columns)
        causal = (column <= row) & (True if window is None else column > row - window)
        want = causal & before[:, None]
        given = (mask if mask.dtype == torch.bool else mask == 0).cpu()[:, 0]
        seen = self.valid[:, :, None]  # what padding rows see does not matter
        if not torch.equal(given & seen, (want & seen).expand_as(given)):
            raise ValueError(
                "a mask other than causal with the padding this CompressedCache was told of (attention_mask=) cannot "
                "be: evicted tokens have no column; use a PlaitCache"
            )

    def commit(self) -> None:
        """Commit the last forward, or drop it if it did not come to its end."""
        step, self.step, self._fresh = self.step, None, None
        if step is not None and len(step.done) == self.store.spec.layers:
            self.store.commit(step)
            self.columns += self.valid.shape[1]
        elif step is not None:
            self.store.abort(step)

    def reconstruct(
        self, model: Any, ids: Tensor, ask: Tensor | None = None, chunk: int = 2048
    ) -> None:
        """Let the model repeat its text, chunk by chunk, and keep what it needed for that (KVzip).

        Args:
            ids: the text that is cached, `[batch, tokens]`.
            ask: ids that ask for a repetition, `[tokens]`, put before each chunk.

        Raises:
            ValueError: if the store's scorers do not wait for it, or the text is not the one that is cached.
        """
        self.commit()
        if not self.store.waits or ids.shape != (len(self.seqs), self.columns):
            raise ValueError(
                f"reconstruct: {list(ids.shape)} ids for {len(self.seqs)} rows of {self.columns} cached tokens; give "
                "the whole cached text, without padding, and make the store with scorer='kvzip:budget=...'"
            )
        self._listens = True
        try:
            for repeated in repetitions(ids, ask, chunk):
                with torch.no_grad():
                    model(repeated, past_key_values=self, logits_to_keep=1)
                self._drop()
        finally:
            self._listens = False
            self._drop()
        self.store.choose(self.seqs)

    def _drop(self) -> None:
        """Forget the last forward."""
        step, self.step, self._fresh = self.step, None, None
        if step is not None:
            self.store.abort(step)

    def _select(self, rows: list[int]) -> None:
        super()._select(rows)
        self.mask = None if self.mask is None else self.mask[rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each row, those since the last choice at most; the number is negative or zero."""
        super().crop(tokens_to_remove)
        self.columns += tokens_to_remove

    def _left(self, length: int, change: int) -> int:
        return max(0, super()._left(length, change))  # a padded row is shorter than its columns

    def reset(self) -> None:
        """Forget all tokens."""
        self.commit()
        for seq in self.seqs:
            self.store.truncate(seq, 0)
        self.columns = 0
