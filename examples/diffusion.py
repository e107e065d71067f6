"""A masked diffusion language model writes a line, its keys and values kept while attention stays what it was.

The model is tiny and random; what is shown is the cache: at gamma above 1 it gives the model's own answer, below it
computes less. See `plait.kvstore.compress.refresh`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.kvstore.compress import Elastic, StepCache

TOKENS, MASK, WIDTH, HEADS, LAYERS, LENGTH = 50, 50, 64, 4, 6, 64


class Block(nn.Module):
    """Attention both ways, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        nn.init.normal_(self.qkv.weight, std=0.2)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shape: `[rows, width]` -> `[heads, rows, head_dim]`, three times"""
        rows = self.qkv(nn.functional.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, HEADS, -1))
        q, k, v = rows.permute(1, 2, 0, 3)
        return q, k, v

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """The residual stream after the block."""
        x = x + self.out(o.transpose(0, 1).flatten(1))
        return x + self.mlp(nn.functional.layer_norm(x, x.shape[-1:]))


class Denoiser(nn.Module):
    """Gives logits for every masked token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS + 1, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, TOKENS)

    def write(self, prompt: Tensor, policy: Elastic | None) -> tuple[Tensor, StepCache]:
        """Unmask two tokens a step, the surest of the window first."""
        ids = torch.cat([prompt, torch.full((LENGTH - len(prompt),), MASK)])
        cache = StepCache(policy or Elastic(), LAYERS)
        while bool((masked := ids == MASK).any()):
            if policy is None:  # the model as it is: a new cache computes everything
                cache = StepCache(Elastic(), LAYERS)
            x = self.embed(ids) + self.place.weight
            logits = self.head(cache.step(list(self.blocks), x, masked))  # type: ignore[arg-type]
            sure, best = logits.softmax(-1).max(-1)
            near = masked & (masked.cumsum(0) <= cache.policy.window)
            chosen = sure.masked_fill(~near, -1).topk(min(2, int(near.sum()))).indices
            ids[chosen] = best[chosen]
        return ids, cache


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        model, prompt = Denoiser().double(), torch.randint(0, TOKENS, (8,))
        want, _ = model.write(prompt, None)
        for gamma in (2.0, 0.999, 0.99, 0.9, 0.0):
            ids, cache = model.write(prompt, Elastic(gamma=gamma))
            shares = " ".join(f"{100 * n / cache.steps / LENGTH:3.0f}" for n in cache.computed)
            print(
                f"gamma {gamma:5.3f}: {int((ids == want).sum())} of {LENGTH} tokens as without a cache; "
                f"computed, % by layer: {shares}"
            )
