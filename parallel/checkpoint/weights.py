"""Where the local weights come from: a model in memory, or safetensors of which each rank reads only its slices.

Values take the dtype of the model's parameters, whatever the file holds: build the meta model in the dtype to run in. A
one-byte float or an integer in the file is taken only by a parameter of that very dtype, for its scale is elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..edits import CutParameter, Edit, HoldRows, ReplaceTensor, SumGradient
from ..errors import PlanError, listed
from ..ranks import ModelRanks
from .buffers import computed_buffers
from .conversion import by_model_names, unused
from .stored import FileTensor, Stored, stored_tensors

Weights = str | Path | Sequence[str | Path] | None

PLAIN_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LISTED_NAMES = 6
META = torch.device("meta")


def load(
    model: nn.Module,
    edits: Sequence[Edit],
    ranks: ModelRanks,
    weights: Weights,
    absent: Container[int] = (),
) -> list[Edit]:
    """Fill in the local part of every cut parameter, and return edits for the tensors that stay whole.

    Of what dp shards only this rank's rows are kept (`HoldRows`).

    Args:
        absent: ids of the parameters that other stages hold; they are not read.

    State: holds at most this rank's parts and one tensor more. The files stay mapped only while they are read.

    Raises:
        PlanError: the files are damaged; a tensor is missing, has another shape or dtype, or holds NaN.
    """
    cuts = [e for e in edits if isinstance(e, CutParameter)]
    if weights is None:
        return _cut_in_memory(cuts, ranks)
    apart = {
        id(e.module._parameters[e.name]) for e in edits if isinstance(e, SumGradient) and e.over_dp
    }
    loading = Loading.of(model, ranks, weights, apart)
    read = loading.cut(cuts) + loading.whole(cuts, absent) + loading.buffers()
    return [*read, HoldRows(loading.rows)] if loading.rows else read


def _cut_in_memory(cuts: list[CutParameter], ranks: ModelRanks) -> list[Edit]:
    made: dict[int, nn.Parameter] = {}
    for edit in cuts:
        assert edit.whole is not None
        if id(edit.whole) not in made:
            local = edit.take(edit.whole.detach(), ranks)
            check_numbers(local, edit.path)
            made[id(edit.whole)] = nn.Parameter(local, requires_grad=edit.whole.requires_grad)
        edit.local = made[id(edit.whole)]
    return []


@dataclass
class Loading:
    """One reading of a checkpoint into a model: what is where, and what was read (tied tensors once)."""

    model: nn.Module
    ranks: ModelRanks
    stored: dict[str, Stored]
    names: dict[int, list[str]]
    apart: set[int]
    made: dict[int, nn.Parameter] = field(default_factory=dict)
    rows: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, ranks: ModelRanks, weights: Weights, apart: set[int] | None = None
    ) -> Loading:
        """Open the files and check every name, shape and dtype before anything is read.

        ``apart`` are ids of parameters that dp does not shard though it shards others.
        """
        stored = by_model_names(model, stored_tensors(weights))
        loading = cls(model, ranks, stored, _names(model), apart or set())
        loading._check_complete()
        return loading

    def cut(self, cuts: list[CutParameter]) -> list[Edit]:
        """Read this rank's part of every cut parameter."""
        for edit in cuts:
            whole = edit.whole
            assert whole is not None
            if id(whole) not in self.made:
                stored = self._stored(self.names[id(whole)])
                local = edit.read(stored.slice, self.ranks)
                self._make(whole, local, edit.path)
            edit.local = self.made[id(whole)]
        return []

    def whole(self, cuts: list[CutParameter], absent: Container[int] = ()) -> list[Edit]:
        """Read the parameters that stay whole."""
        cut = {id(e.whole) for e in cuts}
        edits: list[Edit] = []
        for module in self.model.modules():
            for name, p in module._parameters.items():
                if p is None or id(p) in cut or id(p) in absent:
                    continue
                if id(p) not in self.made:
                    self._make(p, read_whole(self._stored(self.names[id(p)])), self.names[id(p)][0])
                edits.append(ReplaceTensor(module, name, self.made[id(p)]))
        return edits

    def buffers(self) -> list[Edit]:
        """Read the buffers a checkpoint keeps, and compute those on meta that it does not keep."""
        edits: list[Edit] = []
        for path, module in self.model.named_modules():
            for name, buffer in _kept_buffers(module):
                if (stored := self.stored.get(_join(path, name))) is not None:
                    value = read_whole(stored).to(
                        dtype=buffer.dtype, device=rank_device(buffer.device)
                    )
                    check_numbers(value, _join(path, name))
                    edits.append(ReplaceTensor(module, name, value))
            for name, value in computed_buffers(self.model, path, module).items():
                edits.append(ReplaceTensor(module, name, value.to(rank_device(META))))
        return edits

    def _make(self, old: nn.Parameter, value: Tensor, name: str) -> None:
        check_numbers(value, name)
        value = value.to(dtype=old.dtype, device=rank_device(old.device))
        if not self.ranks.sharded or id(old) in self.apart:
            self.made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
            return
        whole = nn.Parameter(torch.empty_like(value, device="meta"), old.requires_grad)
        self.made[id(old)] = whole
        self.rows[whole] = self.ranks.dp_rows(value).clone()

    def _stored(self, names: list[str]) -> Stored:
        return next(self.stored[n] for n in names if n in self.stored)

    def _check_complete(self) -> None:
        needed = dict(self.model.named_parameters(remove_duplicate=False))
        missing = [
            names[0] for names in self.names.values() if not any(n in self.stored for n in names)
        ]
        for path, module in self.model.named_modules():
            kept = {_join(path, name): b for name, b in _kept_buffers(module)}
            missing += [
                name
                for name, b in kept.items()
                if name not in self.stored and b.device.type == "meta"
            ]
            needed |= kept  # type: ignore[arg-type]
        extra = unused(self.model, self.stored, set(needed))
        if missing:
            raise PlanError(
                f"{_some(missing)} of the model",
                f"is not in the weights (which hold {_some(extra) or 'nothing'} besides)",
                "use the config that belongs to these weights",
            )
        for name, tensor in needed.items():
            if (stored := self.stored.get(name)) is not None:
                check_fits(name, stored, tensor)
        for names in self.names.values():
            self._check_tied([n for n in names if n in self.stored])
        if extra and self.ranks.groups.rank == 0:
            warnings.warn(
                f"the weights hold tensors that the model does not use: {_some(extra)}",
                stacklevel=2,
            )

    def _check_tied(self, names: list[str]) -> None:
        """A tied tensor that is stored twice must be stored twice the same."""
        for other in names[1:]:
            first, second = self.stored[names[0]], self.stored[other]
            rows = first.shape[0]
            if not all(
                torch.equal(first.slice(0, r, r + 1), second.slice(0, r, r + 1))
                for r in range(rows)
            ):
                raise PlanError(
                    f"{names[0]} and {other}, which the config ties,",
                    "have different values in the weights",
                    "set tie_word_embeddings=False",
                )


