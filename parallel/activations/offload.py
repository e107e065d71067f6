"""Training with less memory: activations wait for backward on the host or on disk, where the computation hides it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch import nn

from ...kvstore.spec import parse_bytes
from ...kvstore.tiers import DiskTier, MemoryTier, PageForm, Tier, TierLocked
from ..edits import Edits
from ..errors import PlanError
from ..families import is_transformers, repeated_layers
from .saved import Place, SavedTensors
from .shelf import Counters, Keep, Shelf

BLOCK = 4096
LEAST_BYTES = 1 << 20


def offload_activations(
    model: nn.Module,
    disk: str | Path | None = None,
    *,
    disk_bytes: int | str | None = None,
    host_bytes: int | str | None = None,
    least_bytes: int | str = LEAST_BYTES,
    queue_bytes: int | str = "256MiB",
) -> OffloadedActivations:
    """Keep what layers save for backward on disk, or on the host, until backward comes to them.

    Written behind forward, read ahead of backward, a layer early. Values and gradients are bitwise those without it.
    Call it after ``parallelize`` and ``close`` it before ``unparallelize``; every rank has room of its own.

        with plait.offload_activations(model, "/scratch", disk_bytes="100GiB") as activations:
            model(**batch).loss.backward()
        print(activations.counters)

    Args:
        disk: a directory; activations are in a directory inside it, which is removed again.
        disk_bytes: what this rank may take there.
        host_bytes: keep them in so much memory of the host instead, for models on other devices.
        least_bytes: smaller tensors stay where they are; also the unit of room.
        queue_bytes: what may wait to be written; forward waits where the disk is slower.

    Raises:
        PlanError: nothing to move, or nowhere.
    """
    least = parse_bytes(least_bytes)
    unit = -(-least // BLOCK) * BLOCK
    if (disk is None) == (host_bytes is None) or (disk is None) != (disk_bytes is None):
        raise PlanError(
            "offload_activations",
            "needs to know where to, and how much fits there",
            'give a directory and disk_bytes="100GiB", or host_bytes="100GiB"',
        )
    base, layers = layers_of(model)
    if disk is not None:
        assert disk_bytes is not None
        folder = Path(disk) / f"activations-{dist.get_rank() if dist.is_initialized() else 0}"
        tier, where = on_disk(folder, parse_bytes(disk_bytes), unit), f"{folder} ({disk_bytes})"
    else:
        assert host_bytes is not None
        count = parse_bytes(host_bytes) // unit
        if count < 1:
            raise PlanError(
                f"host_bytes={host_bytes}", f"holds no tensor of {unit} bytes", "give more"
            )
        folder, where = None, f"host memory ({host_bytes})"
        tier = MemoryTier(count, unit, Keep())
    shelf = Shelf(tier, unit, parse_bytes(queue_bytes), where)
    return OffloadedActivations(base, layers, shelf, least, folder)


class OffloadedActivations:
    """What `offload_activations` returns: counters, and the way back."""

    def __init__(
        self,
        base: nn.Module,
        layers: list[nn.Module],
        shelf: Shelf,
        least_bytes: int,
        folder: Path | None,
    ) -> None:
        self._shelf, self._folder = shelf, folder
        self._edits = attached(base, layers, shelf, least_bytes)
        self._open = True

    @property
    def counters(self) -> Counters:
        """What was moved so far."""
        return self._shelf.counters

    def close(self) -> None:
        """Leave the model as it was; a backward of an earlier forward can no longer be run. A second does nothing."""
        if not self._open:
            return
        self._open = False
        self._edits.undo()
        self._shelf.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def attached(base: nn.Module, layers: list[nn.Module], place: Place, least_bytes: int) -> Edits:
    """Hang the hooks that hand activations to a place."""
    edits = Edits()
    edits.apply(SavedTensors(base, layers, place, least_bytes).edits())
    return edits


def layers_of(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The module whose forward holds all layers, and the layers.

    Raises:
        PlanError: there are none.
    """
    layers = repeated_layers(model)
    if not layers:
        raise PlanError(
            f"offload_activations of {type(model).__name__}",
            "finds no layers: no list of modules",
            "keep the repeated layers in an nn.ModuleList",
        )
    return model.base_model if is_transformers(model) else model, layers


def on_disk(folder: Path, limit: int, unit: int) -> Tier:
    """Open an empty disk tier; what a run that was killed left there is removed.

    Raises:
        PlanError: another process uses it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)

    def opened() -> DiskTier:
        return DiskTier(folder, PageForm("activations"), unit, limit, Keep())

    try:
        tier = opened()
        if tier.counters()["pages"]:
            tier.close()
            shutil.rmtree(folder)
            tier = opened()
    except TierLocked as error:
        raise PlanError(
            f"offload_activations to {folder}", str(error), "give each run a directory of its own"
        ) from error
    return tier
