"""Files that a plan or a command names: JSON that says what it is, and one error for whatever is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import PlanError

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def write_document(path: str | Path, form: str, fields: Mapping[str, Any]) -> None:
    """Write fields as JSON, beside the name of their format."""
    Path(path).write_text(json.dumps({"format": form, **fields}) + "\n")


def read_document(path: str | Path, form: str) -> dict[str, Any]:
    """Read what `write_document` wrote; to be called under `refusing`.

    Raises:
        ValueError: the file says that it is something else.
    """
    data = json.loads(Path(path).read_text())
    if data["format"] != form:
        raise ValueError(f"its format is {data['format']!r}")
    return data


@contextmanager
def refusing(asked: str, because: str, instead: str, *errors: type[Exception]) -> Iterator[None]:
    """Tell whatever goes wrong while a file is read as one PlanError.

    Args:
        errors: further ones than those of files, JSON and Python's own types.
    """
    try:
        yield
    except PlanError:
        raise
    except (*UNREADABLE, *errors) as error:
        said = f"{because} ({type(error).__name__}: {error})"
        raise PlanError(asked, said, instead) from None


def digest(name: str, path: str) -> str:
    """The SHA-256 of a file, so that ranks can see that they were given the same; "" for no file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except OSError as error:
        raise PlanError(f"{name}={path}", f"cannot be read ({error})", "check the path") from None
