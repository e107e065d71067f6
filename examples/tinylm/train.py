"""Train the byte-level model on the CPU for a stated number of minutes."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import data
import torch
import torch.nn.functional as F
from batches import Windows
from model import Shape, TinyLlama, rotary
from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with one window length."""

    until: float  # as a share of the budget
    rows: int
    length: int
    stretched: float  # share of rows whose positions leap ahead


PHASES = (
    Phase(until=0.28, rows=8, length=512, stretched=0.0),
    Phase(until=0.52, rows=4, length=1024, stretched=0.0),
    Phase(until=0.86, rows=4, length=2048, stretched=0.5),
    Phase(until=1.0, rows=1, length=8192, stretched=0.5),
)
WARM_UP, COOL_DOWN = 0.01, 0.35
MUON_RATE, ADAM_RATE = 0.02, 0.003


def learning_rate(progress: float) -> float:
    """Return the factor on the peak rates at a share of the budget."""
    rising = min(1.0, (progress + 1e-3) / WARM_UP)
    falling = min(1.0, max(0.0, 1.0 - progress) / COOL_DOWN)
    return min(rising, falling)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Give the hidden matrices to Muon, and embeddings, head and norms to AdamW."""
    hidden = [w for n, w in model.named_parameters() if w.ndim == 2 and ".layers." in n]
    other = [w for n, w in model.named_parameters() if w.ndim != 2 or ".layers." not in n]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(other, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Run:
    """State of one training run: weights, optimizers, and how far it has come."""

    def __init__(self, folder: Path, shape: Shape, minutes: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.folder, self.shape, self.budget = folder, shape, 60.0 * minutes
        self.model = TinyLlama(shape)
        self.optimizers = optimizers(self.model)
        self.step = self.tokens = 0
        self.elapsed = 0.0
        self.windows = Windows(data.split()[0], seed)
        self._loss = torch.compile(self._plain_loss, dynamic=False)

    def resume(self) -> None:
        """Load the state of an interrupted run, if the folder holds one."""
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.elapsed = (state[k] for k in ("step", "tokens", "elapsed"))
        self.windows = Windows(data.split()[0], seed=self.step)

    def save(self) -> None:
        """Write the state so that an interruption leaves either the old or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def train_step(self) -> float:
        """Take one step of the phase that the elapsed time calls for and return its loss."""
        progress = self.elapsed / self.budget
        phase = next((phase for phase in PHASES if progress < phase.until), PHASES[-1])
        ids = self.windows.draw(phase.rows, phase.length)
        positions = self.windows.positions(
            phase.rows, phase.length, self.shape.max_position_embeddings, phase.stretched
        )
        cos, sin = rotary(positions, self.shape.head_dim, self.shape.rope_theta)
        loss = self._loss(ids, cos, sin)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids[:, 1:].numel()
        return loss.item()

    @torch.no_grad()
    def held_out_bits(self, kind: str, windows: int = 12, length: int = 2048) -> float:
        """Return bits per byte on evenly spread windows of held-out text."""
        text = torch.tensor(list(data.held_out_text(kind)))
        starts = torch.linspace(0, len(text) - length - 1, windows).long()
        ids = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        cos, sin = rotary(torch.arange(length)[None], self.shape.head_dim, self.shape.rope_theta)
        return self._plain_loss(ids, cos, sin).item() / math.log(2)

    def _plain_loss(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(ids[:, :-1], cos, sin)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(run: Run, save_every: float) -> None:
    """Train until the budget is spent, saving and printing on the way."""
    next_save, smooth = run.elapsed + save_every, None
    while run.elapsed < run.budget:
        begun = time.monotonic()
        loss = run.train_step() / math.log(2)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if run.step % 20 == 0:
            print(f"{run.elapsed:7.0f} s  step {run.step:5d}  {run.tokens:9d} tokens  {smooth:.3f}")
        if run.elapsed >= next_save:
            report(run)
            next_save = run.elapsed + save_every
        run.elapsed += time.monotonic() - begun
    report(run)


def report(run: Run) -> None:
    """Save the run and print held-out bits per byte."""
    run.save()
    bits = {kind: run.held_out_bits(kind) for kind in ("reference", "modules")}
    print("held out, bits per byte:", {kind: round(value, 3) for kind, value in bits.items()})


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run's state is kept")
    parser.add_argument("--minutes", type=float, default=95.0, help="length of the whole run")
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds between saves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run(options.folder, Shape(), options.minutes, options.seed)
    run.resume()
    train(run, options.save_every)


if __name__ == "__main__":
    main()
