"""Multi-head latent attention (DeepSeek): the cache is one latent per token, its attention is done in the latent.

With W_UK absorbed into the query, keys are the latent itself, one KV head wide; values are its first columns. Under
kvp each rank holds a run of tokens of the latent and computes all query heads; W_UV commutes with the merge by lse, so
it may come after the exchange ("latent", the field's choice) or before it ("value": fewer bytes, W_UV for all heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import Edit, SetAttribute
from ..layout import Cut
from ..ranks import ModelRanks
from ..roles import Region, Shared, column_edits, plain_linear, row_edits
from ..tensor import Link
from .gradients import dropout_edits, held_gradient_edits
from .heads import check_heads, query_cut
from .helix import HelixLayer, HelixState, helix_edits


@dataclass(frozen=True, kw_only=True)
class Mla:
    """Multi-head latent attention. ``shared`` names modules every rank computes alike (the down projections)."""

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int
    q: str = "q_b_proj"
    kv_b: str = "kv_b_proj"
    shared: tuple[str, ...] = ()
    o: str = "o_proj"

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        """Prepare the cut: heads over tp; under kvp also the latent cache along the sequence."""
        check_heads(path, self.heads, self.heads, ranks.size, "kvp * tp" if ranks.kvp > 1 else "tp")
        edits: list[Edit] = []
        for name, width in (
            (self.q, self.nope_dim + self.rope_dim),
            (self.kv_b, self.nope_dim + self.value_dim),
        ):
            linear = plain_linear(module.get_submodule(name), f"{path}.{name}")
            cut = query_cut(self.heads, width, ranks.tp, ranks.tp_order)
            edits += column_edits(linear, f"{path}.{name}", cut, Link(ranks.all))
        for name in self.shared:
            edits += Shared().edits(module.get_submodule(name), f"{path}.{name}", ranks)
        edits += held_gradient_edits(edits, ranks)
        edits += Region().edits(module, path, ranks) + dropout_edits(module, ranks)
        linear = plain_linear(module.get_submodule(self.o), f"{path}.{self.o}")
        cut = query_cut(self.heads, self.value_dim, ranks.size, ranks.run_order, dim=1)
        if ranks.helix is None:
            return edits + row_edits(linear, f"{path}.{self.o}", cut, Link(ranks.all, ranks.span))
        return edits + self._helix_edits(module, linear, f"{path}.{self.o}", cut, ranks.helix)

    def _helix_edits(
        self, module: nn.Module, linear: nn.Module, path: str, cut: Cut, state: HelixState
    ) -> list[Edit]:
        layer = LatentLayer(
            state=state,
            number=len(state.layers),
            heads=self.heads // state.ranks.tp,
            kv_heads=1,
            head_dim=self.latent_dim + self.rope_dim,
            value_dim=self.latent_dim,
            role=self,
            up=module.get_submodule(self.kv_b),
        )
        state.layers.append(layer)
        # transformers expands the latents just before attention; under Helix they stay latents.
        return [
            *helix_edits(module, linear, path, cut, layer),
            SetAttribute(module, "expand_kv", keep_latent),
        ]


def keep_latent(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for transformers' ``expand_kv``: latent and rotary part as one key head."""
    return torch.cat([kv_nope, k_rot], -1), kv_nope


@dataclass
class LatentLayer(HelixLayer):
    """A Helix layer whose keys are latents. ``up`` is the projection that holds W_UK and W_UV of each head."""

    role: Mla | None = None
    up: nn.Module | None = None

    @property
    def kv_width(self) -> int:
        """Elements of one token's latent."""
        return self.head_dim

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> Tensor:
        """Absorb W_UK into the queries, attend in the latent, and come back through W_UV.

        Shape: q [batch, heads/tp, length, nope + rope], k [batch, 1, length, latent + rope]
            -> [batch, length, heads/(kvp*tp), value_dim]
        """
        assert self.role is not None
        nope, rotary = q.split([self.role.nope_dim, self.role.rope_dim], -1)
        absorbed = torch.cat(
            [torch.einsum("bhmd,hdr->bhmr", nope, self._up()[:, : self.role.nope_dim]), rotary], -1
        )
        out = super().attend(absorbed, k, None, scale, softcap, sink)
        if self.state.running().mode == "kv":
            return self._values(out, slice(None))
        if self.state.ranks.plan.kvp.mla == "value":
            return out
        kept = self.heads // self.state.ranks.kvp
        return self._values(out, slice(self.state.ranks.k * kept, (self.state.ranks.k + 1) * kept))

    def as_key(self, k: Tensor, v: Tensor) -> Tensor:
        """The latent and the rotary part, which transformers gives as key and value."""
        return torch.cat([k, v], -1)

    def as_value(self, v: Tensor) -> None:
        """Values are the latent's first columns."""

    def _outgoing(self, o: Tensor) -> Tensor:
        return self._values(o, slice(None)) if self.state.ranks.plan.kvp.mla == "value" else o

    def _up(self) -> Tensor:
        assert self.up is not None
        weight: Any = self.up.weight
        return weight.view(self.heads, -1, weight.shape[1])

    def _values(self, o: Tensor, heads: slice) -> Tensor:
        assert self.role is not None
        return torch.einsum("...hr,hvr->...hv", o, self._up()[heads, self.role.nope_dim :])
