"""Reduce the ranks' pieces on this rank: every reduction of this backend ends here, for every dtype.

MPI knows neither bfloat16 nor float16 nor bool, and an own MPI_Op in Python would take the interpreter lock for each
segment; torch has all of them, vectorised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Binary = Callable[..., Tensor]

_OPS: dict[Any, Binary] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or,
    dist.ReduceOp.BXOR: torch.bitwise_xor,
}
_BITWISE = {dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR}
_ORDERED = {dist.ReduceOp.MIN, dist.ReduceOp.MAX}
_HALVES = {torch.bfloat16, torch.float16}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_FLOATS = {torch.float32, torch.float64, *_HALVES}
_COMPLEX = {torch.complex64, torch.complex128}


def check(op: Any, dtype: torch.dtype) -> None:
    """Refuse what has no meaning, before anything is sent.

    Raises:
        TypeError: this op does not exist, or not for this dtype.
    """
    able = _INTEGERS | _FLOATS | _COMPLEX
    if op not in _OPS:
        known = ", ".join(str(known).split(".")[-1] for known in _OPS)
        raise TypeError(f"backend mpi has no reduction {op}; there are {known}")
    if op in _BITWISE:
        able = _INTEGERS
    elif op in _ORDERED:
        able = able - _COMPLEX
    elif op == dist.ReduceOp.AVG:
        able = able - {torch.bool}
    if dtype not in able:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in able))
        raise TypeError(f"{op} of {dtype} is not defined; cast to one of {names}")


def fold(out: Tensor, pieces: Sequence[Tensor], op: Any) -> None:
    """Reduce pieces of equal shape into `out`, in the order given; `out` may be the first piece.

    Half precision is summed in float32 and rounded once.
    """
    if out.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():  # the progress thread is outside the caller's mode
            return _fold(out, pieces, op)
    return _fold(out, pieces, op)


def _fold(out: Tensor, pieces: Sequence[Tensor], op: Any) -> None:
    binary = _OPS[op]
    if out.dtype in _HALVES and len(pieces) > 2:
        total = pieces[0].float()
        for piece in pieces[1:]:
            binary(total, piece, out=total)
        out.copy_(total.div_(len(pieces)) if op == dist.ReduceOp.AVG else total)
        return
    binary(pieces[0], pieces[1], out=out)
    for piece in pieces[2:]:
        binary(out, piece, out=out)
    if op == dist.ReduceOp.AVG:
        average(out, len(pieces))


def average(total: Tensor, ranks: int) -> None:
    """Divide a sum in place; whole numbers are rounded toward zero, as NCCL does."""
    whole = not (total.is_floating_point() or total.is_complex())
    torch.div(total, ranks, rounding_mode="trunc" if whole else None, out=total)
