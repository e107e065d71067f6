"""Decode attention that reads pages of codes as the store's codecs write them; they stay codes in memory.

On CUDA codes become bfloat16 in registers (gpu/page_forms.py), so the result is that of attention to decoded bfloat16
pages; on the CPU float32 (coded_pages.py). What is read by neither is decoded first: int4 in blocks of 8 on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .code_rows import CodeForm, CodeTable
from .coded_pages import attend_codes
from .decode_choice import served_shape, splits_for
from .gpu.kernel import run_on
from .gpu.page_forms import FORMS, PageForm, row_bytes, scale_bytes, whole_scale
from .gpu.toolchain import usable
from .merge import merge_states
from .minifloats import table_of
from .paged_attention import paged_attention
from .paged_decode import decode_launch

KINDS_OF = {  # of codes and of scales
    "e4m3": ("e4m3", "vector"), "int8": ("int8", "vector"), "int4": ("uint4", "pairs"),
    "mxfp8": ("e4m3", "powers"), "mxfp4": ("e2m1", "powers"),
}  # fmt: skip
BLOCKS = {"int4": (8, 16, 32, 64, 128), "mxfp8": (32,), "mxfp4": (32,)}


class CodedPages(NamedTuple):
    """K or V of pages, cut into what its codec wrote.

    Attributes:
        form: how vectors are held; says whether pages were coded one by one.
        codes, scales, lows: of each vector, `[pages, vectors, bytes]` uint8; empty where a form has none.
    """

    form: PageForm
    codes: Tensor
    scales: Tensor
    lows: Tensor


def cut_pages(
    data: Tensor, form: str, block: int, pages: int, vectors: int, width: int
) -> CodedPages:
    """Cut a codec's bytes: those of pages coded together (1-D) or one by one (2-D, a page a row).

    Shape: data `[bytes]` or `[pages, page bytes]` uint8; `vectors` of `width` elements in a page

    Raises:
        ValueError: a form that kernels do not read, or bytes that are not of that form.
    """
    blocks = BLOCKS.get(form, (0,))
    if form not in FORMS or form == "bf16" or block not in blocks or width % max(block, 1):
        raise ValueError(
            f"pages of {form}, {block} channels a block and vectors of {width} cannot be read by attention; decode "
            f"them, or use fp8, int8 ({', '.join(sorted(set(FORMS) - {'bf16'}))}) or int4 with blocks of "
            f"{BLOCKS['int4']} that divide the vectors"
        )
    alone = data.dim() == 2
    made = PageForm(form, block, data.stride(0) if alone else 0)
    rows = data if alone else data[None]
    count = vectors if alone else pages * vectors
    code, scale = row_bytes(made, width), scale_bytes(made, width)
    low = scale if form == "int4" else 0
    if data.dtype != torch.uint8 or rows.shape[1] != count * (code + scale + low):
        raise ValueError(
            f"{list(data.shape)} {data.dtype} are not the bytes of {pages} pages of {vectors} vectors of {width} "
            f"in {form}: {count * (code + scale + low)} uint8 for {'each' if alone else 'all'}"
        )
    sizes = [code, scale] if whole_scale(made) else [scale, low, code]
    parts = rows.split([count * size for size in sizes], 1)
    cut = [p.unflatten(1, (count, n)) for p, n in zip(parts, sizes, strict=True)]
    if not alone:
        cut = [p[0].unflatten(0, (pages, vectors)) for p in cut]
    if whole_scale(made):
        return CodedPages(made, cut[0], cut[1], cut[1][..., :0])
    return CodedPages(made, cut[2], cut[0], cut[1])


def decode_pages_reference(coded: CodedPages, width: int) -> Tensor:
    """Decode to bfloat16. Shape: -> `[pages, vectors, width]`"""
    form, codes = coded.form, coded.codes.contiguous()
    if FORMS[form.name] == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    if whole_scale(form):
        kind = torch.int8 if form.name == "int8" else torch.float8_e4m3fn
        scales = coded.scales.contiguous().view(torch.float32)
        return (codes.view(kind).float() * scales).bfloat16()
    blocked = codes.unflatten(-1, (width // form.block, form.block))
    if form.name == "int4":
        scale, low = (
            t.contiguous().view(torch.bfloat16).float().unsqueeze(-1)
            for t in (coded.scales, coded.lows)
        )
        return (blocked.float() * scale + low).flatten(-2).bfloat16()
    table = torch.from_numpy(table_of("e4m3" if form.name == "mxfp8" else "e2m1"))
    exponent = coded.scales.float()
    scale = torch.where(exponent == 255, torch.nan, torch.exp2(exponent - 127)).unsqueeze(-1)
    return (table.to(codes.device)[blocked.long()] * scale).flatten(-2).bfloat16()


def host_table(coded: CodedPages, width: int, page_tokens: int, kv_heads: int) -> CodeTable | None:
    """Say where pages in host memory lie; None if the CPU kernel does not read them."""
    form = CodeForm.of(
        *KINDS_OF[coded.form.name], coded.form.block, True, width, page_tokens, kv_heads
    )
    if form is None:
        return None
    parts = (coded.codes, coded.scales, coded.lows, coded.codes)
    at = np.arange(len(coded.codes))
    pages = np.stack([part.data_ptr() + at * part.stride(0) for part in parts], 1)
    return CodeTable(form, pages.astype(np.int64), coded)


@torch.library.custom_op("plait::coded_attention", mutates_args=())
def coded_attention_op(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_form: str, k_block: int, v_form: str,
    v_block: int, pages: int, page_tokens: int, kv_heads: int, q_indptr: Tensor,
    kv_indptr: Tensor, kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the codes; where the kernel does not serve the shapes, decode the pages first."""
    vectors, width = page_tokens * kv_heads, q.shape[-1]
    cut = [
        cut_pages(data.contiguous(), form, block, pages, vectors, width)
        for data, form, block in ((k_data, k_form, k_block), (v_data, v_form, v_block))
    ]
    if q.device.type == "cpu":
        keys, values = (host_table(own, width, page_tokens, kv_heads) for own in cut)
        if keys is not None and values is not None:
            return attend_codes(
                q, keys, values, q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap
            )
    k, v = (
        decode_pages_reference(own, width).view(pages, page_tokens, kv_heads, width).to(q.dtype)
        for own in cut
    )
    return paged_attention(q, k, v, q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap)


