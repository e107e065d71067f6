"""How a transformers decoder runs over stages: each lets the model's own forward see its layers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arguments import by_name, given_tokens
from ..context.state import ContextState, Passing
from ..errors import PlanError
from ..labels import ignored_label, item_count
from ..ranks import ModelRanks
from .microbatches import Microbatch, microbatches
from .passage import Crossing, Passage, place_of
from .routers import LOGITS, hooked, widths
from .run import PipelinedModel
from .split import Split
from .wire import Meta

ONLY_HEAD = ("labels", "logits_to_keep", "num_items_in_batch", "shift_labels")
DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")


class PipelinedDecoder(PipelinedModel):
    """A decoder with a head. With labels, and gradients wanted, it trains.

    Where the model wants a balancing loss, the router logits of a microbatch travel with its activations to the last
    stage, whose own code computes it: of that microbatch, and it weighs as much as the microbatch has rows.
    """

    def __init__(self, model: Any, split: Split, ranks: ModelRanks, dtype: torch.dtype) -> None:
        super().__init__(model, split, ranks, dtype)
        config = model.config.get_text_config(decoder=True)
        self.width = config.hidden_size
        said = [f"{n}={getattr(config, n)}" for n in DROPOUTS if getattr(config, n, 0)]
        self.dropout = ", ".join(said)
        self.layers = list(model.get_submodule(split.layers))  # before some of them leave
        self._widths: list[list[int]] | None = None
        self._logits: list[Tensor] = []
        self.crossing = Crossing()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model over all stages."""
        values, self.beside = by_name(self.signature, args, kwargs), None
        labelled = values.get("labels") is not None
        for name in ("output_hidden_states", "output_attentions"):
            if values.pop(name, None):
                raise PlanError(f"{name}=True", "would need what other stages hold", "use pp1")
        if values.get("output_router_logits") and not labelled:
            raise PlanError(
                "output_router_logits=True without labels",
                "would need what other stages hold",
                "give labels, and the balancing loss is in the loss; or use pp1",
            )
        values["output_router_logits"] = labelled and self.balances(values)
        if not self.knows_routers:
            values.pop("output_router_logits")
        if labelled and torch.is_grad_enabled():
            return self.learn(values)
        with torch.no_grad():
            return self.infer(values)

    # --- routers ----------------------------------------------------------------------------------

    @property
    def knows_routers(self) -> bool:
        """Whether the model has a balancing loss."""
        return "output_router_logits" in self.signature.parameters

    def balances(self, values: dict[str, Any]) -> bool:
        """Whether the loss of a call holds the balancing loss of its routers."""
        config = self.model.config.get_text_config(decoder=True)
        said = values.get("output_router_logits")
        wanted = getattr(config, "output_router_logits", False) if said is None else said
        return bool(wanted) and self.knows_routers

    def routers_until(self, chunk: int) -> list[int]:
        """Widths of the logits of all routers up to a chunk, in the order in which tokens meet them."""
        if self._widths is None:
            hooked(self.model)
            self._widths = [widths(self.model, layer) for layer in self.layers]
        return [w for layer in self._widths[: self.split.bounds[chunk + 1]] for w in layer]

    def put_before(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the router logits of other stages before those of this one; a hook of the base model."""
        if self._logits:
            output[LOGITS] = (*self._logits, *(output[LOGITS] or ()))

    # --- one chunk --------------------------------------------------------------------------------

    def links(self, piece: Microbatch) -> list[list[Meta]]:
        tokens = given_tokens(piece.values)
        assert tokens is not None
        whole = tokens.shape[1]
        order = None if self.context is None else self.context.order(whole)
        length = whole if order is None else order.rows(self.context.rank)  # type: ignore[union-attr]
        hidden = Meta((piece.rows, length, self.width), self.dtype)
        balanced = piece.values.get("output_router_logits")
        return [
            [hidden]
            + [
                Meta((piece.rows * whole, width), self.precise)
                for width in (self.routers_until(chunk) if balanced else ())
            ]
            for chunk in range(self.split.chunks - 1)
        ]

    def run_chunk(self, chunk: int, received: list[Tensor], piece: Microbatch) -> list[Tensor]:
        out = self.run_layers(chunk, received, piece.values)
        if chunk < self.split.chunks - 1:
            return self.leaving(out)
        aux = getattr(out, "aux_loss", None) if piece.values.get("output_router_logits") else None
        if aux is None:
            return [out.loss, out.loss.new_zeros(())]
        aux = aux.to(out.loss)
        scale = self.model.router_aux_loss_coef
        return [out.loss + (piece.share - 1) * scale * aux, piece.share * aux]

    def leaving(self, out: Any) -> list[Tensor]:
        """What leaves a chunk: activations, and the router logits so far."""
        hidden, self.crossing.left = self.crossing.left, None
        assert hidden is not None
        return [hidden, *(x.to(self.precise) for x in out.get(LOGITS) or ())]

    def run_layers(self, chunk: int, received: list[Tensor], values: dict[str, Any]) -> Any:
        """Run the model's own forward over the layers of one chunk; the last one with its head."""
        values, last = dict(values), chunk == self.split.chunks - 1
        hidden, self._logits = (received[0], received[1:]) if chunk else (None, [])
        if self.context is not None:
            whole = given_tokens(values)
            length = None if hidden is None or whole is None else whole.shape[1]
            self.context.passing = Passing(length, not last)
        self.crossing.arrived, self.crossing.left = hidden, None
        if hidden is not None:
            values |= {"input_ids": None, "inputs_embeds": self.crossing.embeddings()}
        with self.only(chunk):
            if last:
                return self.original(**values)
            for name in ONLY_HEAD:
                values.pop(name, None)
            return self.model.base_model(**values)

    def stand_ins(self, chunk: int) -> list[tuple[nn.Module, str, nn.Module]]:
        """The chunk's own layers; nothing where a stage has one chunk, for its tree is right already."""
        if self.choice.chunks_per_stage == 1:
            return []
        start, stop = self.split.bounds[chunk : chunk + 2]
        parent, name = place_of(self.model, self.split.layers)
        layers = [
            layer if start <= i < stop else Passage(layer, None, self.crossing, i < start)
            for i, layer in enumerate(getattr(parent, name))
        ]
        ends = self.split.last if chunk < self.split.chunks - 1 else ()
        return [
            (parent, name, nn.ModuleList(layers)),
            *((*place_of(self.model, p), Passage(self.model.get_submodule(p))) for p in ends),
        ]

    @property
    def context(self) -> ContextState | None:
        """What cuts the sequence, where cp does: stages then hand on their own tokens only."""
        return getattr(self.model.config, "_plait_context", None)

    # --- training and inference -------------------------------------------------------------------

    def learn(self, values: dict[str, Any]) -> Any:
        """Train on a batch."""
        from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

        values = {**values, "use_cache": False, "past_key_values": None}
        values["num_items_in_batch"] = item_count(values)
        labels, count = values["labels"], self.choice.microbatches or self.choice.size
        pieces = microbatches(values, len(labels), count, ignored=ignored_label(values))
        loss, aux = self.train(pieces, labels.device)
        if values.get("output_router_logits"):
            return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux)  # type: ignore[arg-type]
        return CausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]

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
        piece, device = Microbatch(values, tokens.shape[0], 1.0), tokens.device
        links, out = self.links(piece), None
        for chunk in self.split.chunks_of(self.stage):
            arrived = self.receive(chunk, links[chunk - 1], device) if chunk else []
            out = self.run_layers(chunk, arrived, values)
            if chunk < self.split.chunks - 1:
                to = self.members[self.split.stage_of(chunk + 1)]
                for x in self.leaving(out):
                    dist.send(x.contiguous(), dst=to, group=self.group)
        last = self.stage == self.last
        logits = self.from_last(out.logits if last else None, device)  # type: ignore[union-attr]
        loss = None
        if values.get("labels") is not None:
            loss = self.from_last(out.loss if last else None, device)  # type: ignore[union-attr]
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=getattr(out, "past_key_values", None),
        )

    def receive(self, chunk: int, metas: Sequence[Meta], device: torch.device) -> list[Tensor]:
        """Receive what arrives at a chunk."""
        source = self.members[self.split.stage_of(chunk - 1)]
        tensors = [torch.empty(meta.shape, dtype=meta.dtype, device=device) for meta in metas]
        for x in tensors:
            dist.recv(x, src=source, group=self.group)
        return tensors
