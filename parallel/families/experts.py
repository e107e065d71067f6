"""Roles of routed experts: packed weights, each expert's matrices cut over etp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...collectives import autograd
from ..edits import AddHook, Edit
from ..errors import PlanError
from ..layout import Cut
from ..plan import Plan
from ..ranks import ModelRanks
from ..roles import Role, cut_parameter


@dataclass(frozen=True)
class PackedExperts:
    """Cut every expert's matrices alike, so that each rank computes a part of every expert (etp = tp * kvp, ep = 1).

    Shape: gate_up_proj [experts, 2 * ffn, hidden], down_proj [experts, hidden, ffn]; ffn is cut.
    Collective: one all-reduce of the output forward; one each of the tokens' and routing weights' gradients.
    """

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        gate_up, down = module._parameters["gate_up_proj"], module._parameters["down_proj"]
        assert gate_up is not None
        assert down is not None
        biased = [n for n in module._parameters if "bias" in n]
        if biased:
            raise PlanError(
                f"etp={ranks.plan.etp} on {path}",
                f"its experts have biases {biased}",
                "use etp=1 for this model",
            )

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(
                autograd.enter(a, ranks.all)
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in args
            )

        def leave(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return autograd.leave(output, ranks.all)

        return [
            cut_parameter(
                module,
                "gate_up_proj",
                path,
                Cut.chunks(1, gate_up.shape[1], ranks.run_order, parts=2),
            ),
            cut_parameter(module, "down_proj", path, Cut.chunks(2, down.shape[2], ranks.run_order)),
            AddHook(lambda: module.register_forward_pre_hook(enter)),
            AddHook(lambda: module.register_forward_hook(leave)),
        ]


def roles_in(block: nn.Module, plan: Plan) -> dict[str, Role]:
    """Find routed experts inside a block and give them their role; whole on every rank when etp = ep = 1."""
    packed = [
        n for n, m in block.named_modules() if {"gate_up_proj", "down_proj"} <= m._parameters.keys()
    ]
    return {name: (PackedExperts() if plan.etp > 1 else _Everywhere()) for name in packed}


@dataclass(frozen=True)
class _Everywhere:
    """Every rank holds and computes every expert on its replicated tokens: exact, and no collective."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        return []
