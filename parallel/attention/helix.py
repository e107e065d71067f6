"""Helix attention: the KV cache cut along the sequence over kvp, its heads over tp, everything after on all ranks.

One layer, one step (Helix Parallelism, arXiv 2507.07120, section 2):
q, k, v of the tp group's heads -> local attention over this rank's tokens -> one all-to-all over kvp and a merge by
lse -> the output projection over all kvp * tp ranks -> one all-reduce. The bytes do not depend on the context length.
For long prompts the ranks compute their own rows only and gather keys and values instead: see exchange.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...collectives.trace import span
from ...cuda_kernels.dense_attention import dense_attention
from ...cuda_kernels.scores import Interleave
from ...kvstore import CompressedStore
from ..edits import AddHook, Edit, SetAttribute
from ..errors import PlanError
from ..layout import Cut
from ..ranks import ModelRanks
from ..roles import row_edits
from ..tensor import Link, RowLinear
from .exchange import (
    Chunks,
    cheaper,
    connected,
    exchange_partials,
    gather_keys,
    pass_keys,
    rows_to_heads,
)
from .hopb import Pace
from .step import Part, Step, make_step

RUNNING = "plait_step"
"""Name of the keyword in which transformers models hand a forward's step down to their attention modules."""


@dataclass
class HelixState:
    """What the Helix layers of one model share: their ranks, and the step that runs.

    State: ``step``, ``parts`` and ``cache`` are set when a forward begins and stay until the next one.
    """

    ranks: ModelRanks
    layers: list[HelixLayer] = field(default_factory=list)
    step: Step | None = None
    parts: tuple[Part, ...] = ()
    cache: Any = None

    def __post_init__(self) -> None:
        self.pace = Pace(self.ranks)

    @property
    def rule(self) -> Interleave:
        """The position rule of this rank."""
        return Interleave(self.ranks.plan.kvp.interleave, self.ranks.kvp, self.ranks.k)

    def begin(
        self, batch: int, length: int, past: list[int], valid: Any, cache: Any, device: torch.device
    ) -> None:
        """Start a step: choose what to exchange and work out who owns which token."""
        kept = cache is not None and isinstance(cache.store, CompressedStore)
        mode = self.ranks.plan.kvp.exchange if self.ranks.kvp > 1 and not kept else "partials"
        if mode == "auto":
            rows = batch * length if valid is None else int(valid.sum())
            mode = self.layers[0].cheaper(rows, rows + sum(past))
        step = make_step(batch, length, past, valid, mode, self.rule, device)
        if mode == "kv" and min(step.rows_of_rank) == 0:
            # A module cannot reshape zero rows into heads; few rows are the case for partials anyway.
            step = make_step(batch, length, past, valid, "partials", self.rule, device)
        self.step, self.cache, self.parts = step, cache, ()
        if kept and max(step.counts, default=0) > 1:
            return  # prompts choose what they keep, with exchanges of their own
        if cache is not None and step.mode == "partials" and not torch.is_grad_enabled():
            self.parts = step.parts(self.pace.chunks(step, device, self.layers[0]))

    def running(self) -> Step:
        """The step of the forward that runs."""
        if self.step is None:
            raise RuntimeError(
                "a Helix layer was called outside its model's forward; call the model, or helix_step(model, ...) first"
            )
        return self.step


