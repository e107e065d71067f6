"""Pages as bytes: what tiers keep of a page, and the proof that it is the page that was asked for."""

from __future__ import annotations

import struct
from collections.abc import Sequence as Listing

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..cuda_kernels import Regions
from .codecs import Codec, CodecError, KVCodec, PageLayout
from .spec import KVSpec
from .tiers.form import PageForm
from .tiers.memory import aligned_region, round_up

_HEAD = struct.Struct("<16sII")  # checksum of the key and all that follows; bytes of K, bytes of V
_CHECKSUM_BYTES = 16
_ALIGN = 64


class PageEncoding:
    """How full pages of one store stand in tiers.

    A page's bytes are a checksum that also binds its key, the lengths of its parts, its own token ids, K and then V as
    the codec writes them, and zeros up to a multiple of 4096. Tiers may lie: what does not agree is no page.

    Attributes:
        page_bytes: of the longest result, what a tier's slots must hold.
    """

    def __init__(self, spec: KVSpec, codec: KVCodec) -> None:
        self.spec, self.codec = spec, codec
        self.plain = str(codec) == "none"
        self._layouts = [
            PageLayout((spec.layers, spec.page_tokens, spec.kv_heads, width), spec.dtype)
            for width in spec.widths
        ]
        self._data_at = round_up(_HEAD.size + 4 * spec.page_tokens, _ALIGN)
        self._codecs = [codec.keys, codec.values][: len(self._layouts)]
        limits = [part.max_bytes(layout) for part, layout in self._both()]
        self.page_bytes = round_up(self._data_at + sum(limits))

    def _both(self) -> list[tuple[Codec, PageLayout]]:
        return list(zip(self._codecs, self._layouts, strict=True))

    def form(self, identity: bytes) -> PageForm:
        """What a disk tier writes beside each page."""
        kept = [*self._layouts[0].shape[:-1], sum(self.spec.widths)]
        dtype = str(self.spec.dtype).removeprefix("torch.")
        return PageForm(identity.hex(), str(self.codec), dtype, tuple(kept))

    def staging(self, count: int) -> Staging:
        """Make memory for some pages on their way, touched already."""
        return Staging(self, count)

    def seal(self, key: bytes, ids: np.ndarray, stage: Staging, row: int) -> np.ndarray:
        """Write the page that stands in a row down; give its bytes, in that row's memory."""
        data, at = stage.bytes[row], self._data_at
        lengths = [layout.page_bytes for layout in self._layouts]
        if not self.plain:
            pairs = zip(self._codecs, stage.parts, strict=True)
            pieces = [codec.encode(part[row]) for codec, part in pairs]
            lengths = [piece.size for piece in pieces]
            for piece in pieces:
                data[at : at + piece.size] = piece
                at += piece.size
        used = self._data_at + sum(lengths)
        end = round_up(used)
        data[used:end] = 0
        data[: self._data_at] = 0
        _HEAD.pack_into(data, 0, b"", lengths[0], lengths[1] if len(lengths) > 1 else 0)
        data[_HEAD.size : _HEAD.size + 4 * len(ids)] = ids.astype("<i4").view(np.uint8)
        data[:_CHECKSUM_BYTES] = np.frombuffer(_checksum(key, data[:end]), np.uint8)
        return data[:end]

    def unseal(self, key: bytes, ids: np.ndarray, stage: Staging, row: int) -> bool:
        """Make the page that was read into a row usable there; False if it is not the one that was sealed."""
        data = stage.bytes[row]
        checksum, *lengths = _HEAD.unpack_from(data)
        lengths = lengths[: len(self._layouts)]
        end = round_up(self._data_at + sum(lengths))
        if end > self.page_bytes or _checksum(key, data[:end]) != checksum:
            return False
        said = data[_HEAD.size : _HEAD.size + 4 * self.spec.page_tokens].view("<i4")
        if not np.array_equal(said, ids):
            return False  # equal hashes of different tokens
        return self.plain or self._decode(data, lengths, stage, row)

    def _decode(self, data: np.ndarray, lengths: list[int], stage: Staging, row: int) -> bool:
        at = self._data_at
        for length, codec, part in zip(lengths, self._codecs, stage.parts, strict=True):
            try:
                codec.decode_into(data[at : at + length], part[row])
            except CodecError:
                return False
            at += length
        return True

    def views(self, region: np.ndarray) -> list[Tensor]:
        """See the data of plain rows as pages: one tensor per part, `[rows, *layout]`."""
        at, parts = self._data_at, []
        for layout in self._layouts:
            piece = torch.from_numpy(region)[:, at : at + layout.page_bytes]
            parts.append(piece.view(layout.dtype).unflatten(1, layout.shape))
            at += layout.page_bytes
        return parts

    def room(self, count: int) -> list[Tensor]:
        """Make memory for pages as they are in the pool: one tensor per part, `[count, *layout]`."""
        return [torch.zeros(count, *shape, dtype=dtype) for shape, dtype in self._layouts]


class Staging:
    """Rows of memory, each with room for a page as the pool has it (`parts`) and as tiers keep it (`bytes`).

    Without a codec the two are the same memory: nothing is copied but into and out of the pool.

    Shape: bytes `[rows, page_bytes]`; parts: one per stored tensor, `[rows, layers, page_tokens, kv_heads, d]`;
        regions: the same, layer by layer.
    """

    def __init__(self, encoding: PageEncoding, count: int) -> None:
        self.bytes = aligned_region(count, encoding.page_bytes)
        self.parts = encoding.views(self.bytes) if encoding.plain else encoding.room(count)
        self.regions = Regions([part[:, i] for part in self.parts for i in range(part.shape[1])])

    def rows(self, first: int, count: int) -> Listing[np.ndarray]:
        """The bytes of some neighbouring rows."""
        return list(self.bytes[first : first + count])


def _checksum(key: bytes, data: np.ndarray) -> bytes:
    state = xxhash.xxh3_128(bytes([len(key)]) + key)
    state.update(data[_CHECKSUM_BYTES:].data)
    return state.digest()
