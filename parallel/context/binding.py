"""How a transformers decoder runs under context parallelism: inputs cut, masks and attention ours, outputs whole.

Every rank of cp is given the same whole batch. Inside the model it holds its own tokens only. With labels each rank
computes its own tokens' part of the loss, and the parts are summed: the loss is whole on every rank, and the
gradients of the ranks sum to the whole ones.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...collectives import autograd
from ..arguments import given_tokens, named_arguments
from ..edits import AddHook, Edit, SetAttribute
from ..labels import ignored_label, item_count, shifted_labels
from ..ranks import ModelRanks
from ..shape import ModelShape
from .attention import CONTEXT, Spread, context_attention
from .masks import context_mask, knows_documents
from .refusals import refuse_call, refuse_generation, refuse_labels, refuse_model
from .state import ContextState


class ContextBinding:
    """Makes a transformers decoder run context parallel.

    State: while a model with a head runs, what is gathered: ``states`` (of the base model, as when that is called
    alone), ``logits``, or nothing (``cut``); and which logits are wanted.
    """

    def __init__(self, model: Any, shape: ModelShape, ranks: ModelRanks) -> None:
        refuse_model(model, shape, ranks.plan)
        self.model, self.base = model, model.base_model
        self.state = ContextState.of(ranks)
        self.headed = self.base is not model
        self.documents = knows_documents(self.base)
        self.gathers = "states"
        self.keep: Any = 0

    def edits(self) -> list[Edit]:
        """Prepare all of it."""
        AttentionInterface.register(CONTEXT, context_attention)
        AttentionMaskInterface.register(CONTEXT, context_mask)
        base, model = self.base, self.model
        edits = [
            *self._config_edits(),
            AddHook(lambda: base.register_forward_pre_hook(self.cut, with_kwargs=True)),
            AddHook(lambda: base.register_forward_hook(self.whole_states)),
        ]
        if self.headed:
            edits += [
                AddHook(lambda: model.register_forward_pre_hook(self.cut_labels, with_kwargs=True)),
                AddHook(lambda: model.register_forward_hook(self.whole_logits, always_call=True)),
                SetAttribute(model, "_loss_function", self._whole_loss(model.loss_function)),
            ]
        if hasattr(model, "generate"):
            edits.append(SetAttribute(model, "generate", refuse_generation(self.state.ranks.plan)))
        return edits

    def cut(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Cut the inputs of the base model along the sequence."""
        values = named_arguments(module, args, kwargs)
        tokens = given_tokens(values)
        if tokens is None:
            return args, kwargs  # transformers raises its own error
        passing = self.state.passing
        arrived = None if passing is None else passing.length
        if arrived is None:
            refuse_call(values, tokens, self.state.ranks.plan)
        batch, length = tokens.shape[0], tokens.shape[1] if arrived is None else arrived
        order, rank = self.state.order(length), self.state.rank
        mask, positions = values.get("attention_mask"), values.get("position_ids")
        if positions is None:
            documents, positions = None, torch.arange(length, device=tokens.device)[None]
        else:
            known = mask is None and self.documents
            documents = positions.expand(batch, -1) if known else None
        self.state.spread = Spread(
            order, rank, self.state.ring, self.state.ulysses,
            tokens.device,
            documents, None if mask is None else mask.bool(),
        )  # fmt: skip
        if values.get("input_ids") is not None:
            values["input_ids"] = order.take(tokens, rank)
        elif arrived is None:
            values["inputs_embeds"] = self.state.enter(tokens)
        values["position_ids"] = order.take(positions, rank)
        # A mask of the whole length tells transformers that positions are no documents: that is seen to here.
        whole = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        values["attention_mask"] = whole if mask is None else mask
        values["use_cache"] = False
        return (), values

    def whole_states(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gather the base model's outputs, except hidden states that a head goes on with or that stay cut."""
        if self.state.spread is None:
            return output
        if getattr(output, "router_logits", None) is not None:
            output["router_logits"] = tuple(self._router(r) for r in output.router_logits)
        leaves = self.state.passing is not None and self.state.passing.leaves
        if self.gathers != "cut" and getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = tuple(self.state.gather(h) for h in output.hidden_states)
        if self.gathers == "states" and not leaves:
            output["last_hidden_state"] = self.state.gather(output.last_hidden_state)
        return output

    def cut_labels(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Shift labels over the whole sequence, then cut them; count the items of the whole batch."""
        values = named_arguments(module, args, kwargs)
        labels, state = values.get("labels"), self.state
        tokens = given_tokens(values)
        # inside, one stage would refuse alone
        if tokens is not None and state.ranks.plan.pp.size > 1:
            refuse_call(values, tokens, state.ranks.plan)
        self.gathers = "logits" if labels is None else "cut"
        if labels is None:
            self.keep = values.get("logits_to_keep", 0)
            if torch.is_grad_enabled() or (isinstance(self.keep, int) and not self.keep):
                values.pop("logits_to_keep", None)
            else:
                self.gathers = "states"  # the head then computes only what is wanted
            return (), values
        refuse_labels(module, values)
        shifted = shifted_labels(values)
        values["num_items_in_batch"] = item_count(values)
        order = state.order(shifted.shape[1])
        own = order.take(shifted, state.rank)
        if not order.counts[state.rank]:
            own = torch.full_like(own, ignored_label(values))
        values["labels"] = values["shift_labels"] = own.contiguous()
        return (), values

    def whole_logits(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gather the logits, unless labels were given."""
        gathers, self.gathers = self.gathers, "states"
        if gathers != "logits" or output is None:  # None: the forward raised
            return output
        logits = self.state.gather(output.logits)
        if isinstance(self.keep, int):
            output["logits"] = logits[:, -self.keep :] if self.keep else logits
        else:
            output["logits"] = logits[:, self.keep]
        return output

    def _whole_loss(self, original: Any) -> Any:
        """Sum the ranks' parts of the loss."""

        @functools.wraps(original)
        def loss(*args: Any, **kwargs: Any) -> Tensor:
            return autograd.leave(original(*args, **kwargs), self.state.group)

        return loss

    def _router(self, logits: Tensor) -> Tensor:
        """Gather router logits, for balancing losses of the whole batch.

        Shape: [batch * seq/cp, experts] -> [batch * seq, experts]
        """
        rows = self.state.running().order.rows(self.state.rank)
        return self.state.gather(logits.view(-1, rows, logits.shape[-1])).flatten(0, 1)

    def _config_edits(self) -> list[Edit]:
        """Give the model a private config that names our attention and knows the state of its forwards."""
        config = self.model.config
        private = copy.deepcopy(config)
        private._attn_implementation = CONTEXT
        # on the class, so that whoever writes the config down does not meet it
        private.__class__ = type(
            type(config).__name__,
            (type(config),),
            {"_plait_context": self.state, "__module__": type(config).__module__},
        )
        return [
            SetAttribute(module, "config", private)
            for module in self.model.modules()
            if vars(module).get("config") is config
        ]


__all__ = ["ContextBinding"]
