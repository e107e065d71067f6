"""Tensors as they lie in safetensors files: read slice by slice, put together from several if need be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import PlanError, listed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Stored(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, known from the header."""
        ...

    @property
    def dtype(self) -> str:
        """Its dtype as safetensors names it, e.g. ``BF16``."""
        ...

    def slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Read a run of one dim; may be a view of the mapped file."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor of one file. Slices are views of the mapped file: nothing is copied before the caller does."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def slice(self, dim: int, start: int, stop: int) -> Tensor:
        if not self.shape:
            return self.file.get_tensor(self.name)
        return self.file.get_slice(self.name)[(slice(None),) * dim + (slice(start, stop),)]


@dataclass(frozen=True)
class Stacked:
    """Equal tensors stacked along a new dim: experts that are stored one by one.

    Shape: n of [...] -> [..., n, ...]
    """

    parts: tuple[Stored, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        return (*shape[: self.dim], len(self.parts), *shape[self.dim :])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def slice(self, dim: int, start: int, stop: int) -> Tensor:
        if dim == self.dim:
            return torch.stack(
                [p.slice(0, 0, p.shape[0]) for p in self.parts[start:stop]], self.dim
            )
        inner = dim - 1 if dim > self.dim else dim
        return torch.stack([p.slice(inner, start, stop) for p in self.parts], self.dim)


@dataclass(frozen=True)
class Joined:
    """Tensors one after another along a dim: gate and up projections that are stored apart."""

    parts: tuple[Stored, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(p.shape[self.dim] for p in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def slice(self, dim: int, start: int, stop: int) -> Tensor:
        if dim != self.dim:
            return torch.cat([p.slice(dim, start, stop) for p in self.parts], self.dim)
        pieces, offset = [], 0
        for part in self.parts:
            first, last = max(start - offset, 0), min(stop - offset, part.shape[dim])
            if first < last:
                pieces.append(part.slice(dim, first, last))
            offset += part.shape[dim]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def stored_tensors(weights: Any) -> dict[str, Stored]:
    """Open safetensors and list their tensors by their names in the files.

    Args:
        weights: a file, a directory, or a sequence of them.

    Raises:
        PlanError: nothing is found, a file is damaged, or two files hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    where: dict[str, Path] = {}
    for path in safetensors_files(weights):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise PlanError(
                f"weights file {path}", f"cannot be read ({error})", "download or save it again"
            ) from None
        for name in file.keys():  # noqa: SIM118
            if name in where:
                raise PlanError(
                    f"tensor {name}",
                    f"is in two files, {where[name]} and {path}",
                    "name the right one in weights=[...]",
                )
            found[name], where[name] = FileTensor(file, name), path
    return found


def safetensors_files(weights: Any) -> list[Path]:
    """Resolve ``weights`` to files: the index of a sharded checkpoint, ``model.safetensors``, or what there is."""
    if isinstance(weights, (list, tuple)):
        return [path for item in weights for path in safetensors_files(item)]
    path = Path(weights)
    if path.name.endswith(".index.json"):
        return list(_indexed(path))
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        return list(_indexed(path / INDEX))
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if found := sorted(path.glob("*.safetensors")):
        return found
    if not path.is_dir():
        raise PlanError(
            f"weights={str(weights)!r}",
            "is neither a directory nor a file here",
            "download the checkpoint and give its directory",
        )
    there = sorted(p.name for p in path.iterdir())[:8]
    raise PlanError(
        f"weights={str(weights)!r}",
        f"holds no safetensors file (found {listed(there)})",
        "give a directory with *.safetensors",
    )


def _indexed(index: Path) -> Iterator[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PlanError(
            f"weights index {index}",
            f"cannot be read ({type(error).__name__}: {error})",
            "download it again",
        ) from None
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise PlanError(
                f"weights file {index.parent / name}",
                f"is named by {index.name} but is not there",
                "download it",
            )
        yield index.parent / name
