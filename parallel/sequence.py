"""Sequence parallel in Megatron's sense: norms and residuals are cut along the sequence over tp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..collectives import autograd
from .edits import AddHook, CutParameter, Edit, SumGradient
from .errors import PlanError
from .experts.compute import is_packed
from .families import decoder_layers
from .ranks import ModelRanks


class SequenceCut:
    """Cuts activations along the sequence before a layer, and makes them whole after one or before the final norm.

    State: the length of the sequence that runs, in the ranks' span.
    """

    def __init__(self, ranks: ModelRanks) -> None:
        assert ranks.span is not None
        self.span, self.group, self.size = ranks.span, ranks.all, ranks.size

    def cut(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Keep this rank's tokens. Shape: [batch, seq, hidden] -> [batch, seq/tp, hidden]"""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.span.length = hidden.shape[1]
        part = autograd.split(hidden, self.group, 1)
        return ((part, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": part})

    def whole(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gather all tokens. Shape: [batch, seq/tp, hidden] -> [batch, seq, hidden]"""
        sizes = autograd.chunk_sizes(self.span.length, self.size)
        return (autograd.gather(args[0], self.group, 1, sizes), *args[1:])

    def whole_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Gather what a layer gives: its hidden states, alone or first of several."""
        if isinstance(output, Tensor):
            return self.whole(module, (output,))[0]
        return self.whole(module, output)

    def around(self, first: nn.Module, last: nn.Module, norm: nn.Module | None) -> list[Edit]:
        """Hang it around a run of layers; ``norm``: what follows them, which is given the whole."""
        door = AddHook(partial(first.register_forward_pre_hook, self.cut, with_kwargs=True))
        if norm is not None:
            return [door, AddHook(partial(norm.register_forward_pre_hook, self.whole))]
        return [door, AddHook(partial(last.register_forward_hook, self.whole_output))]


def sequence_edits(
    model: Any, ranks: ModelRanks, roles: list[Edit], chunks: Sequence[tuple[int, int]] = ()
) -> list[Edit]:
    """Cut activations along the sequence between the first decoder layer and the final norm (Megatron's SP).

    Args:
        chunks: the runs of layers this rank has, where it is a pipeline stage; activations travel whole between them.

    Collective: per block an all-gather and a reduce-scatter instead of an all-reduce: the same bytes.
    """
    path, layers = decoder_layers(model)
    parent = model.get_submodule(path.rpartition(".")[0])
    norm = next((m for n, m in parent.named_children() if "norm" in n and m is not layers), None)
    if norm is None:
        raise PlanError(
            "tp:sp", "needs a final norm after the decoder layers", "use tp without :sp"
        )
    cut, edits, own = SequenceCut(ranks), [outputs_edit(model, ranks)], list[nn.Module]()
    for start, stop in chunks or [(0, len(layers))]:
        own += [layers[i] for i in range(start, stop)]
        edits += cut.around(layers[start], layers[stop - 1], norm if stop == len(layers) else None)
    handled = {(id(e.module), e.name) for e in roles if isinstance(e, (CutParameter, SumGradient))}
    edits += [
        SumGradient(module, name, ranks.all)
        for layer in own
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (id(module), name) not in handled
    ]
    if ranks.plan.ep.size * ranks.plan.etp > 1:  # what the ranks exchange ties them together
        return edits
    packed = [module for layer in own for module in layer.modules() if is_packed(module)]
    return [*edits, *(AddHook(partial(m.register_forward_hook, take_part)) for m in packed)]


def take_part(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Let experts and router take part in backward where a rank has no tokens: the sums of gradients wait for zeros."""
    if not isinstance(output, Tensor) or output.numel():
        return None
    routed = (x for x in args if isinstance(x, Tensor) and x.is_floating_point())
    # in place of the output, not beside it: zero-bubble differentiates what two ways lead to twice
    return output.detach() + sum(x.sum() for x in (*module.parameters(), *routed))


def outputs_edit(model: Any, ranks: ModelRanks) -> Edit:
    """Gather over tp what the model gives out of its layers; before cp gathers it over its ranks.

    Router logits, for balancing losses of all tokens, and hidden states, of which the last comes from the norm, whole.
    Shape: router logits [batch * seq/tp, experts] -> [batch * seq, experts]
        hidden states [batch, seq/tp, hidden] -> [batch, seq, hidden]
    """
    span = ranks.span
    assert span is not None

    def whole(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes, batch = autograd.chunk_sizes(span.length, ranks.size), output[0].shape[0]
        if getattr(output, "router_logits", None) is not None:
            parts = (r.view(batch, sizes[ranks.index], -1) for r in output.router_logits)
            output["router_logits"] = tuple(
                autograd.gather(part, ranks.all, 1, sizes).flatten(0, 1) for part in parts
            )
        if getattr(output, "hidden_states", None) is not None:
            *parts, last = output.hidden_states
            wholes = (autograd.gather(part, ranks.all, 1, sizes) for part in parts)
            output["hidden_states"] = (*wholes, last)

    return AddHook(partial(model.base_model.register_forward_hook, whole, prepend=True))
