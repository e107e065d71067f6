"""What ranks tell each other before they share memory: small cards, and what went wrong anywhere, in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import primitive

CARD_BYTES = 1024
Card = dict[str, Any]


def tell(group: dist.ProcessGroup, card: Card) -> list[Card]:
    """Exchange small JSON objects; gives those of all ranks, in rank order.

    Collective: all ranks of the group; one all-gather of 1 KiB.
    """
    text = json.dumps(card).encode()
    assert len(text) <= CARD_BYTES, text
    device = primitive.message_device(group)
    own = torch.frombuffer(bytearray(text.ljust(CARD_BYTES)), dtype=torch.uint8).to(device)
    every = primitive.all_gather(own[None], group).cpu()
    return [json.loads(row.numpy().tobytes()) for row in every]


def together(group: dist.ProcessGroup, why: str) -> str:
    """Tell all ranks what went wrong here; gives what went wrong anywhere."""
    return ranks_of([card["problem"] for card in tell(group, {"problem": why})])


def ranks_of(problems: list[str]) -> str:
    """Say each problem once, with the ranks that have it."""
    by_text: dict[str, list[str]] = {}
    for rank, text in enumerate(problems):
        if text:
            by_text.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items())


def tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """Do what may fail on this rank alone; gives the result, or what went wrong."""
    try:
        return call(), ""
    except Exception as error:
        return None, said(error)


def said(error: Exception) -> str:
    """Put an error in words for a card."""
    return short(str(error).strip() or type(error).__name__)


def short(problem: str) -> str:
    """The first line of what went wrong, as a card has room for: letters that take six bytes in JSON are replaced."""
    told = "".join(problem.strip().splitlines()[:1])[:300].encode("ascii", "replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in told)