def read_whole(stored: Stored) -> Tensor:
    """Read all of a tensor into memory of its own: a later change of the file must not reach the model."""
    value = stored.slice(0, 0, stored.shape[0] if stored.shape else 1)
    return (
        value.clone(memory_format=torch.contiguous_format)
        if isinstance(stored, FileTensor)
        else value
    )


def check_fits(name: str, stored: Stored, tensor: Tensor) -> None:
    """Refuse a stored tensor of another shape, or of a dtype that does not hold the values themselves."""
    if stored.shape != tuple(tensor.shape):
        raise PlanError(
            f"tensor {name} of shape {list(stored.shape)} in the weights",
            f"does not fit the model's {list(tensor.shape)}",
            "use the config that belongs to these weights",
        )
    if tensor.is_floating_point() and stored.dtype not in PLAIN_FLOATS:
        raise PlanError(
            f"tensor {name} of dtype {stored.dtype} in the weights",
            f"is quantised, the model holds {str(tensor.dtype).removeprefix('torch.')}",
            f"give weights in one of {listed(PLAIN_FLOATS)}",
        )


def check_numbers(value: Tensor, name: str) -> None:
    """Refuse NaN, without a temporary of the tensor's size unless there is one."""
    if value.device.type == "meta" or not value.is_floating_point():
        return
    if bool(torch.isnan(value.sum())) and bool(torch.isnan(value).any()):
        raise PlanError(
            f"parameter {name}", "holds NaN", "repair or reload the weights; nothing was changed"
        )


def rank_device(device: torch.device) -> torch.device:
    """Where a tensor of a meta model goes: this rank's GPU in an NCCL world, else the CPU. Others stay."""
    if device.type != "meta":
        return device
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter; tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _kept_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong into a checkpoint."""
    return [
        (n, b)
        for n, b in module._buffers.items()
        if b is not None and n not in module._non_persistent_buffers_set
    ]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _some(names: Iterable[Any]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(str(n) for n in names[:LISTED_NAMES]) + more
