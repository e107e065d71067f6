"""Reduce the ranks' pieces on this rank: every reduction of this backend ends here, for every dtype.

MPI knows neither bfloat16 nor float16 nor bool, and an own MPI_Op in Python would take the interpreter lock for each
segment; torch has all of them, vectorised. Short pieces are reduced by shm's functions, which a kernel can call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..shm.calls import operator
from ..shm.fold import LOOKS, fold_address
from .swap import Fold

_OPS: dict[str, Callable[..., Tensor]] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}
# half the time of the same with out=, where it is short
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "SUM": Tensor.add_,
    "AVG": Tensor.add_,
    "PRODUCT": Tensor.mul_,
}
_HALVES = {torch.bfloat16, torch.float16}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_FLOATS = {torch.float32, torch.float64, *_HALVES}
_COMPLEX = {torch.complex64, torch.complex128}


@dataclass(frozen=True)
class Reduction:
    """One op for one dtype.

    Attributes:
        wide: summed in float32 and rounded once.
        kernel: how a kernel does it; None where only torch can.
    """

    name: str
    binary: Callable[..., Tensor]
    in_place: Callable[..., Tensor] | None
    wide: bool
    kernel: Fold | None

    def fold(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        """Reduce pieces of equal shape into `out`, in the order given; `out` may be the first piece."""
        if out.is_inference() and not torch.is_inference_mode_enabled():
            with torch.inference_mode():  # the progress thread is outside the caller's mode
                return self._fold(out, pieces)
        return self._fold(out, pieces)

    def _fold(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        total = out
        if self.wide and len(pieces) > 2:
            total = pieces[0].float()
            pieces = (total, *pieces[1:])
        if self.in_place is not None and total is pieces[0]:
            for piece in pieces[1:]:
                self.in_place(total, piece)
        else:
            self.binary(pieces[0], pieces[1], out=total)
            for piece in pieces[2:]:
                self.binary(total, piece, out=total)
        if self.name == "AVG":
            whole = not (out.is_floating_point() or out.is_complex())
            torch.div(total, len(pieces), rounding_mode="trunc" if whole else None, out=total)
        if total is not out:
            out.copy_(total)


@cache
def reduction(op: int, dtype: torch.dtype) -> Reduction:
    """Find the reduction of a c10d `RedOpType` value; refuse what has no meaning before anything is sent.

    Raises:
        TypeError: there is no such op, or not for this dtype.
    """
    name = dist.ReduceOp.RedOpType(op).name
    if name not in _OPS:
        raise TypeError(f"backend mpi has no reduction {name}; there are {', '.join(_OPS)}")
    able = _INTEGERS | _FLOATS | _COMPLEX
    if name in ("BAND", "BOR", "BXOR"):
        able = _INTEGERS
    elif name in ("MIN", "MAX"):
        able -= _COMPLEX
    elif name == "AVG":
        able -= {torch.bool}
    if dtype not in able:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in able))
        raise TypeError(f"{name} of {dtype} is not defined; cast to one of {names}")
    return Reduction(
        name, _OPS[name], _IN_PLACE.get(name), dtype in _HALVES, _kernel_of(name, dtype)
    )


def _kernel_of(name: str, dtype: torch.dtype) -> Fold | None:
    if dtype not in LOOKS or (name == "AVG" and not dtype.is_floating_point):
        return None
    op = operator(dtype, dist.ReduceOp(dist.ReduceOp.RedOpType.__members__[name]))
    return Fold(fold_address(dtype, op), op, dtype.itemsize)


def one_dtype(out: Tensor, parts: Sequence[Tensor]) -> None:
    """Refuse to reduce tensors into one of another dtype."""
    if odd := [t.dtype for t in parts if t.dtype != out.dtype]:
        raise ValueError(f"reduce_scatter of {odd[0]} into {out.dtype}; use one dtype")
