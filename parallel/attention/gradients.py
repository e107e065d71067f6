"""Gradients and random numbers inside a parallel region, where the ranks hold different heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..edits import AddHook, CutParameter, Edit, SumGradient
from ..ranks import ModelRanks


def held_gradient_edits(edits: Sequence[Edit], ranks: ModelRanks) -> list[Edit]:
    """Sum the gradients of parameters that several ranks hold alike; each rank's is partial inside a region."""
    hooks: list[Edit] = []
    for edit in edits:
        if not isinstance(edit, CutParameter):
            continue
        for holders, parts in edit.cut.shared(ranks.index).items():
            all_of_it = sum(stop - start for start, stop in parts) == edit.cut.extent(ranks.index)
            group = ranks.subset(holders)
            hooks.append(
                SumGradient(edit.module, edit.name, group, edit.cut.dim, () if all_of_it else parts)
            )
    return hooks


def dropout_edits(module: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Give each rank its own random numbers inside attention, where ranks hold different heads.

    The seed is drawn from the common generator, so ranks agree again outside, and recomputation replays it.
    """
    if not getattr(module, "attention_dropout", 0.0):
        return []
    forks: list[Any] = []

    def fork(_: nn.Module, args: Any) -> None:
        if module.training:
            seed = int(torch.randint(2**31, (1,)))
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            forks.append(torch.random.fork_rng(devices=devices))
            forks[-1].__enter__()
            torch.manual_seed(seed + ranks.index)

    def join(_: nn.Module, args: Any, output: Any) -> None:
        if forks:
            forks.pop().__exit__(None, None, None)

    return [
        AddHook(lambda: module.register_forward_pre_hook(fork)),
        AddHook(lambda: module.register_forward_hook(join, always_call=True)),
    ]
