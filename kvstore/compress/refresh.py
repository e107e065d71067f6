"""Elastic-Cache: keys and values of a diffusion language model, kept until attention has drifted (2025).

Such a model reads all tokens at every denoising step, both ways, so every key changes a little at every step. Most
changes are too small to matter, and drift grows with depth: a layer tests it, and the layers after it are refreshed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..named import Named


@dataclass(frozen=True)
class Elastic(Named):
    """When to refresh, and which tokens are computed at every step.

    Args:
        gamma: least cosine between the weights that the most attended token has now and had a step ago; above 1 every
            step refreshes everything, which is the model without a cache; at 0 nothing but a new window does.
        window: next masked tokens that are computed at every step; those after them are as old as the last refresh.
    """

    gamma: float = 0.9
    window: int = 16
    name: ClassVar[str] = "elastic"

    def __post_init__(self) -> None:
        if self.window < 1 or self.gamma != self.gamma:
            raise ValueError(f"{self}: window must be at least 1 token and gamma a number")

    def rows(self, masked: Tensor, changed: Tensor) -> Tensor:
        """Tokens of a step: the window, and those that are others than a step ago.

        Shape: `[tokens]` bool, twice -> `[rows]` int64
        """
        near = masked & (masked.cumsum(0) <= self.window)
        return (near | changed).nonzero()[:, 0]

    def drifted(self, now: Tensor, before: Tensor) -> bool:
        """Whether a layer's attention is no longer what it was; without anything to compare it is not.

        Shape: `[heads, rows]`, twice, of the rows that both steps computed
        """
        if not now.numel():
            return True
        return bool(cosine_similarity(now.flatten(), before.flatten(), 0) < self.gamma)


class DenoisingBlock(Protocol):
    """A layer of the model: what stands before its attention, and after."""

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shape: `[rows, width]` -> q, k, v `[heads, rows, head_dim]`"""
        ...

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """Shape: x `[rows, width]`, o `[heads, rows, head_dim]` -> the next layer's input `[rows, width]`"""
        ...


class StepCache:
    """What each layer of one text keeps from denoising step to step.

    Attributes:
        versions: the step at which each layer's keys of all tokens were last made; they never rise with depth falling.
        computed: rows that each layer computed so far.

    State: `step` changes it.
    """

    def __init__(self, policy: Elastic, layers: int) -> None:
        self.policy, self.steps = policy, 0
        self.versions, self.computed = [-1] * layers, [0] * layers
        self.inputs: list[Tensor] = []  # of each layer, and the output
        self.keys: list[tuple[Tensor, Tensor]] = []
        self._seen: list[tuple[int, Tensor, Tensor]] = []  # most attended token, rows, its weights

    def step(self, blocks: Sequence[DenoisingBlock], x: Tensor, masked: Tensor) -> Tensor:
        """Run the blocks over the tokens as they are now; rows that are not computed are as old as they are.

        Shape: x `[tokens, width]` embeddings, masked `[tokens]` bool -> `[tokens, width]`
        """
        every = torch.arange(len(x))
        rows, whole = every, not self.inputs
        if whole:
            self.inputs = [x.clone()] + [torch.empty(0)] * len(blocks)
            self.keys, self._seen = [(x, x)] * len(blocks), [(0, every, x)] * len(blocks)
        else:
            rows = self.policy.rows(masked, (x != self.inputs[0]).any(1))
            self.inputs[0][rows] = x[rows]
        for layer, block in enumerate(blocks):
            rows = every if whole else rows
            out, weights = self._attend(block, layer, rows)
            drifted = self._drift(layer, rows, weights)
            if whole:
                self.versions[layer] = self.steps
            elif drifted:  # keys of this layer stay; what it gives, and all after it, is made anew
                whole, rows = True, every
                out, _ = self._attend(block, layer, every, project=False)
            if whole:
                self.inputs[layer + 1] = out
            else:
                self.inputs[layer + 1][rows] = out
        self.steps += 1
        return self.inputs[-1]

    def _attend(
        self, block: DenoisingBlock, layer: int, rows: Tensor, project: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Shape: -> `[rows, width]`, weights `[heads, rows, tokens]`"""
        x = self.inputs[layer][rows]
        q, k, v = block.project(x, rows)
        if len(rows) == len(self.inputs[layer]) and project:
            self.keys[layer] = k, v
        elif project:
            for held, new in zip(self.keys[layer], (k, v), strict=True):
                held[:, rows] = new
        keys, values = self.keys[layer]
        weights = (q @ keys.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        self.computed[layer] += len(rows)
        return block.finish(x, weights @ values), weights

    def _drift(self, layer: int, rows: Tensor, weights: Tensor) -> bool:
        """Test a layer, and remember its most attended token for the next step."""
        token, old_rows, old = self._seen[layer]
        most = int(weights.sum((0, 1)).argmax())
        self._seen[layer] = most, rows, weights[:, :, most].clone()
        if self.versions[layer] < 0:
            return True
        now, before = torch.isin(rows, old_rows), torch.isin(old_rows, rows)
        return self.policy.drifted(weights[:, now, token], old[:, before])
