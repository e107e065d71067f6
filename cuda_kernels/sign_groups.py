"""One or three levels a side of zero: a sign, or a sign or nothing, times the mean magnitude of a group of tokens.

    scale = mean |x|;  two levels: +-scale;  three: 0 where |x| <= scale / 2, else +-scale

Source: VidKV (arXiv 2503.16257) section 3, as its formulas say; its published code drops the sign of the first and the
scale of the second. Three levels are packed five to a byte: 1.6 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .bits import pack_into, unpack_into
from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .halves import narrow, widen
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .numbers import bits_of, half_of
from .sign_groups_gpu import code_launch, serves, sizes_launch, widen_launch
from .workers import run_rows

ELEMENTS_A_THREAD = 1 << 16
TRITS = 5  # to a byte: 3 ** 5 = 243
CANNOT = "quantise_signs: infinities, NaN, or values too large for 16-bit scales"


def signs_reference(x: Tensor, three: bool) -> Tensor:
    """Round and back in plain torch, in float32 but for the 16-bit scale. Shape: `[groups, group, inner]`"""
    wide = x.float()
    half = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    scale = wide.abs().mean(1, keepdim=True).to(half).float()
    if three:
        return torch.where(wide.abs() > scale / 2, wide.sign() * scale, 0.0)
    return torch.where(wide >= 0, scale, -scale)


@njit(nogil=True)
def _add_sizes(row, total):
    for c in range(row.size):
        total[c] += abs(np.float32(widen(row[c])))


@njit(nogil=True)
def _code_row(row, scale, three, codes):
    for c in range(row.size):
        value = np.float32(widen(row[c]))
        if three:
            large = abs(value) > scale[c] * np.float32(0.5)
            codes[c] = np.uint8(1 + (large and value > 0) - (large and value < 0))
        else:
            codes[c] = np.uint8(value >= 0)


@njit(nogil=True)
def _quantise(x, three, scales, codes):
    """Shape: x, codes `[groups, group, inner]`, scales `[groups, inner]`; give how many have no scale."""
    groups, group, inner = x.shape
    total, bad = np.empty(inner, np.float32), 0
    for g in range(groups):
        total[:] = 0
        for t in range(group):
            _add_sizes(x[g, t], total)
        for c in range(inner):
            scales[g, c] = narrow(total[c] / np.float32(group), scales)
            total[c] = widen(scales[g, c])
            bad += not np.isfinite(total[c])
        for t in range(group):
            _code_row(x[g, t], total, three, codes[g, t])
    return bad


@njit(nogil=True)
def _dequantise(codes, three, scales, x):
    groups, group, inner = codes.shape
    for g in range(groups):
        for t in range(group):
            run, out = codes[g, t], x[g, t]
            for c in range(inner):
                step = np.int32(run[c]) - 1 if three else 2 * np.int32(run[c]) - 1
                out[c] = narrow(np.float32(step) * widen(scales[g, c]), x)


@njit(nogil=True)
def _pack_trits(codes, out):
    for i in range(out.size):
        byte = 0
        for j in range(min((i + 1) * TRITS, codes.size) - 1, i * TRITS - 1, -1):
            byte = byte * 3 + codes[j]
        out[i] = byte


@njit(nogil=True)
def _unpack_trits(data, codes):
    for i in range(data.size):
        byte = np.int64(data[i])
        for j in range(i * TRITS, min((i + 1) * TRITS, codes.size)):
            codes[j] = byte % 3
            byte //= 3


def signs_bytes(count: int, three: bool) -> int:
    """Bytes of so many packed codes."""
    return -(-count // TRITS) if three else -(-count // 8)


def quantise_signs_into(x: Tensor, three: bool, scales: np.ndarray, codes: np.ndarray) -> bool:
    """Code contiguous groups in host memory; say whether all elements were finite and in range.

    Shape: x `[groups, group, inner]` -> scales `[groups, inner]` as `bits_of` sees 16-bit floats, codes `[bytes]`
    """
    source, wide, bad = bits_of(x), np.empty(x.shape, np.uint8), []

    def part(a: int, b: int) -> None:
        bad.append(_quantise(source[a:b], three, scales[a:b], wide[a:b]))

    run_rows(part, x.shape[0], ELEMENTS_A_THREAD // max(1, x[:1].numel()))
    if three:
        _pack_trits(wide.reshape(-1), codes)
    else:
        pack_into(wide.reshape(1, -1), 1, codes[None])
    return not any(bad)


def dequantise_signs_into(scales: np.ndarray, codes: np.ndarray, three: bool, x: Tensor) -> None:
    """Undo `quantise_signs_into`."""
    target, wide = bits_of(x), np.empty(x.shape, np.uint8)
    if three:
        _unpack_trits(codes, wide.reshape(-1))
    else:
        unpack_into(codes[None], 1, wide.reshape(1, -1))

    def part(a: int, b: int) -> None:
        _dequantise(wide[a:b], three, scales[a:b], target[a:b])

    run_rows(part, x.shape[0], ELEMENTS_A_THREAD // max(1, x[:1].numel()))


@torch.library.custom_op("plait::quantise_signs", mutates_args=())
def quantise_signs(x: Tensor, three: bool) -> tuple[Tensor, Tensor]:
    """Quantise groups of tokens to signs, or with `three` to signs or nothing, and the mean size of each channel.

    Shape: x `[groups, group, inner]` -> scales `[groups, inner]` (16-bit floats), codes `[signs_bytes(numel)]` uint8

    Raises:
        ValueError: an element is infinite or NaN, or a channel too large for its 16-bit scale.
    """
    parts, fine = coded_on_host(
        lambda x, *parts: quantise_signs_into(x, three, *parts), x, _rooms(x, three)
    )
    if not fine:
        raise ValueError(CANNOT)
    return parts[0], parts[1]


def _rooms(x: Tensor, three: bool) -> tuple[Tensor, Tensor]:
    scales = x.new_empty(x.shape[0], x.shape[2], dtype=half_of(x.dtype))
    return scales, x.new_empty(signs_bytes(x.numel(), three), dtype=torch.uint8)


quantise_signs.register_fake(_rooms)


@torch.library.custom_op("plait::dequantise_signs", mutates_args=())
def dequantise_signs(
    scales: Tensor, codes: Tensor, group: int, three: bool, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_signs`. Shape: -> `[groups, group, inner]` of the dtype"""
    shape = (scales.shape[0], group, scales.shape[1])
    return decoded_on_host(
        lambda s, c, x: dequantise_signs_into(s, c, three, x), (scales, codes), shape, dtype
    )


