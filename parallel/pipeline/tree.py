"""What modules return, as trees of tensors: told from one stage to the others without pickling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from ...collectives.primitive import Group
from ..errors import PlanError
from .passage import share
from .wire import Meta

PLAIN = (str, bool, type(None))


@dataclass(frozen=True)
class Layout:
    """A tree of which only shapes are known: a `Meta` for every tensor, and what else its leaves are."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any, said: str = "the forward") -> Layout:
        """Read it off a tree.

        Raises:
            PlanError: a leaf is neither tensor nor constant.
        """
        leaves, spec = tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise PlanError(
                    f"{said} returns a {type(leaf).__name__}",
                    "cannot be told to other stages",
                    "return tensors, in tuples, lists and dicts",
                )
        return cls(spec, tuple(Meta.of(x) if isinstance(x, Tensor) else x for x in leaves))

    def dumps(self) -> list[Any]:
        """Write it as JSON can."""
        told = [
            [str(x.dtype).removeprefix("torch."), x.shape] if isinstance(x, Meta) else x
            for x in self.leaves
        ]
        return [treespec_dumps(self.spec), told]

    @classmethod
    def loads(cls, told: list[Any]) -> Layout:
        """Read what `dumps` wrote."""
        leaves = (
            Meta(tuple(x[1]), getattr(torch, x[0])) if isinstance(x, list) else x for x in told[1]
        )
        return cls(treespec_loads(told[0]), tuple(leaves))

    def tensors(self) -> list[int]:
        """Numbers of the leaves that are tensors."""
        return [i for i, x in enumerate(self.leaves) if isinstance(x, Meta)]

    def filled(self, tensors: dict[int, Tensor], device: torch.device) -> Any:
        """Make the tree of the tensors that are known; the others are NaN, so that whoever uses them sees it."""

        def leaf(number: int, x: Any) -> Any:
            if not isinstance(x, Meta):
                return x
            if number in tensors:
                return tensors[number].clone()  # a model may write into what it was given
            nothing = float("nan") if x.dtype.is_floating_point else 0
            return torch.full(x.shape, nothing, dtype=x.dtype, device=device)

        return tree_unflatten([leaf(i, x) for i, x in enumerate(self.leaves)], self.spec)


def share_text(text: str | None, source: int, group: Group, device: torch.device) -> str:
    """Give every stage a text that one has.

    Collective: the ranks of the group; two broadcasts.
    """
    told = None if text is None else torch.tensor(list(text.encode()), dtype=torch.uint8)
    told = share(None if told is None else told.to(device), source, group, device)
    return bytes(told.tolist()).decode()


def share_tensors(
    tensors: dict[int, Tensor],
    layout: Layout,
    wanted: Iterable[int],
    source: int,
    group: Group,
    device: torch.device,
) -> dict[int, Tensor]:
    """Give every stage some tensors of a tree that one has, of a layout that all know.

    Collective: the ranks of the group; a broadcast of each.
    """
    found = {}
    for number in wanted:
        meta = layout.leaves[number]
        if dist.get_rank() == source:
            x = tensors[number].detach().contiguous()
        else:
            x = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        dist.broadcast(x.view(torch.uint8) if x.dtype == torch.bool else x, src=source, group=group)
        found[number] = x
    return found


def tensors_of(tree: Any) -> dict[int, Tensor]:
    """The tensors of a tree by their number among its leaves."""
    return {i: x for i, x in enumerate(tree_flatten(tree)[0]) if isinstance(x, Tensor)}


def sources(outputs: Iterable[Tensor], leaves: dict[int, Any]) -> set[Any]:
    """Find which leaves of autograd's graph outputs depend on; ``leaves`` maps their ids to what they are called."""
    found, seen = set(), set()
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        name = leaves.get(id(getattr(node, "variable", None)))
        if name is not None:
            found.add(name)
        nodes += [after for after, _ in node.next_functions if after is not None]
    return found
