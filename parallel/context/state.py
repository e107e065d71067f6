"""What the forwards of one model share under context parallelism, and the sums of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ...collectives import autograd
from ...collectives.primitive import Group
from ..edits import Edit, SumGradient
from ..ranks import ModelRanks
from .attention import Spread
from .order import SequenceOrder


@dataclass(frozen=True)
class Passing:
    """What a pipeline stage is given and hands on: between stages activations stay cut along the sequence.

    Attributes:
        length: of the whole sequence whose activations arrive cut; None where the inputs are the whole batch's.
        leaves: whether the activations go on, cut, to another stage.
    """

    length: int | None
    leaves: bool


@dataclass
class ContextState:
    """The ranks of cp, and the forward that runs.

    State: ``spread`` is set when a forward begins and stays until the next one; ``passing`` is set for every run of a
    pipeline stage.
    """

    ranks: ModelRanks
    group: Group
    ring: Group
    ulysses: Group
    spread: Spread | None = None
    passing: Passing | None = None

    @classmethod
    def of(cls, ranks: ModelRanks) -> ContextState:
        """Make the groups of the ring and of Ulysses.

        Collective: all ranks of cp, at first use of a group.
        """
        members = ranks.groups.folding.group(ranks.groups.rank, "cp")
        at, width = members.index(ranks.groups.rank), ranks.ulysses
        block = at // width * width
        return cls(
            ranks,
            group=ranks.groups.group("cp"),
            ring=ranks.groups.of_ranks(members[at % width :: width]),
            ulysses=ranks.groups.of_ranks(members[block : block + width]),
        )

    def order(self, length: int) -> SequenceOrder:
        """Who holds which of so many tokens."""
        return SequenceOrder(length, self.ranks.cp // self.ranks.ulysses, self.ranks.ulysses)

    @property
    def rank(self) -> int:
        """This rank of cp."""
        return 0 if self.group is None else self.group.rank()

    def running(self) -> Spread:
        """The spread of the forward that runs."""
        if self.spread is None:
            raise RuntimeError("a mask was asked for outside the model's forward; call the model")
        return self.spread

    def enter(self, x: Tensor) -> Tensor:
        """Take this rank's tokens; backward, the gradient of the whole is put together on every rank.

        Shape: [batch, seq, ...] -> [batch, seq/cp, ...]
        Collective: none forward; one all-reduce backward where ``x`` wants a gradient.
        """
        return self.running().order.take(autograd.enter(x, self.group), self.rank)

    def gather(self, x: Tensor) -> Tensor:
        """Put the ranks' tokens together; the gradient of the whole is the same on every rank.

        Shape: [batch, seq/cp, ...] -> [batch, seq, ...]
        Collective: all ranks of cp; one all-gather, padded to the largest part; none backward.
        """
        order = self.running().order
        own = x.narrow(1, 0, order.counts[self.rank])
        return order.restore(autograd.gather(own, self.group, 1, order.counts))


def gradient_edits(
    model: nn.Module, group: Group, roles: list[Edit], held: Callable[[str], bool] = lambda _: True
) -> list[Edit]:
    """Sum every parameter's gradient over cp: each rank has that of its own tokens. Experts have seen them all.

    Args:
        held: says of a module's path whether this rank's pipeline stage has it.
    """
    summed = {(id(e.module), e.name) for e in roles if isinstance(e, SumGradient) and e.over_dp}
    seen: set[int] = set()
    edits: list[Edit] = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items() if held(path) else ():
            if (id(module), name) in summed:
                continue
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                edits.append(SumGradient(module, name, group))
    return edits


__all__ = ["ContextState", "gradient_edits"]
