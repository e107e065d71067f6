"""What stands where another stage's modules were, and the edits that put it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...collectives.primitive import Group
from ..checkpoint.weights import rank_device
from ..errors import PlanError
from ..ranks import ModelRanks
from .split import Split


@dataclass
class Crossing:
    """What comes to the layers of a chunk, and what goes from them.

    The model's own forward may do more than run its layers: multiply the embeddings it is given, normalise at the end
    without a parameter. So what crosses stages is what the layers themselves are given and give.

    State: ``arrived``, from the chunk before; ``left``, by the chunk's last layer; both of the chunk that runs.
    """

    arrived: Tensor | None = None
    left: Tensor | None = None
    known: bool = False

    def embeddings(self) -> Tensor | None:
        """What a later stage's forward is given in place of embeddings, which it has not: nothing may come of it."""
        if self.arrived is None:
            return None
        return self.arrived.new_full((), torch.nan).expand(self.arrived.shape)

    def comes(self, given: Any) -> Tensor:
        """Give the first own layer its input.

        Raises:
            PlanError: layers are given something else that is made of the embeddings.
        """
        assert self.arrived is not None
        for x in tree_leaves(given) if not self.known else ():
            if isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()):
                raise PlanError(
                    "pp of a model that gives its embeddings to every layer",
                    "would need them on all stages, and the first has them",
                    "use pp1",
                )
        self.known = True
        return self.arrived

    def goes(self, hidden: Tensor) -> None:
        """Keep what the last own layer gave."""
        self.left = hidden if self.left is None else self.left


class Passage(nn.Module):
    """Stands in the place of a module that another stage runs, and hands activations on unchanged.

    In the place of a layer it also keeps the cache's count of tokens, one element of key and value each: positions and
    masks of this stage's layers are read off the cache's first layers, which may be elsewhere.

    Args:
        crossing: of a layer: where what arrives is found (``before`` the own layers), or what leaves is put.

    Shape: [batch, seq, hidden] -> the same
    """

    def __init__(
        self,
        module: nn.Module,
        number: int | None = None,
        crossing: Crossing | None = None,
        before: bool = False,
    ) -> None:
        super().__init__()
        self.number, self.crossing, self.before = number, crossing, before
        for name, value in vars(module).items():  # models ask a layer for its kind of attention
            if isinstance(value, str):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.crossing is not None and self.before:
            hidden_states = self.crossing.comes((args, kwargs))
        elif self.crossing is not None:
            self.crossing.goes(hidden_states)
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and self.number is not None:
            count = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(count, count, self.number)
        return hidden_states


def place_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The parent of a module or parameter, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


@dataclass
class Depart:
    """Take a module that another stage runs out of the model; its memory is free once the edits are committed."""

    parent: nn.Module
    name: str
    stand_in: Callable[[nn.Module], nn.Module]
    module: nn.Module | None = None
    _kept: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def apply(self) -> None:
        self.module = module = self.parent._modules[self.name]
        assert module is not None
        self.parent._modules[self.name] = self.stand_in(module)
        for child in module.modules():
            for name, p in child._parameters.items():
                if p is not None:
                    self._kept.append((child, name, p))
                    child._parameters[name] = nn.Parameter(p.detach().to("meta"), p.requires_grad)

    def commit(self) -> None:
        """Let go of the parameters; `fetch` brings them back."""
        self._kept.clear()

    def undo(self) -> None:
        for child, name, p in self._kept:
            child._parameters[name] = p
        self.parent._modules[self.name] = self.module


def fetch(model: nn.Module, split: Split, ranks: ModelRanks) -> None:
    """Fill every parameter of a model whose modules are all back, from the stage that holds it.

    Collective: all stages; one broadcast per parameter.
    """
    group, members = ranks.groups.group("pp"), ranks.groups.ranks("pp")
    for names in split.names:
        places = [place_of(model, name) for name in names]
        held = [module._parameters[name] for module, name in places]
        mine = next((p for p in held if p is not None and p.device.type != "meta"), None)
        if mine is None:
            like = held[0]
            assert like is not None
            empty = torch.empty_like(like, device=rank_device(like.device))
            mine = nn.Parameter(empty, requires_grad=like.requires_grad)
        owner = split.stages_of(names)[0]
        dist.broadcast(mine.data, src=members[owner], group=group)
        for module, name in places:
            module._parameters[name] = mine


def of_all_stages(state: dict[str, Tensor], split: Split, ranks: ModelRanks) -> dict[str, Tensor]:
    """Put the state dicts of all stages together; the first stage's rank has all of it.

    Collective: the ranks along pp; one broadcast per parameter.
    """
    group, members = ranks.groups.group("pp"), ranks.groups.ranks("pp")
    device = next(iter(state.values())).device
    stage = members.index(ranks.groups.rank)
    whole = {n: value for n, value in state.items() if stage == 0 and split.owner(n) is None}
    for names in split.names:
        owner = split.stages_of(names)[0]
        value = share(state.get(split.name_on(names, owner)), members[owner], group, device)
        whole |= dict.fromkeys(names, value) if stage == 0 else {}
    return whole


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
MOST_DIMS = 6


def share(value: Tensor | None, source: int, group: Group, device: torch.device) -> Tensor:
    """Give every stage what one has: its shape and dtype first, which only that one knows.

    Collective: the ranks of the group; ``source`` is a rank of the world.
    """
    head = torch.zeros(2 + MOST_DIMS, dtype=torch.int64, device=device)
    if dist.get_rank() == source:
        assert value is not None
        head[: 2 + value.dim()] = torch.tensor(
            [DTYPES.index(value.dtype), value.dim(), *value.shape]
        )
    dist.broadcast(head, src=source, group=group)
    number, dim, *shape = head.tolist()
    if dist.get_rank() != source:
        value = torch.empty(shape[:dim], dtype=DTYPES[number], device=device)
    assert value is not None
    value = value.detach().contiguous()
    dist.broadcast(value, src=source, group=group)
    return value
