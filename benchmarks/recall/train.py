"""Train the recall model: a curriculum of longer contexts and more symbols, one seed, a few minutes of CPU.

    python benchmarks/recall/train.py

Every stage ends when it recalls well enough, so the minutes depend on the machine and the weights on nothing but
the seed, the thread count and the versions of torch and its BLAS.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from model import CHECKPOINT, Recall, save
from tasks import IGNORE, Batch, needles, spans
from torch import nn


@dataclass(frozen=True)
class Stage:
    """A context length and what stands in it."""

    context: int
    facts: int
    turns: int
    symbols: int
    rows: int
    enough: float  # share of answer symbols right, averaged over the last steps
    steps: int  # at most


STAGES = (
    Stage(16, 3, 3, 32, 64, 0.96, 2000),
    Stage(24, 5, 5, 64, 48, 0.96, 1500),
    Stage(64, 12, 12, 128, 24, 0.97, 1500),
    Stage(128, 24, 16, 448, 16, 0.98, 1500),
    Stage(256, 40, 24, 448, 8, 0.985, 800),
    Stage(512, 64, 32, 448, 6, 0.99, 500),
    Stage(512, 64, 32, 448, 6, 0.998, 150),
)
MUON_RATE, ADAM_RATE = 0.01, 0.003


def batch_of(stage: Stage, step: int, seed: int) -> Batch:
    """Every fourth batch is a span to repeat, the others facts to look up."""
    number = seed * 1_000_000 + step
    if step % 4 == 3:
        return spans(
            stage.rows,
            stage.context,
            min(64, stage.context // 2, stage.symbols),
            stage.symbols,
            number,
        )
    return needles(stage.rows, stage.context, stage.facts, stage.turns, stage.symbols, number)


def keep_memory() -> None:
    """Tell glibc to keep freed memory: giving it back makes every step fault its pages in again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-1, 1 << 30), (-2, 256 << 20), (-4, 0)):  # trim, top pad, no mmap
            libc.mallopt(option, value)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Hidden matrices to Muon, the rest to AdamW."""
    hidden = [w for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n]
    other = [w for n, w in model.named_parameters() if w.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(other, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_stage(
    model: Recall, both: list[torch.optim.Optimizer], stage: Stage, number: int, seed: int
) -> None:
    """Run one stage; the last one cools the rates down to nothing."""
    right, begin, busy = 0.0, time.perf_counter(), time.process_time()
    last = number == len(STAGES) - 1
    step = 0
    for step in range(1, stage.steps + 1):
        batch = batch_of(stage, number * 100_000 + step, seed)
        logits = model(batch.ids)
        asked = batch.targets != IGNORE
        loss = nn.functional.cross_entropy(logits[asked], batch.targets[asked])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = max(0.02, 1 - step / stage.steps) if last else 1.0
        for optimizer, peak in zip(both, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        model.zero_grad(set_to_none=True)
        now = (logits[asked].argmax(-1) == batch.targets[asked]).float().mean().item()
        right = 0.95 * right + 0.05 * now
        if step % 50 == 0:
            cpu, wall = time.process_time() - busy, time.perf_counter() - begin
            print(
                f"  {step:5} loss {loss.item():.3f} right {right:.4f} cpu {cpu:.0f}s wall {wall:.0f}s",
                flush=True,
            )
        if right >= stage.enough and not last:
            break
    cpu = time.process_time() - busy
    print(
        f"stage {number} context {stage.context}: {step} steps, {right:.4f} right, {cpu:.0f} CPU-s",
        flush=True,
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(
        1
    )  # two threads on two busy cores wait for each other, and one adds in one order
    torch.manual_seed(options.seed)
    model = Recall()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(std=0.1)
            elif weight.ndim == 2:
                weight.normal_(std=0.5 * weight.shape[1] ** -0.5)
    both = optimizers(model)
    for number, stage in enumerate(STAGES):
        train_stage(model, both, stage, number, options.seed)
        save(model, options.out)


if __name__ == "__main__":
    main()
