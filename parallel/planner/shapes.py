"""Shapes: what the planner knows of a decoder, layer kind by layer kind; and its parameter counts."""

from __future__ import annotations

from dataclasses import dataclass

from ..shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention: GQA (or MFA: one KV head and a query rank), MLA, or linear.

    Args:
        window: tokens a sliding-window layer sees and keeps; None is all.
        q_rank: width of a low-rank query projection, or None.
        kv_rank: width of MLA's latent; None is GQA. ``rope_dim`` is the rotary part beside it.
        state: elements of a linear layer's state per request; 0 is an attention that keeps tokens.
        mixer: parameters of a linear layer, where ``state`` is given.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None = None
    q_rank: int | None = None
    kv_rank: int | None = None
    rope_dim: int = 0
    state: int = 0
    mixer: int = 0
    bias: bool = False
    output_bias: bool = False
    qk_norm: int = 0
    sinks: bool = False

    @property
    def is_mla(self) -> bool:
        """Whether the cache is one latent per token."""
        return self.kv_rank is not None

    @property
    def cache_heads(self) -> int:
        """KV heads as cached; no more ranks than this can share the cache by heads."""
        return 1 if self.is_mla else self.kv_heads

    @property
    def cache_width(self) -> int:
        """Elements cached per token and cached head: K and V, or the latent and its rotary part."""
        if self.kv_rank is not None:
            return self.kv_rank + self.rope_dim
        return self.head_dim + self.value_head_dim

    @property
    def kv_elements(self) -> int:
        """Elements cached per token of this layer."""
        return 0 if self.state else self.cache_heads * self.cache_width

    @property
    def q_params(self) -> int:
        """Weights of the query projection."""
        wide = self.heads * self.head_dim
        if self.q_rank is None:
            return self.hidden * wide
        return self.hidden * self.q_rank + self.q_rank * wide

    @property
    def kv_params(self) -> int:
        """Weights that make what is cached: W_K and W_V, or MLA's down-projection."""
        if self.kv_rank is not None:
            return self.hidden * (self.kv_rank + self.rope_dim)
        return self.hidden * self.kv_heads * (self.head_dim + self.value_head_dim)

    @property
    def up_params(self) -> int:
        """Weights of MLA's W_UK and W_UV, which a decode step absorbs; 0 otherwise."""
        if self.kv_rank is None:
            return 0
        return self.kv_rank * self.heads * (self.head_dim - self.rope_dim + self.value_head_dim)

    @property
    def o_params(self) -> int:
        """Weights of the output projection."""
        return self.heads * self.value_head_dim * self.hidden

    @property
    def matrix_params(self) -> int:
        """Weights that a token is multiplied with."""
        return self.mixer or self.q_params + self.kv_params + self.up_params + self.o_params

    @property
    def params(self) -> int:
        """All parameters, with norms, biases and sinks."""
        if self.mixer:
            return self.mixer
        extra = self.qk_norm + (self.heads if self.sinks else 0)
        if self.kv_rank is not None:
            extra += self.kv_rank + (self.q_rank or 0)
        if self.bias:
            extra += self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return self.matrix_params + extra + (self.hidden if self.output_bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """One layer's feed-forward: dense (``experts=0``) or experts.

    Args:
        width: of the dense FFN, or of one routed expert.
        shared: width of all shared experts together.
        latent: width of what routed experts read and write (LatentMoE); None is ``hidden``.
        zero: zero-computation experts (MoE++) among which a token may also choose.
        choice_bias: whether the router keeps one number per expert for balancing.
    """

    hidden: int
    width: int
    experts: int = 0
    per_token: int = 0
    shared: int = 0
    latent: int | None = None
    zero: int = 0
    bias: bool = False
    gate_of_shared: bool = False
    choice_bias: bool = False

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert (or of the dense FFN): up, gate and down."""
        return 3 * (self.latent or self.hidden) * self.width

    @property
    def shared_params(self) -> int:
        """Weights of the shared experts and of LatentMoE's two projections."""
        projections = 2 * self.hidden * self.latent if self.latent else 0
        return 3 * self.hidden * self.shared + projections

    @property
    def router_params(self) -> int:
        """Weights of the router."""
        return self.hidden * (self.experts + self.zero) if self.experts else 0

    @property
    def active_params(self) -> int:
        """Weights that one token is multiplied with, without the router."""
        if not self.experts:
            return self.expert_params
        chosen = self.per_token * self.experts / (self.experts + self.zero)
        return round(chosen * self.expert_params) + self.shared_params

    @property
    def params(self) -> int:
        """All parameters."""
        if not self.experts:
            return self.expert_params
        biases = (2 * self.width + self.hidden) * self.experts + self.experts if self.bias else 0
        extra = (self.experts if self.choice_bias else 0) + (
            self.hidden if self.gate_of_shared else 0
        )
        return (
            self.experts * self.expert_params
            + self.shared_params
            + self.router_params
            + biases
            + extra
        )


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that are all alike."""

    count: int
    attention: Attention
    ffn: Ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model as the planner sees it."""

    name: str
    shape: ModelShape
    kinds: tuple[LayerKind, ...]
    vocab: int
    tied: bool = False
    source: str = "a config that was given"

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.kinds[0].attention.hidden

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(kind.count for kind in self.kinds)

    @property
    def layer_params(self) -> int:
        """Parameters of all layers, with their two norms."""
        norms = 2 * self.hidden
        return sum(k.count * (k.attention.params + k.ffn.params + norms) for k in self.kinds)

    @property
    def embedding_params(self) -> int:
        """Parameters of the embedding and of the head, one matrix where tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """All parameters."""
        return self.layer_params + self.embedding_params + self.hidden

    @property
    def active_params(self) -> int:
        """Parameters one token uses, embedding and head included."""
        unused = sum(k.count * _idle(k.ffn) for k in self.kinds if k.ffn.experts)
        return self.params - round(unused)

    @property
    def kv_elements(self) -> int:
        """Elements cached per token, all layers, windows not applied."""
        return sum(kind.count * kind.attention.kv_elements for kind in self.kinds)

    @property
    def has_experts(self) -> bool:
        """Whether any layer routes."""
        return any(kind.ffn.experts for kind in self.kinds)

    @property
    def is_mla(self) -> bool:
        """Whether the cache is latent."""
        return any(kind.attention.is_mla for kind in self.kinds)


def _idle(ffn: Ffn) -> float:
    """Parameters of the experts that one token does not choose, their biases included."""
    biases = 2 * ffn.width + ffn.hidden if ffn.bias else 0
    return (ffn.experts - ffn.per_token) * (ffn.expert_params + biases)
