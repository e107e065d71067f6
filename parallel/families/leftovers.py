"""What a model has of which the tables say nothing: a cut would use it wrongly, or add up its gradients wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..attention.mla import Mla
from ..attention.role import Attention
from ..errors import PlanError
from ..roles import Column, Role, Row, Shared

ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")


def activations_in(path: str, block: nn.Module, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Activations that learn numbers (Apertus): used on local columns, so that their gradients are partial."""
    beside = {at.rpartition(".")[0] for at, role in roles.items() if isinstance(role, Column)}
    return {
        f"{path}.{name}": Shared()
        for name, module in block.named_modules()
        if name.rpartition(".")[2] in ACTIVATIONS
        and f"{path}.{name}".rpartition(".")[0] in beside
        and any(True for _ in module.parameters())
        and all(p.numel() == 1 for p in module.parameters())
    }


def refuse_leftovers(model: nn.Module, roles: Mapping[str, Role]) -> None:
    """Refuse parameters that stand between cut projections and have no role.

    Raises:
        PlanError: naming them.
    """
    for path, names in _blocks(roles):
        left = [
            name
            for name, _ in model.get_submodule(path).named_parameters()
            if not any(name == known or name.startswith(f"{known}.") for known in names)
        ]
        if left:
            raise PlanError(
                f"tp or kvp of {path}",
                f"would cut what {', '.join(left)} is used on, of which plait does not know how",
                "use tp=1 and kvp=1 for this model, or give rules",
            )


def refuse_alibi(model: Any) -> None:
    """Refuse positions by a bias of each head, which a model makes for all its heads."""
    if getattr(model.config, "alibi", False) or hasattr(model.base_model, "build_alibi_tensor"):
        raise PlanError(
            f"tp or kvp of {type(model).__name__}",
            "makes a bias of positions (ALiBi) for all heads, of which a rank has some",
            "use tp=1 and kvp=1 for this model",
        )


def _blocks(roles: Mapping[str, Role]) -> Iterator[tuple[str, set[str]]]:
    """Blocks that are cut inside, and the names of what is known in each."""
    parents = {p.rpartition(".")[0] for p, role in roles.items() if isinstance(role, (Column, Row))}
    for path in parents:
        yield path, {p[len(path) + 1 :] for p in roles if p.startswith(f"{path}.")}
    for path, role in roles.items():
        if isinstance(role, Attention):
            names = (role.q, role.k, role.v, role.fused, role.o, role.sinks, *role.norms)
            yield path, {name for name in names if name is not None}
        elif isinstance(role, Mla):
            yield path, {role.q, role.kv_b, role.o, *role.shared}
