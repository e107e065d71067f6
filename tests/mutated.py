"""A module loaded again with one thing changed: the negative control of what its tests show."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType


def mutated(module: ModuleType, old: str = "", new: str = "", name: str = "mutated") -> ModuleType:
    """Load `module` beside the true one, with `new` wherever its source says `old`."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} does not say {old!r}"
    changed = ModuleType(f"{module.__name__}_{name}")
    changed.__package__ = module.__package__
    sys.modules[changed.__name__] = changed  # where dataclasses look
    exec(compile(source.replace(old, new), module.__file__ or "", "exec"), changed.__dict__)
    return changed
