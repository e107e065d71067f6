"""What a module's forward says: read where a family's code decides what can stand in for it."""

from __future__ import annotations

import ast
import inspect
import textwrap


def forward_code(kind: type) -> ast.FunctionDef | None:
    """Parse a class's forward; None where its text cannot be had, or is no ``def`` (a lambda)."""
    try:
        text = textwrap.dedent(inspect.getsource(kind.forward))  # type: ignore[attr-defined]
        function = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return function if isinstance(function, ast.FunctionDef) else None
