"""Context parallelism for modules that are not transformers': their user says what has a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arguments import forward_signature
from ..edits import AddHook, Edit, SetAttribute
from ..errors import PlanError
from ..modules import Intercept
from ..ranks import ModelRanks
from ..rules import matches
from .attention import Spread, SpreadMask
from .state import ContextState


@dataclass(frozen=True)
class Sequence:
    """The rule of a whole module, under the path ``""``: what cp cuts of it. Without cp it changes nothing.

    ``inputs`` names the arguments of its forward that hold the sequence in dim 1; ``attention`` the modules, as
    patterns, whose ``scaled_dot_product_attention`` is attention over that sequence. Every tensor that the forward
    returns must hold the sequence in dim 1, and is gathered.

    What depends on a token's place must come in as an input: a module that counts its tokens itself counts its own.
    """

    inputs: tuple[str, ...]
    attention: tuple[str, ...]

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        if ranks.cp == 1:
            return []
        door = Door(self, ContextState.of(ranks))
        inner = [m for p, m in module.named_modules() if any(matches(a, p) for a in self.attention)]
        if path or not inner:
            raise PlanError(
                f"Sequence at {path!r} with attention={list(self.attention)}",
                "matches no module of the model" if not path else "is a rule of a whole model",
                'give it under the path "" and name the modules that attend',
            )
        return [
            AddHook(lambda: module.register_forward_pre_hook(door.cut, with_kwargs=True)),
            AddHook(lambda: module.register_forward_hook(door.whole)),
            *(SetAttribute(m, "forward", door.attending(m.forward)) for m in inner),
        ]


@dataclass
class Door:
    """Cuts what enters a module, gathers what leaves it, and answers for attention between.

    State: the masks of the forward that runs.
    """

    rule: Sequence
    state: ContextState
    masks: dict[int, SpreadMask] = field(default_factory=dict)

    def cut(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Take this rank's tokens of the named inputs."""
        given = forward_signature(type(module)).bind(module, *args, **kwargs)
        found = {n: given.arguments.get(n) for n in self.rule.inputs}
        tensors = {n: t for n, t in found.items() if isinstance(t, Tensor)}
        lengths = {t.shape[1] if t.dim() > 1 else 0 for t in tensors.values()}
        if len(lengths) != 1 or 0 in lengths:
            said = {n: list(t.shape) for n, t in tensors.items()}
            raise PlanError(
                f"inputs {said} under cp={self.state.ranks.cp}",
                "do not hold one sequence in dim 1",
                f"give {', '.join(self.rule.inputs)} as [batch, seq, ...]",
            )
        order, device = self.state.order(lengths.pop()), next(iter(tensors.values())).device
        spread = Spread(order, self.state.rank, self.state.ring, self.state.ulysses, device)
        self.state.spread = spread
        self.masks = {
            c: SpreadMask(spread, spread.visible(causal if c else everything)) for c in (0, 1)
        }
        for name, tensor in tensors.items():
            given.arguments[name] = self.state.enter(tensor)
        return given.args[1:], given.kwargs

    def whole(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gather the outputs."""
        rows = self.state.running().order.rows(self.state.rank)

        def gather(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if x.dim() < 2 or x.shape[1] != rows:
                raise PlanError(
                    f"an output of shape {list(x.shape)} under cp={self.state.ranks.cp}",
                    "does not hold the sequence in dim 1",
                    "return tensors of [batch, seq, ...], and reduce them outside the module",
                )
            return self.state.gather(x)

        return tree_map(gather, output)

    def attending(self, original: Any) -> Any:
        """Answer a forward's scaled_dot_product_attention over all ranks."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with Intercept(self.attend):
                return original(*args, **kwargs)

        return forward

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Attend as torch would with all tokens.

        Shape: q [batch, heads, seq/cp, d], k, v [batch, kv_heads, seq/cp, d] -> [batch, heads, seq/cp, d]
        Collective: all ranks of cp; see ``SpreadMask.attend``.
        """
        rows = self.state.running().order.rows(self.state.rank)
        fits = all(t.dim() == 4 and t.shape[2] == rows for t in (q, k, v))
        if attn_mask is not None or dropout_p or not fits:
            raise PlanError(
                f"scaled_dot_product_attention of {list(q.shape)} with {list(k.shape)} under cp",
                "has a mask, dropout, or another sequence than the one that is cut",
                "attend over all tokens with is_causal=True or no mask, or use kvp or tp",
            )
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return self.masks[int(is_causal)].attend(q, k, v, factor, 0.0, None)


def causal(rows: Tensor, keys: Tensor) -> Tensor:
    """See a token and those before it."""
    return (rows[:, None] >= keys[None, :])[None, None]


def everything(rows: Tensor, keys: Tensor) -> Tensor:
    """See every token."""
    return torch.ones(1, 1, len(rows), len(keys), dtype=torch.bool, device=rows.device)


__all__ = ["Door", "Sequence"]
