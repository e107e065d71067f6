"""A kept text as bytes: numbers first, then arrays end to end. What is in fewer bits stays so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .coded import CodedLayer, CodedRun
from .lanes import LanePool
from .sequence import KeptSequence

_HEAD_BYTES = 8  # length of the numbers


def pack(seq: KeptSequence, pool: LanePool, ids: np.ndarray | None = None) -> bytes:
    """Write down what a sequence keeps: tokens, places, attention received, coded bytes, newest queries.

    A selector's memory is left out: it is made again from the decoded keys.

    Args:
        ids: of the text, for who finds it by them.
    """
    arrays = [np.empty(0, np.int32) if ids is None else ids.astype(np.int32)]
    layers = []
    for layer, (lanes, coded) in enumerate(zip(seq.lanes, seq.coded, strict=True)):
        rows = [pool.read(lanes, head) for head in range(len(lanes.counts))]
        arrays += [
            _raw(torch.cat([row[0] for row in rows])),
            _raw(torch.cat([row[1] for row in rows])),
        ]
        arrays.append(np.concatenate([row[2] for row in rows]))
        if pool.received is not None:
            arrays.append(_raw(torch.cat([row[3] for row in rows if row[3] is not None])))
        for run in coded.runs:
            arrays += [run.keys, run.values, run.heads, run.places]
        q = seq.queries[layer]
        layers.append({
            "counts": lanes.counts.tolist(), "loose": coded.loose, "tiers": [run.tier for run in coded.runs],
            "asked": None if q is None else str(q.dtype).removeprefix("torch."),
        })  # fmt: skip
        arrays += [] if q is None else [_raw(q)]
    said = {
        "tokens": seq.tokens, "text": seq.text, "prompt": seq.prompt, "chosen": seq.chosen, "layers": layers,
        "left": seq.left,
        "arrays": [[array.dtype.str, array.shape] for array in arrays],
    }  # fmt: skip
    numbers = json.dumps(said, separators=(",", ":")).encode()
    numbers += b" " * (-len(numbers) % _HEAD_BYTES)
    head = len(numbers).to_bytes(_HEAD_BYTES, "little")
    return b"".join([head, numbers, *(array.tobytes() for array in arrays)])


def ids_of(data: bytes) -> np.ndarray:
    """The token ids that a text was written down with."""
    return next(_arrays(data)[1])


def unpack(data: bytes, seq: KeptSequence, pool: LanePool) -> None:
    """Let a new sequence keep what `pack` wrote down.

    Raises:
        PoolExhausted: if the pages do not suffice; the sequence holds those of some layers.
    """
    said, arrays = _arrays(data)
    next(arrays)
    spec = pool.pool.spec
    for layer, own in enumerate(said["layers"]):
        k, v = (torch.from_numpy(next(arrays)).view(spec.dtype).to(spec.device) for _ in range(2))
        places = next(arrays)
        heard = (
            None if pool.received is None else torch.from_numpy(next(arrays)).view(torch.float32)
        )
        cuts = np.cumsum(own["counts"])[:-1].tolist()
        rows = None if heard is None else list(heard.tensor_split(cuts))
        seq.lanes[layer] = pool.fill(
            list(k.tensor_split(cuts)), list(v.tensor_split(cuts)), np.split(places, cuts), rows
        )
        runs = [
            CodedRun(tier, next(arrays), next(arrays), next(arrays), next(arrays))
            for tier in own["tiers"]
        ]
        seq.coded[layer] = CodedLayer(runs, own["loose"])
        if own["asked"] is not None:
            seq.queries[layer] = torch.from_numpy(next(arrays)).view(getattr(torch, own["asked"]))
    seq.tokens, seq.text, seq.prompt = said["tokens"], said["text"], said["prompt"]
    seq.chosen, seq.left = list(said["chosen"]), int(said.get("left", 0))


def _raw(x: Tensor) -> np.ndarray:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy()


def _arrays(data: bytes) -> tuple[dict[str, Any], Iterator[np.ndarray]]:
    """The numbers, and the arrays one by one, in memory of their own."""
    stop = _HEAD_BYTES + int.from_bytes(data[:_HEAD_BYTES], "little")
    said = json.loads(data[_HEAD_BYTES:stop])

    def each() -> Iterator[np.ndarray]:
        at = stop
        for dtype, shape in said["arrays"]:
            array = np.frombuffer(data, dtype, int(np.prod(shape)), at).reshape(shape).copy()
            at += array.nbytes
            yield array

    return said, each()
