"""16-bit floats in kernels, bit for bit; and the files whose compiled code would go stale unseen."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from plait.cuda_kernels import halves

ROOT = Path(__file__).parent.parent.parent
SHM = "collectives/shm"


@njit
def through(x: Any, out: Any, back: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = halves.widen(x[i])
        back[i] = halves.narrow(out[i], x)


@njit
def rounded(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = halves.narrow(x[i], out)


@njit
def rounded_results(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = halves.narrow_result(x[i] * np.float32(1), out)


@pytest.mark.parametrize(
    ("dtype", "look"), [(torch.float16, np.int16), (torch.bfloat16, np.uint16)]
)
def test_every_half_widens_and_comes_back(dtype: torch.dtype, look: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide, back = np.empty(1 << 16, np.float32), np.empty(1 << 16, look)
    through(bits.view(look), wide, back)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(wide, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], bits[numbers])
    assert (
        torch.from_numpy(back.view(np.int16)).view(dtype)[~torch.from_numpy(numbers)].isnan().all()
    )


@pytest.mark.parametrize(
    ("dtype", "look"), [(torch.float16, np.int16), (torch.bfloat16, np.uint16)]
)
def test_rounding_is_torchs(dtype: torch.dtype, look: Any) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    out = np.empty(len(x), look)
    rounded(x, out)
    found, expected = (
        torch.from_numpy(out.view(np.int16)).view(dtype),
        torch.from_numpy(x).to(dtype),
    )
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert torch.equal(found.isnan(), expected.isnan())
    x = np.where(np.isnan(x), np.float32(np.nan), x)  # what arithmetic gives for numbers
    again = np.empty(len(x), look)
    rounded_results(x, again)
    assert np.array_equal(again[~np.isnan(x)], out[~np.isnan(x)])
    assert torch.from_numpy(again.view(np.int16)).view(dtype).isnan().equal(expected.isnan())


def test_other_numbers_pass() -> None:
    x = np.array([1.5, -2.5])
    out, back = np.empty(2), np.empty(2)
    through(x, out, back)
    np.testing.assert_array_equal(back, x)


# ---- Numba caches a kernel by the text of its own file, but compiles into it what it calls


def inlined(folder: str, names: tuple[str, ...]) -> str:
    here, common = ROOT / folder, ROOT / "cuda_kernels"
    files = [here / name if (here / name).exists() else common / name for name in names]
    text = b"".join(file.read_bytes().partition(b"# inlines ")[0].rstrip() for file in files)
    return hashlib.sha256(text).hexdigest()[:8]


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ("cuda_kernels/weighted.py", ("halves.py",)),
        ("cuda_kernels/merge.py", ("exp.py", "halves.py", "weighted.py")),
        ("cuda_kernels/expert_gradients.py", ("halves.py",)),
        ("cuda_kernels/expert_rows.py", ("halves.py",)),
        ("cuda_kernels/paged_attention.py", ("exp.py", "halves.py")),
        ("cuda_kernels/attention_mass.py", ("exp.py",)),
        ("cuda_kernels/page_summary.py", ("halves.py",)),
        ("cuda_kernels/top_k.py", ("halves.py",)),
        ("cuda_kernels/unit_scores.py", ("paged_attention.py", "halves.py")),
        ("cuda_kernels/int_groups.py", ("halves.py",)),
        ("cuda_kernels/block_runs.py", ("halves.py", "minifloats.py")),
        ("cuda_kernels/nvfp4.py", ("block_runs.py", "halves.py", "minifloats.py")),
        ("cuda_kernels/block_floats.py", ("block_runs.py", "halves.py", "minifloats.py")),
        ("cuda_kernels/scaled_rows.py", ("halves.py", "minifloats.py", "numbers.py")),
        ("cuda_kernels/numbers.py", ("halves.py",)),
        ("cuda_kernels/minifloats.py", ("halves.py",)),
        ("cuda_kernels/block_ints.py", ("block_runs.py", "halves.py")),
        ("cuda_kernels/micro_blocks.py", ("block_ints.py", "block_runs.py", "halves.py")),
        ("cuda_kernels/hadamard.py", ("halves.py",)),
        (
            "cuda_kernels/turbo.py",
            ("block_runs.py", "hadamard.py", "halves.py", "turbo_gpu.py"),
        ),
        ("cuda_kernels/sign_groups.py", ("halves.py",)),
        (f"{SHM}/fold.py", ("memory.py", "halves.py")),
        (f"{SHM}/steps.py", ("memory.py",)),
        (f"{SHM}/stores.py", ("memory.py", "steps.py")),
        (f"{SHM}/ways.py", ("memory.py", "steps.py", "stores.py")),
        (f"{SHM}/channel.py", ("memory.py", "steps.py", "stores.py")),
        (f"{SHM}/reductions.py", ("memory.py", "steps.py", "stores.py", "ways.py")),
        (f"{SHM}/single_copy.py", ("memory.py", "steps.py", "stores.py", "ways.py")),
        (f"{SHM}/exchange.py", ("memory.py", "steps.py", "stores.py", "ways.py", "single_copy.py")),
        (f"{SHM}/norms.py", ("memory.py", "halves.py", "quantised.py")),
        (f"{SHM}/fused.py", ("memory.py", "steps.py", "stores.py", "ways.py", "norms.py")),
    ],
)
def test_a_changed_file_renews_the_kernels_that_inline_it(
    kernel: str, names: tuple[str, ...]
) -> None:
    folder = kernel.rpartition("/")[0]
    line = f"# inlines {' and '.join(names)} {inlined(folder, names)}"
    assert (ROOT / kernel).read_text().rstrip().endswith(line), f"end {kernel} with: {line}"
