"""The shape of what a store keeps: said once, shared by pool, tiers and codecs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

FIRST_PAGES = 64  # a growing store starts this small and doubles
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class KVSpec:
    """Keys and values of one model on one rank.

    Args:
        layers: number of attention layers kept.
        kv_heads: KV heads on this rank.
        head_dim: columns of a key head.
        page_tokens: tokens per page, the unit of allocation and sharing.
        dtype: float32, float64, bfloat16 or float16.
        value_dim: columns of a value head, if not `head_dim`.
        shared_kv: keep K only; V is the first `value_dim` columns of K (the MLA latent).
        device: where pages live.

    Shape:
        pages of one layer: K `[pages, page_tokens, kv_heads, head_dim]`, V likewise.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int = 16
    dtype: torch.dtype = torch.float32
    value_dim: int | None = None
    shared_kv: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "page_tokens"):
            if int(getattr(self, name)) < 1:
                raise ValueError(f"KVSpec.{name}={getattr(self, name)} must be at least 1")
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        if self.v_dim < 1 or (self.shared_kv and self.v_dim > self.head_dim):
            raise ValueError(
                f"KVSpec.value_dim={self.value_dim} must be at least 1"
                + (
                    f" and at most head_dim={self.head_dim} with shared_kv"
                    if self.shared_kv
                    else ""
                )
            )
        if self.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(
                f"KVSpec.dtype={self.dtype} cannot be kept in pages; use float32, float64, "
                "bfloat16 or float16"
            )

    @property
    def v_dim(self) -> int:
        """Columns of a value head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @cached_property
    def device_type(self) -> str:
        """The kind of device, such as "cuda" of "cuda:1"."""
        return torch.device(self.device).type

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each stored tensor: (K, V), or (K,) when V is part of K."""
        return (self.head_dim,) if self.shared_kv else (self.head_dim, self.v_dim)

    @property
    def bytes_per_token_layer(self) -> int:
        """Bytes one token takes in one layer."""
        return self.kv_heads * sum(self.widths) * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in all layers."""
        return self.layers * self.bytes_per_token_layer

    @property
    def bytes_per_page(self) -> int:
        """Bytes one page takes in all layers."""
        return self.page_tokens * self.bytes_per_token


def parse_bytes(text: int | str) -> int:
    """Read a size such as `"4GiB"`, `"512 MB"` or a number of bytes.

    Raises:
        ValueError: if the text is no size.
    """
    if isinstance(text, int):
        number, unit = float(text), ""
    else:
        clean = text.strip().lower()
        digits = clean.rstrip("kmgtib ")
        unit = clean[len(digits) :].strip()
        try:
            number = float(digits)
        except ValueError:
            number = -1.0
    if number < 0 or unit not in _UNITS:
        raise ValueError(
            f"{text!r} is no size; use a number of bytes or text such as '4GiB', '512MB'"
        )
    return int(number * _UNITS[unit])


def plan_pages(
    spec: KVSpec, device_bytes: int | str | None, num_pages: int | None, grow: bool
) -> tuple[int, int | None]:
    """Decide how many pages a store starts with and may grow to (None: no limit).

    With `device_bytes` all its pages are made at once, unless `num_pages` asks for fewer.

    Raises:
        ValueError: if the wishes contradict each other.
    """
    limit = None if device_bytes is None else parse_bytes(device_bytes) // spec.bytes_per_page
    if limit is not None and limit < 1:
        raise ValueError(
            f"device_bytes={device_bytes} holds no page of {spec.bytes_per_page} bytes; "
            "give more bytes or fewer page_tokens"
        )
    if num_pages is None:
        if limit is None and not grow:
            raise ValueError("grow=False needs num_pages or device_bytes to size the store")
        num_pages = FIRST_PAGES if limit is None else limit
    if num_pages < 1 or (limit is not None and num_pages > limit):
        most = "" if limit is None else f" and at most {limit}, which fit {device_bytes}"
        raise ValueError(f"num_pages={num_pages} must be at least 1{most}")
    return num_pages, limit if grow else num_pages