@dequantise_signs.register_fake
def _(scales: Tensor, codes: Tensor, group: int, three: bool, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(scales.shape[0], group, scales.shape[1], dtype=dtype)


def _fits(x: Tensor, scales: Tensor, codes: Tensor) -> bool:
    """Say whether the CUDA kernels take such groups, and can run."""
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, scales, codes))
    return aligned and serves(x.dtype, tuple(x.shape)) and usable()


@quantise_signs.register_kernel("cuda")
def quantise_signs_cuda(x: Tensor, three: bool) -> tuple[Tensor, Tensor]:
    """Quantise in two launches; what the kernels do not serve goes by way of the host."""
    x = x.contiguous()
    scales, codes = _rooms(x, three)
    if not _fits(x, scales, codes):
        return by_way_of_host(quantise_signs, [x], three)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    run_on(sizes_launch(x, scales, flag), x)
    run_on(code_launch(x, three, scales, codes), x)
    if bool(flag):
        raise ValueError(CANNOT)
    return scales, codes


@dequantise_signs.register_kernel("cuda")
def dequantise_signs_cuda(
    scales: Tensor, codes: Tensor, group: int, three: bool, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, c = scales.contiguous(), codes.contiguous()
    x = codes.new_empty(scales.shape[0], group, scales.shape[1], dtype=dtype)
    if not _fits(x, s, c):
        return by_way_of_host(dequantise_signs, [s, c], group, three, dtype)
    run_on(widen_launch(s, c, three, x), c)
    return x
