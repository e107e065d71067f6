"""Train the byte-level model on the CPU for a stated number of minutes.

Run it under `torchrun --nproc-per-node N` to share every batch among N processes: one thread
each loses less than N threads of one process when the machine has other work to do.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from batches import Windows
from model import Shape, TinyLlama, rotary
from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with one window length."""

    until: float  # as a share of the budget
    rows: int  # of all processes together
    length: int
    stretched: float  # share of rows whose positions leap ahead


# Most of the training reads short windows, which cost little; positions that leap ahead teach
# the model distances that the window does not have, and the last windows are long ones.
PHASES = (
    Phase(until=0.60, rows=8, length=512, stretched=0.25),
    Phase(until=0.88, rows=4, length=2048, stretched=0.5),
    Phase(until=1.00, rows=2, length=8192, stretched=0.25),
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
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.model = TinyLlama(shape)
        self.muon, self.adam = optimizers(self.model)
        self.step = self.tokens = 0
        self.elapsed = 0.0  # the same in every process, as every decision depends on it
        self.stop_wanted = self.stopping = False
        self.windows = Windows(data.split()[0], seed + self.rank)
        self._loss = torch.compile(self._plain_loss, dynamic=False)
        self._clock = time.monotonic()
        for weight in self._matrices():
            self.muon.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    def resume(self) -> None:
        """Load the state of an interrupted run, if the folder holds one."""
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["optimizers"][0])
        self.adam.load_state_dict(state["optimizers"][1])
        self.step, self.tokens, self.elapsed = (state[k] for k in ("step", "tokens", "elapsed"))
        self.windows = Windows(data.split()[0], seed=self.step * self.world + self.rank)

    def save(self) -> None:
        """Write the state so that an interruption leaves either the old or the new one."""
        self._share([self.muon.state[weight]["momentum_buffer"] for weight in self._matrices()])
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [self.muon.state_dict(), self.adam.state_dict()],
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
        rows = phase.rows // self.world
        ids = self.windows.draw(rows, phase.length)
        reach = self.shape.max_position_embeddings
        positions = self.windows.positions(rows, phase.length, reach, phase.stretched)
        loss = self._loss(ids, *rotary(positions, self.shape.head_dim, self.shape.rope_theta))
        loss.backward()
        mean_loss = self._average(loss.item())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._update(learning_rate(progress))
        self.step += 1
        self.tokens += ids[:, 1:].numel() * self.world
        return mean_loss

    def _update(self, factor: float) -> None:
        """Step both optimizers; each process orthogonalises its share of the matrices."""
        for optimizer, peak in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        for place, weight in enumerate(self._matrices()):
            if place % self.world != self.rank:
                weight.grad = None  # Muon passes over weights without a gradient
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self._share([weight.data for weight in self._matrices()])

    def _matrices(self) -> list[nn.Parameter]:
        return self.muon.param_groups[0]["params"]

    def _share(self, tensors: list[Tensor]) -> None:
        """Send every process the tensors that the others updated."""
        if self.world == 1:
            return
        for owner in range(self.world):
            owned = tensors[owner :: self.world]
            flat = torch.cat([tensor.flatten() for tensor in owned])
            dist.broadcast(flat, owner)
            for tensor, values in zip(owned, flat.split([t.numel() for t in owned]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def _average(self, loss: float) -> float:
        """Average gradients, loss, clock and the wish to stop over the processes."""
        now = time.monotonic()
        elapsed, self._clock = self.elapsed + now - self._clock, now
        grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        extra = torch.tensor([loss, elapsed, float(self.stop_wanted)])
        flat = torch.cat([*(grad.flatten() for grad in grads), extra])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
            sizes = [grad.numel() for grad in grads]
            for grad, values in zip(grads, flat[:-3].split(sizes), strict=True):
                grad.copy_(values.view_as(grad))
        mean_loss, self.elapsed, wish = flat[-3:].tolist()
        self.stopping = wish > 0
        return mean_loss

    @torch.no_grad()
    def held_out_bits(self, kind: str, windows: int = 6, length: int = 2048) -> float:
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
    """Train until the budget is spent or a TERM signal comes, saving and printing on the way."""
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop_wanted", True))
    next_save, smooth = run.elapsed + save_every, None
    while run.elapsed < run.budget and not run.stopping:
        loss = run.train_step() / math.log(2)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if run.step % 20 == 0 and run.rank == 0:
            print(f"{run.elapsed:7.0f} s  step {run.step:5d}  {run.tokens:9d} tokens  {smooth:.3f}")
        if run.elapsed >= next_save:
            report(run)
            next_save = run.elapsed + save_every
    report(run)


def report(run: Run) -> None:
    """Save the run and print held-out bits per byte."""
    run.save()
    if run.rank == 0:
        bits = {kind: run.held_out_bits(kind) for kind in ("reference", "modules")}
        print("held out, bits per byte:", {kind: round(value, 3) for kind, value in bits.items()})


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run's state is kept")
    parser.add_argument("--minutes", type=float, default=95.0, help="length of the whole run")
    parser.add_argument("--save-every", type=float, default=600.0, help="seconds between saves")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    run = Run(options.folder, Shape(), options.minutes, options.seed)
    run.resume()
    train(run, options.save_every)


if __name__ == "__main__":
    main()
