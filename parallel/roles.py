"""What a module is to the plan. A role is data found in tables or given as a rule; it knows how its module is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from ..collectives.primitive import chunk_sizes
from .edits import AddHook, CutParameter, Edit, SetAttribute, SumGradient, SwapClass
from .errors import PlanError
from .layout import Cut
from .ranks import ModelRanks, Placed
from .tensor import (
    ColumnLinear,
    GatheredLinear,
    Link,
    RowLinear,
    VocabEmbedding,
    VocabHead,
    Vocabulary,
)


class Role(Protocol):
    """A role turns its module into edits; nothing is touched until the edits are applied."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        """Prepare the edits that cut ``module``, found at ``path``, for this rank."""
        ...


def cut_parameter(module: nn.Module, name: str, path: str, *cuts: Cut | Placed) -> CutParameter:
    """Name the cuts of one parameter; its local part is filled in when weights are read."""
    parameter = module._parameters[name]
    assert parameter is not None
    shape = tuple(parameter.shape)
    placed = tuple(c if isinstance(c, Placed) else Placed(c) for c in cuts)
    for cut in (p.cut for p in placed):
        if shape[cut.dim] != cut.length:
            raise PlanError(
                f"{path}.{name} has shape {list(shape)}",
                f"its role cuts dim {cut.dim} as if it were {cut.length} long",
                "check heads, head_dim and parts in the rules or the model's config",
            )
    return CutParameter(
        module, name, f"{path}.{name}" if path else name, placed, whole=parameter, shape=shape
    )


def plain_linear(module: nn.Module, path: str) -> nn.Linear:
    """Return a linear layer, or refuse a module whose class may compute something else than its weight says."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        if "weight" in module._parameters:
            return module
        raise PlanError(
            path,
            "makes its weight from other parameters (parametrize, weight_norm), which no part of it can",
            "remove the parametrization, or leave the path out of the rules to keep it whole on every rank",
        )
    raise PlanError(
        f"{path} ({type(module).__name__})",
        "is to be cut as a linear layer, but its class computes something else: its parts might not add up to it",
        "use torch.nn.Linear there, or leave the path out of the rules to keep it whole on every rank",
    )


@dataclass(frozen=True)
class Column:
    """Cut the outputs of a linear layer; ``parts`` equal parts are cut alike (a fused gate and up projection)."""

    parts: int = 1
    enters: bool = True

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        linear = plain_linear(module, path)
        cut = Cut.chunks(0, linear.weight.shape[0], ranks.run_order, self.parts)
        return column_edits(linear, path, cut, Link(ranks.all, ranks.span, enters=self.enters))


@dataclass(frozen=True)
class Row:
    """Cut the inputs of a linear layer and sum the outputs over the ranks."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        linear = plain_linear(module, path)
        cut = Cut.chunks(1, linear.weight.shape[1], ranks.run_order)
        return row_edits(linear, path, cut, Link(ranks.all, ranks.span))


@dataclass(frozen=True)
class Embedding:
    """Cut an embedding along its vocabulary; the parts may be uneven."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        if not isinstance(module, nn.Embedding):
            raise PlanError(
                f"{path} ({type(module).__name__}) is to be cut as an embedding",
                "is not a torch.nn.Embedding",
                "drop its rule",
            )
        rows = module.num_embeddings
        here = vocabulary(rows, ranks)
        padding = module.padding_idx
        local_padding = (
            padding - here.start
            if padding is not None and here.start <= padding < here.stop
            else None
        )
        return [
            cut_parameter(module, "weight", path, Cut.chunks(0, rows, ranks.run_order)),
            SetAttribute(module, "_plait", here),
            SetAttribute(module, "padding_idx", local_padding),
            SwapClass(module, VocabEmbedding),
        ]


@dataclass(frozen=True)
class Head:
    """Cut an output projection along its outputs and gather them; the parts may be uneven."""

    mixin: type = VocabHead

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        rows = plain_linear(module, path).weight.shape[0]
        cut = Cut.chunks(0, rows, ranks.run_order)
        edits: list[Edit] = [cut_parameter(module, "weight", path, cut)]
        if module.bias is not None:
            edits.append(cut_parameter(module, "bias", path, cut))
        return [
            *edits,
            SetAttribute(module, "_plait", vocabulary(rows, ranks)),
            SwapClass(module, self.mixin),
        ]


@dataclass(frozen=True)
class Shared:
    """Keep a module whole inside a region; its gradients are partial and are summed over the ranks."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        return [
            SumGradient(child, name, ranks.all)
            for child in module.modules()
            for name in child._parameters
            if child._parameters[name] is not None
        ]


@dataclass(frozen=True)
class Whole:
    """Keep a module whole: every rank computes it alike."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        return []


@dataclass(frozen=True)
class Region:
    """Enter the parallel region once, at the door of a module whose column layers all read the same input."""

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        link = Link(ranks.all, ranks.span)

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            if args:
                return (link.enter(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": link.enter(kwargs["hidden_states"])}

        return [AddHook(lambda: module.register_forward_pre_hook(enter, with_kwargs=True))]


STYLES: dict[str, Role] = {
    "colwise": Column(),
    "rowwise": Row(),
    "packed_colwise": Column(parts=2),
    "colwise_gather_output": Head(GatheredLinear),
    "embedding_rowwise": Embedding(),
    "replicated_with_grad_allreduce": Shared(),
    "replicate": Whole(),
}
"""Transformers' style names, which rules may use."""


def column_edits(module: nn.Module, path: str, cut: Cut, link: Link) -> list[Edit]:
    """Edits of a linear layer whose outputs are cut."""
    names = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
    cuts: list[Edit] = [cut_parameter(module, name, path, cut) for name in names]
    return [*cuts, SetAttribute(module, "_plait", link), SwapClass(module, ColumnLinear)]


def row_edits(
    module: nn.Module, path: str, cut: Cut, link: Any, mixin: type = RowLinear
) -> list[Edit]:
    """Edits of a linear layer whose inputs are cut; its bias stays whole and is added once."""
    return [
        cut_parameter(module, "weight", path, cut),
        SetAttribute(module, "_plait", link),
        SwapClass(module, mixin),
    ]


def vocabulary(rows: int, ranks: ModelRanks) -> Vocabulary:
    """The part of ``rows`` this rank holds, in the order of the head runs."""
    sizes = chunk_sizes(rows, ranks.size)
    own = ranks.run_order[ranks.index]
    start = sum(sizes[:own])
    return Vocabulary(ranks.all, start, start + sizes[own], tuple(sizes), ranks.run_order)


def ungrouped(role: Role) -> Role:
    """The same role for a column layer whose region is entered by its parent."""
    return replace(role, enters=False) if isinstance(role, Column) else role


__all__ = [
    "STYLES",
    "Column",
    "Embedding",
    "Head",
    "Region",
    "Role",
    "Row",
    "Shared",
    "Whole",
    "column_edits",
    "cut_parameter",
    "row_edits",
    "ungrouped",
    "vocabulary",
]
