"""The fused norm of a group over shared memory: which calls its kernel takes, and how they are cut into steps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ...cuda_kernels.kernel_cache import entry
from ...cuda_kernels.quantised import Quantised
from ...cuda_kernels.room import keep_heap
from ..trace import listening
from .all_reduce_norm import ELSEWHERE, STAT_BYTES, all_reduce_norm
from .calls import KIND, code_of
from .engine import Engine
from .fold import SUM
from .norms import AS_E4M3, AS_INT8, AS_IS, row_functions
from .noted import NotedCall
from .segment import RESULT, SLOT
from .steps import DONE
from .work import PATIENCE

PLAIN = {Tensor, Parameter}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ONE_SHOT_BYTES = {2: 32 << 10}  # by the least number of ranks: up to these bytes of x
CHUNK_BYTES = 512 << 10  # of x in a step, so that slots stay in the cache
_STORED = {None: AS_IS, torch.int8: AS_INT8, torch.float8_e4m3fn: AS_E4M3}
NOWHERE = None, ELSEWHERE


def rows_of_a_step(rows: int, row_bytes: int, ranks: int) -> int:
    """Cut rows into equal steps that fit slots and the places of results; 0 where not one row does."""
    room = min(SLOT // row_bytes, ranks * (RESULT // (row_bytes + STAT_BYTES)))
    if room == 0:
        return 0
    room = min(room, max(1, CHUNK_BYTES // row_bytes))
    return -(-rows // -(-rows // room))


def schedule(rows: int, row_bytes: int, ranks: int) -> tuple[int, bool]:
    """Choose by what was measured: rows in a step, and whether one-shot."""
    most = next(b for n, b in reversed(ONE_SHOT_BYTES.items()) if n <= ranks)
    return rows_of_a_step(rows, row_bytes, ranks), rows * row_bytes <= most


@lru_cache(maxsize=256)
def form_of(
    shape: torch.Size, dtype: torch.dtype, stored: torch.dtype | None, eps: float, centred: bool,
    ranks: int,
) -> NotedCall | None:  # fmt: skip
    """Write down what calls on such tensors share; None where the kernel does not take them, for its dtypes or size."""
    width, item = shape[-1], dtype.itemsize
    rows, row_bytes = shape.numel() // max(1, width), width * item
    chunk, one_shot = schedule(rows, row_bytes, ranks) if rows else (0, False)
    if dtype not in DTYPES or ranks == 1 or chunk == 0:
        return None
    keep_heap()
    words = np.array([
        0, 0, int(np.float64(eps).view(np.int64)), width, 0, centred, _STORED[stored], *row_functions(dtype),
        rows, shape.numel(), chunk, width * (item if stored is None else stored.itemsize), row_bytes, one_shot,
    ], np.int64)  # fmt: skip
    code = code_of(KIND["all_reduce with norm"], dtype, SUM)
    return NotedCall(entry(all_reduce_norm), words.ctypes.data, code, shape.numel(), words)


def suits(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether these are dense tensors of one dtype, on the CPU."""
    dtype = x.dtype
    # written out: a loop over the tensors takes twice the time
    return (
        residual.dtype is dtype is weight.dtype
        and type(x) is Tensor is type(residual) and type(weight) in PLAIN
        and x.is_cpu and residual.is_cpu and weight.is_cpu
        and x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()
        and not (x.is_neg() or residual.is_neg())
        and (bias is None or (
            type(bias) in PLAIN and bias.dtype is dtype and bias.is_cpu and bias.is_contiguous()
        ))
    )  # fmt: skip


class FusedNorm:
    """The calls of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._ranks = engine, engine.members.ranks
        self._place_of, self._state_at = engine.symmetric.place_of, engine.state.ctypes.data

    def run(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
        stored: torch.dtype | None,
    ) -> tuple[Tensor | Quantised, Tensor] | None:  # fmt: skip
        """Sum `x` over the ranks, add the residual, normalise; the sum and the normed rows are new tensors.

        None, with nothing done, where these do not suit it: dense tensors of one dtype, whose rows fit, do.
        """
        if not suits(x, residual, weight, bias):
            return None
        shape = x.shape
        form = form_of(shape, x.dtype, stored, eps, bias is not None, self._ranks)
        if form is None:
            return None
        total, scales = torch.empty_like(x), None
        if stored is None:
            normed = torch.empty_like(x)
        else:
            normed = torch.empty_like(x, dtype=stored)
            scales = torch.empty((*shape[:-1], 1), dtype=torch.float32)
        bases, offset = self._place_of(x) or NOWHERE
        arguments = (
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            normed.data_ptr(), total.data_ptr(), 0 if scales is None else scales.data_ptr(),
            0 if bases is None else bases.ctypes.data, offset,
        )  # fmt: skip
        inputs = [x, residual, weight] if bias is None else [x, residual, weight, bias]
        self._do(form, arguments, [normed, total], inputs)
        return normed if scales is None else Quantised(normed, scales), total

    def _do(
        self, form: NotedCall, arguments: tuple[int, ...], outputs: list[Tensor], inputs: list[Tensor]
    ) -> None:  # fmt: skip
        engine, (kernel, at, code, count, _, _) = self._engine, form
        if not engine.shows_calls and not listening():  # most calls: what `run` does, in less time
            progress, work = engine.progress, None
            with progress.lock:
                if not progress.collectives and progress.broken is None:
                    if kernel(self._state_at, at, *arguments, code, PATIENCE) == DONE:
                        return
                    work = engine.pend(form, arguments, code, count, outputs, inputs)
            if work is not None:
                work.wait()
                return
        engine.run(form, arguments, code, count, outputs, True, inputs)
