"""What one run of a user's module showed: which boxes' outputs later chunks use, and where the loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from ..errors import PlanError
from .tree import Layout

Place = tuple[str, int]
Places = frozenset[Place]


@dataclass(frozen=True)
class Lesson:
    """What crosses between chunks, and what comes out.

    Attributes:
        sends: of each chunk but the last, the tensors that leave it: box and number among its outputs.
        output: the layout of the forward's output.
        loss: number of the loss among its leaves; None: it returns none.
        beside: numbers of further single numbers, which are told too.
    """

    sends: tuple[tuple[Place, ...], ...]
    output: Layout
    loss: int | None
    beside: tuple[int, ...]

    @classmethod
    def of(cls, used: Sequence[Places], chunk_of: dict[str, int], told: dict[str, Any]) -> Lesson:
        """Read it off what each chunk used of others, and what the last one told.

        Raises:
            PlanError: a chunk uses nothing of those before it.
        """
        sends = []
        for chunk in range(len(used) - 1):
            later = frozenset().union(*used[chunk + 1 :])
            sends.append(tuple(sorted(p for p in later if chunk_of[p[0]] <= chunk)))
            if not sends[-1]:
                raise PlanError(
                    "a forward under pp",
                    f"uses nothing of the first {chunk + 1} runs of layers in what follows",
                    "check which list of layers Stages(...) is for",
                )
        return cls(tuple(sends), Layout.loads(told["output"]), told["loss"], tuple(told["beside"]))

    @staticmethod
    def told_by(output: Any) -> dict[str, Any]:
        """Say what the last chunk's output is like, and where the loss is in it.

        Raises:
            PlanError: several numbers could be the loss.
        """
        layout = Layout.of(output)
        paths, _ = tree_flatten_with_path(output)
        leaves = [x for _, x in paths]
        numbers = [
            i
            for i, x in enumerate(leaves)
            if isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point()
        ]
        could = [i for i in numbers if leaves[i].requires_grad]
        named = [i for i in could if keystr(paths[i][0]).strip("[]'.") == "loss"]
        if len(could) > 1 and len(named) != 1:
            raise PlanError(
                f"a forward that returns {len(could)} numbers with gradients, under pp",
                "does not say which is the loss",
                'return a dict with "loss", or one loss',
            )
        loss = (named if len(could) > 1 else could or [None])[0]
        beside = [i for i in numbers if i != loss]
        return {"output": layout.dumps(), "loss": loss, "beside": beside}

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the leaves that are told in training: the loss, and those beside it."""
        assert self.loss is not None
        return self.loss, *self.beside

    def sent(self, path: str, number: int, chunk: int) -> bool:
        """Say whether a tensor leaves a chunk; nothing leaves the last."""
        return chunk < len(self.sends) and (path, number) in self.sends[chunk]
