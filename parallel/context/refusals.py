"""What context parallelism cannot run, said before anything is sent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention.mla import Mla
from ..attention.role import Attention
from ..errors import PlanError
from ..families import decoder_layers, roles_of
from ..plan import Plan
from ..shape import ModelShape

MOVING_ROPE = ("dynamic", "longrope")


def refuse_model(model: Any, shape: ModelShape, plan: Plan) -> None:
    """Refuse a model that computes something along the sequence which is not attention as we know it."""
    name = f"cp={plan.cp.size} on {type(model).__name__}"
    if model.config.get_text_config(decoder=True) is not model.config:
        raise PlanError(name, "has parts beside its decoder", "use cp=1, or the decoder alone")
    if model.get_submodule(decoder_layers(model)[0].rpartition(".")[0]) is not model.base_model:
        raise PlanError(name, "runs its decoder past its base model", "use cp=1")
    if not getattr(model, "_supports_attention_backend", False):
        raise PlanError(
            name, "does not reach its attention through transformers' registry", "use cp=1"
        )
    if model.base_model is not model and model.get_output_embeddings() is None:
        raise PlanError(
            name,
            "has a head that is not a language model's",
            "use the base model or the CausalLM class, or cp=1",
        )
    roles = roles_of(model, shape, plan).values()
    if sum(isinstance(role, (Attention, Mla)) for role in roles) != shape.layers:
        raise PlanError(name, "has decoder layers whose attention we do not recognise", "use cp=1")
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in MOVING_ROPE:
                raise PlanError(
                    f"{name} with rope_type={kind!r}",
                    "turns by the longest position of the batch, which no single rank holds",
                    "use cp=1, or another rope_type",
                )


def refuse_call(values: dict[str, Any], tokens: Tensor, plan: Plan) -> None:
    """Refuse inputs of a forward that cannot be cut along the sequence."""
    batch, length = tokens.shape[:2]
    if values.get("past_key_values") is not None or values.get("use_cache"):
        raise PlanError(
            f"a KV cache under cp={plan.cp.size}", "is not kept by Ring or Ulysses", decode(plan)
        )
    if length == 0:
        raise PlanError("an input of no tokens", "has nothing to cut", "give at least one token")
    mask = values.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, length)):
        what = type(mask).__name__ if not isinstance(mask, Tensor) else f"shape {list(mask.shape)}"
        raise PlanError(
            f"an attention_mask of {what}",
            "cannot be cut over cp without holding seq x seq on every rank",
            f"give a padding mask [{batch}, {length}], or position_ids that begin anew with each document",
        )
    positions = values.get("position_ids")
    if positions is not None and positions.shape not in {(1, length), (batch, length)}:
        raise PlanError(
            f"position_ids of shape {list(positions.shape)}",
            "are not one number a token",
            f"give [{batch}, {length}]",
        )
    known = {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "labels",
        "shift_labels",
    }
    for name, value in values.items():
        if name not in known and isinstance(value, Tensor) and value.shape[:2] == (batch, length):
            raise PlanError(
                f"{name} of shape {list(value.shape)} under cp={plan.cp.size}",
                "seems to belong to tokens, and is not known to be cut with them",
                "leave it out, or use cp=1",
            )


def refuse_labels(model: Any, values: dict[str, Any]) -> None:
    """Refuse labels for a loss whose sum over tokens we do not know."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model.loss_function, "__wrapped__", None) is not ForCausalLMLoss:
        raise PlanError(
            "labels with a loss_function of your own",
            "are cut over cp, and only transformers' causal language model loss is known to sum over the parts",
            "compute the loss from the logits, which are whole when no labels are given",
        )
    labels = values["labels"]
    tokens = values.get("input_ids")
    tokens = values.get("inputs_embeds") if tokens is None else tokens
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise PlanError(
            f"labels of shape {list(labels.shape)}",
            "do not fit the tokens",
            f"give {list(tokens.shape[:2])}",
        )
    if not isinstance(values.get("logits_to_keep", 0), int) or values.get("logits_to_keep", 0):
        raise PlanError("logits_to_keep with labels", "leaves labels without logits", "drop one")


def refuse_generation(plan: Plan) -> Any:
    """Make a ``generate`` that says what does generate."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        """Refuse: Ring and Ulysses keep no cache."""
        raise PlanError(
            f"generate under cp={plan.cp.size}", "has no cache to decode from", decode(plan)
        )

    return generate


def decode(plan: Plan) -> str:
    """Say which plan decodes on these ranks."""
    return (
        f"use kvp={plan.cp.size}: the same ranks, as Helix, keep the cache cut along the sequence"
    )


__all__ = ["decode", "refuse_call", "refuse_generation", "refuse_labels", "refuse_model"]
