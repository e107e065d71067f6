"""HyLRA: layers that read everything, chosen by a profile, and layers that read what the last of them found.

After HyLRA (2026; only its abstract was to be had): sensitivity of layers and overlap of their greatest weights are
measured once, and dynamic programming says which layers read everything. What a plan costs is our own wording:
`weight` times the time of a layer, plus the attention mass that a reading layer misses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...cuda_kernels import top_k
from .delta import followed
from .layers import Layers
from .selector import Budgeted, KeyView, Selection

FIRST = Layers("0")


@dataclass(frozen=True)
class HyLRA(Budgeted):
    """The greatest attention weights of the last full layer, each KV head its own.

    Args:
        full: layers that read everything, from `plan_layers`; it begins with layer 0.
    """

    full: Layers = FIRST
    name: ClassVar[str] = "hylra"
    across_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full[0] != 0:
            raise ValueError(
                f"{self}: full must begin with layer 0: there is nothing to read before"
            )

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection | None:
        """Choose for others, or read what was chosen."""
        if view.layer not in self.full:
            return followed(view, self.full)
        if self.full.leads(view.layer, view.layers):
            weights = (view.logits(view.grouped(q)) * view.scale).softmax(-1).sum(1)
            held = view.own.get("chosen")
            hint = None if held is None else held[1].indices.view(len(weights), -1)
            chosen = Selection.of(top_k(weights, keep, hint), 1)
            view.own["chosen"] = (view.tokens, chosen)
        return None


def missed_mass(weights: list[Tensor], keep: int) -> Tensor:
    """Profile: the share of attention that layer l misses when it reads what layer j found, the mean over rows.

    Shape: weights of each layer `[rows, kv_heads, group, tokens]`, rows summing to one over tokens -> `[l, j]`
        float64; 0 where j > l.
    """
    summed = [own.double().mean(2) for own in weights]  # [rows, kv_heads, tokens]
    found = [top_k(own, min(keep, own.shape[-1])) for own in summed]
    missed = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for layer, own in enumerate(summed):
        for leader in range(layer + 1):
            missed[layer, leader] = 1 - own.gather(-1, found[leader]).sum(-1).mean()
    return missed


def plan_layers(
    missed: Tensor, full_cost: float, read_cost: float, weight: float, most_missed: float = 1.0
) -> Layers:
    """Choose the layers that read everything, at the least sum of costs; of equal plans the one with fewer.

    Args:
        missed: `[layers, layers]` from `missed_mass`.
        full_cost, read_cost: time of a layer that reads everything, and of one that reads what was found.
        weight: what a unit of time is worth in missed mass.
        most_missed: a layer does not read from one of which it would miss more: it is too sensitive.
    """
    layers = len(missed)
    # best[l]: cost of layers l and after, given that l reads everything; the next full one is tried at each place.
    best = [0.0] * (layers + 1)
    following = [layers] * layers
    for leader in reversed(range(layers)):
        cost, best[leader] = full_cost * weight, float("inf")
        for stop in range(leader + 1, layers + 1):
            if cost + best[stop] <= best[leader]:
                best[leader], following[leader] = cost + best[stop], stop
            if stop < layers:
                lost = float(missed[stop, leader])
                cost += read_cost * weight + (lost if lost <= most_missed else float("inf"))
    full, layer = [], 0
    while layer < layers:
        full.append(layer)
        layer = following[layer]
    return Layers(full)
