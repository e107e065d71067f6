"""How a model whose layers are spread over stages runs: torch's schedules in training, one pass in inference."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arguments import by_name, given_tokens
from ..axes import Pipeline
from ..context.state import ContextState, Passing
from ..errors import PlanError
from ..labels import item_count
from ..ranks import ModelRanks
from .microbatches import microbatches
from .passage import Passage, share
from .split import Split

ONLY_HEAD = ("labels", "logits_to_keep", "num_items_in_batch", "shift_labels")


class PipelinedModel:
    """Runs one rank's chunks; ``forward`` takes the place of the model's own.

    With labels, and gradients wanted, a forward is a whole schedule: forward and backward of every microbatch. It gives
    the loss of the whole batch, on every stage, as a tensor whose backward adds this stage's gradients.

    Collective: all stages; activations and their gradients between neighbours, the loss (or logits) from the last.
    """

    def __init__(self, model: Any, split: Split, ranks: ModelRanks) -> None:
        self.model, self.split, self.ranks = model, split, ranks
        self.choice: Pipeline = ranks.plan.pp
        self.stage = ranks.groups.folding.coords(ranks.groups.rank)["pp"]
        self.members = ranks.groups.ranks("pp")
        self.group = ranks.groups.group("pp")
        self.original = model.forward
        self.signature = inspect.signature(model.forward)
        self.pause: Any = None
        self.batches: list[dict[str, Any]] = []
        self._schedule: tuple[Any, Any] = (None, None)
        self._views: dict[int, list[tuple[nn.Module, str, nn.Module]]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model over all stages."""
        values = by_name(self.signature, args, kwargs)
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if values.pop(name, None):
                raise PlanError(f"{name}=True", "would need what other stages hold", "use pp1")
        if values.get("labels") is not None and torch.is_grad_enabled():
            return self.train(values)
        with torch.no_grad():
            return self.infer(values)

    # --- one chunk --------------------------------------------------------------------------------

    def run_chunk(self, chunk: int, hidden: Tensor | None, values: dict[str, Any]) -> Any:
        """Run the model's own forward over the layers of one chunk; the last one with its head."""
        values, last = dict(values), chunk == self.split.chunks - 1
        if self.context is not None:
            whole = given_tokens(values)
            length = None if hidden is None or whole is None else whole.shape[1]
            self.context.passing = Passing(length, not last)
        if hidden is not None:
            values |= {"input_ids": None, "inputs_embeds": hidden}
        with self.only(chunk):
            if last:
                return self.original(**values)
            for name in ONLY_HEAD:
                values.pop(name, None)
            return self.model.base_model(**values)

    @contextmanager
    def only(self, chunk: int) -> Iterator[None]:
        """Let the model see no layers but a chunk's, while its own forward runs."""
        places = self._views.get(chunk)
        if places is None:
            places = self._views[chunk] = self._view(chunk)
        before = [(parent, name, parent._modules[name]) for parent, name, _ in places]
        try:
            for parent, name, module in places:
                parent._modules[name] = module
            yield
        finally:
            for parent, name, module in before:
                parent._modules[name] = module

    def _view(self, chunk: int) -> list[tuple[nn.Module, str, nn.Module]]:
        """What to put where while a chunk runs: nothing where a stage has one chunk, for its tree is right already."""
        if self.choice.chunks_per_stage == 1:
            return []
        start, stop = self.split.bounds[chunk : chunk + 2]
        path, _, name = self.split.layers.rpartition(".")
        parent = self.model.get_submodule(path)
        layers = [
            layer if start <= i < stop else Passage(layer)
            for i, layer in enumerate(parent._modules[name])
        ]
        places: list[tuple[nn.Module, str, nn.Module]] = [(parent, name, nn.ModuleList(layers))]
        for end in self.split.last if chunk < self.split.chunks - 1 else ():
            owner, _, own = end.rpartition(".")
            module = self.model.get_submodule(end)
            places.append((self.model.get_submodule(owner), own, Passage(module)))
        return places

    # --- inference --------------------------------------------------------------------------------

    def infer(self, values: dict[str, Any]) -> Any:
        """One pass of the whole batch; every stage gets the logits (and the loss, with labels)."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if self.choice.chunks_per_stage > 1:
            if values.get("past_key_values") is not None:
                raise PlanError(
                    f"a cache under pp schedule {self.choice.schedule}",
                    "would be filled by two chunks of one stage in turn",
                    "generate with schedule gpipe, 1f1b or zero-bubble",
                )
            values["use_cache"] = False
        tokens = given_tokens(values)
        if tokens is None:
            raise PlanError("forward", "was given no input_ids and no inputs_embeds", "give one")
        out: Any = None
        for chunk in self.split.chunks_of(self.stage):
            hidden = self.receive(chunk - 1, tokens) if chunk else None
            out = self.run_chunk(chunk, hidden, values)
            if chunk < self.split.chunks - 1:
                to = self.members[self.split.stage_of(chunk + 1)]
                dist.send(out.last_hidden_state.contiguous(), dst=to, group=self.group)
        last = self.stage == self.split.stage_of(self.split.chunks - 1)
        logits = self.from_last(out.logits if last else None, tokens.device)
        loss = None
        if values.get("labels") is not None:
            loss = self.from_last(out.loss if last else None, tokens.device)
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=getattr(out, "past_key_values", None),
        )

    def receive(self, chunk: int, tokens: Tensor) -> Tensor:
        """Receive the activations of a chunk."""
        batch, length = tokens.shape[:2]
        if self.context is not None:
            length = self.context.order(length).rows(self.context.rank)
        hidden = torch.empty((batch, length, self.width), dtype=self.dtype, device=tokens.device)
        dist.recv(hidden, src=self.members[self.split.stage_of(chunk)], group=self.group)
        return hidden

    def from_last(self, value: Tensor | None, device: torch.device) -> Tensor:
        """Give every stage what the last one has: the logits, or the loss."""
        source = self.members[self.split.stage_of(self.split.chunks - 1)]
        return share(value, source, self.group, device)

    @property
    def context(self) -> ContextState | None:
        """What cuts the sequence, where cp does: stages then hand on their own tokens only."""
        return getattr(self.model.config, "_plait_context", None)

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations travel in."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    # --- training ---------------------------------------------------------------------------------

    def train(self, values: dict[str, Any]) -> Any:
        """Run the schedule: forward and backward of every microbatch."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        count = self.choice.microbatches or self.choice.size
        values = {**values, "use_cache": False, "past_key_values": None}
        values["num_items_in_batch"] = item_count(values)
        self.batches = microbatches(values, count)
        parameters = list(self.model.parameters())
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with self.paused():
                losses = self._step(count, values["labels"])
            fresh = [p.grad for p in parameters]
        finally:
            self.batches = []
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
        self._sum_tied(parameters, fresh)
        last = self.stage == self.split.stage_of(self.split.chunks - 1)
        total = torch.stack([x.detach() for x in losses]).sum() if last else None
        total = self.from_last(total, values["labels"].device)
        return CausalLMOutputWithPast(loss=deposited(total, parameters, fresh))  # type: ignore[arg-type]

    def paused(self) -> AbstractContextManager[Any]:
        """Keep dp from averaging each microbatch: it averages when the caller's backward ends."""
        return self.pause()

    def _step(self, count: int, labels: Tensor) -> list[Tensor]:
        shape = (-(-labels.shape[0] // count), labels.shape[1], self.width)
        if self._schedule[0] != (shape, self.dtype):
            self._schedule = (shape, self.dtype), make_schedule(self, shape, count, labels.device)
        numbers = torch.arange(count, device=labels.device)
        losses: list[Tensor] = []
        first = (numbers,) if self.stage == 0 else ()
        self._schedule[1].step(
            *first, number=numbers, target=numbers, losses=losses, return_outputs=False
        )
        return losses

    def _sum_tied(self, parameters: list[nn.Parameter], fresh: list[Tensor | None]) -> None:
        """Add up the gradients of a parameter that two stages hold, so that both copies move alike.

        Collective: the two stages; one all-reduce of the parameter's bytes.
        """
        at = {id(p): i for i, p in enumerate(parameters)}
        for names in self.split.tied():
            stages = sorted({s for s in map(self.split.owner, names) if s is not None})
            if self.stage not in stages:
                continue
            mine = next(n for n in names if self.split.owner(n) == self.stage)
            p = self.model.get_parameter(mine)
            if not p.requires_grad:
                continue
            group = self.ranks.groups.of_ranks(tuple(self.members[s] for s in stages))
            grad = fresh[at[id(p)]]
            grad = torch.zeros_like(p) if grad is None else grad.contiguous()
            own: Any = grad  # dp's shard of it, where there are shards
            dist.all_reduce(own.to_local() if hasattr(own, "to_local") else own, group=group)
            fresh[at[id(p)]] = grad


class Chunk(nn.Module):
    """One chunk as torch's pipelining sees it: a module from activations to activations, or to the loss."""

    def __init__(self, run: PipelinedModel, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self._run = [run]  # in a list: the model is not a part of its part
        start, stop = run.split.bounds[chunk : chunk + 2]
        layers = run.model.get_submodule(run.split.layers)
        self.parts = nn.ModuleList(layers[i] for i in range(start, stop))
        ends = run.split.first if chunk == 0 else ()
        ends += run.split.last if chunk == run.split.chunks - 1 else ()
        self.parts.extend(run.model.get_submodule(end) for end in ends)

    def forward(self, *args: Tensor, number: Tensor) -> Tensor:
        run = self._run[0]
        values = run.batches[int(number)]
        hidden = args[0] if self.chunk else None
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda grad: grad.contiguous())  # what travels must be
        out = run.run_chunk(self.chunk, hidden, values)
        last = self.chunk == run.split.chunks - 1
        given = out.loss if last else out.last_hidden_state.contiguous()
        # Zero-bubble schedules detach what they have differentiated in place, which no view lets them do.
        return given.clone() if given._is_view() else given


def make_schedule(run: PipelinedModel, shape: tuple[int, ...], count: int, device: Any) -> Any:
    """Make torch's schedule for batches of one shape; it needs to be told shapes, and then sends no objects."""
    from torch.distributed import pipelining

    split, hidden = (
        run.split,
        torch.empty(shape, dtype=run.dtype, device="meta", requires_grad=True),
    )
    number = torch.empty(1, dtype=torch.int64, device="meta")
    loss = torch.empty((), dtype=run.dtype, device="meta", requires_grad=True)
    stages = [
        pipelining.PipelineStage(
            Chunk(run, chunk),
            chunk,
            split.chunks,
            device,
            input_args=(hidden if chunk else number,),
            output_args=(hidden if chunk < split.chunks - 1 else loss,),
            group=run.group,
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


def deposited(loss: Tensor, parameters: list[nn.Parameter], grads: list[Tensor | None]) -> Tensor:
    """Make the loss a tensor whose backward adds gradients that exist already, times its own."""
    anchor = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=True)
    held = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    return _Deposit.apply(anchor, loss, held)  # type: ignore[return-value]


class _Deposit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, held: list[Any]) -> Tensor:
        ctx.held = held
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        held, ctx.held = ctx.held, None
        if held is None:
            raise RuntimeError("this loss was differentiated before; its gradients are used up")
        for p, g in held:
            g = g * grad.to(g.dtype)
            p.grad = g if p.grad is None else p.grad.add_(g)
        return None, None, None
