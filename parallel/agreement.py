"""Make sure that all ranks were told the same thing, and that an error on one is an error on all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import primitive
from ..collectives.primitive import Group
from .errors import PlanError

_MESSAGE_BYTES = 4096
_FACT_BYTES = 512  # of a value; so that what failed has room behind several


class RanksDisagree(PlanError):
    """The ranks were given different plans, models or inputs."""


def agree(group: Group, facts: dict[str, str], failure: BaseException | None = None) -> None:
    """Compare facts over the group and share a failure.

    Collective: all ranks; one all-gather of 4 KiB.

    Raises:
        RanksDisagree: on every rank, naming the fact and the ranks that differ from the majority.
        PlanError: on every rank, if one of them failed; on the rank that failed, its own error.
    """
    if group is None:
        if failure is not None:
            raise failure
        return
    reports = _exchange(group, facts, failure)
    failed = {rank: text for rank, (_, text) in enumerate(reports) if text}
    for name in facts if not failed else ():
        _compare(name, [values.get(name, "") for values, _ in reports])
    if failure is not None:
        raise failure
    if failed:
        rank, text = next(iter(failed.items()))
        raise PlanError(
            f"rank {rank} of {len(reports)}", f"failed: {text}", "nothing was changed on any rank"
        )


def announce(group: Group) -> None:
    """Send what ``agree`` sends, where nothing can be compared: a run on meta tensors over fake groups.

    Collective: all ranks; one all-gather of 4 KiB.
    """
    primitive.all_gather(torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8), group)


def _exchange(
    group: dist.ProcessGroup, facts: dict[str, str], failure: BaseException | None
) -> list[tuple[dict[str, str], str]]:
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"
    lines = [f"{name}={_cut(value)}" for name, value in facts.items()]
    raw = "\n".join([*lines, f"!{text}"]).encode()[:_MESSAGE_BYTES]
    buffer = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    buffer[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    every = (
        primitive.all_gather(buffer.to(primitive.message_device(group)), group)
        .cpu()
        .view(group.size(), -1)
    )
    return [_parse(bytes(row.tolist()).rstrip(b"\0").decode(errors="replace")) for row in every]


def _cut(value: str) -> str:
    """Put a value on one line, and cut a long one; a hash of the whole then stands for what is left out."""
    value = value.replace("\n", " ")
    raw = value.encode()
    if len(raw) <= _FACT_BYTES:
        return value
    whole = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return f"{raw[: _FACT_BYTES - 40].decode(errors='ignore')}... (hash of the whole: {whole})"


def _parse(text: str) -> tuple[dict[str, str], str]:
    head, _, failure = text.partition("\n!") if not text.startswith("!") else ("", "", text[1:])
    return dict(line.split("=", 1) for line in head.split("\n") if "=" in line), failure


def _compare(name: str, values: list[str]) -> None:
    common = max(values, key=values.count)
    others = {rank: value for rank, value in enumerate(values) if value != common}
    if others:
        said = ", ".join(f"rank {rank}: {value}" for rank, value in list(others.items())[:4])
        raise RanksDisagree(
            f"the {name} of ranks {sorted(others)}",
            f"differs from the other ranks' ({said}; others: {common})",
            f"give every rank the same {name}",
        )


def model_digest(parameters: Iterable[tuple[str, Tensor]], samples: int = 64) -> str:
    """Hash names, shapes, dtypes and a few values of every parameter: two random initialisations differ."""
    hasher = hashlib.blake2b(digest_size=8)
    for name, p in parameters:
        hasher.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        if p.device.type != "meta" and p.numel():
            flat = p.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // samples)][:samples]
            hasher.update(picked.to(torch.float64).cpu().numpy().tobytes())
    return hasher.hexdigest()


def tensor_digest(*tensors: Tensor | None) -> str:
    """Hash shapes and contents of inputs."""
    hasher = hashlib.blake2b(digest_size=8)
    for t in tensors:
        if t is not None:
            t = t.detach()
            t = t.to(torch.int64) if not t.is_floating_point() else t.to(torch.float64)
            hasher.update(str(tuple(t.shape)).encode() + t.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def structure(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The model's parameters by name, tied ones once."""
    return list(model.named_parameters())
