"""What CUDA runs for `paged_attention`: which calls the tensor-core kernels serve, and in how many splits."""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .latent_decode import latent_launch, served_latent
from .merge import merge_states
from .paged_attention import paged_attention_op, paged_attention_reference
from .paged_decode import ROWS, decode_launch
from .scores import Interleave


def served(q: Tensor, k_pages: Tensor, v_pages: Tensor, value_dim: int) -> bool:
    """Say whether the kernel serves these shapes and dtypes."""
    page_tokens, kv_heads, head_dim = k_pages.shape[1:]
    tensors = (q, k_pages, v_pages)
    return (
        all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in tensors)
        and all(t.data_ptr() % 16 == 0 for t in tensors)
        and value_dim == head_dim
        and v_pages.shape == k_pages.shape
        and served_shape(q, page_tokens, kv_heads)
    )


def served_shape(q: Tensor, page_tokens: int, kv_heads: int) -> bool:
    """Say whether the kernel serves such queries: bfloat16, groups to 16, pages of a power of two."""
    group, rest = divmod(q.shape[1], kv_heads)
    return (
        q.dtype == torch.bfloat16
        and q.shape[2] in (64, 128)
        and rest == 0
        and 1 <= group <= ROWS
        and page_tokens & (page_tokens - 1) == 0
        and q.numel() > 0
    )


def splits_of(sequences: int, kv_heads: int, tokens: int, processors: int) -> int:
    """Choose a power of two: blocks for two on each processor, and at least 256 tokens in each."""
    splits = 1
    while splits < 16 and sequences * kv_heads * splits < 2 * processors:
        if tokens // (2 * splits) < 256:
            break
        splits *= 2
    return splits


def splits_for(
    device: torch.device, q_indptr: Tensor, kv_indices: Tensor, page_tokens: int, kv_heads: int
) -> int:
    """Choose without reading what the tensors hold, so that graphs can be captured."""
    sequences = q_indptr.numel() - 1
    tokens = kv_indices.numel() * page_tokens // max(sequences, 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return splits_of(sequences, kv_heads, tokens, processors)


@paged_attention_op.register_kernel("cuda")
def paged_attention_cuda(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, run: int, shards: int, shard: int,
    value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend on tensor cores; what the kernels do not serve gathers its pages with torch."""
    latent = served_latent(q, k_pages, v_pages, value_dim)
    known = latent or served(q, k_pages, v_pages, value_dim)
    if alibi_slopes is not None or not known or not usable():
        return paged_attention_reference(
            q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap,
            alibi_slopes, q_pos, Interleave(run, shards, shard), value_dim,
        )  # fmt: skip
    integers = [t.int().contiguous() for t in (q_indptr, kv_indptr, kv_indices, lo, hi)]
    page_tokens, kv_heads = k_pages.shape[1:3]
    if latent:  # blocks share out the heads by 16
        splits = splits_for(q.device, q_indptr, kv_indices, page_tokens, -(-q.shape[1] // ROWS))
        made = latent_launch(q, k_pages, value_dim, integers, scale, softcap, splits)
    else:
        splits = splits_for(q.device, q_indptr, kv_indices, page_tokens, kv_heads)
        made = decode_launch(q, k_pages, v_pages, integers, scale, softcap, splits)
    *launch, o, lse = made
    run_on(launch, q)
    merged, merged_lse = merge_states(o, lse)
    return merged.to(q.dtype), merged_lse


__all__ = ["paged_attention_cuda", "served", "served_shape", "splits_for", "splits_of"]