@dataclass
class HelixLayer:
    """One attention module under Helix. ``number`` is its layer in the KV store, which keeps only Helix layers."""

    state: HelixState
    number: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys and values on one rank."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    def cheaper(self, rows: int, keys: int) -> str:
        """Choose what to exchange by bytes."""
        kvp = self.state.ranks.kvp
        return cheaper(rows, keys, self.heads, self.value_dim, self.kv_width, kvp)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> Tensor:
        """Attend with the step's new tokens to everything each may see.

        Shape: q [batch, heads/tp, length, d], k, v [batch, kv_heads/tp, length, d]
            -> [batch, length, heads/(kvp*tp), d];
            in "kv" mode batch is 1 and length this rank's own rows, in and out, with all heads/tp.
        Collective: see ``exchange_partials`` and ``gather_keys``.
        """
        step = self.state.running()
        rows = [t.transpose(1, 2) for t in (q, k) + (() if v is None else (v,))]
        if step.mode == "kv":
            q, k, *rest = (t.flatten(0, 1) for t in rows)
            return self._own_rows(q, k, rest[0] if rest else None, scale, softcap, sink)[None]
        q = step.pick(rows[0])
        if len(self.state.parts) > 1:
            return step.place(self._overlapped(q, scale, softcap, sink))
        own = [step.pick(t).index_select(0, step.own) for t in rows[1:]]
        begin = time.perf_counter()
        with span("attention"):
            o, lse = self._local(q, own[0], own[1] if len(own) > 1 else None, scale, softcap)
            o = self._outgoing(o)
        if not sum(step.own_counts):
            o = connected(o, q, *rows[1:])
        middle = time.perf_counter()
        merged = self._exchange(o, lse, sink)
        self.state.pace.note(middle - begin, time.perf_counter() - middle)
        return step.place(merged)

    def as_key(self, k: Tensor, v: Tensor) -> Tensor:
        """What the store keeps as key."""
        return k

    def as_value(self, v: Tensor) -> Tensor | None:
        """What the store keeps as value; None if it is part of the key."""
        return v

    def collect(self, x: Tensor) -> Tensor:
        """Bring attention's output to the shape the output projection wants: all rows, this rank's heads."""
        step = self.state.running()
        if step.mode == "partials":
            return x
        return step.place(rows_to_heads(x[0], self.state.ranks.kvp_group, step))

    def write(self, k: Tensor, v: Tensor | None) -> None:
        """Append this rank's own tokens of the running step to the store."""
        step, cache = self.state.running(), self.state.cache
        rows = [t.detach().transpose(1, 2) for t in (k, v) if t is not None]
        if step.mode == "kv":
            own = [t.flatten(0, 1) for t in rows]
        else:
            own = [t.flatten(0, 1).index_select(0, step.own_flat) for t in rows]
        cache.store.append(cache.write_step, self.number, own[0], own[1] if len(own) > 1 else None)

    def _overlapped(
        self, q: Tensor, scale: float, softcap: float | None, sink: Tensor | None
    ) -> Tensor:
        """Attend chunk after chunk, each chunk's exchange under way behind the next one's attention (HOP-B).

        Shape: q [rows, heads/tp, d] -> [rows, heads/(kvp*tp), d]
        Collective: one all-to-all over kvp for each chunk; together the bytes of ``exchange_partials``.
        """
        group, parts = self.state.ranks.kvp_group, self.state.parts
        assert group is not None
        begin = time.perf_counter()
        chunks = Chunks(group, [len(part.lo) for part in parts])
        for number, part in enumerate(parts):
            with span(f"attention, chunk {number}"):
                o, lse = self._over_pages(q[part.rows], part, scale, softcap)
                o = self._outgoing(o)
            chunks.send(o, lse)
        merged = chunks.merge(self._own_sink(sink))
        self.state.pace.note(0.0, time.perf_counter() - begin)
        return merged

    def _outgoing(self, o: Tensor) -> Tensor:
        """What is exchanged of the local output: all of it, as it is."""
        return o

    def _exchange(self, o: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
        return exchange_partials(o, lse, self.state.ranks.kvp_group, self._own_sink(sink))

    def _own_sink(self, sink: Tensor | None) -> Tensor | None:
        """The sinks of the heads that this rank keeps."""
        if sink is None:
            return None
        kept = self.heads // self.state.ranks.kvp
        return sink[self.state.ranks.k * kept : (self.state.ranks.k + 1) * kept]

    def _over_pages(
        self, q: Tensor, part: Part, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend with some requests' rows to this rank's tokens in the store."""
        cache = self.state.cache
        return cache.store.attend(
            cache.seqs[part.requests], self.number, q, q_indptr=part.indptr, lo=part.lo, hi=part.hi,
            scale=scale, softcap=softcap, step=cache.write_step, interleave=self.state.rule,
        )  # fmt: skip

    def _local(
        self, q: Tensor, k: Tensor, v: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend with all rows to this rank's tokens, old and new."""
        step, cache = self.state.running(), self.state.cache
        if cache is not None and not recorded(q, k, v):
            whole = Part(slice(None), slice(None), step.indptr, step.lo, step.hi)
            return self._over_pages(q, whole, scale, softcap)
        keys, values = self._held(k, v)
        sizes = [int(n) for n in step_local_lengths(step)]
        o, lse = self._per_sequence(q, keys, values, sizes, scale, softcap, None)
        return bound(o, q, k, v), lse

    def _own_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> Tensor:
        """Attend with own rows to all tokens: gathered from all shards, or as they pass by (``cp`` beside ``kvp``)."""
        step = self.state.running()
        keys, values = self._held(k, v)
        if self.state.ranks.plan.cp.size > 1:
            values = keys[..., : self.value_dim] if values is None else values
            group = self.state.ranks.kvp_group
            return pass_keys(q, keys, values, group, step, scale, softcap, sink)
        keys, values = gather_keys(keys, values, self.state.ranks.kvp_group, step)
        o, _ = self._per_sequence(q, keys, values, list(step.lengths), scale, softcap, sink)
        return o

    def _held(self, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """This rank's tokens, sequence after sequence: those in the store, then the step's own."""
        step, cache = self.state.running(), self.state.cache
        if cache is None or not any(step.past):
            return k, v
        pieces: list[tuple[Tensor, ...]] = []
        new = recorded(k, v)
        ks, vs = k.split(step.own_counts), (None if v is None else v.split(step.own_counts))
        for i, seq in enumerate(cache.seqs):
            old = cache.store.keys_values(seq, self.number, None if new else cache.write_step)
            pieces.append(old)
            if new:  # the store holds values, not graphs: the step's own tokens come from the graph
                pieces.append((ks[i], ks[i][..., : self.value_dim] if vs is None else vs[i]))
        keys = pieces[0][0] if len(pieces) == 1 else torch.cat([p[0] for p in pieces])
        if v is None:
            return keys, None
        return keys, pieces[0][1] if len(pieces) == 1 else torch.cat([p[1] for p in pieces])

    def _per_sequence(
        self, q: Tensor, k: Tensor, v: Tensor | None, sizes: list[int], scale: float, softcap: float | None,
        sink: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        step = self.state.running()
        v = k[..., : self.value_dim] if v is None else v
        at = step.indptr.tolist()
        if len(sizes) == 1:
            return dense_attention(q, k, v, step.lo, step.hi, scale, softcap, sink=sink)
        parts, start = [], 0
        for i, size in enumerate(sizes):
            rows, keys = slice(at[i], at[i + 1]), slice(start, start + size)
            parts.append(
                dense_attention(
                    q[rows],
                    k[keys],
                    v[keys],
                    step.lo[rows],
                    step.hi[rows],
                    scale,
                    softcap,
                    sink=sink,
                )
            )
            start += size
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class HelixRow(RowLinear):
    """The output projection over all kvp * tp ranks, after Helix's all-to-all."""

    _plait_layer: HelixLayer

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._plait_layer.collect(input))


def step_local_lengths(step: Step) -> list[int]:
    """Tokens this rank holds of each sequence after the step."""
    return [step.rule.local_length(length) for length in step.lengths]


def recorded(*tensors: Tensor | None) -> bool:
    """Say whether autograd records any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def bound(o: Tensor, *inputs: Tensor | None) -> Tensor:
    """Make an output depend on all inputs in autograd's eyes, without changing it.

    A rank without keys computes zeros out of nothing. Its backward must still take part in the exchange and in the sums
    of its projections' gradients, or the other ranks would wait for ever.
    """
    if not recorded(*inputs):
        return o
    return o + sum(t.flatten()[:0].sum() for t in inputs if t is not None)


def helix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under Helix; registered with transformers as the attention implementation ``plait_helix``."""
    if dropout:
        raise PlanError(
            f"attention dropout {dropout}",
            "cannot be exact when keys are spread over ranks",
            "set attention_dropout=0",
        )
    layer: HelixLayer = module._plait_attention  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, scale, softcap, s_aux), None


def helix_edits(
    module: nn.Module, linear: nn.Module, path: str, cut: Cut, layer: HelixLayer
) -> list[Edit]:
    """Edits that make an attention module a Helix layer; ``linear`` is its output projection."""
    state = layer.state

    def own_rows(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        # recomputation (gradient checkpointing) comes when later forwards may have begun
        if RUNNING in kwargs:
            state.step, state.cache = kwargs.pop(RUNNING)
        step = state.running()
        if step.mode == "partials":
            return args, kwargs
        return tuple(take_rows(a, step) for a in args), {
            n: take_rows(a, step) for n, a in kwargs.items()
        }

    return [
        SetAttribute(module, "_plait_attention", layer),
        AddHook(lambda: module.register_forward_pre_hook(own_rows, with_kwargs=True)),
        SetAttribute(linear, "_plait_layer", layer),
        *row_edits(linear, path, cut, Link(state.ranks.all), HelixRow),
    ]


def take_rows(x: Any, step: Step) -> Any:
    """Take this rank's own rows of an activation: [batch or 1, length, ...] -> [1, own rows, ...]."""
    if isinstance(x, tuple):
        return tuple(take_rows(item, step) for item in x)
    if (
        not isinstance(x, Tensor)
        or x.dim() < 2
        or x.shape[1] != step.length
        or x.shape[0] not in {1, step.batch}
    ):
        return x
    if x.shape[0] == step.batch:
        return x.flatten(0, 1).index_select(0, step.own_flat)[None]
    return x[0].index_select(0, step.own_flat % step.length)[None]
