"""The residual stream of a pre-norm decoder: all-reduce, add and the next norm as one step.

Sixty-odd families of transformers share one decoder layer word for word: norm, attention, add, norm, MLP, add. Between
two matrix products a cut layer then does: all-reduce, add, norm. `StreamLayer` does the three at once where nothing is
recorded for a backward, and carries the norm over to the next layer. A layer whose code is not that text keeps it.

With ``weave`` a prefill goes in pieces of its tokens, see weave.py.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import autograd
from ..collectives.fused import all_reduce_rms_norm
from ..collectives.primitive import Group
from ..cuda_kernels.add_rms_norm import add_rms_norm
from .edits import Edit, SetAttribute, SwapClass
from .families import decoder_layers, forward_code, is_transformers
from .outlet import Outlet, run
from .ranks import ModelRanks
from .tensor import Link, RowLinear
from .weave import (
    after_attention,
    after_attention_recorded,
    through_layer,
    weaves_attention,
    weaves_mlp,
    whole,
)

PRE_NORM = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(
    hidden_states=hidden_states, attention_mask=attention_mask, position_ids=position_ids,
    past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""


@dataclass
class Norm:
    """An RMSNorm as the fused step needs it; ``eps`` is None where the module computes something else."""

    module: nn.Module
    eps: float | None

    def fuses(self, x: Tensor) -> bool:
        """Say whether the fused step stands in for the module, hooks included."""
        watched = self.module._forward_hooks or self.module._forward_pre_hooks
        return self.eps is not None and x.dtype in (torch.float32, torch.bfloat16) and not watched

    def with_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add what was summed to the stream, and normalise: the normalised stream, and the stream."""
        if self.fuses(x):
            assert self.eps is not None
            weight: Any = self.module.weight
            return add_rms_norm(x, residual, weight, self.eps)
        total = residual + x
        return self.module(total), total


