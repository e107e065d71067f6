"""Which stored tensors make which parameter: names of a checkpoint against names of a transformers model.

Transformers keeps this knowledge in its conversion mapping (renamed prefixes, experts stored one by one and held
packed, a base model's checkpoint in a model with a head). We ask it for the names; its stacking and joining is done
lazily.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import PlanError
from ..families import is_transformers
from .stored import Joined, Stacked, Stored

Sources = dict[str, list[Stored]]


def by_model_names(model: nn.Module, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Give every stored tensor the name it has in the model, putting together what is stored in pieces.

    Raises:
        PlanError: the checkpoint needs a conversion that cannot be read slice by slice.
    """
    if not is_transformers(model):
        return stored
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    own, prefix = model.state_dict(), str(model.base_model_prefix)
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    result: dict[str, Stored] = {}
    pieces: dict[str, Sources] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if pattern is None:
            result[name if target not in own and name in own else target] = stored[name]
        else:
            pieces[target][pattern].append(stored[name])
    for target, sources in pieces.items():
        pattern = next(iter(sources))
        result[target] = converted(target, sources, by_pattern[pattern])
    return result


def converted(target: str, sources: Sources, converter: Any) -> Stored:
    """Apply a converter's operations to tensors that are not read yet."""
    if set(sources) != set(converter.source_patterns):
        missing = sorted(set(converter.source_patterns) - set(sources))
        raise PlanError(
            f"tensor {target}",
            f"has no part {missing} in the weights",
            "download the checkpoint again",
        )
    parts: list[list[Stored]] = [sources[pattern] for pattern in converter.source_patterns]
    for operation in converter.operations:
        parts = (
            [_apply(target, operation, parts)]
            if _joins(operation)
            else [[_stack(target, operation, p)] for p in parts]
        )
    if len(parts) != 1 or len(parts[0]) != 1:
        raise PlanError(
            f"tensor {target}",
            f"is made by {converter.operations}, which gives several",
            _instead(),
        )
    return parts[0][0]


def _joins(operation: Any) -> bool:
    return type(operation).__name__ == "Concatenate"


def _stack(target: str, operation: Any, parts: list[Stored]) -> Stored:
    if type(operation).__name__ != "MergeModulelist":
        raise PlanError(
            f"tensor {target}",
            f"is stored in another form, which needs {operation} and cannot be read in slices",
            _instead(),
        )
    _same_shapes(target, parts, range(len(parts[0].shape)))
    return Stacked(tuple(parts), operation.dim)


def _apply(target: str, operation: Any, parts: list[list[Stored]]) -> list[Stored]:
    flat = [p for part in parts for p in part]
    _same_shapes(target, flat, (d for d in range(len(flat[0].shape)) if d != operation.dim))
    return [Joined(tuple(flat), operation.dim)]


def _same_shapes(target: str, parts: list[Stored], dims: Iterable[int]) -> None:
    dims = list(dims)
    shapes = {
        tuple(p.shape[d] for d in dims) for p in parts if len(p.shape) > max(dims, default=-1)
    }
    if len(shapes) != 1 or len({len(p.shape) for p in parts}) != 1:
        raise PlanError(
            f"tensor {target}",
            f"is made of parts of shapes {sorted({p.shape for p in parts})}, which do not fit",
            "repair the weights",
        )


def unused(model: nn.Module, names: Iterable[str], needed: set[str]) -> list[str]:
    """Stored tensors that no parameter or buffer takes, less those transformers says to ignore."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    patterns = [re.compile(p) for p in (*ignored, r"rotary_emb\.inv_freq$")]
    return sorted(n for n in names if n not in needed and not any(p.search(n) for p in patterns))


def _instead() -> str:
    return "load it with from_pretrained and parallelize without weights=, or save it in the model's own form first"
