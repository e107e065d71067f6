"""KVzip: tokens that the model needs to write the text down again (arXiv 2505.23416)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..view import LayerView
from .scorer import Scorer


@dataclass(frozen=True)
class KVzip(Scorer):
    """The most attention that a token receives from any query of any head while the text is repeated.

    No request is asked, so what is kept serves every question. It needs the model to run over its own text once more
    (`CompressedCache.reconstruct`); until then everything is kept. The reference takes the softmax over the repeated
    chunk alone; here it is over all that the query sees.
    """

    name: ClassVar[str] = "kvzip"
    received: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    @property
    def attends(self) -> bool:
        """The most attention."""
        return True

    def score(self, view: LayerView, keep: int) -> Tensor:
        """What was received."""
        if view.received is None:
            raise ValueError("kvzip: scores by the attention of a reconstruction; run one first")
        return view.received.clone()
