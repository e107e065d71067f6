"""One sum for a block's routed and shared experts, where both are cut over the same ranks.

Each kind ends in partial results that are to be summed over the model's ranks, and the block adds the two. A sum of
sums is one sum: both wait, and what the block returns is summed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...collectives import autograd
from ...collectives.primitive import Group
from ..edits import Edit, SetAttribute, SwapClass
from ..ranks import ModelRanks
from ..tensor import Link, RowLinear
from .layer import ExpertLayer

PROBE_TOKENS = 3


@dataclass
class JointSum:
    """What the parts of one block share; ``waits`` says whether they leave their results unsummed."""

    group: Group
    waits: bool = field(default=False, compare=False)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the parts' sums wait."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def leave(self, x: Tensor) -> Tensor:
        """Sum a partial result, unless its sum is to wait."""
        return x if self.waits else autograd.leave(x, self.group)


@dataclass(frozen=True)
class JointLink(Link):
    """The link of a shared expert's last layer, whose sum can wait for the block's."""

    joint: JointSum | None = None

    def leave(self, x: Tensor) -> Tensor:
        assert self.joint is not None
        return self.joint.leave(x)


class JointBlock(nn.Module):
    """A block of routed and shared experts that sums what it returns.

    Shape: [batch, seq, hidden] -> [batch, seq, hidden]
    Collective: the ranks of the model copy; one all-reduce of the output, instead of one for each kind of experts.
    """

    _plait_joint: JointSum

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        joint = self._plait_joint
        with joint.waiting():
            out = super().forward(hidden_states, *args, **kwargs)
        return joint.leave(out)


def joint_edits(model: nn.Module, ranks: ModelRanks, roles: list[Edit]) -> list[Edit]:
    """Let the blocks that are known to add their experts' results sum once."""
    if ranks.all is None or ranks.span is not None:
        return []
    values = {(id(e.owner), e.name): e.value for e in roles if isinstance(e, SetAttribute)}
    swapped = {id(e.module): e.mixin for e in roles if isinstance(e, SwapClass)}
    seen: dict[tuple[type, ...], bool] = {}
    edits: list[Edit] = []
    for block in model.modules():
        routed = [m for m in block.children() if swapped.get(id(m)) is ExpertLayer]
        rows: list[Any] = [m for m in block.modules() if swapped.get(id(m)) is RowLinear]
        if len(routed) != 1 or len(rows) != 1 or rows[0].bias is not None:
            continue
        here = values[id(routed[0]), "_plait_experts"]
        link = values[id(rows[0]), "_plait"]
        if not here.sums or link.group is not ranks.all:
            continue
        kinds = (type(block), *(type(m) for m in block.children()))
        if kinds not in seen:
            seen[kinds] = adds(block, routed[0], rows[0])
        if not seen[kinds]:
            continue
        joint = JointSum(ranks.all)
        waiting = JointLink(link.group, link.span, link.enters, joint)
        edits += [
            SetAttribute(routed[0], "_plait_experts", replace(here, joint=joint)),
            SetAttribute(rows[0], "_plait", waiting),
            SetAttribute(block, "_plait_joint", joint),
            SwapClass(block, JointBlock),
        ]
    return edits


class Given(nn.Module):
    """Stands in for a part of a block: returns what it is told to, in the shape of its input."""

    out: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.out.view(*x.shape[:-1], self.out.shape[-1])


@torch.no_grad()
def adds(block: Any, routed: nn.Module, row: nn.Linear) -> bool:
    """Find out by trying whether a block returns the sum of its experts' results, and nothing else.

    Where it multiplies one of them (Qwen2's gate), the factor would need a gradient from all ranks.
    """
    stand_ins: dict[int, Any] = {id(routed): Given(), id(row): Given()}
    g = torch.Generator().manual_seed(0)
    width = row.out_features
    x = torch.randn(1, PROBE_TOKENS, width, generator=g)
    results = torch.randn(2, PROBE_TOKENS, width, generator=g)
    for part, out in zip(stand_ins.values(), results, strict=True):
        part.out = out
    try:
        twin = copy.deepcopy(block, dict(stand_ins)).to_empty(device="cpu").float().eval()
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * tensor.numel() ** -0.5)
        found = twin(x).view(PROBE_TOKENS, width)
    except Exception:  # a block that does not take one activation is none that we know
        return False
    return torch.allclose(found, results.sum(0), atol=1e-5)
