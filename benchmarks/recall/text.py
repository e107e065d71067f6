"""Bits per byte of the tiny language model on held-out text, most of it read before and kept by a method."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from caches import Method
from scipy.special import stdtrit
from torch import Tensor
from transformers import LlamaForCausalLM

TINYLM = Path(__file__).parent.parent.parent / "examples" / "tinylm"


@dataclass
class TextRow:
    """What was measured: `error` is the standard error of the difference to the whole cache, text by text."""

    texts: int
    family: str
    method: str
    context: int
    scored: int
    bits_per_byte: float
    more: float
    error: float
    kl: float
    read: float
    held: float
    seconds: float

    @property
    def half(self) -> float:
        """Half of the 95 % interval of `more`, by Student's t over the texts."""
        return float(stdtrit(self.texts - 1, 0.975)) * self.error if self.texts > 1 else math.nan


def load_model() -> LlamaForCausalLM:
    """The checkpoint of examples/tinylm, in float32."""
    return LlamaForCausalLM.from_pretrained(TINYLM / "checkpoint", dtype=torch.float32).eval()


def texts(count: int, length: int) -> list[Tensor]:
    """The beginnings of the longest held-out documents. Shape: `[1, length]` each"""
    sys.path.insert(0, str(TINYLM))
    import data
    from bytes_tokenizer import encode

    long = sorted((t for _, t in data.split()[1] if len(t) >= length), key=len, reverse=True)
    return [torch.tensor([encode(text[: length - 1])]) for text in long[:count]]


@torch.no_grad()
def read_text(
    model: LlamaForCausalLM, ids: Tensor, context: int, method: Method
) -> tuple[Tensor, float, float, float]:
    """Log-probabilities of the tokens after the context; shares read and held; seconds a token.

    Shape: ids `[1, length]` -> `[length - context, vocabulary]`
    """
    opened = method.open(model, ids[:, :context])
    out = [model(ids[:, :context], past_key_values=opened.cache, logits_to_keep=1).logits[0]]
    begin = time.process_time()
    for at in range(context, ids.shape[1] - 1):
        places = torch.tensor([[at + method.shift]])
        step = model(ids[:, at : at + 1], past_key_values=opened.cache, position_ids=places)
        out.append(step.logits[0])
    seconds = (time.process_time() - begin) / max(1, len(out) - 1)
    read, held = opened.read(), opened.held()
    opened.close()
    return torch.cat(out).log_softmax(-1), read, held, seconds


def measure_texts(
    model: LlamaForCausalLM, rows: list[Tensor], context: int, methods: list[Method],
    say: Callable[[str], None],
) -> list[TextRow]:  # fmt: skip
    """Measure each method on all texts; the first method is the whole cache."""
    base: list[Tensor] = []
    out = []
    for method in methods:
        costs, kls, reads, helds, seconds = [], [], [], [], []
        for number, ids in enumerate(rows):
            found, read, held, took = read_text(model, ids, context, method)
            if len(base) == number:
                base.append(found)
            wanted = ids[0, context:, None]
            costs.append(-found.gather(1, wanted).mean().item() / math.log(2))
            kls.append((base[number].exp() * (base[number] - found)).sum(-1).mean().item())
            reads.append(read)
            helds.append(held)
            seconds.append(took)
        whole = torch.tensor([-b.gather(1, ids[0, context:, None]).mean().item() / math.log(2)
                              for b, ids in zip(base, rows, strict=True)])  # fmt: skip
        more = torch.tensor(costs) - whole
        error = (more.std() / len(rows) ** 0.5).item() if len(rows) > 1 else float("nan")
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        out.append(
            TextRow(len(rows), method.family, method.name, context, rows[0].shape[1] - context, mean(costs),
                    more.mean().item(), error, mean(kls), mean(reads), mean(helds), min(seconds))
        )  # fmt: skip
        row = out[-1]
        say(
            f"{context} {row.method}: {row.bits_per_byte:.4f} more {row.more:+.4f} +-{row.half:.4f} KL {row.kl:.5f}"
        )
    return out
