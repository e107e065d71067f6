"""The choices of the expert axis: how experts are shared out over ranks."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from .choice import Choice, Problem, file_name, one_of, whole
from .errors import PlanError, listed

if TYPE_CHECKING:
    from .plan import Plan
    from .shape import ModelShape


@dataclass(frozen=True, slots=True)
class Experts(Choice):
    """Expert parallelism: experts are shared out over ep. ``ep4``, ``ep4,exchange=tokens``.

    Args:
        exchange: what crosses the wire: ``tokens`` (rows travel to their experts and back), ``sums`` (every rank works
            on the tokens that all ranks of its model copy hold, and the results are summed; where ep * etp fits into a
            copy), or ``auto``: sums where it can be.
        capacity: rows of each expert at most, in multiples of an even share; 0: none is ever dropped.
        drop: what a full expert keeps: ``probs``, the largest weights, or ``position``, what comes first.
        pad: give every expert its capacity of rows, empty ones included: shapes do not depend on the routing, and the
            host reads nothing. Capacity is then counted on each rank's own tokens.
        nodes: the nodes that the ranks of ep lie on evenly: a token crosses to each once, however many of its experts
            are there.
        placement: a file that says which rank holds which experts, and copies of which; none: equal runs.
    """

    size: int
    _: KW_ONLY
    exchange: str = "auto"
    capacity: float = 0.0
    drop: str = "probs"
    pad: bool = False
    nodes: int = 1
    placement: str = ""
    axis: ClassVar[str] = "ep"
    kind: ClassVar[str] = "experts"

    def __post_init__(self) -> None:
        whole("ep", self.size)
        one_of("exchange", self.exchange, ("auto", "tokens", "sums"))
        one_of("drop", self.drop, ("probs", "position"))
        number = not isinstance(self.capacity, bool) and isinstance(self.capacity, (int, float))
        if not number or not 0 <= self.capacity < float("inf"):
            asked = f"capacity={self.capacity!r}"
            raise PlanError(asked, "is not a factor of an even share", "use e.g. capacity=1.25")
        object.__setattr__(self, "capacity", float(self.capacity))
        whole("nodes", self.nodes)
        if not isinstance(self.pad, bool):
            raise PlanError(f"pad={self.pad!r}", "is not true or false", "use pad=True")
        file_name("placement", self.placement)

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        copies = plan.size("ffn_tp")
        if self.exchange == "sums" and (copies % (self.size * plan.etp) or plan.sequence_parallel):
            because = (
                f"with exchange=sums needs ep * etp = {self.size * plan.etp} to divide the {copies} ranks "
                "(kvp * tp, without sp) that hold the same tokens"
            )
            return because, "use exchange=tokens"
        if self.capacity and self.size * plan.etp == 1:
            return f"with capacity={self.capacity} cuts no experts, and drops none", "use ep > 1"
        if self.pad and (not self.capacity or self.exchange == "sums"):
            because = "with pad=true sends every expert its capacity of rows"
            return because, "give capacity=, and not exchange=sums"
        uneven = "tp:sp" if plan.sequence_parallel else f"cp={plan.cp.size}"
        if self.pad and (plan.sequence_parallel or (plan.cp.size > 1 and plan.kvp.size == 1)):
            because = (
                f"with pad=true needs as many tokens on every rank, which {uneven} does not promise"
            )
            return because, "use pad=false, or tp without :sp and cp=1"
        if self.nodes > 1 and (self.size % self.nodes or self.pad or self.exchange == "sums"):
            because = f"with nodes={self.nodes} sends tokens to nodes, in numbers as they come"
            return (
                because,
                f"use nodes in {listed(_divisors(self.size))}, without pad and exchange=sums",
            )
        if self.placement and self.size == 1:
            return f"with placement={self.placement} has one place for all experts", "use ep > 1"
        return None


@dataclass(frozen=True, slots=True)
class Fssdp(Experts):
    """Expert parallelism whose popular experts are copied for each step. ``ep4:fssdp,spare=2``.

    Args:
        spare: experts of others that a rank holds at most, one layer at a time.
    """

    _: KW_ONLY
    spare: int = 1
    kind: ClassVar[str] = "fssdp"

    def __post_init__(self) -> None:
        Experts.__post_init__(self)
        whole("spare", self.spare)

    @property
    def word(self) -> str:
        return "fssdp"

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        others = self.exchange == "sums" or self.pad or self.nodes > 1 or self.placement
        if others or plan.etp > 1 or self.size == 1:
            because = "(fssdp) copies whole experts to the ranks of ep, and sends tokens to the nearest copy"
            return because, "use ep > 1 and etp=1, without exchange=sums, pad, nodes and placement"
        if shape.experts and self.spare > shape.experts - shape.experts // self.size:
            most = shape.experts - shape.experts // self.size
            return (
                f"with spare={self.spare} has only {most} experts elsewhere",
                f"use spare <= {most}",
            )
        return Experts.problem(self, plan, shape)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
