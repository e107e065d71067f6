"""What the ranks' buffers of a cross-rank kernel hold, and how ranks wait for each other inside a kernel.

Every rank owns one buffer that all ranks have mapped. Each begins with words of its owner (the step, a counter of
finished blocks) and flags: flag (block, source) of a set holds the last step that block has published for. Flags only
grow. The step lives in the buffer, so that a captured graph goes on where it was; the last block raises it.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import ptx
from .ptx import device_function, i32, u32, u64

HEAD = 256  # bytes: step, counter, and room so that flags begin a line
PATIENCE = u64(30_000_000_000)  # nanoseconds that a rank waits for another before it traps


@dataclass(frozen=True)
class Layout:
    """Where things lie in a rank's buffer.

    Attributes:
        slot_bytes: of each (parity, source) slot; a multiple of 16.
        blocks: the largest grid.
        sets: how many sets of flags, one for each crossing of a step.
    """

    world: int
    slot_bytes: int
    blocks: int = 64
    sets: int = 2

    @property
    def set_bytes(self) -> int:
        return self.blocks * self.world * 4

    @property
    def slots(self) -> int:
        """Where the slots begin."""
        return -(-(HEAD + self.sets * self.set_bytes) // HEAD) * HEAD

    @property
    def parity_bytes(self) -> int:
        return self.world * self.slot_bytes

    @property
    def half_bytes(self) -> int:
        """Half the slots of a parity, where two places are enough whatever the number of ranks."""
        return self.world * self.slot_bytes // 32 * 16

    @property
    def total_bytes(self) -> int:
        """Two parities of slots: a rank can be one step ahead of another, never two."""
        return self.slots + 2 * self.parity_bytes


@device_function
def wait_for(flag, step):
    """Wait until a flag has reached a step; traps when the rank behind it does not come."""
    begun = ptx.nanoseconds()
    while i32(u32(ptx.ld4_acquire(flag) - step)) < i32(0):
        ptx.pause(u32(20))
        if u64(ptx.nanoseconds() - begun) > PATIENCE:
            ptx.trap()


@device_function
def cross(peers, own, rank, world, flags, step):
    """Publish what this block has written, and wait for the same block of every rank.

    `flags` is where the block's flags of a set begin in every buffer.
    """
    ptx.barrier()  # all of the block has written; a release covers what a barrier has brought together
    peer = ptx.thread()
    if peer < i32(world):
        base = ptx.ld_u64(peers + u64(u32(peer)) * u64(8))
        ptx.st4_release(base + flags + u64(u32(rank)) * u64(4), step)
        wait_for(own + flags + u64(u32(peer)) * u64(4), step)
    ptx.barrier()


@device_function
def end_step(own, step):
    """Raise the step when all blocks have come here."""
    ptx.barrier()
    if ptx.thread() == i32(0):
        before = ptx.count4(own + u64(4), u32(1))
        if i32(before) == i32(ptx.blocks() - i32(1)):
            ptx.st4(own + u64(4), u32(0))
            ptx.st4(own, step)
