"""Memory for results: where it starts, and that it is not faulted in anew at each call."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch

from plait.cuda_kernels.room import room

CALLS = 20
FAULTS = f"""
import resource, torch
from plait.cuda_kernels import room
if KEPT == "no":
    room.keep_heap = lambda: None
def call():
    held = [room.room((256, 4096), torch.float32).fill_(1) for _ in range(3)]
call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({CALLS}):
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("shape", [(3, 5), (512, 4097), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_room_starts_at_a_cache_line(shape: tuple[int, int], dtype: torch.dtype) -> None:
    got = room(shape, dtype)
    assert (got.shape, got.dtype) == (shape, dtype)
    assert got.is_contiguous()
    assert got.data_ptr() % 64 == 0


def faults(kept: str) -> int:
    code = f"KEPT = {kept!r}\n{FAULTS}"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(shown.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="says how glibc's heap behaves")
def test_results_of_every_call_are_not_faulted_in_anew() -> None:
    a_page_each = CALLS * 3 * (256 * 4096 * 4) // resource.getpagesize()
    assert faults("yes") < a_page_each / 100
    assert faults("no") > faults("yes")  # three of a size that glibc gives back together