@dataclass
class Stream:
    """What the layers of one model share: one layer's output, and what the next one's norm makes of it."""

    group: Group
    pieces: int = 1
    ready: tuple[Tensor, int, Norm | None, Tensor] | None = None

    def hand_over(self, total: Tensor, norm: Norm | None, normed: Tensor | None) -> None:
        """Keep what the next layer's norm makes of this layer's output."""
        self.ready = None if normed is None else (total, version(total), norm, normed)

    def norm(self, hidden: Tensor, norm: Norm) -> Tensor:
        """Normalise a layer's input, unless the layer before has, and nobody has written to it since."""
        ready, self.ready = self.ready, None
        here = ready is not None and ready[0] is hidden and ready[2] is norm
        if ready is not None and here and ready[1] == version(hidden):
            return ready[3]
        return norm.module(hidden)

    def add(
        self, partial: Tensor, waiting: bool, residual: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sum over the ranks, add to the stream, and normalise for the reader, if there is one.

        Shape: partial, residual [batch, seq, hidden] -> sum [batch, seq, hidden], and the same normalised
        Collective: one all-reduce of ``partial`` over the model's ranks if its sum is ``waiting``.
        """
        if waiting and norm is not None and norm.fuses(partial):
            assert norm.eps is not None
            weight: Any = norm.module.weight
            normed, total = all_reduce_rms_norm(partial, residual, weight, norm.eps, self.group)
            return total, normed
        total = residual + (autograd.leave(partial, self.group) if waiting else partial)
        return total, None if norm is None else norm.module(total)


def version(x: Tensor) -> int:
    """Count how often a tensor was written to, where torch does."""
    return 0 if x.is_inference() else x._version


@dataclass
class Plumbing:
    """Where one layer meets the stream. A None outlet sums by itself."""

    stream: Stream
    attention: Outlet | None
    mlp: Outlet | None
    first: Norm
    second: Norm
    following: Norm | None


class StreamLayer(nn.Module):
    """A pre-norm decoder layer that leaves the sums of its row layers to the residual stream."""

    _plait_stream: Plumbing

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        here = self._plait_stream
        recorded = torch.is_grad_enabled() or self.training
        if args or (recorded and here.stream.pieces == 1):
            return super().forward(hidden_states, *args, **kwargs)
        if recorded:
            return self._forward_recorded(here, hidden_states, kwargs)
        if weaves_attention(here, self, hidden_states, kwargs):
            return through_layer(here, self, hidden_states, kwargs)
        hidden_states = whole(hidden_states)
        normed = here.stream.norm(hidden_states, here.first)
        out, waiting = run(here.attention, self.self_attn, hidden_states=normed, **kwargs)
        if waiting and weaves_mlp(here, self, out.shape[:-1].numel()):
            return after_attention(here, self, out, hidden_states)
        total, normed = here.stream.add(out, waiting, hidden_states, here.second)
        assert normed is not None
        out, waiting = run(here.mlp, self.mlp, normed)
        total, normed = here.stream.add(out, waiting, total, here.following)
        here.stream.hand_over(total, here.following, None if self._overwritten(total) else normed)
        return total

    def _forward_recorded(self, here: Plumbing, hidden: Tensor, given: dict[str, Any]) -> Tensor:
        """The same layer with nothing fused, in pieces where it weaves."""
        normed = here.first.module(hidden)
        out, waiting = run(here.attention, self.self_attn, hidden_states=normed, **given)
        if waiting and weaves_mlp(here, self, out.shape[:-1].numel()):
            return after_attention_recorded(here, self, out, hidden)
        total = hidden + (autograd.leave(out, here.stream.group) if waiting else out)
        out, waiting = run(here.mlp, self.mlp, here.second.module(total))
        return total + (autograd.leave(out, here.stream.group) if waiting else out)

    def _overwritten(self, total: Tensor) -> bool:
        """Say whether somebody may write to this output unseen: a hook in inference mode, which counts no versions."""
        return bool(self._forward_hooks) and total.is_inference()


def stream_edits(model: Any, ranks: ModelRanks, roles: list[Edit]) -> list[Edit]:
    """Let the decoder layers that are pre-norm to the letter use the fused step."""
    if not ranks.plan.tp.fuse or ranks.span is not None or not is_transformers(model):
        return []
    links = {
        id(e.owner): e.value
        for e in roles
        if isinstance(e, SetAttribute) and e.name == "_plait" and isinstance(e.value, Link)
    }
    rows = {
        id(e.module) for e in roles if isinstance(e, SwapClass) and issubclass(e.mixin, RowLinear)
    }
    layers: list[Any] = [m for m in decoder_layers(model)[1] if is_pre_norm(type(m))]
    stream, edits = Stream(ranks.all, ranks.plan.tp.weave), list[Edit]()
    seen: dict[tuple[type, float], bool] = {}
    norms = [
        (as_norm(m.input_layernorm, seen), as_norm(m.post_attention_layernorm, seen))
        for m in layers
    ]
    for i, layer in enumerate(layers):
        last = [only_row(half, rows) for half in (layer.self_attn, layer.mlp)]
        outlets = [None if row is None else Outlet(links[id(row)]) for row in last]
        if outlets == [None, None]:
            continue
        following = norms[i + 1][0] if i + 1 < len(layers) else None
        plumbing = Plumbing(stream, outlets[0], outlets[1], *norms[i], following)
        edits += [SetAttribute(r, "_plait", o) for r, o in zip(last, outlets, strict=True) if o]
        edits += [SetAttribute(layer, "_plait_stream", plumbing), SwapClass(layer, StreamLayer)]
    return edits


def only_row(module: nn.Module, rows: set[int]) -> nn.Module | None:
    """The one row layer of a module, if it has one and adds no bias after the sum."""
    own = [m for m in module.children() if id(m) in rows and m._parameters.get("bias") is None]
    return own[0] if len(own) == 1 else None


def is_pre_norm(kind: type) -> bool:
    """Say whether a decoder layer's forward is, statement for statement, the one that `StreamLayer` stands in for."""
    function = forward_code(kind)
    if function is None:
        return False
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return [ast.dump(s) for s in body] == [ast.dump(s) for s in ast.parse(PRE_NORM).body]


def as_norm(module: nn.Module, seen: dict[tuple[type, float], bool]) -> Norm:
    """Find out whether a norm is RMSNorm by what it computes; ``seen`` remembers the classes that were tried."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if not isinstance(eps, float) or weight is None or weight.dim() != 1:
        return Norm(module, None)
    key = (type(module), eps)
    if key not in seen:
        seen[key] = computes_rms_norm(module, eps)
    return Norm(module, eps if seen[key] else None)


@torch.no_grad()
def computes_rms_norm(module: nn.Module, eps: float) -> bool:
    """Compare a copy of the norm with the formula, on rows small enough for eps to show."""
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    g = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=g) + 0.5)
    weight = twin.get_parameter("weight")
    x = torch.randn(4, len(weight), generator=g) * torch.tensor([[1e-3], [1e-2], [1.0], [9.0]])
    expected = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    try:
        return torch.allclose(twin(x), expected, rtol=1e-5, atol=0)
    except Exception:  # a module that does not take one activation is not a norm we know
        return False
