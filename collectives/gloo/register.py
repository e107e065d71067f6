"""Register the backend with torch, beside its own gloo."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..errors import BackendUnavailable
from .group import GlooGroup

NAME = "plait_gloo"  # torch hard-codes what "gloo" makes


def register() -> str:
    """Let `init_process_group`, `new_group` and device meshes use it; return the name to ask for.

    Raises:
        BackendUnavailable: torch was built without gloo.
    """
    if not dist.is_gloo_available():
        raise BackendUnavailable("backend 'gloo' needs a torch that was built with gloo")
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    return NAME


def _create(options: Any, _: object) -> GlooGroup:
    names = list(options.global_ranks_in_group) or list(range(options.group_size))
    name = options.group_id or "world"
    return GlooGroup(options.store, options.group_rank, names, options.timeout, name)
