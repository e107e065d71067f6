"""Train on one long sequence that is cut over ranks: the loop is the one you have.

torchrun --standalone --nproc-per-node 2 examples/long_training.py cp2
torchrun --standalone --nproc-per-node 4 examples/long_training.py "cp4:ring,ulysses=2" --tokens 8192
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import plait


def read_bytes(count: int) -> torch.Tensor:
    """Some real text as token ids: this repository's documentation, [1, count]."""
    pages = sorted((Path(__file__).parent.parent / "docs").rglob("*.md"))
    text = b"".join(page.read_bytes() for page in pages)
    return torch.tensor(list((text * (1 + count // len(text)))[:count])).unsqueeze(0)


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> list[float]:
    """An ordinary training loop; every rank is given the whole sequence."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss  # the whole loss, the same number on every rank
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train under the plan, and once more without it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", nargs="?", default="tp1")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    world = plait.init()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=176, max_position_embeddings=args.tokens,
    )  # fmt: skip
    alone = LlamaForCausalLM(config)
    model = plait.parallelize(copy.deepcopy(alone), args.plan)
    ids = read_bytes(args.tokens)

    losses = train(model, ids, args.steps)  # type: ignore[arg-type]
    expected = train(alone, ids, args.steps)
    for number, (ours, one) in enumerate(zip(losses, expected, strict=True)):
        world.print(f"step {number}  loss {ours:.6f}   in one process {one:.6f}")
    plait.unparallelize(model)
    far = max(
        (p - q).abs().max().item()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )
    world.print(f"largest difference of any weight from one process: {far:.1e}")
    world.close()


if __name__ == "__main__":
    main()
