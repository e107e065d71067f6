"""Copies of pages and of tokens' rows on a GPU: every piece is loaded and stored once, 16 bytes where memory allows.

Regions come as tables in device memory, so one launch copies any number of pages of any number of regions. Pinned
host memory has an address on the device too: a region may lie there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.pieces import movers, piece_bytes
from .gpu.ptx import i32, u32, u64

AT_ONCE = 4  # pieces that a thread has in flight
PART_BYTES = 64 << 10  # of a page that one block copies: few pages still fill the device
MOST_BLOCKS = 65535  # of a grid's y and z


@kernel(threads=256, table=[{"size": 16}, {"size": 4}])
def copy_page_pieces(size, threads):
    """Block (i, r, p) copies part p of page i of region r; a table's row is address, step and bytes of a page."""
    load, store = movers(size)
    loaded, turn = 4 * AT_ONCE, AT_ONCE * threads * size

    def body(to: u64, of: u64, to_pages: u64, of_pages: u64, parts: i32):
        entry = u64(u32(ptx.block_y())) * u64(24)
        page = u64(u32(ptx.block())) * u64(8)
        of_page, to_page = ptx.ld_u64(of_pages + page), ptx.ld_u64(to_pages + page)
        source = ptx.ld_u64(of + entry) + of_page * ptx.ld_u64(of + entry + u64(8))
        target = ptx.ld_u64(to + entry) + to_page * ptx.ld_u64(to + entry + u64(8))
        n_bytes = ptx.ld_u64(to + entry + u64(16))
        at = u64(u32(ptx.block_z())) * u64(turn) + u64(u32(ptx.thread())) * u64(size)
        v = ptx.local(loaded, u32)
        while at < n_bytes:
            for j in range(AT_ONCE):  # all loads first; beyond the end the first piece again
                one = u64(at + u64(j * threads * size))
                one = one if one < n_bytes else at
                v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3] = load(source + one)
            for j in range(AT_ONCE):
                one = u64(at + u64(j * threads * size))
                if one < n_bytes:
                    store(target + one, v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3])
            at = u64(at + u64(u32(parts)) * u64(turn))

    return body


def copy_pages_launch(
    to: Tensor, of: Tensor, to_pages: Tensor, of_pages: Tensor, size: int, most_bytes: int
) -> tuple[Variant, tuple[int, int, int], tuple[int, ...]]:
    """Choose the variant, the grid and the arguments; tables `[regions, 3]` and pages `[n]` int64 on the device.

    Args:
        size: bytes of a piece that all addresses, steps and pages are multiples of.
        most_bytes: of the largest page.
    """
    variant = copy_page_pieces(size=size)
    parts = max(1, min(MOST_BLOCKS, -(-most_bytes // PART_BYTES)))
    pointers = tuple(t.data_ptr() for t in (to, of, to_pages, of_pages))
    return variant, (len(to_pages), len(to), parts), (*pointers, parts)


@kernel(threads=128, table=[{"size": 16, "lanes": 16}, {"size": 2, "lanes": 128}])
def write_token_rows(size, lanes, threads):
    """Copy one head's row of a token by `lanes` threads; block y is the head."""
    load, store = movers(size)
    shift = (lanes - 1).bit_length()
    lane_mask = lanes - 1

    def body(
        to: u64, slots: u64, rows: u64, tokens: i32, heads: i32, pieces: i32, token_step: u64,
        head_step: u64,
    ):  # fmt: skip
        token = i32(ptx.block() * i32(threads >> shift) + (ptx.thread() >> i32(shift)))
        if token >= tokens:
            return
        head = u64(u32(ptx.block_y()))
        slot = ptx.ld_u64(slots + u64(u32(token)) * u64(8))
        source = rows + u64(u32(token)) * token_step + head * head_step
        target = to + (slot * u64(u32(heads)) + head) * u64(u32(pieces)) * u64(size)
        piece = i32(ptx.thread() & i32(lane_mask))
        while piece < pieces:
            at = u64(u32(piece)) * u64(size)
            a, b, c, d = load(source + at)
            store(target + at, a, b, c, d)
            piece = i32(piece + i32(lanes))

    return body


def write_tokens_launch(
    region: Tensor, slots: Tensor, rows: Tensor
) -> tuple[Variant, tuple[int, int], tuple[int, ...]]:
    """Choose the variant, the grid and the arguments; region contiguous, slots int64, rows `[.., heads, width]`
    with the last dim dense."""  # fmt: skip
    tokens, heads, width = rows.shape
    item = rows.element_size()
    steps = rows.stride(0) * item, rows.stride(1) * item
    size = piece_bytes((region.data_ptr(), rows.data_ptr(), width * item, *steps))
    pieces = width * item // size
    lanes = min(128, 1 << (pieces - 1).bit_length())
    variant = write_token_rows(size=size, lanes=lanes)
    pointers = region.data_ptr(), slots.data_ptr(), rows.data_ptr()
    grid = -(-tokens * lanes // variant.threads), heads
    return variant, grid, (*pointers, tokens, heads, pieces, *steps)


def pages_on(device: torch.device, pages: Tensor) -> Tensor:
    """Bring page numbers to the device.

    Raises:
        ValueError: a graph is being captured, which would keep the numbers' place in host memory and not the numbers.
    """
    if pages.device != device and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"page numbers on {pages.device} cannot be read by a CUDA graph; give a tensor on {device}"
        )
    return pages.to(device, torch.int64, non_blocking=True).contiguous()
