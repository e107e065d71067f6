"""What a model may not bring along when it is cut: compiled code, modules in two places, hooks on what is replaced."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .edits import CutParameter, Edit
from .errors import PlanError


def refuse_compiled(model: nn.Module) -> None:
    """Refuse modules given to `torch.compile`, whose code is of the whole model."""
    for path, module in model.named_modules():
        # OptimizedModule, told by what it holds: its class is imported with the compiler
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise PlanError(
                path or type(module).__name__,
                "was given to torch.compile, and its code is that of the whole model",
                "give parallelize the model that was not compiled",
            )


def refuse_shared(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse a module that stands in two places with a role: it would be cut twice."""
    seen: dict[nn.Module, str] = {}
    for path in paths:
        module = model.get_submodule(path)
        if module in seen:
            raise PlanError(
                path,
                f"is the module of {seen[module]} too, and would be cut twice",
                "put a module of its own there; its parameters may be the same",
            )
        seen[module] = path


def refuse_hooks(edits: list[Edit]) -> None:
    """Refuse hooks on parameters that are replaced by their parts: they would be called no more."""
    for edit in edits:
        if not isinstance(edit, CutParameter) or edit.whole is None:
            continue
        if edit.whole._backward_hooks or edit.whole._post_accumulate_grad_hooks:
            raise PlanError(
                edit.path,
                "has hooks for its gradient, which would be called no more",
                "register them after parallelize, on the new parameters",
            )
