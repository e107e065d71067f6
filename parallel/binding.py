"""What a plan changes in a transformers model as a whole: inputs compared, random state shared, saving."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..collectives.primitive import message_device
from .agreement import agree, announce, tensor_digest
from .arguments import named_arguments
from .edits import AddHook, Edit, SetAttribute
from .errors import PlanError
from .inputs import refuse_inputs
from .pipeline import of_all_stages
from .ranks import ModelRanks

INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")


def agreement_edits(model: Any, ranks: ModelRanks) -> list[Edit]:
    """Compare the ranks' inputs at every new prompt, and their random state at every ``generate``."""
    own: list[Edit] = [
        SetAttribute(model, "save_pretrained", types.MethodType(saving(model, ranks), model)),
        SetAttribute(model, "__deepcopy__", refuse_copy(ranks)),
        SetAttribute(model, "resize_token_embeddings", refuse_resizing(ranks)),
    ]
    if ranks.plan.pp.size > 1:
        own.append(AddHook(lambda: model.register_forward_hook(refuse_backward)))
    if ranks.inputs is None:
        return own
    device, vocabulary = (
        next(model.parameters()).device,
        model.get_input_embeddings().num_embeddings,
    )

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return
        if device.type == "meta":  # a run for its collectives: there are no values to compare
            announce(ranks.inputs)
            return
        named = (kwargs.get(n) for n in INPUTS)
        tensors = [*args, *named]
        digest = tensor_digest(*(t for t in tensors if isinstance(t, Tensor)))
        mode = "computed" if torch.is_grad_enabled() else "not computed"
        agree(ranks.inputs, {"input": digest, "gradients": mode}, None)
        refuse_inputs(named_arguments(module, args, kwargs), vocabulary, ranks.plan.pp.size)

    original = model.generate if hasattr(model, "generate") else None

    def generate(_: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with every rank drawing rank 0's random numbers."""
        share_random_state(ranks)
        assert original is not None
        return original(*args, **kwargs)

    edits: list[Edit] = [
        AddHook(lambda: model.register_forward_pre_hook(compare, with_kwargs=True))
    ]
    if original is not None:
        edits.append(SetAttribute(model, "generate", types.MethodType(generate, model)))
    return [*edits, *own]


def refuse_resizing(ranks: ModelRanks) -> Callable[..., Any]:
    """Make a ``resize_token_embeddings`` that says when to."""

    def refuse(*_: Any, **__: Any) -> Any:
        """Refuse: every rank would draw rows of its own for its own part."""
        raise PlanError(
            f"resize_token_embeddings under {ranks.plan}",
            "finds a vocabulary that is cut, or parameters that an optimizer knows already",
            "resize the model before parallelize",
        )

    return refuse


def refuse_backward(_: nn.Module, args: Any, output: Any) -> None:
    """Let the backward of logits from stages say that there is none, rather than leave it out of a sum of losses."""
    logits = getattr(output, "logits", None)
    if torch.is_grad_enabled() and isinstance(logits, Tensor) and not logits.requires_grad:
        output["logits"] = _NoWayBack.apply(logits.new_zeros((), requires_grad=True), logits)


class _NoWayBack(torch.autograd.Function):
    """Shape: any -> the same"""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise PlanError(
            "a backward from the logits of a model under pp",
            "has no way back through the stages: they run forward and backward in one schedule",
            "give labels to the forward and use the loss it returns, or call it under torch.no_grad()",
        )


def refuse_copy(ranks: ModelRanks) -> Callable[[Any], Any]:
    """Make a ``__deepcopy__`` that says what can be copied."""

    def refuse(_: Any) -> Any:
        """Refuse: what runs between the ranks is open once."""
        raise PlanError(
            f"a copy of a model under {ranks.plan}",
            "would share its process groups, hooks and caches with the model",
            "copy the model before parallelize and parallelize both; for the weights, copy its state_dict()",
        )

    return refuse


def saving(model: Any, ranks: ModelRanks) -> Callable[..., None]:
    """Make a ``save_pretrained`` for a cut model: what it writes is a plain checkpoint of the whole model."""
    original, config = model.save_pretrained, model.config

    def save_pretrained(self: Any, directory: Any, **options: Any) -> None:
        """Write the whole model as transformers does.

        Collective: all ranks. Those of the first model copy make an all-gather per cut parameter, under pp also a
        broadcast from its stage, and the first rank writes. Replicas further along dp and cp hold the same and only
        wait; shards, and experts spread over them, take part. Last one all-gather of 4 KiB.
        """
        at = ranks.groups.folding.coords(ranks.groups.rank)
        replica = bool(at["dp"] or (ranks.cp > 1 and at["cp"]))
        writes = ranks.index == 0 and not replica
        whole = {} if replica and not ranks.spread else whole_state(self, keep=writes)
        split = self._plait.split
        if writes and split is not None:
            whole = of_all_stages(whole, split, ranks)
            writes = at["pp"] == 0
        failure: Exception | None = None
        private, self.config = self.config, config
        try:
            if writes:
                original(directory, state_dict=whole, **options)
        except Exception as error:
            failure = error
        finally:
            self.config = private
        # nobody goes on before the files are there, or knows why they are not
        agree(ranks.groups.group("tp", "cp", "dp", "pp"), {}, failure)

    return save_pretrained


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Put the state dict of this rank's stage together; empty on ranks that do not keep it.

    Collective: the holders of each cut parameter; one all-gather each.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full
    return whole


def share_random_state(ranks: ModelRanks) -> None:
    """Give every rank the random state of the first, so that sampling draws the same tokens.

    Collective: all ranks of the model copy, on all stages; one broadcast of the generator's state (5 KB).
    """
    if ranks.inputs is None:
        return
    first = min(torch.distributed.get_process_group_ranks(ranks.inputs))
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_available():
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for read, write in generators:
        state = read().to(message_device(ranks.inputs))
        torch.distributed.broadcast(state, src=first, group=ranks.inputs)
        write(state.cpu())
