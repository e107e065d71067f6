"""Roles of a transformers model, read from the plan tables it ships, with a family's word where they are silent."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention.mla import Mla
from ..attention.role import Attention
from ..errors import PlanError
from ..experts import RoutedExperts
from ..plan import Plan
from ..roles import STYLES, Column, Embedding, Head, Region, Role, Row, ungrouped
from ..rules import matches, snippet
from ..shape import ModelShape
from . import attention_names, experts
from .leftovers import activations_in, refuse_alibi, refuse_leftovers

REFUSED = ("linear_attention", "mamba", "conv", "recurrent")


def is_transformers(model: nn.Module) -> bool:
    """Say whether a module is a transformers model, without importing transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.")
        for c in type(model).__mro__
    )


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers and its path."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and path.rsplit(".", 1)[-1] in {"layers", "h"}
        ):
            return path, module
    raise PlanError(
        f"model {type(model).__name__}",
        "has no list of decoder layers we can find",
        "give rules:\n" + snippet(model),
    )


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Find the decoder layers; of a module that is not transformers', the items of its outermost lists of modules."""
    if is_transformers(model):
        return list(decoder_layers(model)[1])
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    return [item for each in lists if id(each) not in inner for item in each]


def roles_of(model: Any, shape: ModelShape, plan: Plan) -> dict[str, Role]:
    """Map module paths to roles for a transformers decoder.

    Raises:
        PlanError: the model ships no table and none of its modules has a known name.
    """
    table = dict(getattr(model, "_tp_plan", None) or {})
    roles: dict[str, Role] = {}
    prefix, layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        roles |= _layer_roles(f"{prefix}.{number}", layer, number, model, shape, plan, table)
    if not any(isinstance(role, (Attention, Mla)) for role in roles.values()):
        raise PlanError(
            f"model {type(model).__name__}",
            "has attention we do not recognise (no table entry and no known projection names)",
            "give rules, for example:\n" + snippet(model),
        )
    if plan.cuts_experts and not any(isinstance(role, RoutedExperts) for role in roles.values()):
        raise PlanError(
            f"ep={plan.size('ep')} etp={plan.etp}",
            f"finds no experts it knows how to cut in {type(model).__name__}",
            "use ep=1 and etp=1, or give rules",
        )
    if plan.tp.size * plan.kvp.size > 1:
        refuse_alibi(model)
        refuse_leftovers(model, roles)
    return roles | _ends(model)


def _layer_roles(
    path: str,
    layer: nn.Module,
    number: int,
    model: Any,
    shape: ModelShape,
    plan: Plan,
    table: dict[str, str],
) -> dict[str, Role]:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if kinds is not None and any(word in kinds[number] for word in REFUSED):
        raise PlanError(
            f"layer {path}",
            f"is of type {kinds[number]!r}, which is not parallelised yet",
            "use tp=1 kvp=1",
        )
    roles: dict[str, Role] = {}
    for name, child in layer.named_children():
        attention = attention_names.role_of(child, shape, number, plan.kvp.size > 1)
        if attention is not None:
            roles[f"{path}.{name}"] = attention
        elif any(True for _ in child.parameters()):  # packed experts have no nn.Linear
            roles |= _feed_forward(f"{path}.{name}", child, table, plan)
    return roles


def _feed_forward(
    path: str, block: nn.Module, table: dict[str, str], plan: Plan
) -> dict[str, Role]:
    """Roles inside a feed-forward block; the block is one region if every weight in it is cut."""
    routed = {f"{path}.{n}": role for n, role in experts.roles_in(block).items()}
    roles: dict[str, Role] = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear) or any(
            f"{path}.{name}".startswith(f"{e}.") for e in routed
        ):
            continue
        style = next(
            (s for pattern, s in table.items() if matches(pattern, f"{path}.{name}")), None
        )
        role = _linear_role(name.rsplit(".", 1)[-1], style)
        if role is not None:
            roles[f"{path}.{name}"] = role
    roles |= activations_in(path, block, roles)
    weights = {
        f"{path}.{n}"
        for n, m in block.named_modules()
        if any(True for _ in m.parameters(recurse=False))
    }
    if roles and weights == set(roles):
        roles = {p: ungrouped(role) for p, role in roles.items()}
        roles[path] = Region()
    return roles | routed


def _linear_role(name: str, style: str | None) -> Role | None:
    # The tables gather fused gate_up projections because a plain chunk would mix the halves; we cut each half.
    if name == "gate_up_proj":
        return Column(parts=2)
    if style in {"rowwise", "rowwise_split_input"}:
        return Row()
    return STYLES.get(style) if style is not None else None


def _ends(model: Any) -> dict[str, Role]:
    """The embedding and the output projection, cut along the vocabulary whatever its size."""
    paths = {id(module): path for path, module in model.named_modules()}
    roles: dict[str, Role] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None:
        roles[paths[id(embedding)]] = Embedding()
    if isinstance(head, nn.Linear):
        roles[paths[id(head)]] = Head()
    return roles
