"""The words of a CUDA kernel: each is one PTX instruction (or a few), and a Python function that simulates it.

A kernel is a Python function over these words. Called in Python, under `simulator.run`, it is simulated; a back end
(`numba_cuda.py`) compiles it by replacing each word with the template that stands beside it.
Nothing in this file needs CUDA, and no kernel needs another way to say PTX.

In kernels write `f32(0.5)`, never `0.5` (a float64); `while` loops over i32, never `range` with a stride; shifts,
never `//` and `%`; u64 addresses. docs/decisions/025-cuda-seam.md has the list, and `make check-cuda` sees the breach.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
TYPES: dict[str, Any] = {"u32": u32, "i32": i32, "u64": u64, "f32": f32}
Word = TypeVar("Word", bound=Callable[..., Any])


@dataclass(frozen=True)
class Instruction:
    """What a back end puts in the place of a word.

    Attributes:
        text: PTX with `$0 ..`: results, then arguments.
        results, arguments: type names (`u32 u64 i32 f32`).
        pure: may be merged, moved or dropped (conversions, arithmetic); otherwise it stays and touches memory.
        warp: all lanes of a warp must come together (shuffles, votes, matrix products).
    """

    text: str
    results: tuple[str, ...]
    arguments: tuple[str, ...]
    pure: bool
    warp: bool


WORDS: dict[Callable[..., Any], Instruction] = {}


def word(
    text: str, results: str = "", arguments: str = "", pure: bool = False, warp: bool = False
) -> Callable[[Word], Word]:
    """Make a Python function a word of kernels: compiled it is `text`, in Python it simulates."""

    def record(function: Word) -> Word:
        WORDS[function] = Instruction(
            text, tuple(results.split()), tuple(arguments.split()), pure, warp
        )
        return function

    return record


def device_function(function: Word) -> Word:
    """Make a function over words callable from kernels; it is inlined. Builders may make their own."""
    function.__dict__["inlined"] = True
    return function


def version() -> str:
    """Name the state of all templates, for caches of compiled kernels."""
    lines = sorted(f"{function.__name__} {entry}" for function, entry in WORDS.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
