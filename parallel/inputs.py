"""What a forward may be given: checked at the model's door, where every rank sees the same and refuses the same.

In one process torch would raise where the value is used. Cut over ranks that is on one of them, and the others wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import given_tokens
from .errors import PlanError
from .labels import ignored_label


def refuse_inputs(values: dict[str, Any], vocabulary: int, stages: int) -> None:
    """Refuse what no process could read, and what stages cannot cut into microbatches.

    Args:
        values: the arguments of the forward, by name.
        vocabulary: rows of the embedding.
        stages: of the pipeline.

    Raises:
        PlanError: the same on every rank that was given the same.
    """
    ids, embeds, labels = (values.get(n) for n in ("input_ids", "inputs_embeds", "labels"))
    if (ids is None) == (embeds is None):
        both = "were given both" if ids is not None else "are missing"
        raise PlanError("input_ids and inputs_embeds", both, "give exactly one of them")
    if ids is not None:
        refuse_shape("input_ids", ids, 2, (torch.int64, torch.int32))
        refuse_numbers("input_ids", ids, vocabulary)
    if embeds is not None:
        refuse_shape("inputs_embeds", embeds, 3)
    tokens = given_tokens(values)
    assert tokens is not None
    if tokens.numel() == 0:
        raise PlanError(
            f"an input of {list(tokens.shape)}", "has no tokens", "give at least one token"
        )
    if isinstance(labels, Tensor):
        if labels.numel() != tokens.shape[0] * tokens.shape[1]:
            raise PlanError(
                f"labels of shape {list(labels.shape)}",
                f"are not one for each of {list(tokens.shape[:2])} tokens",
                f"give {list(tokens.shape[:2])}; the loss shifts them",
            )
        refuse_shape("labels", labels, labels.dim(), (torch.int64,))
        refuse_numbers("labels", labels[labels != ignored_label(values)], vocabulary)
    refuse_rows(values, tokens)
    if stages > 1:
        refuse_uncut(values, tokens, stages)


def refuse_uncut(values: dict[str, Any], tokens: Tensor, stages: int) -> None:
    """Refuse what does not survive the way through stages."""
    labels, pp = values.get("labels"), f"under pp={stages}"
    if isinstance(labels, Tensor) and labels.shape != tokens.shape[:2]:
        raise PlanError(
            f"labels of shape {list(labels.shape)} {pp}",
            "have not the rows of the batch, which becomes microbatches",
            f"give {list(tokens.shape[:2])}",
        )
    if tokens.requires_grad and torch.is_grad_enabled():
        raise PlanError(
            f"inputs_embeds that want a gradient, {pp},",
            "would be given it while the forward runs its schedule, whatever the loss is then multiplied with",
            "detach them, or use pp1",
        )
    if values.get("return_dict") is False:
        raise PlanError(
            f"return_dict=False {pp}",
            "is not what stages hand on",
            "leave it out, and call .to_tuple()",
        )


def refuse_rows(values: dict[str, Any], tokens: Tensor) -> None:
    """Refuse masks of other rows than the batch's."""
    mask = values.get("attention_mask")
    rows = tokens.shape[0]
    if isinstance(mask, Tensor) and mask.shape[0] not in ({rows, 1} if mask.dim() == 4 else {rows}):
        raise PlanError(
            f"an attention_mask of shape {list(mask.shape)}",
            f"is not of a batch of {rows}",
            f"give [{rows}, {tokens.shape[1]}]",
        )


def refuse_shape(name: str, value: Tensor, dims: int, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Refuse tensors of other dims or dtypes."""
    if value.dim() != dims:
        wanted = "[batch, seq]" if dims == 2 else "[batch, seq, hidden]"
        raise PlanError(
            f"{name} of shape {list(value.shape)}", f"has {value.dim()} dims", f"give {wanted}"
        )
    if dtypes and value.dtype not in dtypes:
        raise PlanError(f"{name} of {value.dtype}", "are no whole numbers", f"give {dtypes[0]}")


def refuse_numbers(name: str, value: Tensor, vocabulary: int) -> None:
    """Refuse numbers that no token has. On the host: what the ranks compare of their inputs was read already."""
    wrong = value[(value < 0) | (value >= vocabulary)]
    if wrong.numel():
        raise PlanError(
            f"{name} of {int(wrong[0])}", f"are outside the vocabulary of {vocabulary}",
            f"give 0 to {vocabulary - 1}" + (", or the ignored label" * (name == "labels")),
        )  # fmt: skip
