"""Rules: module-path patterns to roles. A rule that matches nothing is an error, never a silent no-op."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .errors import PlanError, suggestion
from .experts import RoutedExperts
from .roles import STYLES, Role

Rules = Mapping[str, "str | Role"]
NAMED: dict[str, Role] = {**STYLES, "experts": RoutedExperts()}
"""What a rule may say in a word: transformers' style names, and experts."""


def match(model: nn.Module, rules: Rules) -> dict[str, Role]:
    """Find the modules that each rule names.

    A pattern is a module path in which ``*`` stands for one part of it: ``blocks.*.attn.q_proj``. A role is one of
    transformers' style names or a role object such as ``Attention(...)``. The first matching rule wins.

    Raises:
        PlanError: a pattern matches no module, or a style is unknown.
    """
    paths = [path for path, _ in model.named_modules()]  # "" is the model itself
    found: dict[str, Role] = {}
    for pattern, role in rules.items():
        hits = [path for path in paths if matches(pattern, path)]
        if not hits:
            raise PlanError(
                f"rule {pattern!r}",
                "matches no module of the model",
                suggestion(pattern, _shapes_of(paths)),
            )
        for path in hits:
            found.setdefault(path, named(role, pattern))
    return found


def matches(pattern: str, path: str) -> bool:
    """Say whether a pattern names a path; ``*`` stands for one part."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path) is not None


def named(role: str | Role, where: str) -> Role:
    """Look up a style by name."""
    if not isinstance(role, str):
        return role
    if role not in NAMED:
        raise PlanError(f"rule {where!r}: style {role!r}", "is not known", suggestion(role, NAMED))
    return NAMED[role]


def _shapes_of(paths: list[str]) -> list[str]:
    """Fold the layer numbers of module paths into ``*``."""
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths})


def snippet(model: nn.Module) -> str:
    """Write an example of rules for an unknown model, from the names of its linear layers."""
    linear = sorted(
        {
            re.sub(r"\.\d+(?=\.|$)", ".*", path)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
    )[:8]
    lines = ["parallelize(model, plan, rules={"]
    lines += [f'    "{path}": "colwise",  # or "rowwise"' for path in linear]
    lines += [
        '    "blocks.*.attn": Attention(heads=..., kv_heads=..., head_dim=..., q="wq", k="wk", v="wv", o="wo"),',
        "})",
    ]
    return "\n".join(lines)
