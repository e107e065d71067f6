"""How the user of a module of his own says where it can be cut into stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..edits import Edit
from ..errors import PlanError, suggestion
from ..ranks import ModelRanks
from ..rules import Rules, matches


@dataclass(frozen=True)
class Stages:
    """The rule of a list of layers, under its path: where pp cuts the model. Without pp it changes nothing.

    The layers, and the modules named in ``first`` and ``last``, each run on one stage; all else in the model's forward
    runs on every stage, and parameters outside of them are kept by all. What a module returned on another stage is
    brought to where it is used.

    To train under pp the forward returns its loss, a tensor of one element, alone or in a tuple or dict.

    Args:
        first: paths of modules that the first stage runs (embeddings).
        last: paths of modules that the last stage runs (final norm, head).
        loss: ``"mean"`` over rows, ``"sum"`` over rows; with ``items`` the mean over what that counts.
        items: ``items(**arguments)`` counts what the loss of a (micro)batch is a mean over, e.g. labels not ignored.
        whole: names of arguments that every microbatch gets whole; all other tensors with the batch's rows are cut.
    """

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    loss: str = "mean"
    items: Callable[..., Any] | None = field(default=None, repr=False)
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.loss not in {"mean", "sum"}:
            raise PlanError(
                f"loss={self.loss!r}", "is no way to add up losses", 'use "mean" or "sum"'
            )
        for name in ("first", "last", "whole"):
            if isinstance(getattr(self, name), str):
                raise PlanError(
                    f"{name}={getattr(self, name)!r}", "is a string", f"write {name}=(...,)"
                )

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        return []


def find_stages(model: nn.Module, rules: Rules | None) -> tuple[str, Stages] | None:
    """Find the rule of stages and the list of layers it is for.

    Raises:
        PlanError: it names no list of layers, or modules that are not there or are in the layers.
    """
    given = [(p, role) for p, role in (rules or {}).items() if isinstance(role, Stages)]
    if not given:
        return None
    paths = [path for path, _ in model.named_modules()]
    found = [(path, rule) for pattern, rule in given for path in paths if matches(pattern, path)]
    if len(found) != 1:
        raise PlanError(
            f"Stages at {', '.join(repr(p) for p, _ in given)}",
            f"is for {len(found)} modules of the model",
            "name the one list of its layers, e.g. " + suggestion(given[0][0], lists(model)),
        )
    path, rule = found[0]
    names = [name for name, _ in model.get_submodule(path).named_children()]
    if names != [str(i) for i in range(len(names))] or not names:
        raise PlanError(
            f"Stages at {path!r}",
            f"is no list of layers but {type(model.get_submodule(path)).__name__}",
            "name a ModuleList or Sequential, e.g. " + suggestion(path, lists(model)),
        )
    for end in (*rule.first, *rule.last):
        if end not in paths:
            raise PlanError(f"Stages: {end!r}", "is no module of the model", suggestion(end, paths))
    every = [path, *rule.first, *rule.last]
    for i, one in enumerate(every):
        for j, other in enumerate(every):
            if i != j and (one == other or one.startswith(f"{other}.") or not one):
                raise PlanError(
                    f"Stages: {one!r} beside {other!r}",
                    "would run on two stages",
                    "name each module once; what is in neither first nor last is on every stage",
                )
    return path, rule


def lists(model: nn.Module) -> list[str]:
    """Paths of the outermost lists of modules."""
    found: list[str] = []
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inner:
            found.append(path)
    return found