@coded_attention_op.register_fake
def _(q, k_data, v_data, k_form, k_block, v_form, v_block, pages, page_tokens, kv_heads, q_indptr,
      kv_indptr, kv_indices, lo, hi, scale, softcap):  # fmt: skip
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=work)


@coded_attention_op.register_kernel("cuda")
def coded_attention_cuda(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_form: str, k_block: int, v_form: str,
    v_block: int, pages: int, page_tokens: int, kv_heads: int, q_indptr: Tensor,
    kv_indptr: Tensor, kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the codes; where the kernel does not serve the shapes, decode."""
    k, v = (
        cut_pages(data, form, block, pages, page_tokens * kv_heads, q.shape[-1])
        for data, form, block in ((k_data, k_form, k_block), (v_data, v_form, v_block))
    )
    if not served_coded(q, k, v, page_tokens, kv_heads) or not usable():
        return coded_attention_op._init_fn(
            q, k_data, v_data, k_form, k_block, v_form, v_block, pages, page_tokens, kv_heads,
            q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap,
        )  # fmt: skip
    integers = [t.int().contiguous() for t in (q_indptr, kv_indptr, kv_indices, lo, hi)]
    splits = splits_for(q.device, q_indptr, kv_indices, page_tokens, kv_heads)
    *launch, o, lse = coded_launch(
        q.contiguous(), k, v, page_tokens, kv_heads, integers, scale, softcap, splits
    )
    run_on(launch, q)
    merged, merged_lse = merge_states(o, lse)
    return merged.to(q.dtype), merged_lse


def served_coded(q: Tensor, k: CodedPages, v: CodedPages, page_tokens: int, kv_heads: int) -> bool:
    """Say whether the kernel serves these shapes, and codes that begin at 16 bytes."""
    even = all(
        t.form.page_bytes % 16 == 0
        and t.codes.data_ptr() % 16 == 0
        and t.scales.data_ptr() % 4 == 0
        for t in (k, v)
    )
    return even and served_shape(q, page_tokens, kv_heads)


def coded_launch(
    q: Tensor, k: CodedPages, v: CodedPages, page_tokens: int, kv_heads: int,
    integers: list[Tensor], scale: float, softcap: float, splits: int,
):  # fmt: skip
    """Choose variant, grid and arguments; see `decode_launch`."""
    extra = tuple(t.data_ptr() for t in (k.scales, k.lows, v.scales, v.lows))
    return decode_launch(
        q, k.codes, v.codes, integers, scale, softcap, splits, (page_tokens, kv_heads),
        (k.form, v.form), extra,
    )  # fmt: skip


def coded_attention(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_form: tuple[str, int], v_form: tuple[str, int],
    pages: int, page_tokens: int, kv_heads: int, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with a few rows per sequence to pages of codes; see `paged_attention` for the rest.

    A form is its name and the channels of a block: `("e4m3", 0)` and `("int8", 0)` are the codecs fp8 and int8,
    `("int4", 32)` is `int4:group=32` of bfloat16 pages, `("mxfp8", 32)` and `("mxfp4", 32)` are theirs.
    The vectors of K and V are as wide as q's.

    Shape: q `[rows, heads, head_dim]`, k_data, v_data as `cut_pages` takes them
        -> o `[rows, heads, head_dim]`, lse `[rows, heads]` (natural log)

    Raises:
        ValueError: bytes that are not of their form.
    """
    for data, (form, block) in ((k_data, k_form), (v_data, v_form)):
        cut_pages(data, form, block, pages, page_tokens * kv_heads, q.shape[-1])
    return torch.ops.plait.coded_attention(
        q, k_data, v_data, *k_form, *v_form, pages, page_tokens, kv_heads, q_indptr, kv_indptr,
        kv_indices, lo, hi, scale, float(softcap or 0.0),
    )  # fmt: skip
