"""The arguments of a forward, by name."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor, nn


@lru_cache(maxsize=64)
def forward_signature(kind: type[nn.Module]) -> inspect.Signature:
    """Read the signature of a class's own forward, once: it is asked for at every call."""
    return inspect.signature(kind.forward)


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Name all arguments of a call, those caught by ``**kwargs`` by their own names; without ``self``."""
    values = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            values |= values.pop(name, {})
    values.pop("self", None)
    return values


def given_tokens(values: dict[str, Any]) -> Tensor | None:
    """What a forward is to read: ids, or embeddings in their place."""
    ids = values.get("input_ids")
    return values.get("inputs_embeds") if ids is None else ids


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Name all arguments of a module's forward, as a pre-hook is given them."""
    return by_name(forward_signature(type(module)), (module, *args), kwargs)
