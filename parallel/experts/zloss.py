"""The router z-loss: large router logits cost, so that their softmax stays precise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...collectives import autograd, primitive
from ...collectives.primitive import Group
from ..errors import PlanError
from .compute import is_packed
from .layer import ExpertLayer


class RouterZLoss:
    """A coefficient times the mean over tokens of ``logsumexp(router logits) ** 2``, summed over layers of experts.

    Make it after ``parallelize``, or on a model of one process, and add what it returns after each forward:

        z_loss = RouterZLoss(model, 1e-3)
        for batch in batches:
            (model(**batch).loss + z_loss()).backward()

    Every token counts, padding too, as in transformers' balancing loss without a mask. Under cp it is the loss of the
    whole sequence, the same number on all its ranks; each dp rank has that of its own batch. Under pp it is of all
    stages, and its gradient comes with that of the model's loss, so both must be scaled alike.

    Collective: under pp all stages; one all-reduce of a number.

    State: the logits of the last forward, or microbatch; hooks on the model until `close`.
    Source: ST-MoE (arXiv 2202.08906) equation 5.
    """

    def __init__(self, model: nn.Module, coefficient: float = 1e-3) -> None:
        self.coefficient = coefficient
        self.logits: list[Tensor] = []
        self._handles: list[Any] = []
        self.group = _cuts_the_sequence(model)
        self.device = next(model.parameters()).device
        for block in model.modules():
            experts = next(
                (m for m in block.children() if isinstance(m, ExpertLayer) or is_packed(m)), None
            )
            if experts is not None:
                self._watch(block, experts)
        self.stages = getattr(model, "_plait_stages", None)
        found = bool(self._handles)
        if self.stages is not None:
            found = self.stages.somewhere(found)
            self.stages.take(self)
        if not found:
            raise PlanError(
                f"the z-loss of {type(model).__name__}",
                "finds no router beside experts",
                "compute it from the router logits that the model returns",
            )
        self._handles.append(model.register_forward_pre_hook(lambda *_: self.logits.clear()))

    def _watch(self, block: nn.Module, experts: Any) -> None:
        count = (
            experts._plait_experts.place.experts
            if isinstance(experts, ExpertLayer)
            else len(experts.down_proj)
        )
        for child in block.children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == count:
                self._handles.append(child.register_forward_hook(self._note))

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.logits.append(output[0] if isinstance(output, tuple) else output)

    def __call__(self) -> Tensor:
        """The loss of the last forward.

        Collective: the ranks of cp; one all-reduce of a number, and one of another. Under pp none after training.
        """
        if self.stages is not None:
            return self.stages.penalty()
        if not self.logits:
            raise RuntimeError("the z-loss is of a forward of the model; there was none")
        return self.own()

    def own(self) -> Tensor:
        """The loss of the routers that are here; zero without."""
        if not self.logits:
            return torch.zeros((), device=self.device)
        squares = [logits.logsumexp(-1).square() for logits in self.logits]
        count = torch.tensor(float(squares[0].numel()), device=squares[0].device)
        count = primitive.all_reduce(count, self.group)
        total = torch.stack([each.sum() for each in squares]).sum()
        return self.coefficient * autograd.leave(total, self.group) / count.to(total.dtype)

    def close(self) -> None:
        """Take the hooks off the model, and the loss out of pp's."""
        if self.stages is not None:
            self.stages.take(None)
        while self._handles:
            self._handles.pop().remove()


def _cuts_the_sequence(model: Any) -> Group:
    done = getattr(model, "_plait", None)
    if done is None:
        return None
    return done.ranks.groups.group("cp") if done.ranks.cp > 1 else None
