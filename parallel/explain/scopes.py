"""Scopes: tell a trace which module runs, forward and backward."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...collectives.trace import Trace


class Scopes:
    """Set ``trace.scope`` to the path of the innermost module that runs, inside ``with Scopes(model, trace)``.

    In backward it is ``backward:`` and the path of the layer, or layer's child, whose output's gradient came last.

    Args:
        onlooks: let sums wait as they do unobserved (outlet.py); they belong to their layer then, not to its modules.

    State: hooks on every module, removed at the end.
    """

    def __init__(self, model: nn.Module, trace: Trace, *, onlooks: bool = False) -> None:
        self.model, self.onlooks = model, onlooks
        self.trace = trace
        self.layers = layer_paths(model)
        self._stack: list[str] = [""]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for path, module in self.model.named_modules():
            # First of all hooks: those of the plan communicate too, and belong to their module.
            enter = module.register_forward_pre_hook(self._enter(path), prepend=True)
            leave = module.register_forward_hook(self._leave(path), always_call=True)
            self._handles += [enter, leave]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(*_: Any) -> None:
            self._stack.append(path)
            self.trace.scope = path

        return hook

    def _leave(self, path: str) -> Any:
        parent = path.rpartition(".")[0]
        coarse = path != "" and (parent in {"", *self.layers} or path in self.layers)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            self.trace.scope = self._stack[-1]
            for leaf in tree_leaves(output) if coarse else ():
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(came)

        def came(_: Tensor) -> None:
            self.trace.scope = f"backward:{path}"

        if self.onlooks:
            hook.onlooker = True  # type: ignore[attr-defined]
        return hook


def layer_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated layers: the children of the outermost lists of modules."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{p}.") for p in paths):
            paths += [f"{path}.{name}" for name, _ in module.named_children()]
    return tuple(paths)
