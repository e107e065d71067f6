"""The masks that transformers models ask for, about tokens that are spread over ranks."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    padding_mask_function,
)

from ..errors import PlanError
from ..families import forward_code
from .attention import Spread, SpreadMask
from .visible import Sees


def context_mask(
    *,
    batch_size: int,
    mask_function: Any = causal_mask_function,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> SpreadMask:
    """Keep the mask as a function; registered with transformers as the mask of ``plait_context``.

    What the whole batch adds to it is added here: padding, and documents where causal masks have them.
    """
    if use_vmap:
        raise PlanError(
            "a model that overlays its own function on the mask",
            "is not known to be right for tokens in another order",
            "use cp=1",
        )
    spread: Spread = config._plait_context.running()
    # transformers finds documents in causal masks only
    if "allow_is_bidirectional_skip" not in kwargs:
        mask_function = in_documents(mask_function, spread.whole_positions)
    if spread.padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(spread.padding))
    return SpreadMask(spread, spread.visible(by_index(mask_function, batch_size)))


def in_documents(mask_function: Any, positions: Tensor | None) -> Any:
    """Let tokens see their own document only, if the position ids of the whole batch begin anew somewhere."""
    if positions is None or positions.device.type == "meta":
        return mask_function
    documents = find_packed_sequence_indices(positions)
    if documents is None:
        return mask_function
    return packed_sequence_compatibility_function(mask_function, positions, documents)


def knows_documents(base: nn.Module) -> bool:
    """Say whether a model hands position ids to the functions that make its masks; some (gpt-oss) do not.

    In one process such a model sees across documents, and so it does under cp.

    Raises:
        PlanError: its forward cannot be read.
    """
    code = forward_code(type(base))
    if code is None:
        raise PlanError(
            f"cp of {type(base).__name__}",
            "needs the text of its forward, to see whether its masks know documents; it cannot be read here",
            "define the class in a file, or use cp=1",
        )
    for node in ast.walk(code):
        names: list[Any] = []
        if isinstance(node, ast.Dict):
            names = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Call) and "mask" in ast.unparse(node.func):
            names = [keyword.arg for keyword in node.keywords]
        if "position_ids" in names:
            return True
    return False


def by_index(mask_function: Any, batch: int) -> Sees:
    """Turn a mask function of four indices into one of the places of rows and keys."""

    def sees(rows: Tensor, keys: Tensor) -> Tensor:
        each = torch.arange(batch, device=rows.device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=rows.device)
        seen = mask_function(each, head, rows[None, None, :, None], keys[None, None, None, :])
        return seen.expand(seen.shape[0], 1, len(rows), len(keys))

    return sees


__all__ = ["by_index", "context_mask", "in_documents", "knows_documents"]
