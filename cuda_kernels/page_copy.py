"""Copies of whole pages between lists of regions, and of new tokens' rows into pages.

A region is a tensor `[pages, *page]` whose pages are contiguous; the step from page to page may be larger, as in
one layer of a row of pages that stand layer after layer. CPU kernel in Numba: one `memmove` a page and region,
without the GIL, page by page, so that a page of all layers is still in the caches when the next call reads it. On a
GPU one launch, see `page_copy_gpu.py`; there page numbers may be a tensor on the device, and then no host reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from .gpu.kernel import run_on
from .gpu.pieces import piece_bytes
from .gpu.toolchain import usable
from .kernel_cache import njit
from .merge import direct
from .page_copy_gpu import MOST_BLOCKS, copy_pages_launch, pages_on, write_tokens_launch

memmove: Any = types.ExternalFunction("memmove", types.intp(types.intp, types.intp, types.intp))


class Regions:
    """Regions whose pages are copied together, with the table that the CPU kernel reads.

    Raises:
        ValueError: if a page is not contiguous, or the regions are on several devices.

    Attributes:
        table: address, bytes from page to page, bytes of a page, `[regions, 3]` int64.
        pages: how many each region has, at least.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        for tensor in self.tensors:
            if tensor.dim() < 2 or not tensor[:1].is_contiguous():
                raise ValueError(
                    f"Regions: pages of {list(tensor.shape)} with strides {tensor.stride()} are not "
                    "contiguous; make them so"
                )
        if len({tensor.device for tensor in self.tensors}) > 1:
            raise ValueError("Regions: all must be on one device")
        self.pages = min([tensor.shape[0] for tensor in self.tensors]) if self.tensors else 0
        self.direct = all(map(direct, self.tensors))
        self.shapes = [(tensor.shape[1:], tensor.dtype) for tensor in self.tensors]
        self.table = np.array([_row(t) for t in self.tensors], np.int64).reshape(-1, 3)
        self._tables: dict[torch.device, Tensor] = {}

    def table_on(self, device: torch.device) -> Tensor:
        """Give the table in a GPU's memory, the same at each call."""
        if device not in self._tables:
            self._tables[device] = pages_on(device, torch.from_numpy(self.table))
        return self._tables[device]

    @cached_property
    def cuda(self) -> bool:
        """Whether a GPU reaches them: its own memory, or pinned memory of the host."""
        return all(map(_reached, self.tensors))


