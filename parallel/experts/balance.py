"""Loss-free balancing: a bias that only selection sees moves towards experts that have too little to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...collectives import primitive
from ...collectives.primitive import Group
from ..errors import PlanError
from .route import count

BIAS = "e_score_correction_bias"


class BiasBalance:
    """Moves the selection bias of every router (DeepSeek-V3's ``e_score_correction_bias``) by the loads of a step.

    Make it after ``parallelize``, or on a model of one process, and call `step` when the optimizer steps:

        balance = BiasBalance(model, rate=1e-3)
        for batch in batches:
            model(**batch).loss.backward(); optimizer.step(); balance.step()

    Counts are of training forwards, before anything is dropped, and of the whole batch: summed over cp and dp, so every
    rank moves its bias alike and as one process would.

    Collective: under pp all stages; one all-reduce of a number.

    State: one count for each expert of each router; hooks on the model until `close`.
    Source: Wang et al., Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664).
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        self.rate = rate
        self.group = _sees_other_tokens(model)
        self.stages = getattr(model, "_plait_stages", None)
        self.loads: list[
            tuple[Tensor, Tensor]
        ] = []  # of each router: the bias, the rows of each expert
        self._handles: list[Any] = []
        for block in model.modules():
            router = next((m for m in block.children() if BIAS in m._buffers), None)
            experts = getattr(block, "experts", None)
            if router is not None and isinstance(experts, nn.Module):
                self._watch(experts, router.get_buffer(BIAS))
        found = bool(self.loads)
        if not (found if self.stages is None else self.stages.somewhere(found)):
            raise PlanError(
                f"balancing {type(model).__name__}",
                f"finds no router with a {BIAS}",
                "use the model's own balancing loss",
            )

    def _watch(self, experts: nn.Module, bias: Tensor) -> None:
        load = torch.zeros(bias.shape, dtype=torch.long, device=bias.device)
        self.loads.append((bias, load))

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            counts = self.stages is None or self.stages.counts
            if counts and module.training and torch.is_grad_enabled():
                load.add_(count(args[1].reshape(-1), len(load)).to(load.device))

        self._handles.append(experts.register_forward_pre_hook(note))

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was counted since the last step.

        Collective: the ranks along cp and dp; one all-reduce of 8 bytes for each expert of each router.
        """
        if not self.loads:
            return
        every = torch.cat([load for _, load in self.loads])
        every = primitive.all_reduce(every, self.group)
        parts = every.split([len(load) for _, load in self.loads])
        for (bias, load), total in zip(self.loads, parts, strict=True):
            error = total.double().mean() - total
            bias.add_(torch.sign(error).to(bias.dtype), alpha=self.rate)
            load.zero_()

    def close(self) -> None:
        """Take the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()


def _sees_other_tokens(model: Any) -> Group:
    """The ranks whose tokens differ from this rank's; those of a copy hold the same, except under tp:sp."""
    done = getattr(model, "_plait", None)
    if done is None:
        return None
    axes = ("dp",) if done.plan.kvp.size > 1 else ("cp", "dp")
    axes = ("tp", *axes) if done.ranks.span is not None else axes
    return done.ranks.groups.group(*axes)
