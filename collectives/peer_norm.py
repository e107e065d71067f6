"""The fused norm of a CUDA group: `cuda_kernels/all_reduce_norm.py` over buffers that all ranks have mapped.

The first call of a group allocates them, or finds out why they cannot be had; then an all-reduce and the norm's kernel
do it (`how` says which). All decisions are made from what all ranks know alike, so that no rank waits for a kernel that
another does not start.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from ..cuda_kernels import all_reduce_norm
from ..cuda_kernels.all_reduce_norm import STATISTICS
from ..cuda_kernels.gpu.peers import Layout
from ..cuda_kernels.gpu.vectors import VECTORS
from ..cuda_kernels.quantised import Quantised
from .norm_schedule import ONE, SLOT_BYTES, SWITCH, Steps, choose, steps_for
from .peer_driver import Driver
from .per_group import PerGroup
from .symmetric import PeerBuffer, symmetric_buffer
from .trace import listening, tell_traces

MOST_ROW_BYTES = 32 << 10  # a row stays in the registers of 512 threads
SWITCH_BLOCKS = 16  # TokenWeave: fewer starve the switch, more take multiprocessors for nothing


class PeerNorm:
    """The fused norm of one group.

    State: the ranks' buffers, and in them the number of the step; calls are in one order on all ranks and one stream.
    """

    def __init__(self, buffer: PeerBuffer, layout: Layout, steps: Steps) -> None:
        self.buffer, self.layout, self.steps = buffer, layout, steps
        self.rank, self.driver = buffer.group.rank(), buffer.driver
        # the kernels' way to the ranks
        self.table = torch.tensor(buffer.addresses, dtype=torch.int64, device=self.driver.device)
        self.processors = min(card["processors"] for card in buffer.cards)
        self.fp8 = all(card["fp8"] for card in buffer.cards)

    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
        stored: torch.dtype | None,
    ) -> tuple[Tensor | Quantised, Tensor] | None:  # fmt: skip
        """Do what `fused.all_reduce_rms_norm` asks for; None, on all ranks, where the kernels do not serve it."""
        schedule = self.schedule(x, residual, weight, bias, stored)
        if schedule is None:
            return None
        begin = time.perf_counter()
        ready = [_dense(t) for t in (x, residual, weight, weight if bias is None else bias)]
        total, normed = torch.empty_like(ready[0]), torch.empty_like(ready[0], dtype=stored)
        scales = None
        if stored is not None:
            scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        hidden = x.shape[-1]
        rows, pieces = x.numel() // hidden, hidden * x.element_size() // 16
        variant = getattr(all_reduce_norm, schedule)(
            world=self.layout.world, hidden=hidden, dtype=x.dtype, layer_norm=bias is not None,
            fp8=stored is not None, slot_bytes=self.layout.slot_bytes, blocks=self.layout.blocks,
            virtual=False, threads=min(512, max(64, 1 << (pieces - 1).bit_length())),
        )  # fmt: skip
        cast = (self.buffer.multicast,) if schedule == SWITCH else ()
        outputs = (normed, total, total if scales is None else scales)
        pointers = (t.data_ptr() for t in (*ready, *outputs))
        self.driver.launch(
            variant, self._blocks(schedule, rows), self.table.data_ptr(), *cast, self.rank,
            *pointers, rows, eps,
        )  # fmt: skip
        if listening():
            tell_traces(self.buffer.group, "all_reduce", [x], time.perf_counter() - begin)
        return (normed if scales is None else Quantised(normed, scales)), total

    def schedule(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
        stored: torch.dtype | None,
    ) -> str | None:  # fmt: skip
        """Choose the kernel by shapes and dtypes alone; None if none of them serves."""
        given = [residual, weight] + ([] if bias is None else [bias])
        row = x.shape[-1] * x.element_size()
        alike = x.dtype in VECTORS and all(t.dtype == x.dtype for t in given)
        codes = stored is None or (stored == torch.float8_e4m3fn and self.fp8)
        if not alike or not codes or x.numel() == 0 or row % 16 or row > MOST_ROW_BYTES:
            return None
        chosen = choose(self.steps, x.numel() * x.element_size())
        if chosen == SWITCH and x.dtype != torch.bfloat16:
            chosen = choose(steps_for("", self.layout.world, False), x.numel() * x.element_size())
        room = self.layout.half_bytes if chosen == SWITCH else self.layout.slot_bytes
        fits = x.numel() // x.shape[-1] * (row + STATISTICS) <= room
        return chosen if fits else None

    def _blocks(self, schedule: str, rows: int) -> int:
        """Blocks that have something to do, and are all resident at once."""
        runs = rows if schedule == ONE else -(-rows // self.layout.world)
        most = SWITCH_BLOCKS if schedule == SWITCH else self.layout.blocks
        return max(1, min(runs, most, self.processors))


def make_norm(group: dist.ProcessGroup, driver: Driver | None = None) -> PeerNorm:
    """Make the fused norm of a group.

    Collective: all ranks of the group.

    Raises:
        PeerMemoryError: on every rank.
    """
    layout = Layout(group.size(), SLOT_BYTES)
    buffer = symmetric_buffer(layout.total_bytes, group, driver)
    names = {card["name"] for card in buffer.cards}
    name = names.pop() if len(names) == 1 else ""
    return PeerNorm(buffer, layout, steps_for(name, group.size(), buffer.multicast != 0))


norms = PerGroup("all_reduce_rms_norm", make_norm)


def how(group: dist.ProcessGroup) -> str:
    """Say how a CUDA group does `all_reduce_rms_norm`; known after its first call."""
    found = norms.made.get(group)
    if found is None:
        return "not called yet"
    if isinstance(found, str):
        return f"all-reduce, then add_rms_norm: {found}"
    passed = f" ({found.buffer.passed})" if found.buffer.passed else ""
    rule = ", ".join(f"{schedule} to {most >> 10} KiB" for most, schedule in found.steps)
    return f"one kernel over {found.buffer.route}{passed}: {rule}"


def _dense(x: Tensor) -> Tensor:
    """Rows behind one another that begin at 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
