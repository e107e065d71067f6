"""Which rank holds which experts, and on which of its copies a token meets an expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..documents import read_document, refusing, write_document
from ..errors import PlanError
from ..layout import Cut
from .route import numbers

FORMAT = "plait-placement-1"


@dataclass(frozen=True)
class Placement:
    """The experts of each ep rank, in order. An expert may be on several ranks, once on each; ranks may hold unevenly.

    A *slot* is one expert on one rank; slots are numbered rank by rank, so that a slot's number says where it is.
    """

    experts: int
    ranks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = [e for rank in self.ranks for e in rank]
        strange = [e for e in held if isinstance(e, bool) or not isinstance(e, int)]
        twice = [r for r, rank in enumerate(self.ranks) if len(set(rank)) < len(rank)]
        if strange or set(held) != set(range(self.experts)) or twice:
            missing = sorted(set(range(self.experts)) - set(held))
            because = (
                f"puts an expert on rank {twice[0]} twice"
                if twice
                else f"leaves out {missing}, or names others, of its {self.experts} experts"
            )
            raise PlanError(
                "a placement of experts", because, "put every expert on one rank or several"
            )

    @classmethod
    def even(cls, experts: int, ranks: int) -> Placement:
        """Runs of experts in order, as many on each rank."""
        held = experts // ranks
        return cls(experts, tuple(tuple(range(r * held, (r + 1) * held)) for r in range(ranks)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each rank."""
        return tuple(len(rank) for rank in self.ranks)

    @property
    def slots(self) -> int:
        """Slots of all ranks."""
        return sum(self.sizes)

    def first(self, rank: int) -> int:
        """The number of a rank's first slot."""
        return sum(self.sizes[:rank])

    @cached_property
    def homes(self) -> tuple[tuple[int, ...], ...]:
        """The slots of each expert."""
        held = [e for rank in self.ranks for e in rank]
        return tuple(
            tuple(s for s, other in enumerate(held) if other == e) for e in range(self.experts)
        )

    def homes_near(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The slots of each expert that a rank's tokens use: its own, or all."""
        first, last = self.first(rank), self.first(rank + 1)
        own = (tuple(s for s in home if first <= s < last) for home in self.homes)
        return tuple(mine or home for mine, home in zip(own, self.homes, strict=True))

    @cached_property
    def plain(self) -> bool:
        """Whether experts are numbered as their slots are."""
        return self.homes == tuple((e,) for e in range(self.experts))

    def cut(self) -> Cut:
        """Dim 0 of a stack of one expert a row, as the ranks hold it."""
        runs = tuple(tuple((e, e + 1) for e in rank) for rank in self.ranks)
        return Cut(0, self.experts, runs)

    def spread(self, index: Tensor, turn: int = 0, near: int | None = None) -> Tensor:
        """Find the slot of every (token, expert) pair; an expert's pairs take its copies in turn.

        The host reads nothing. Pairs of expert number ``experts``, which is nobody, become slot number ``slots``.

        Args:
            turn: where to begin; ranks with tokens of their own begin at different copies.
            near: the rank whose own copies are taken where it has them.
        Shape: [tokens, top_k] -> [tokens, top_k]
        """
        if self.plain:
            return index
        flat = index.reshape(-1)
        homes = self.homes if near is None else self.homes_near(near)
        copies = max(len(home) for home in homes)
        rows = [[*home, *home[:1] * (copies - len(home))] for home in homes]
        table = torch.tensor([*rows, [self.slots] * copies], device=index.device)
        if copies == 1:
            return table[:, 0].index_select(0, flat).view_as(index)
        counts = torch.tensor([*map(len, homes), 1], device=index.device)
        choice = (numbers(flat, self.experts + 1) + turn) % counts.index_select(0, flat)
        return table.index_select(0, flat).gather(1, choice[:, None]).view_as(index)


def write_placements(path: str | Path, layers: Mapping[str, Placement]) -> None:
    """Write the placements of a model's layers, by the path of each layer's experts, as JSON."""
    told = {name: {"experts": each.experts, "ranks": each.ranks} for name, each in layers.items()}
    write_document(path, FORMAT, {"layers": told})


def read_placements(path: str | Path) -> dict[str, Placement]:
    """Read what `write_placements` wrote.

    Raises:
        PlanError: there is no such file, or it is something else.
    """
    with refusing(
        f"placement={path}",
        "is no file of placements",
        "make one with plait experts TRACE --out placement.json",
    ):
        return {
            name: Placement(each["experts"], tuple(tuple(rank) for rank in each["ranks"]))
            for name, each in read_document(path, FORMAT)["layers"].items()
        }
