"""Compiling the kernels of a group before it opens, so that no rank waits for another's compiler."""

from __future__ import annotations

import torch
from numba import types

from .all_reduce import all_reduce, all_reduce_dense, all_reduce_symmetric
from .all_reduce_norm import all_reduce_norm
from .channel import look, pull, push
from .exchange import exchange, exchange_evenly
from .fold import SUM, fold_address
from .reduce_scatter import reduce_scatter, reduce_scatter_evenly

_WORD, _ROW, _TABLE = (
    types.int64,
    types.Array(types.int64, 1, "C"),
    types.Array(types.int64, 2, "C"),
)
_NOTED = exchange_evenly, all_reduce_dense, reduce_scatter_evenly
_SIGNATURES = (
    (all_reduce, (_ROW, _ROW, *[_WORD] * 6)),
    (all_reduce_symmetric, (_ROW, _ROW, *[_WORD] * 7)),
    (all_reduce_norm, (_WORD,) * 13),
    (reduce_scatter, (_ROW, _TABLE, _ROW, _ROW, *[_WORD] * 5)),
    (exchange, (_ROW, *[_TABLE] * 4, *[_WORD] * 5)),
    *((kernel, (_WORD,) * 4) for kernel in _NOTED),
    (push, (_ROW, _WORD, _ROW, _ROW, *[_WORD] * 4)),
    (pull, (_WORD, _ROW, _ROW, *[_WORD] * 2)),
    (look, (_WORD, _ROW, _WORD)),
)


def compile_kernels() -> None:
    """Compile every kernel for its one signature, or load it from Numba's cache; later calls do nothing.

    The first time on a machine it takes about 10 s of a core, then a tenth of a second in a process.
    """
    for kernel, signature in _SIGNATURES:
        if not kernel.signatures:
            kernel.compile(signature)
            kernel.disable_compile()
    fold_address(torch.float32, SUM)
