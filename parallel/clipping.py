"""The global norm of gradients that are cut, copied and sharded over ranks: each element counted once."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..collectives import primitive
from .edits import CutParameter


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most ``max_norm``; returns the norm before.

    What one process would compute, under any plan: a cut parameter counts every part once, one that ranks hold alike
    counts once, and so do copied KV heads, shards, and a tied parameter on two stages. torch's own function would see
    this rank's parts only. Call it after backward, on every rank; a model without a plan is taken too.

    Collective: all ranks; one all-reduce of one number (and, under shards, a gather of copied KV heads over dp).

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite`` was asked for; the same on every rank.
    """
    done = getattr(model, "_plait", None)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if done is None:
        norm = torch.nn.utils.get_total_norm(grads)
    else:
        device = next(model.parameters()).device
        square = torch.zeros((), dtype=torch.float64, device=device)
        for p, share in shares(model, done):
            if p.grad is not None:
                square += share(p.grad)
        norm = primitive.all_reduce(square, done.ranks.groups.group("tp", "cp", "dp", "pp")).sqrt()
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {float(norm)}; nothing was scaled")
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's formula
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.dtype))
    return norm


def shares(model: nn.Module, done: Any) -> list[tuple[nn.Parameter, Any]]:
    """Each parameter of this rank with a function from its gradient to the part of the squared norm this rank adds."""
    cuts: dict[int, CutParameter] = {}
    for edit in done.parameters():
        held = edit.module._parameters[edit.name]
        cuts.setdefault(id(held), edit)
    elsewhere = counted_elsewhere(model, done)
    return [
        (p, Share(done, cuts.get(id(p)), p).of)
        for p in model.parameters()
        if id(p) not in elsewhere
    ]


def counted_elsewhere(model: nn.Module, done: Any) -> set[int]:
    """Ids of this stage's copies of tied parameters, which the stage of their first name counts."""
    if done.split is None:
        return set()
    stage = done.ranks.groups.folding.coords(done.ranks.groups.rank)["pp"]
    return {
        id(model.get_parameter(done.split.name_on(names, stage)))
        for names, stages in done.split.tied()
        if stage in stages[1:]
    }


class Share:
    """How much of one parameter's squared norm this rank counts."""

    def __init__(self, done: Any, edit: CutParameter | None, parameter: nn.Parameter) -> None:
        plan, ranks = done.plan, done.ranks
        placed = [] if edit is None else edit.placed(ranks)
        parts = prod(holders.size for _, holders in placed)
        self.copies = plan.world_size // plan.pp.size // parts  # ranks that hold the same part
        self.kept = self.copies // plan.dp.size if isinstance(parameter, DTensor) else self.copies
        held = [(cut, cut.shared(holders.index)) for cut, holders in placed]
        self.cut, self.shared = next((each for each in held if each[1]), (None, {}))

    def of(self, grad: Tensor) -> Tensor:
        """The sum of squares, divided by the number of ranks that count the same."""
        if self.cut is None:
            return _square(grad.to_local() if isinstance(grad, DTensor) else grad) / self.kept
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        total = _square(whole)
        for holders, runs in self.shared.items():
            for start, stop in runs:
                part = _square(whole.narrow(self.cut.dim, start, stop - start))
                total -= part * (1 - 1 / len(holders))
        return total / self.copies


def _square(x: Tensor) -> Tensor:
    return x.to(torch.float64).square().sum()
