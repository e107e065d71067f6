"""The library's methods as caches of a transformers model, with what they hold and read counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from plait.kvstore.codecs import Balancer, Codec, Mixed, PageLayout, find_codec, find_kv_codec
from plait.kvstore.compress import LayerView, keep_best
from plait.kvstore.compress.scorers import H2O
from plait.kvstore.engines.compressed import CompressedCache, compressed_store
from plait.kvstore.engines.pages import InPages, read_pages_in_place
from plait.kvstore.engines.transformers import PlaitCache, make_store
from plait.kvstore.select import KeyView, Selection, Selector, find_selector
from plait.kvstore.select.rocket import split

PAGE_TOKENS = 16


@dataclass
class Opened:
    """A cache for a batch, and what it came to.

    Attributes:
        read: share of the cached tokens that a KV head read in a decode step, the mean.
        held: bytes held over those of all keys and values in 16 bits.
    """

    cache: Any
    read: Callable[[], float] = lambda: 1.0
    held: Callable[[], float] = lambda: 1.0
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Method:
    """A row of the table. ``open(model, ids)`` gives a cache for rows of one length."""

    family: str
    name: str
    open: Callable[[Any, Tensor], Opened]
    shift: int = 0  # added to the positions of decoded tokens: a control
    turns: bool = False  # later questions come as prompts of their own, not token by token


def full() -> Method:
    """Everything, exact."""
    return Method("full", "full", lambda model, ids: Opened(DynamicCache()))


# ---- selection


@dataclass(frozen=True)
class Counted(Selector):
    """Another selector, and how much it had read.

    State: `counts` grows: tokens read, tokens there were.
    """

    inner: Selector | None = None
    spoil: str = ""
    counts: list[float] = field(default_factory=lambda: [0.0, 0.0], compare=False)
    name: ClassVar[str] = "counted"

    @property
    def share(self) -> float:
        """Share of the cached tokens that were read."""
        return self.counts[0] / max(1.0, self.counts[1])

    def queries(self, tokens: int) -> int:
        """What the inner one wants."""
        return 0 if self.inner is None else self.inner.queries(tokens)

    def prompt(self, q: Tensor, view: KeyView) -> None:
        """Show the inner one."""
        if self.inner is not None:
            self.inner.prompt(q, view)

    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        """Ask the inner one; a spoiled one is a control."""
        assert self.inner is not None
        seen = view
        if self.spoil == "stale":  # summaries of other keys than those that are read
            seen = replace(view, pages=view.pages.roll(1))
        chosen = self.inner.plan(q, seen)
        if chosen is None:
            read = float(view.tokens * view.kv_heads)
        else:
            read = float(len(chosen.indices) * chosen.unit)
            if self.spoil == "shuffled":
                units = -(-view.tokens // chosen.unit)
                lists = [torch.randperm(units)[: len(own)].sort().values for own in chosen.lists()]
                chosen = chosen._replace(indices=torch.cat(lists).int())
        self.counts[0] += read
        self.counts[1] += view.tokens * view.kv_heads
        return chosen


def selecting(text: str, name: str = "", spoil: str = "", turns: bool = False) -> Method:
    """A store with a selector, its pages read in place."""

    def open_(model: Any, ids: Tensor) -> Opened:
        counted = Counted(find_selector(text), spoil)
        store = make_store(model, PAGE_TOKENS, weights="recall", selector=counted)
        read_pages_in_place(model)
        cache = PlaitCache(store, ids, in_place=True)
        return Opened(cache, lambda: counted.share, close=cache.close)

    return Method("selection", name or text, open_, turns=turns)


# ---- eviction


def evicting(text: str, name: str = "", selector: str | None = None, shift: int = 0) -> Method:
    """A store that keeps what a scorer says; with a selector that reads a part of it."""

    def open_(model: Any, ids: Tensor) -> Opened:
        counted = None if selector is None else Counted(find_selector(selector))
        store = compressed_store(model, text, page_tokens=PAGE_TOKENS, selector=counted)
        cache = CompressedCache(store, ids)
        kept = lambda: store.report()["kept_tokens"] / max(1, store.report()["text_tokens"])  # noqa: E731
        read = lambda: kept() * (1.0 if counted is None else counted.share)  # noqa: E731
        return Opened(cache, read, lambda: store.report()["ratio"], cache.close)

    return Method("eviction", name or text, open_, shift)


def rocket(budget: float, name: str) -> Method:
    """Both stages of RocketKV, the budget of a step split as the paper says."""

    def open_(model: Any, ids: Tensor) -> Opened:
        tokens = round(budget * ids.shape[1])
        kept = split(ids.shape[1], tokens, 0, model.config.head_dim).kept
        stage_one = f"snapkv:window=32,kernel=63,pool=max,budget={kept}"
        return evicting(stage_one, name, f"rocket:budget={tokens}").open(model, ids)

    return Method("eviction", name, open_)


# ---- codecs


class CodedCache(DynamicCache):
    """What codecs make of a prompt's keys and values, but of its newest tokens; decoded tokens are exact.

    Args:
        tail: newest tokens of the prompt that stay exact.
    """

    def __init__(self, tail: int = 32) -> None:
        super().__init__()
        self.tail = tail
        self.bytes = [0, 0]
        self.fresh: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; a prompt's attention is asked of `attend`."""
        first = self.get_seq_length(layer_idx) == 0
        whole = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not first:
            return whole
        self.fresh.add(layer_idx)
        return InPages.of(self, layer_idx), InPages.of(self, layer_idx)

    def attend(
        self, module: Any, layer: int, query: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Attend to the prompt exactly, then keep what its bytes say."""
        own = self.layers[layer]
        found = sdpa_attention_forward(
            module, query, own.keys, own.values, attention_mask, scaling=scaling, **kwargs
        )
        k, v = (x.transpose(1, 2) for x in (own.keys, own.values))
        coded = self.code(k, v, query)
        own.keys, own.values = (x.transpose(1, 2).contiguous() for x in coded)
        return found

    def code(self, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Give what comes back.

        Shape: k, v `[rows, tokens, kv_heads, head_dim]`, q `[rows, heads, tokens, head_dim]`
        """
        raise NotImplementedError

    def through(self, codec: Codec, x: Tensor) -> Tensor:
        """Write all but the tail down, read it back, and count."""
        once = codec.tokens_at_once
        stop = max(0, x.shape[1] - self.tail) // once * once
        page, rest = x[:, :stop].contiguous(), x[:, stop:]
        data = codec.encode(page)
        self.bytes[0] += data.size + 2 * rest.numel()
        self.bytes[1] += 2 * x.numel()
        return torch.cat([codec.decode(data, PageLayout.of(page)), rest], 1)


class PlainlyCoded(CodedCache):
    """One codec for keys and one for values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.codec = find_kv_codec(text)

    def code(self, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Through the codecs."""
        return self.through(self.codec.keys, k), self.through(self.codec.values, v)


class MixedCoded(CodedCache):
    """MiKV: tokens that received much attention exact, the others in few bits; with its balancer or without.

    Args:
        mirrored: whether keys are divided again by what they were multiplied with; a control if not.
    """

    def __init__(self, low: str, share: float, balanced: bool, mirrored: bool = True) -> None:
        super().__init__()
        self.low, self.share, self.balanced, self.mirrored = low, share, balanced, mirrored

    def code(self, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """By the attention of all queries."""
        view = LayerView(k.transpose(1, 2), v.transpose(1, 2), q)
        keep = round(self.share * k.shape[1])
        scores = H2O(recent=0.0).score(view, keep).flatten(0, 1)
        kept = keep_best(scores, torch.full((len(scores),), keep))
        tiers = torch.zeros(scores.shape, dtype=torch.uint8)
        for row, own in zip(tiers, kept, strict=True):
            row[own] = 1
        tiers = tiers.unflatten(0, (len(k), -1)).transpose(1, 2)  # [rows, tokens, kv_heads]
        mixed = Mixed((find_codec(self.low), find_codec("bf16")))
        if not self.balanced:
            return self.mix(mixed, k, tiers), self.mix(mixed, v, tiers)
        sizes = q.abs().amax((0, 2)).unflatten(0, (k.shape[2], -1)).amax(1)
        balancer = Balancer.of(sizes, k.abs().amax((0, 1)))
        back = self.mix(mixed, balancer.encode(k), tiers)
        if self.mirrored:
            back = balancer.decode(back, PageLayout.of(back))
        return back, self.mix(mixed, v, tiers)

    def mix(self, mixed: Mixed, x: Tensor, tiers: Tensor) -> Tensor:
        """Write all but the tail down by its tiers, read it back, and count."""
        stop = x.shape[1] - self.tail
        page, rest = x[:, :stop].contiguous(), x[:, stop:]
        data = mixed.encode(page, tiers[:, :stop].contiguous())
        self.bytes[0] += data.size + 2 * rest.numel()
        self.bytes[1] += 2 * x.numel()
        return torch.cat([mixed.decode(data, PageLayout.of(page))[0], rest], 1)


def coding(text: str, name: str = "") -> Method:
    """A cache whose prompt went through a codec, such as ``kivi:bits=2`` or ``int4/int2``."""
    return _coded(lambda: PlainlyCoded(text), name or text)


def mixing(low: str, name: str, balanced: bool, mirrored: bool = True) -> Method:
    """MiKV with a tenth of the tokens exact."""
    return _coded(lambda: MixedCoded(low, 0.1, balanced, mirrored), name)


def _coded(make: Callable[[], CodedCache], name: str) -> Method:
    def open_(model: Any, ids: Tensor) -> Opened:
        read_pages_in_place(model)
        cache = make()
        return Opened(cache, held=lambda: cache.bytes[0] / max(1, cache.bytes[1]))

    return Method("codec", name, open_)
