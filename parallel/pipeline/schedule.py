"""torch's pipeline schedules over the chunks of a stage, and a loss whose backward gives what they computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .wire import Wire

if TYPE_CHECKING:
    from .run import PipelinedModel


class Chunk(nn.Module):
    """One chunk as torch's pipelining sees it: a module from activations to activations, or to the loss."""

    def __init__(self, run: PipelinedModel, chunk: int, wires: Sequence[Wire]) -> None:
        super().__init__()
        self.chunk = chunk
        self._run = [run]  # in a list: the model is not a part of its part
        self.arrives = wires[chunk - 1] if chunk else None
        self.leaves = wires[chunk] if chunk < len(wires) else None
        self.parts = nn.ModuleList(run.model.get_submodule(p) for p in run.split.paths_of(chunk))
        self.shared = nn.ParameterList(run.split.shared(run.model))

    def forward(self, *args: Tensor, number: Tensor) -> Tensor | tuple[Tensor, ...]:
        at = int(number)
        received = [] if self.arrives is None else self.arrives.unpack(at, args)
        left = self._run[0].run_microbatch(self.chunk, received, at)
        if self.leaves is not None:
            return self.leaves.pack(at, left)
        return left[0].clone() if left[0]._is_view() else left[0]


def make_schedule(run: PipelinedModel, wires: Sequence[Wire], count: int, device: Any) -> Any:
    """Make torch's schedule for batches of one shape; it needs to be told shapes, and then sends no objects."""
    from torch.distributed import pipelining

    split = run.split
    number = torch.empty(1, dtype=torch.int64, device="meta")
    loss = torch.empty((), dtype=run.precise, device="meta", requires_grad=True)
    stages = [
        pipelining.PipelineStage(
            Chunk(run, chunk, wires),
            chunk,
            split.chunks,
            device,
            input_args=tuple(wires[chunk - 1].buffers()) if chunk else (number,),
            output_args=tuple(wires[chunk].buffers()) if chunk < len(wires) else (loss,),
            group=run.group,
            # torch parts gradients of weights from those of inputs where a weight meets an input; what all layers
            # share meets many, and would be differentiated twice. Then both are computed at once.
            dw_builder=(lambda: _nothing) if split.shared(run.model) else None,
        )
        for chunk in split.chunks_of(run.stage)
    ]
    kinds = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
    }
    several = run.choice.schedule in {"interleaved", "zero-bubble"}
    return kinds[run.choice.schedule](
        stages if several else stages[0],  # type: ignore[arg-type]
        count,
        loss_fn=lambda loss, _: loss,
        scale_grads=False,
    )


def _nothing() -> None:
    """Compute no gradients of weights: they were computed with the others."""


def deposited(
    loss: Tensor,
    beside: Tensor,
    parameters: list[nn.Parameter],
    grads: list[Tensor | None],
    both: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make losses whose backward adds gradients that exist already, times their own.

    Args:
        both: the gradients are those of the sum of both; ``beside`` must then be added as it is.
    """
    anchor = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=True)
    held = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    return _Deposit.apply(anchor, loss, beside, held, both)  # type: ignore[return-value]


class _Deposit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, loss: Tensor, beside: Tensor, held: list[Any], both: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.held, ctx.both = held, both
        ctx.set_materialize_grads(False)
        return loss.clone(), beside.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        grad, beside = grads
        held, ctx.held = ctx.held, None
        if held is None:
            raise RuntimeError("this loss was differentiated before; its gradients are used up")
        if ctx.both and (grad is None or beside is None or not torch.equal(grad, beside)):
            raise RuntimeError(
                "under pp the router z-loss is differentiated with the model's loss: write "
                "(model(**batch).loss + z_loss()).backward(), both scaled alike, and weigh it by its coefficient"
            )
        for p, g in held:
            g = g if grad is None else g * grad.to(g.dtype)
            p.grad = g if p.grad is None else p.grad.add_(g)
        return None, None, None, None, None
