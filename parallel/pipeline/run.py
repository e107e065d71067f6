"""How a model whose layers are spread over stages trains: a whole schedule of torch's in every forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...collectives import primitive
from ..axes import Pipeline
from ..errors import PlanError
from ..ranks import ModelRanks
from .microbatches import Microbatch
from .passage import share
from .schedule import deposited, make_schedule
from .split import Split
from .wire import Meta, Wire


class PipelinedModel:
    """Runs one rank's chunks; ``forward`` takes the place of the model's own.

    Where it trains, a forward is a whole schedule: forward and backward of every microbatch. It gives the loss of the
    whole batch, on every stage, as a tensor whose backward adds this stage's gradients.

    Collective: all stages; activations and their gradients between neighbours, the loss (or outputs) from the last.

    State: ``piece``, the microbatch that runs; ``z_loss``, a `RouterZLoss` that is to be in the loss; ``beside``, its
    value of the last forward.
    """

    def __init__(self, model: Any, split: Split, ranks: ModelRanks, dtype: torch.dtype) -> None:
        self.model, self.split, self.ranks, self.dtype = model, split, ranks, dtype
        self.precise = torch.promote_types(dtype, torch.float32)
        self.choice: Pipeline = ranks.plan.pp
        self.stage = ranks.groups.folding.coords(ranks.groups.rank)["pp"]
        self.members = ranks.groups.ranks("pp")
        self.group = ranks.groups.group("pp")
        self.original = model.forward
        self.signature = inspect.signature(model.forward)
        self.dropout = ""
        self.z_loss: Any = None
        self.beside: Tensor | None = None
        self.piece: Microbatch | None = None
        self.pieces: list[Microbatch] = []
        self._rows: list[Tensor] = []
        self._schedule: tuple[Any, Any] = (None, None)
        self._cast: Any = nullcontext
        self._stand_ins: dict[int, list[tuple[nn.Module, str, nn.Module]]] = {}

    # --- what a kind of model says ----------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model over all stages."""
        raise NotImplementedError

    def links(self, piece: Microbatch) -> list[list[Meta]]:
        """What crosses after each chunk but the last."""
        raise NotImplementedError

    def run_chunk(self, chunk: int, received: list[Tensor], piece: Microbatch) -> list[Tensor]:
        """Run a chunk: from what arrives to what leaves, or of the last one its loss and further numbers to be told."""
        raise NotImplementedError

    def stand_ins(self, chunk: int) -> list[tuple[nn.Module, str, nn.Module]]:
        """What to put where while a chunk runs: parents, names there, and modules."""
        raise NotImplementedError

    @contextmanager
    def only(self, chunk: int) -> Iterator[None]:
        """Let the model see no modules of other chunks than this, while its own forward runs."""
        if chunk not in self._stand_ins:
            self._stand_ins[chunk] = self.stand_ins(chunk)
        places = self._stand_ins[chunk]
        before = [(parent, name, parent._modules[name]) for parent, name, _ in places]
        try:
            for parent, name, module in places:
                parent._modules[name] = module
            yield
        finally:
            for parent, name, module in before:
                parent._modules[name] = module

    # --- the z-loss -------------------------------------------------------------------------------

    def somewhere(self, here: bool) -> bool:
        """Say whether some stage has what may be here or not.

        Collective: all stages; one all-reduce of a number.
        """
        found = torch.tensor(float(here), device=next(self.model.parameters()).device)
        return bool(primitive.all_reduce(found, self.group) > 0)

    def take(self, z_loss: Any) -> None:
        """Compute a z-loss with the model's loss from now on; None: no more."""
        if z_loss is not None and self.z_loss is not None:
            raise PlanError("a second z-loss under pp", "has one before it", "close() that first")
        self.z_loss, self.beside = z_loss, None

    def penalty(self) -> Tensor:
        """The z-loss of the last forward.

        Collective: after a forward without gradients all stages; one all-reduce of a number.
        """
        if self.beside is not None:
            return self.beside
        with torch.no_grad():
            return primitive.all_reduce(self.z_loss.own().to(self.precise), self.group)

    # --- training ---------------------------------------------------------------------------------

    @property
    def last(self) -> int:
        """The stage of the last chunk."""
        return self.split.stage_of(self.split.chunks - 1)

    @property
    def counts(self) -> bool:
        """Whether the rows that run are the batch's own, and not there to fill up."""
        return self.piece is None or self.piece.share > 0

    def train(self, pieces: list[Microbatch], device: torch.device) -> list[Tensor]:
        """Run the schedule: forward and backward of every microbatch. Gives the loss, and what else is told."""
        self.refuse_training(device)
        self.pieces = pieces
        parameters = list(self.model.parameters())
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with getattr(self.model, "no_sync", nullcontext)(), self.uncast(device):
                self._step(device)  # dp averages when the caller's backward ends
            fresh = [p.grad for p in parameters]
        finally:
            self.pieces, self.piece = [], None
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
        self._sum_tied(parameters, fresh)
        rows, self._rows = self._rows, []
        told = torch.stack(rows).sum(0) if self.stage == self.last else None
        loss, beside, *more = self.from_last(told, device).unbind()
        loss, self.beside = deposited(loss, beside, parameters, fresh, self.z_loss is not None)
        return [loss, *more]

    def refuse_training(self, device: torch.device) -> None:
        """Refuse a step that could not be right; the same on every stage."""
        if self.model.training and self.dropout:
            raise PlanError(
                f"training with {self.dropout} under pp",
                "would draw the same masks on every stage",
                "set it to 0",
            )
        cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        if torch.float16 in (self.dtype, cast):
            raise PlanError(
                "training in float16 under pp",
                "would lose small gradients: backward runs inside the forward, before a loss could be scaled",
                "use bfloat16, whose range is float32's",
            )

    @contextmanager
    def uncast(self, device: torch.device) -> Iterator[None]:
        """Keep the caller's autocast to the forwards of the microbatches: backward is not to run under it."""
        kind = device.type
        if not torch.is_autocast_enabled(kind):
            yield
            return
        dtype = torch.get_autocast_dtype(kind)
        self._cast = lambda: torch.autocast(kind, dtype)
        try:
            with torch.autocast(kind, enabled=False):
                yield
        finally:
            self._cast = nullcontext

    def run_microbatch(self, chunk: int, received: list[Tensor], number: int) -> list[Tensor]:
        """Run a chunk in the schedule, with the z-loss of its routers; the z-loss of chunks before arrives last."""
        self.piece = piece = self.pieces[number]
        penalty = received.pop() if self.z_loss is not None and chunk else None
        cast: AbstractContextManager[Any] = self._cast()
        with cast:
            if self.z_loss is not None:
                self.z_loss.logits.clear()
            left = self.run_chunk(chunk, received, piece)
            if self.z_loss is not None:
                own = (self.z_loss.own() * piece.share).to(self.precise)
                penalty = own if penalty is None else penalty + own
        if chunk < self.split.chunks - 1:
            return left if penalty is None else [*left, penalty]
        zero = left[0].new_zeros(()) if penalty is None else penalty
        told = [left[0], zero, *left[1:]]
        self._rows.append(torch.stack([x.detach().to(self.precise) for x in told]))
        return [(left[0] + zero).to(self.precise)]

    def wires(self) -> tuple[Wire, ...]:
        """What crosses after each chunk but the last, of all microbatches."""
        own = [] if self.z_loss is None else [Meta((), self.precise)]
        every = [[(*metas, *own) for metas in self.links(piece)] for piece in self.pieces]
        return tuple(Wire(tuple(each)) for each in zip(*every, strict=True))

    def _step(self, device: torch.device) -> None:
        wires, count = self.wires(), len(self.pieces)
        if self._schedule[0] != wires:
            self._schedule = wires, make_schedule(self, wires, count, device)
        numbers = torch.arange(count, device=device)
        first = (numbers,) if self.stage == 0 else ()
        self._rows.clear()
        self._schedule[1].step(*first, number=numbers, target=numbers, return_outputs=False)

    def _sum_tied(self, parameters: list[nn.Parameter], fresh: list[Tensor | None]) -> None:
        """Add up the gradients of a parameter that several stages hold, so that all copies move alike.

        Collective: these stages; one all-reduce of the parameter's bytes.
        """
        at = {id(p): i for i, p in enumerate(parameters)}
        for names, stages in self.split.tied():
            if self.stage not in stages:
                continue
            p = self.model.get_parameter(self.split.name_on(names, self.stage))
            if not p.requires_grad:
                continue
            group = self.ranks.groups.of_ranks(tuple(self.members[s] for s in stages))
            grad = fresh[at[id(p)]]
            grad = torch.zeros_like(p) if grad is None else grad.contiguous()
            own: Any = grad  # dp's shard of it, where there are shards
            dist.all_reduce(own.to_local() if hasattr(own, "to_local") else own, group=group)
            fresh[at[id(p)]] = grad

    def from_last(self, value: Tensor | None, device: torch.device) -> Tensor:
        """Give every stage what the last one has."""
        return share(value, self.members[self.last], self.group, device)
