"""Ranks meet: the proof that all of them came, or the same error on every rank."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .errors import LaunchError
from .launch import Launch
from .meeting_point import missing, name_ranks, open_store

# how long rank 0 keeps its store open so that the others can read why the start failed
LINGER_S = 5.0
Card = dict[str, Any]


def meet(
    launch: Launch,
    card: Card,
    timeout_s: float,
    *,
    objection: Callable[[list[Card]], str] = lambda cards: "",
    visit: int = 0,
) -> tuple[dist.Store, list[Card]]:
    """Bring all ranks to one store and exchange their cards.

    A card is a small JSON object that says who this rank is. One that holds "error" fails the
    start on every rank, and so does an `objection` that rank 0 finds in the cards of all.

    Collective: every rank of the launch; a few hundred bytes through the store.

    Args:
        visit: tells apart several meetings of one job.

    Raises:
        LaunchError: a rank did not come within `timeout_s` (every rank names all missing ones),
            or brought an error.
    """
    deadline = time.monotonic() + timeout_s
    with open_store(launch, deadline, timeout_s) as base:
        store = dist.PrefixStore(f"plait/{launch.job}/{visit}", base)
        store.set(f"card/{launch.rank}", json.dumps(card))
        cards = _gather_cards(store, launch, deadline) if launch.rank == 0 else {}
    if launch.rank == 0:
        error = _errors_of(cards) or missing(launch, list(cards), timeout_s)
        error = error or objection(list(cards.values()))
        verdict = {"error": error, "cards": list(cards.values())}
        store.set("verdict", json.dumps(verdict))
    else:
        verdict = _await_verdict(store, launch, deadline, timeout_s)
    if verdict["error"]:
        _linger(store, launch, list(cards))
        raise LaunchError(verdict["error"])
    return store, verdict["cards"]


def _gather_cards(store: dist.Store, launch: Launch, deadline: float) -> dict[int, Card]:
    keys = [f"card/{rank}" for rank in range(launch.world_size)]
    with contextlib.suppress(RuntimeError):
        store.wait(keys, datetime.timedelta(seconds=max(0.01, deadline - time.monotonic())))
    came = [rank for rank, key in enumerate(keys) if store.check([key])]
    return {rank: json.loads(store.get(keys[rank])) for rank in came}


def _errors_of(cards: dict[int, Card]) -> str:
    brought: dict[str, list[int]] = {}
    for rank, card in cards.items():
        if "error" in card:
            brought.setdefault(card["error"], []).append(rank)
    return "; ".join(f"{name_ranks(ranks)}: {text}" for text, ranks in brought.items())


def _await_verdict(store: dist.Store, launch: Launch, deadline: float, timeout_s: float) -> Card:
    patience = max(0.01, deadline - time.monotonic()) + min(LINGER_S, timeout_s)
    try:
        store.wait(["verdict"], datetime.timedelta(seconds=patience))
        return json.loads(store.get("verdict"))
    except RuntimeError as lost:
        try:
            came = [rank for rank in range(launch.world_size) if store.check([f"card/{rank}"])]
            error = (
                missing(launch, came, timeout_s)
                or f"rank 0 came but did not answer within {timeout_s:g} s"
            )
            # Should rank 0 still be deciding, it must not count on us.
            store.set(f"card/{launch.rank}", json.dumps({"error": f"gave up waiting: {error}"}))
        except RuntimeError:
            raise LaunchError(
                f"rank 0, which holds the meeting point, went away during the start: {lost}"
            ) from lost
        raise LaunchError(error) from None


def _linger(store: dist.Store, launch: Launch, came: list[int]) -> None:
    """Rank 0 may hold the store: it goes last, so that every rank has read the verdict."""
    with contextlib.suppress(RuntimeError):
        if launch.rank:
            store.set(f"seen/{launch.rank}", "")
        else:
            store.wait(
                [f"seen/{rank}" for rank in came if rank], datetime.timedelta(seconds=LINGER_S)
            )
