"""What a compressed store says of itself, and its proof."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np

from ..errors import IntegrityError
from ..page import PageState
from ..spec import KVSpec
from .lanes import LanePool
from .sequence import KeptSequence


def report(
    spec: KVSpec, pool: LanePool, seqs: Listing[KeptSequence], prefixes: Listing[KeptSequence]
) -> dict[str, float]:
    """Count tokens of all open sequences, and bytes, those kept for later prompts included, on this rank.

    `text_tokens` were seen, `kept_tokens` is the mean of what layers and heads keep of them. `held_bytes` are those of
    pages in use, with the places of their tokens, and `coded_bytes` the coded part of them; `whole_bytes` what all
    tokens would take; `peak_bytes` the most that exact pages ever took at once.
    """
    coded = {
        id(run): run.num_bytes
        for seq in (*seqs, *prefixes)
        for own in seq.coded
        for run in own.runs
    }
    held = pool.pool.held_pages * pool.bytes_per_page + sum(coded.values())
    kept = [float(seq.kept.mean()) for seq in seqs]
    text = sum(seq.tokens for seq in seqs)
    whole = text * spec.bytes_per_token
    return {
        "sequences": len(seqs),
        "prefixes": len(prefixes),
        "text_tokens": text,
        "kept_tokens": sum(kept),
        "held_bytes": held,
        "coded_bytes": sum(coded.values()),
        "whole_bytes": whole,
        "ratio": held / whole if whole else 1.0,
        "peak_bytes": pool.peak_pages * pool.bytes_per_page,
        "pool_bytes": pool.pool.capacity * pool.bytes_per_page,
    }


def check_lanes(pool: LanePool, seqs: Listing[KeptSequence]) -> None:
    """Compare pages with their holders, and places with the text.

    Raises:
        IntegrityError: naming what does not hold.
    """
    holders = np.zeros(pool.pool.capacity, np.int32)
    for seq in seqs:
        for layer, lanes in enumerate(seq.lanes):
            np.add.at(holders, pool.held(lanes), 1)
            for head in range(len(lanes.counts)):
                own = pool.read(lanes, head)[2]
                rises = (own[1:] > own[:-1]).all() and (own < max(seq.tokens, 1)).all()
                if not rises and seq.step is None:
                    raise IntegrityError(f"{seq!r}: places of layer {layer}, head {head} are wrong")
    pool.pool.check_integrity(holders)
    if (pool.pool.states[holders > 0] != PageState.LIVE).any():
        raise IntegrityError("a lane holds a page that is not LIVE")
