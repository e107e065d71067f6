"""What a module's forward says: read where a family's code decides what can stand in for it."""

from __future__ import annotations

import ast
import inspect
import textwrap


def forward_code(kind: type) -> ast.FunctionDef | None:
    """Parse a class's forward; None where its text cannot be had."""
    try:
        text = textwrap.dedent(inspect.getsource(kind.forward))  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return None
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function
