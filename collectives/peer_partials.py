"""Helix's exchange of a CUDA group: partials go straight into the slots of the ranks that merge them.

`cuda_kernels/helix_combine.py` over buffers that all ranks have mapped. What a rank sends of a chunk goes on its way
beside the next chunk's attention, on a stream of its own; one launch then merges all chunks as they come. That launch
is the last of a step: a kernel that waits for sends which this process has not queued yet would wait for ever where
the host stops for the device (an allocation, a module that is loaded, CUDA_LAUNCH_BLOCKING).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ..cuda_kernels.gpu.peers import Layout
from ..cuda_kernels.gpu.vectors import VECTORS
from ..cuda_kernels.helix_combine import helix_combine, helix_send, inverse_of, record_bytes
from .peer_driver import Driver
from .per_group import PerGroup
from .symmetric import PeerBuffer, symmetric_buffer
from .trace import listening, tell_traces

# what a rank receives from another in a step: 16 MiB of each device at 8 ranks
SLOT_BYTES = 1 << 20
MOST_CHUNKS, MOST_VECTORS = 32, 96


class PeerPartials:
    """The exchange of one group.

    State: the ranks' buffers, and in them the number of the step; calls are in one order on all ranks and one stream.

    Args:
        fp8: rows travel as e4m3, half the bytes and an error of 1/16 of a number at most (16-bit dtypes).
    """

    def __init__(self, buffer: PeerBuffer, layout: Layout, fp8: bool = False) -> None:
        self.buffer, self.layout, self.fp8 = buffer, layout, fp8
        self.rank, self.driver = buffer.group.rank(), buffer.driver
        self.table = torch.tensor(buffer.addresses, dtype=torch.int64, device=self.driver.device)
        self.processors = min(card["processors"] for card in buffer.cards)
        self.ends: dict[tuple[int, ...], Tensor] = {}

    def serves(self, rows: Sequence[int], o: Tensor, lse: Tensor) -> bool:
        """Say, by shapes and dtypes alone, whether the kernels take chunks of so many rows."""
        own, rest = divmod(o.shape[1], self.layout.world)
        vectors, over = divmod(o.shape[2] * o.element_size(), 16)
        fits = sum(rows) * own * record_bytes(vectors, self.fp8) <= self.layout.slot_bytes
        kinds = o.dtype in VECTORS and lse.dtype == torch.float32
        wide = 0 < vectors <= MOST_VECTORS and (not self.fp8 or o.dtype != torch.float32)
        return (
            kinds
            and wide
            and not rest
            and not over
            and fits
            and len(rows) <= self.layout.blocks
            and min(rows) > 0
        )

    def begin(self, rows: Sequence[int], o: Tensor) -> PeerRun:
        """Begin a step of chunks of so many rows, with partials like `o`."""
        return PeerRun(self, tuple(accumulate(rows)), o)

    def ends_of(self, ends: tuple[int, ...]) -> Tensor:
        """Where chunks end, on the device; kept, so that a step's layers and a graph's replays find it there."""
        found = self.ends.get(ends)
        if found is None:
            found = torch.tensor(ends, dtype=torch.int32, device=self.driver.device)
            self.ends[ends] = found
        return found


class PeerRun:
    """One step's exchange: `send` for each chunk in order, then `merge`."""

    def __init__(self, peers: PeerPartials, ends: tuple[int, ...], like: Tensor) -> None:
        self.peers, self.ends = peers, ends
        self.heads, self.width = like.shape[1] // peers.layout.world, like.shape[2]
        self.held: list[Tensor] = []  # until the sends are done
        self.begun = time.perf_counter()
        self.constants = {
            "world": peers.layout.world, "vectors": self.width * like.element_size() // 16,
            "dtype": like.dtype, "slot_bytes": peers.layout.slot_bytes,
            "chunks": peers.layout.blocks, "virtual": False, "fp8": peers.fp8,
        }  # fmt: skip

    def send(self, o: Tensor, lse: Tensor) -> None:
        """Send a chunk. Shape: o `[rows, heads, d]`, lse `[rows, heads]`, all ranks' heads"""
        peers, chunk = self.peers, len(self.held) // 2
        first = self.ends[chunk - 1] if chunk else 0
        o, lse = o.contiguous(), lse.contiguous()
        o = o.clone() if o.data_ptr() % 16 else o
        self.held += [o, lse]
        with peers.driver.beside():
            peers.driver.launch(
                helix_send(**self.constants), (o.shape[0], peers.layout.world),
                peers.table.data_ptr(), peers.rank, o.data_ptr(), lse.data_ptr(), chunk, first,
                self.ends[-1], self.heads,
            )  # fmt: skip

    def merge(self, sink: Tensor | None = None) -> Tensor:
        """Merge what all ranks sent. Shape: sink `[heads/kvp]` -> `[all rows, heads/kvp, d]`"""
        peers, o = self.peers, self.held[0]
        assert len(self.held) == 2 * len(self.ends)
        rows = self.ends[-1] * self.heads
        out = o.new_empty(self.ends[-1], self.heads, self.width)
        out_lse = o.new_empty(self.ends[-1], self.heads, dtype=torch.float32)
        variant = helix_combine(**self.constants, sink=sink is not None)
        logits = out_lse if sink is None else sink.float().contiguous()
        a_turn = variant.threads >> (self.constants["vectors"] - 1).bit_length()
        ends = peers.ends_of(self.ends)
        peers.driver.join()
        peers.driver.launch(
            variant, max(1, min(-(-rows // a_turn), 2 * peers.processors)), peers.table.data_ptr(),
            peers.rank, out.data_ptr(), out_lse.data_ptr(), logits.data_ptr(), ends.data_ptr(),
            len(self.ends), self.heads, inverse_of(self.heads),
        )  # fmt: skip
        if listening():
            seconds = time.perf_counter() - self.begun
            tell_traces(peers.buffer.group, "all_to_all", self.held, seconds)
        self.held = []
        return out


def make_partials(group: dist.ProcessGroup, driver: Driver | None = None) -> PeerPartials:
    """Make the exchange of a group.

    Collective: all ranks of the group.

    Raises:
        PeerMemoryError: on every rank.
    """
    layout = Layout(group.size(), SLOT_BYTES, MOST_CHUNKS, sets=2)
    return PeerPartials(symmetric_buffer(layout.total_bytes, group, driver), layout)


partials = PerGroup("exchange of partials", make_partials)
