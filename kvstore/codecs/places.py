"""Where a codec's vectors lie, for attention that reads codes in place on the CPU."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ...cuda_kernels.code_rows import CodeForm, CodeTable
from ...cuda_kernels.numbers import half_of

if TYPE_CHECKING:
    from .codec import Codec, PageLayout


class CodePlaces(NamedTuple):
    """How a writer's bytes are read; see `CodeForm`.

    Attributes:
        codes, scales: kinds; block: elements, or tokens, of a scale.
        parts: which of `sections` holds codes, scales and low ends (the latter twice where there are none).
    """

    codes: str
    scales: str
    block: int
    parts: tuple[int, int, int]


def code_table(
    codec: Codec, layout: PageLayout, runs: Listing[np.ndarray], heads: int = 1
) -> CodeTable | None:
    """Say where the pages of some runs lie, one run after the other; None if kernels do not read them.

    Args:
        layout: of one page, `[page_tokens, heads, width]`.
        runs: bytes of pages that were coded together; they must not move while the table is used.
    """
    places = None if codec.pages or codec.packers else codec.writer.places(layout)
    sizes = codec.sections(layout)
    if places is None or sizes is None:
        return None
    brain = half_of(layout.dtype) == torch.bfloat16
    shape = (layout.shape[-1], layout.shape[0], heads)
    form = CodeForm.of(places.codes, places.scales, places.block, brain, *shape)
    if form is None:
        return None
    tables = [np.empty((0, 4), np.int64)]
    for data in runs:
        pages = (data.size - sizes[0]) // sum(sizes[1:])
        starts = sizes[0] + pages * np.cumsum((0, *sizes[1:]))
        at, base = np.arange(pages), data.ctypes.data
        parts = [base + starts[part] + at * sizes[1 + part] for part in places.parts]
        tables.append(np.stack([*parts, np.full(pages, base)], 1))
    return CodeTable(form, np.concatenate(tables), runs)
