"""One method on one task: prompts as they are, the rest token by token, against the model with its whole cache."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from caches import Method
from model import Recall
from tasks import ASK, IGNORE, Batch
from torch import Tensor


@dataclass
class Row:
    """What was measured.

    Attributes:
        first: share of first questions (asked before anything was evicted) answered right in all symbols.
        later: the same of the questions after it.
        kl: mean of KL(whole cache || method) over answer symbols, in nats.
    """

    model: str
    task: str
    family: str
    method: str
    first: float
    first_of: int
    later: float
    later_of: int
    kl: float
    read: float
    held: float
    seconds: float


@torch.no_grad()
def whole_logits(model: Recall, batch: Batch) -> Tensor:
    """Logits of every token with everything exact."""
    return torch.cat([model(ids) for ids in batch.ids.split(16)])


@torch.no_grad()
def logits_of(model: Recall, batch: Batch, method: Method) -> tuple[Tensor, float, float, float]:
    """Logits from the prompt's last token on; shares read and held; seconds of all after the prompt."""
    opened = method.open(model.llama, batch.ids[:, : batch.prompt])
    out = [model(batch.ids, 0, opened.cache, batch.prompt)[:, -1:]]
    begin = time.process_time()
    for first, last in pieces(batch, method.turns):
        out.append(model(batch.ids, first, opened.cache, last, method.shift))
    seconds = time.process_time() - begin
    read, held = opened.read(), opened.held()
    opened.close()
    return torch.cat(out, 1), read, held, seconds


def pieces(batch: Batch, turns: bool) -> list[tuple[int, int]]:
    """What one forward reads after the prompt: a token, or the question of a turn."""
    edges, at = [], batch.prompt
    while at < batch.ids.shape[1]:
        size = 2 if turns and int(batch.ids[0, at]) == ASK else 1
        edges.append((at, at + size))
        at += size
    return edges


def measure(
    model: Recall, batch: Batch, whole: Tensor, method: Method, name: str, task: str
) -> Row:
    """Measure; `whole` is `whole_logits` of the same batch."""
    logits, read, held, seconds = logits_of(model, batch, method)
    start = batch.prompt - 1
    targets, turn, wanted = batch.targets[:, start:], batch.turn[start:], whole[:, start:]
    asked = targets != IGNORE
    right = (logits.argmax(-1) == targets) | ~asked
    turns = range(int(turn.max()) + 1)
    exact = torch.stack([right[:, turn == t].all(1) for t in turns], 1)
    if task == "copy":  # one long answer: count its symbols
        exact = right[asked][:, None]
    kl = torch.nn.functional.kl_div(
        logits[asked].log_softmax(-1),
        wanted[asked].log_softmax(-1),
        log_target=True,
        reduction="none",
    )
    return Row(
        name, task, method.family, method.name,
        exact[:, 0].float().mean().item(), len(exact),
        exact[:, 1:].float().mean().item() if exact.shape[1] > 1 else float("nan"),
        exact[:, 1:].numel(), kl.sum(-1).mean().item(), read, held, seconds,
    )  # fmt: skip
