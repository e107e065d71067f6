"""HOP-B: into how many chunks a step's requests are cut, so that exchanges hide behind attention.

While a chunk's partial outputs are on the wire the next chunk is attended (Helix Parallelism, arXiv 2507.07120, section
2.1.3). Every chunk costs one more exchange and one more call of the kernel, so that one chunk is often best: always
where the wire is memory that the same cores copy. `Pace` measures the first steps, and answers by what it saw; on CUDA,
where clocks of the host say nothing, it answers by bytes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ...collectives import primitive

if TYPE_CHECKING:
    from ..ranks import ModelRanks
    from .helix import HelixLayer
    from .step import Step

STEPS = 4  # steps timed one way before they are judged; the fastest counts
GAIN = 0.95  # chunks are taken up if a step takes less than this much of its time in one piece
AGAIN = 1024  # steps after which a choice is looked at again
COUNTS = (2, 4, 8, 16)
# A CUDA device as it is supposed: bytes a second of its memory and to its peers, seconds of one more chunk. Not
# measured; ranks must answer alike, so they are no device's own.
MEMORY, LINK, CHUNK = 2.5e12, 3.0e11, 5e-6
ITEM = 2  # bytes of a number there


def predicted(attention: float, exchange: float, chunks: int, launch: float) -> float:
    """Seconds of attention and its exchange in a pipeline of two stages; ``launch`` is an empty exchange.

    Each chunk attends for c and exchanges for m: c + m + (chunks - 1) * max(c, m). One more chunk costs a launch in
    both, as the processor that attends also begins the exchange.
    """
    if chunks == 1:
        return attention + exchange
    c, m = attention / chunks + launch, max(0.0, exchange - launch) / chunks + launch
    return c + m + (chunks - 1) * max(c, m)


def best_chunks(
    attention: float, exchange: float, launch: float, requests: int, now: int = 1
) -> int:
    """Choose the count that is predicted fastest; another than ``now`` only if it is by far."""
    counts = [n for n in COUNTS if n <= requests]
    if now > 1:
        counts.insert(0, min(now, requests))
    if not counts:
        return 1
    first = counts[0] if now > 1 else 1
    seconds = {n: predicted(attention, exchange, n, launch) for n in (1, *counts)}
    best = min(seconds, key=lambda n: seconds[n])
    return best if seconds[best] < GAIN * seconds[first] else first


def chunks_by_bytes(attended: float, exchanged: float, requests: int) -> int:
    """Choose for a CUDA device, by the bytes of keys and values that it reads and of partials that it sends."""
    return best_chunks(attended / MEMORY, exchanged / LINK + CHUNK, CHUNK, requests)


@dataclass
class Regime:
    """Steps of about one size, and what is known of them.

    State: ``phase`` is "alone" (timed in one piece), "trial" (timed in ``chunks``) or "settled". Equal on all ranks:
    it moves by agreed times and by the number of steps.
    """

    phase: str = "alone"
    chunks: int = 1
    kept: int = 1
    steps: int = 0
    alone: float = math.inf
    attention: float = math.inf
    exchange: float = math.inf
    whole: float = math.inf
    running: list[tuple[float, float]] = field(default_factory=list)

    def enter(self, phase: str, chunks: int) -> None:
        """Begin a phase."""
        self.phase, self.chunks, self.steps = phase, chunks, 0
        self.attention = self.exchange = self.whole = math.inf
        self.running = []

    def count(self) -> None:
        """Count the step that ended, and keep the fastest; times are of one layer."""
        layers, self.running = self.running, []
        if not layers:
            return
        self.steps += 1
        attention, exchange = (sum(t) / len(layers) for t in zip(*layers, strict=True))
        self.attention = min(self.attention, attention)
        self.exchange = min(self.exchange, exchange)
        self.whole = min(self.whole, attention + exchange)


class Pace:
    """Chooses the chunks of each step of one model.

    State: a `Regime` for every size of step met (powers of two of rows and tokens), and which of them runs.
    """

    def __init__(self, ranks: ModelRanks) -> None:
        self.ranks = ranks
        self.regimes: dict[tuple[int, int], Regime] = {}
        self.running: Regime | None = None

    def chunks(self, step: Step, device: torch.device, layer: HelixLayer | None = None) -> int:
        """Say into how many chunks the coming step is cut; ``layer``: one of those that run.

        Collective: all ranks of the model copy while a regime is measured; after every ``STEPS`` of its steps three
        empty exchanges over kvp and an all-reduce of 32 bytes.
        """
        asked, self.running = self.ranks.plan.kvp.chunks, None
        requests = sum(count > 0 for count in step.counts)
        if isinstance(asked, int):
            return min(asked, max(1, requests))
        if requests < 2 or self.ranks.kvp_group is None:
            return 1
        if device.type != "cpu":  # a call returns before its work is done
            if layer is None:
                return 1
            kvp = self.ranks.kvp
            attended = sum(step.lengths) / kvp * layer.kv_width * ITEM
            sent = step.num_rows * layer.heads * (layer.value_dim + 2) * (kvp - 1) / kvp * ITEM
            return chunks_by_bytes(attended, sent, requests)
        size = step.num_rows.bit_length(), sum(step.lengths).bit_length()
        regime = self.running = self.regimes.setdefault(size, Regime())
        regime.count()
        if regime.steps >= (AGAIN if regime.phase == "settled" else STEPS):
            self._judge(regime, requests)
        return min(regime.chunks, requests)

    def note(self, attention: float, exchange: float) -> None:
        """Add one layer's seconds to the step that runs; in chunks only their sum means something."""
        if self.running is not None:
            self.running.running.append((attention, exchange))

    def _judge(self, regime: Regime, requests: int) -> None:
        if regime.phase == "settled":
            regime.enter("alone", 1)
            return
        attention, exchange, whole, launch = self._agreed(regime)
        if regime.phase == "alone":
            regime.alone = whole
            chunks = best_chunks(attention, exchange, launch, requests, regime.kept)
            regime.enter("trial" if chunks > 1 else "settled", chunks)
        elif whole < (1.0 if regime.chunks == regime.kept else GAIN) * regime.alone:
            regime.enter("settled", regime.chunks)
        else:  # fewer may do better
            fewer = regime.chunks // 2
            regime.enter("trial" if fewer > 1 else "settled", max(1, fewer))
        if regime.phase == "settled":
            regime.kept = regime.chunks

    def _agreed(self, regime: Regime) -> tuple[float, float, float, float]:
        """Times that all ranks share: the slowest attention, and the fastest exchange, which has waited for nobody."""
        kvp = self.ranks.kvp_group
        assert kvp is not None
        launch = min(_empty_exchange(kvp) for _ in range(3))
        mine = [regime.attention, -regime.exchange, regime.whole, launch]
        times = torch.tensor(mine, dtype=torch.float64)
        times = primitive.all_reduce(times, self.ranks.all, dist.ReduceOp.MAX)
        attention, exchange, whole, launch = times.tolist()
        return attention, -exchange, whole, launch


def _empty_exchange(group: dist.ProcessGroup) -> float:
    """Time an exchange of next to nothing."""
    begin = time.perf_counter()
    primitive.start_all_to_all(torch.zeros(group.size(), 1), group).wait()
    return time.perf_counter() - begin
