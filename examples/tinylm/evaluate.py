"""Measure held-out bits per byte against `xz -9`, and against position up to 32k."""

from __future__ import annotations

import argparse
import json
import lzma
import math
from itertools import pairwise
from pathlib import Path

import data
import torch
import torch.nn.functional as F
from bytes_tokenizer import encode
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

CONTEXT, STRIDE = 2048, 1024
EDGES = (0, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
LONGEST = EDGES[-1]


@torch.no_grad()
def losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return the bits that each token after the first costs, for ids of shape [rows, length]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    nats = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    return nats / math.log(2)


def sliding_losses(model: LlamaForCausalLM, text: bytes, rows: int = 4) -> Tensor:
    """Return the bits of each byte, read in windows of `CONTEXT` tokens.

    Windows start every `STRIDE` bytes and lead with the beginning-of-text mark; a window scores
    only the bytes that no earlier one has, so every byte past the first window is predicted
    from at least `CONTEXT - STRIDE` tokens.
    """
    size = CONTEXT - 1
    starts = range(0, max(1, len(text) - size + STRIDE), STRIDE)
    windows = [torch.tensor(encode(text[start : start + size])) for start in starts]
    padded = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
    bits = torch.cat([losses(model, part) for part in padded.split(rows)])
    fresh = [bits[0]] + [row[size - STRIDE :] for row in bits[1:]]
    return torch.cat(fresh)[: len(text)]


def xz_bits(text: bytes, preset: int = 9) -> float:
    """Return the bits per byte of a text compressed as one `xz` file."""
    return 8 * len(lzma.compress(text, preset=preset)) / len(text)


def against_xz(model: LlamaForCausalLM) -> list[dict[str, object]]:
    """Return bits per byte of the model and of `xz` for each kind of held-out text."""
    rows: list[dict[str, object]] = []
    for kind in ("reference", "modules"):
        text = data.held_out_text(kind)
        row = {
            "text": kind,
            "bytes": len(text),
            "model": sliding_losses(model, text).mean().item(),
            "xz -9": xz_bits(text),
            "xz -9e": xz_bits(text, 9 | lzma.PRESET_EXTREME),
        }
        rows.append(row)
    return rows


def against_position(model: LlamaForCausalLM, count: int) -> list[dict[str, object]]:
    """Return bits per byte by position in the longest held-out documents.

    Each document is read in one forward of 32k tokens; the same bytes read through the sliding
    2048-token window are the comparison, since some parts of a file are easier than others.
    """
    texts = [text for _, text in data.split()[1] if len(text) >= LONGEST]
    texts = sorted(texts, key=len, reverse=True)[:count]
    whole = torch.stack([losses(model, torch.tensor([encode(t[:LONGEST])]))[0] for t in texts])
    sliding = torch.stack([sliding_losses(model, text[:LONGEST]) for text in texts])
    return [
        {
            "position": f"{begin}-{end}",
            "documents": len(texts),
            "whole context": whole[:, begin:end].mean().item(),
            "2048 window": sliding[:, begin:end].mean().item(),
        }
        for begin, end in pairwise(EDGES)
    ]


def show(console: Console, title: str, rows: list[dict[str, object]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    """Read the command line, measure, and print."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=here / "checkpoint")
    parser.add_argument("--documents", type=int, default=10, help="long documents to read")
    parser.add_argument("--only", choices=("xz", "position"))
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    results: dict[str, list[dict[str, object]]] = {}
    if options.only != "position":
        results["held-out bits per byte, 2048 tokens of context"] = against_xz(model)
    if options.only != "xz":
        results["held-out bits per byte by position"] = against_position(model, options.documents)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for title, rows in results.items():
        show(Console(), title, rows)


if __name__ == "__main__":
    main()