def _reached(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and (tensor.is_cuda or (tensor.is_cpu and tensor.is_pinned()))


def _row(tensor: Tensor) -> tuple[int, int, int]:
    item = tensor.element_size()
    there = type(tensor) is Tensor and tensor.device.type in ("cpu", "cuda")
    address = tensor.data_ptr() if there and not torch.compiler.is_compiling() else 0
    return address, tensor.stride(0) * item, tensor[0].numel() * item if len(tensor) else 0


@njit(nogil=True)
def _copy(to, to_pages, of, of_pages):
    for i in range(len(to_pages)):
        for r in range(len(to)):
            memmove(to[r, 0] + to_pages[i] * to[r, 1], of[r, 0] + of_pages[i] * of[r, 1], to[r, 2])


def copy_pages_reference(
    to: Sequence[Tensor], to_pages: Tensor, of: Sequence[Tensor], of_pages: Tensor
) -> None:
    """Copy in plain torch, on any device; see `copy_pages`."""
    for target, source in zip(to, of, strict=True):
        pages = source.index_select(0, of_pages.to(source.device))
        target.index_copy_(0, to_pages.to(target.device), pages.to(target.device))


@torch.library.custom_op("plait::copy_pages", mutates_args={"to"})
def copy_pages_op(
    to: Sequence[Tensor], to_pages: Tensor, of: Sequence[Tensor], of_pages: Tensor
) -> None:
    """Copy behind torch's dispatcher: Numba on the CPU, torch elsewhere."""
    if all(map(direct, (*to, *of))):
        a, b = Regions(to), Regions(of)
        places, sources = _checked(to_pages, a.pages), _checked(of_pages, b.pages)
        _copy(a.table, places.numpy(), b.table, sources.numpy())
    else:
        copy_pages_reference(to, to_pages, of, of_pages)


@copy_pages_op.register_fake
def _(to, to_pages, of, of_pages):
    return None


@copy_pages_op.register_kernel("cuda")
def _(to: Sequence[Tensor], to_pages: Tensor, of: Sequence[Tensor], of_pages: Tensor) -> None:
    _copy_cuda(Regions(to), to_pages, Regions(of), of_pages)


def _copy_cuda(to: Regions, to_pages: Tensor, of: Regions, of_pages: Tensor) -> None:
    """Copy in one launch; what the kernel does not reach goes by torch."""
    if not (to_pages.numel() and len(to.table)):
        return
    if not (to.cuda and of.cuda and len(to.table) <= MOST_BLOCKS and usable()):
        copy_pages_reference(to.tensors, to_pages, of.tensors, of_pages)
        return
    device = next(t.device for t in (*to.tensors, *of.tensors) if t.is_cuda)
    size = piece_bytes([*to.table.ravel().tolist(), *of.table.ravel().tolist()])
    tables = to.table_on(device), of.table_on(device)
    pages = pages_on(device, to_pages), pages_on(device, of_pages)
    run_on(copy_pages_launch(*tables, *pages, size, int(to.table[:, 2].max())), tables[0])


def copy_pages(
    to: Regions, to_pages: np.ndarray | Tensor, of: Regions, of_pages: np.ndarray | Tensor
) -> None:
    """Copy page `of_pages[i]` of each region of `of` over page `to_pages[i]` of the same region of `to`.

    Gather, scatter and copy-on-write in one: it depends on what the regions are. No page that is written may
    also be read. Between a GPU and pinned memory of the host too.

    Shape: to_pages, of_pages `[n]` whole numbers. Tensors on a GPU are not looked at by the host: they must be right.

    Raises:
        ValueError: if the regions' pages differ in number, shape or dtype, or a page does not exist.
    """
    if to.shapes != of.shapes:
        raise ValueError(f"copy_pages: pages of {of.shapes[:2]}... do not fit {to.shapes[:2]}...")
    a, b = _checked(to_pages, to.pages), _checked(of_pages, of.pages)
    if a.shape != b.shape or a.dim() != 1:
        told = f"{tuple(b.shape)} pages cannot go to {tuple(a.shape)}"
        raise ValueError(f"copy_pages: {told}; give two equal rows")
    if torch.compiler.is_compiling():
        torch.ops.plait.copy_pages(to.tensors, a, of.tensors, b)
    elif to.direct and of.direct:
        _copy(to.table, a.numpy(), of.table, b.numpy())
    elif to.cuda and of.cuda:
        _copy_cuda(to, a, of, b)  # with the tables that are there already
    else:
        torch.ops.plait.copy_pages(to.tensors, a, of.tensors, b)


def _checked(pages: np.ndarray | Tensor, there: int) -> Tensor:
    """See page numbers as a tensor; those in host memory must exist. In a compiled graph the operator looks."""
    if isinstance(pages, Tensor) and (pages.device.type != "cpu" or torch.compiler.is_compiling()):
        return pages
    held = np.ascontiguousarray(pages, np.int64)
    if held.size and not 0 <= held.min() <= held.max() < there:
        raise ValueError(f"copy_pages: pages {held.tolist()[:8]} must be in [0, {there})")
    return torch.from_numpy(held)


@njit(nogil=True)
def _write(to, slots, of, token_step, heads, head_step, size):
    """Write rows of `heads` pieces of `size` bytes; neighbours with one call where they are dense."""
    whole = heads * size
    dense = token_step == whole and head_step == size
    first = 0
    while first < len(slots):
        stop = first + 1
        while dense and stop < len(slots) and slots[stop] == slots[stop - 1] + 1:
            stop += 1
        if head_step == size:
            memmove(to + slots[first] * whole, of + first * token_step, (stop - first) * whole)
        else:
            for h in range(heads):
                place = of + first * token_step + h * head_step
                memmove(to + slots[first] * whole + h * size, place, size)
        first = stop


def write_tokens_reference(region: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write in plain torch, on any device; see `write_tokens`."""
    region.view(-1, *region.shape[2:]).index_copy_(0, slots, rows)


@torch.library.custom_op("plait::write_tokens", mutates_args={"region"})
def write_tokens_op(region: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write behind torch's dispatcher: Numba on the CPU, torch elsewhere."""
    if direct(region) and direct(rows):
        _write_direct(region, slots.numpy(), rows)
    else:
        write_tokens_reference(region, slots.to(region.device), rows)


@write_tokens_op.register_fake
def _(region, slots, rows):
    return None


@write_tokens_op.register_kernel("cuda")
def _(region: Tensor, slots: Tensor, rows: Tensor) -> None:
    if not rows.numel():
        return
    if not (region.is_cuda and _reached(rows) and rows.shape[1] <= MOST_BLOCKS and usable()):
        write_tokens_reference(region, slots.to(region.device), rows.to(region.device))
        return
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    run_on(write_tokens_launch(region, pages_on(region.device, slots), rows), region)


def _write_direct(region: Tensor, slots: np.ndarray, rows: Tensor) -> None:
    _, heads, width = rows.shape
    token_step, head_step, step = rows.stride()
    if step != 1:
        rows = rows.contiguous()
        token_step, head_step, _ = rows.stride()
    item = rows.itemsize
    if heads == 1:
        head_step = width
    _write(
        region.data_ptr(), slots, rows.data_ptr(), token_step * item, heads, head_step * item, width * item
    )  # fmt: skip


def write_tokens(region: Tensor, slots: np.ndarray | Tensor, rows: Tensor) -> None:
    """Write the keys or values of new tokens into their places in one layer's region.

    Shape: region `[pages, page_tokens, kv_heads, d]` contiguous, slots `[tokens]` int64 (`page * page_tokens +
        offset`, the caller's own and in range), rows `[tokens, kv_heads, d]` of the region's dtype, any strides.

    Raises:
        ValueError: if they do not belong together, or the region is not contiguous.
    """
    fits = region.dim() == 4 and rows.dim() == 3 and rows.shape[1:] == region.shape[2:]
    if not fits or rows.dtype != region.dtype or len(slots) != len(rows):
        raise ValueError(
            f"write_tokens: rows {list(rows.shape)} {rows.dtype} at {len(slots)} slots do not fit region "
            f"{list(region.shape)} {region.dtype}; use rows [tokens, kv_heads, d] and as many slots"
        )
    if not region.is_contiguous():
        raise ValueError(
            f"write_tokens: region {list(region.shape)} with strides {region.stride()} is not contiguous; make it so"
        )
    if direct(rows) and direct(region):
        _write_direct(region, np.ascontiguousarray(slots, np.int64), rows)
    else:
        torch.ops.plait.write_tokens(region, torch.as_tensor(slots), rows)


__all__ = [
    "Regions", "copy_pages", "copy_pages_reference", "write_tokens", "write_tokens_reference",
]  # fmt: skip
