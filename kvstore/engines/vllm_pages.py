"""How pages and vLLM's blocks belong together, and what scheduler and workers tell each other about them.

A page holds one block of one group of layers (vLLM's KV cache group), of one worker's shard.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .vllm_model import require_vllm

require_vllm()

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    group_kernel_blocks,
)

_FULL, _WINDOWED = (FullAttentionSpec, MLAAttentionSpec), (SlidingWindowSpec,)


class PageAt(NamedTuple):
    """A page and the block it is in, or shall be put in."""

    key: bytes
    group: int
    block: int


@dataclass
class Plan(KVConnectorMetadata):
    """What the workers shall do in one step: pages to load, by request, and pages to save."""

    loads: dict[str, list[PageAt]] = field(default_factory=dict)
    saves: list[PageAt] = field(default_factory=list)


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What workers hold now and did not before, or the reverse; by rank.

    Attributes:
        settled: pages that a save was asked for, and that are now held, or not saved after all.
    """

    held: dict[int, list[bytes]] = field(default_factory=dict)
    gone: dict[int, list[bytes]] = field(default_factory=dict)
    settled: dict[int, list[bytes]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Join two workers' reports."""
        assert isinstance(other, Report)
        return Report(
            {**self.held, **other.held},
            {**self.gone, **other.gone},
            {**self.settled, **other.settled},
        )


@dataclass
class FirstReport(KVConnectorHandshakeMetadata):
    """What a worker found in its directory."""

    rank: int
    keys: list[bytes]


class Group(NamedTuple):
    """A group of layers as the scheduler sees it.

    Attributes:
        tokens: in a block.
        hashes: block hashes per block; vLLM hashes the smallest common unit.
        window: blocks before a position that are needed there; None, all.
    """

    tokens: int
    hashes: int
    window: int | None


def page_groups(kv_cache_config: Any, hash_tokens: int) -> list[Group]:
    """Read the groups of an engine.

    Raises:
        ValueError: if a group keeps something else than keys and values of all tokens, or of a window.
    """
    eligible = kv_cache_config.prefix_cacheable_group_ids
    groups = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        wrapped = group.kv_cache_spec
        spec = getattr(wrapped, "first_spec", wrapped)
        if type(spec) not in (*_FULL, *_WINDOWED) or number not in eligible:
            raise ValueError(
                f"PlaitConnector keeps full and sliding-window attention; layers {group.layer_names[:2]}... "
                f"have {type(spec).__name__}: run this model without the connector"
            )
        tokens = spec.block_size
        window = None
        if isinstance(spec, _WINDOWED):
            window = -(-(spec.sliding_window - 1) // tokens)
        groups.append(Group(tokens, tokens // hash_tokens, window))
    return groups


class LayerRows:
    """One layer's cache as bytes: a row per block. Shape: `[blocks, bytes of a block]`.

    Raises:
        ValueError: if a block's bytes do not lie together.
    """

    def __init__(self, name: str, cache: Any, num_blocks: int) -> None:
        if not isinstance(cache, torch.Tensor):
            raise ValueError(f"layer {name} keeps {type(cache).__name__}, not one tensor of pages")
        cache = group_kernel_blocks(cache, num_blocks)
        extent = 1 + sum(
            (size - 1) * step
            for size, step in zip(cache.shape[1:], cache.stride()[1:], strict=True)
        )
        size = cache[0].numel() * cache.element_size()
        if extent * cache.element_size() != size or cache.stride(0) * cache.element_size() < size:
            raise ValueError(
                f"layer {name} has blocks of shape {tuple(cache.shape[1:])} and strides {cache.stride()}, which are "
                "not contiguous; choose another kv_cache_layout"
            )
        self.bytes = size
        self.facts = f"{name} {tuple(cache.shape[1:])} {cache.stride()[1:]} {cache.dtype}"
        step = cache.stride(0) * cache.element_size()
        start = cache.storage_offset() * cache.element_size()
        self._rows = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(
            cache.untyped_storage(), start, (num_blocks, size), (step, 1)
        )
        self._host = self._rows.numpy() if cache.device.type == "cpu" else None

    def read(self, blocks: list[int]) -> np.ndarray:
        """Copy blocks to the host. Shape: `[len(blocks), bytes]`."""
        if self._host is not None:
            return self._host[blocks]
        index = torch.tensor(blocks, device=self._rows.device)
        return self._rows.index_select(0, index).cpu().numpy()

    def write(self, blocks: list[int], rows: np.ndarray) -> None:
        """Copy rows from the host into blocks."""
        if self._host is not None:
            self._host[blocks] = rows
            return
        index = torch.tensor(blocks, device=self._rows.device)
        self._rows.index_copy_(0, index, torch.from_numpy(rows).to(self._rows.device))


class GroupPages:
    """The layers of a group, one behind the other in a page."""

    def __init__(self, layers: list[LayerRows]) -> None:
        self.layers = layers
        self.bytes = sum(layer.bytes for layer in layers)

    def read(self, blocks: list[int], pages: np.ndarray, slots: list[int]) -> None:
        """Copy blocks into rows of staging memory."""
        at = 0
        for layer in self.layers:
            pages[slots, at : at + layer.bytes] = layer.read(blocks)
            at += layer.bytes

    def write(self, blocks: list[int], pages: np.ndarray, slots: list[int]) -> None:
        """Copy rows of staging memory into blocks."""
        at = 0
        for layer in self.layers:
            layer.write(blocks, np.ascontiguousarray(pages[slots, at : at + layer.bytes]))
            at += layer.bytes


def group_pages(kv_cache_config: Any, kv_caches: dict[str, Any]) -> list[GroupPages]:
    """Find each group's layers among a worker's caches."""
    count = kv_cache_config.num_blocks
    return [
        GroupPages([LayerRows(name, kv_caches[name], count) for name in group.layer_names])
        for group in kv_cache_config.kv_cache_groups
    ]
