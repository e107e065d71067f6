"""The role of an attention module: how its projections are cut, with and without a KV axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..edits import Edit, OverrideConfig, SetAttribute
from ..errors import PlanError
from ..layout import Cut
from ..modules import key_split_edits
from ..ranks import ModelRanks
from ..roles import Region, Shared, column_edits, cut_parameter, plain_linear, row_edits
from ..tensor import Link
from .gradients import dropout_edits, held_gradient_edits
from .heads import check_heads, check_runs, kv_cut, query_cut, stacked_cut
from .helix import HelixLayer, HelixState, helix_edits


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head or grouped-query attention.

    ``q``, ``k``, ``v``, ``o`` name the projections; or ``fused`` names one projection for all three, whose rows are
    ``"stacked"`` (all q, all k, all v: Phi-3) or ``"per_head"`` (q, k, v of each head: GPT-NeoX). ``norms`` are
    whole modules used on local heads, whose gradients are partial; ``sinks`` a parameter of one number a query head.
    ``counts`` names attributes of the module that hold ``"heads"``, ``"kv_heads"`` or ``"groups"`` and must become
    local; ``config_counts`` the same in the module's ``config``. ``window`` marks sliding-window layers, whose KV is
    short: under kvp it is kept whole on the ranks that read it instead of being cut along the sequence.

    ``through`` says how Helix reaches the attention itself: ``"sdpa"`` (any module that calls
    ``torch.nn.functional.scaled_dot_product_attention`` and shapes its heads by ``-1`` or by ``counts``) or
    ``"transformers"`` (its attention registry and its cache).
    """

    heads: int
    kv_heads: int
    head_dim: int
    q: str | None = None
    k: str | None = None
    v: str | None = None
    o: str = "o_proj"
    fused: str | None = None
    fused_order: str = "stacked"
    norms: tuple[str, ...] = ()
    sinks: str | None = None
    counts: tuple[tuple[str, str], ...] = ()
    config_counts: tuple[tuple[str, str], ...] = ()
    window: bool = False
    through: str = "sdpa"

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        """Prepare the cut of the projections; with kvp the KV heads are cut over tp and the tokens over kvp."""
        helix = ranks.helix is not None and not self.window
        count, order = (ranks.tp, ranks.tp_order) if helix else (ranks.size, ranks.run_order)
        check_heads(
            path, self.heads, self.kv_heads, count, "tp" if helix or ranks.kvp == 1 else "kvp * tp"
        )
        check_runs(path, self.heads, ranks.size)
        edits: list[Edit] = self._input_edits(module, path, ranks, count, order)
        edits += self._count_edits(module, count)
        for name in self.norms:
            self._check_norm(module.get_submodule(name), f"{path}.{name}")
            edits += Shared().edits(module.get_submodule(name), f"{path}.{name}", ranks)
        if self.sinks is not None:
            edits.append(
                cut_parameter(module, self.sinks, path, query_cut(self.heads, 1, count, order))
            )
        edits += held_gradient_edits(edits, ranks)
        if self._is_region:
            edits += Region().edits(module, path, ranks)
        edits += dropout_edits(module, ranks)
        return edits + self._output_edits(module, path, ranks, helix)

    @property
    def _is_region(self) -> bool:
        """Whether the module reads one input and all of it lies between the projections; known of transformers."""
        return self.through == "transformers"

    def _input_edits(
        self, module: nn.Module, path: str, ranks: ModelRanks, count: int, order: Sequence[int]
    ) -> list[Edit]:
        link = Link(ranks.all, ranks.span, enters=not self._is_region)
        edits: list[Edit] = []
        for name, cut in self._input_cuts(count, order):
            linear = plain_linear(module.get_submodule(name), f"{path}.{name}")
            edits += column_edits(linear, f"{path}.{name}", cut, link)
        return edits

    def _input_cuts(self, count: int, order: Sequence[int]) -> list[tuple[str, Cut]]:
        width = self.head_dim
        if self.fused is not None and self.fused_order == "per_head":
            return [(self.fused, query_cut(self.heads, 3 * width, count, order))]
        if self.fused is not None:
            return [(self.fused, stacked_cut(self.heads, self.kv_heads, width, count, order))]
        kv = kv_cut(self.heads, self.kv_heads, width, count, order)
        if not (self.q and self.k and self.v):
            raise PlanError(
                "an Attention role",
                "names neither q, k and v nor fused",
                "name the module's projections",
            )
        return [(self.q, query_cut(self.heads, width, count, order)), (self.k, kv), (self.v, kv)]

    def _output_edits(
        self, module: nn.Module, path: str, ranks: ModelRanks, helix: bool
    ) -> list[Edit]:
        linear = plain_linear(module.get_submodule(self.o), f"{path}.{self.o}")
        cut = query_cut(self.heads, self.head_dim, ranks.size, ranks.run_order, dim=1)
        state = ranks.attention
        if state is None or not helix:
            edits = row_edits(linear, f"{path}.{self.o}", cut, Link(ranks.all, ranks.span))
            if state is None or ranks.kvp > 1 or self.window or self.through == "sdpa":
                return edits
            return [*edits, SetAttribute(module, "_plait_attention", self._layer(state))]
        if self.through == "sdpa":
            edits = row_edits(linear, f"{path}.{self.o}", cut, Link(ranks.all))
            return [*edits, *key_split_edits(module, ranks)]
        return helix_edits(module, linear, f"{path}.{self.o}", cut, self._layer(state))

    def _layer(self, state: HelixState) -> HelixLayer:
        """The next layer of the KV store."""
        tp = state.ranks.tp
        layer = HelixLayer(
            state=state,
            number=len(state.layers),
            heads=self.heads // tp,
            kv_heads=max(1, self.kv_heads // tp),
            head_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        state.layers.append(layer)
        return layer

    def _check_norm(self, norm: nn.Module, path: str) -> None:
        wide = [n for n, p in norm.named_parameters() if p.shape[-1] != self.head_dim]
        if wide:
            raise PlanError(
                f"tensor parallelism over {path}",
                f"normalises over all heads together ({wide} are not head_dim={self.head_dim} wide)",
                "use tp=1 kvp=1 for this model",
            )

    def _count_edits(self, module: nn.Module, count: int) -> list[Edit]:
        kv_local = max(1, self.kv_heads // count)
        local = {
            "heads": self.heads // count,
            "kv_heads": kv_local,
            "groups": self.heads // count // kv_local,
        }
        edits: list[Edit] = [
            SetAttribute(module, name, local[what])
            for name, what in self.counts
            if hasattr(module, name)
        ]
        if self.config_counts:
            edits.append(
                OverrideConfig(module, {name: local[what] for name, what in self.config_counts})
            )
        return edits
