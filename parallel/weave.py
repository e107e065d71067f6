"""TokenWeave: a prefill in pieces of its tokens, so that one's sum over the ranks travels while another computes.

A piece goes through attention after the pieces before it, as a chunk of a chunked prefill does: they are in the cache
by then. Where attention cannot be cut (a cache that wants one layer's tokens at once, a mask that is not a table of
positions) it runs whole, and only the MLP is in pieces. A layer whose pieces are still on their way returns a `Woven`
tensor: the next layer goes on with the pieces, and anyone else who touches it finds the whole.
Where gradients are recorded attention runs whole, and the MLP in pieces, forward and backward.
Source: TokenWeave, arXiv 2505.11329.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..collectives import autograd
from ..collectives.primitive import Started, start_all_reduce
from ..collectives.trace import span
from .outlet import can_wait, run

if TYPE_CHECKING:
    from .residual import Norm, Plumbing

WOVEN_ROWS = 32  # a piece of fewer tokens is not worth its messages
MASK_BYTES = 64 << 20  # of a mask that attention in pieces needs where attention in one needs none
CUT = ("attention_mask", "position_ids", "position_embeddings", "past_key_values")
IGNORED = ("use_cache", "cache_position")


@dataclass
class Piece:
    """Some tokens on their way: the residual stream, and what will be added to it when it has come."""

    total: Tensor
    coming: Started | None = None

    def arrive(self, norm: Norm | None = None) -> Tensor | None:
        """Add what was under way, and normalise, if somebody will read that."""
        coming, self.coming = self.coming, None
        if coming is None:
            return None if norm is None else norm.module(self.total)
        if norm is None:
            self.total = self.total + coming.wait()
            return None
        normed, self.total = norm.with_sum(coming.wait(), self.total)
        return normed


class Woven(Tensor):
    """A layer's output of which pieces are still under way; whatever reads it waits for them first."""

    pieces: list[Piece] | None  # until it was read: then somebody may have written to it, too

    @staticmethod
    def of(pieces: list[Piece], shape: torch.Size) -> Woven:
        """Make a layer's output of its pieces along the sequence."""
        out = pieces[0].total.new_empty(shape).as_subclass(Woven)
        out.pieces = pieces
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _SAY_NOTHING:
                for each in tree_leaves((args, kwargs)):
                    if isinstance(each, Woven):
                        each._gather()
            return func(*args, **kwargs)

    def _gather(self) -> None:
        pieces, self.pieces = self.pieces, None
        if pieces is None:
            return
        with torch.inference_mode(self.is_inference()), torch.no_grad():
            for piece in pieces:
                piece.arrive()
            torch.cat([piece.total for piece in pieces], 1, out=self)


_SAY_NOTHING: set[Any] = {  # of the elements
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cpu", "is_cuda")
} | {Tensor.size, Tensor.dim, Tensor.is_floating_point}


def whole(hidden: Tensor) -> Tensor:
    """Wait for the pieces of a layer's output, if they are under way."""
    return hidden.detach() if isinstance(hidden, Woven) else hidden


def weaves_mlp(here: Plumbing, layer: Any, rows: int) -> bool:
    """Say whether there are tokens enough, and an MLP of which it is known that its sum can wait."""
    pieces = here.stream.pieces
    return pieces > 1 and can_wait(here.mlp, layer.mlp) and rows >= pieces * WOVEN_ROWS


def weaves_attention(here: Plumbing, layer: Any, hidden: Tensor, given: dict[str, Any]) -> bool:
    """Say whether attention, too, can go piece by piece: by its cache, its mask, and what else it is given."""
    batch, seq = hidden.shape[:2]
    attention, pieces = layer.self_attn, here.stream.pieces
    if pieces < 2 or seq < pieces or not can_wait(here.attention, attention):
        return False
    others = [value for name, value in given.items() if name not in CUT + IGNORED]
    plain = all(value is None or value is False for value in others)
    if not plain or not weaves_mlp(here, layer, batch * seq):
        return False
    past, mask = past_tokens(given.get("past_key_values"), attention), given.get("attention_mask")
    kind = attention_of(attention)
    if past is None or kind not in ("sdpa", "eager") or not getattr(attention, "is_causal", True):
        return False
    if mask is None:  # causal, of all tokens at once
        return kind == "sdpa" and past == 0 and seq * seq <= MASK_BYTES
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (seq, past + seq)


def attention_of(attention: Any) -> str | None:
    """Name the attention function of transformers that the running forward computes; None where it is Helix's."""
    from .attention.paged import PAGED

    config = getattr(attention, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if kind != PAGED:
        return kind
    step = attention._plait_attention.state.step
    new = step is None or (step.rows is None and not any(step.past))
    return config._plait_attention if new else None  # type: ignore[union-attr]


def past_tokens(cache: Any, attention: Any) -> int | None:
    """Count the tokens that a layer's cache holds; None if it does not take tokens piece by piece."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    from .attention.cache import PagedCache
    from .attention.paged import PAGED

    if cache is None:
        return 0
    if isinstance(cache, PagedCache):  # it takes a prompt when all pieces have been through
        return 0 if attention.config._attn_implementation == PAGED else None
    if type(cache) is not DynamicCache:
        return None
    if attention.layer_idx >= len(cache.layers):
        return 0 if cache.layer_class_to_replicate is DynamicLayer else None
    layer = cache.layers[attention.layer_idx]
    return int(layer.get_seq_length()) if type(layer) is DynamicLayer else None


def through_layer(here: Plumbing, layer: Any, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """Take a prefill through a layer in pieces along the sequence.

    Shape: [batch, seq, hidden] -> [batch, seq, hidden]
    Collective: two all-reduces over the model's ranks for each piece; together the bytes of the whole. The last ones
        are under way when this returns, unless the layer is the last.
    """
    from transformers.cache_utils import DynamicCache

    shape, seq, attention = hidden.shape, hidden.shape[1], layer.self_attn
    step = -(-seq // here.stream.pieces)
    cuts = [(start, min(start + step, seq)) for start in range(0, seq, step)]
    came = hidden.pieces if isinstance(hidden, Woven) else None
    if came is None:
        came = [Piece(whole(hidden)[:, start:stop].contiguous()) for start, stop in cuts]
    cache = given.get("past_key_values")
    past = past_tokens(cache, attention) or 0
    if type(cache) is not DynamicCache:  # pieces see those before them
        given = {**given, "past_key_values": DynamicCache()}
    pieces = []
    for number, (piece, (start, stop)) in enumerate(zip(came, cuts, strict=True)):
        normed = piece.arrive(here.first)
        with span(f"attention, piece {number}"):
            part = part_of(given, past, start, stop)
            out, waiting = run(here.attention, attention, hidden_states=normed, **part)
        assert waiting
        pieces.append(Piece(piece.total, start_all_reduce(out.contiguous(), here.stream.group)))
    if cache is not None and cache is not given["past_key_values"]:
        held: Any = given["past_key_values"].layers[attention.layer_idx]
        cache.update(held.keys, held.values, attention.layer_idx)
    through_mlp(here, layer, pieces)
    out = Woven.of(pieces, shape)
    return whole(out) if here.following is None else out


def part_of(given: dict[str, Any], past: int, start: int, stop: int) -> dict[str, Any]:
    """What attention is given, for the tokens of one piece; those before it are in the cache."""
    part, mask = dict(given), given.get("attention_mask")
    if mask is not None:
        part["attention_mask"] = mask[..., start:stop, : past + stop]
    elif start:
        rows, keys = torch.arange(start, stop), torch.arange(stop)
        part["attention_mask"] = (keys <= rows[:, None])[None, None]
    if given.get("position_ids") is not None:
        part["position_ids"] = given["position_ids"][..., start:stop]
    if given.get("position_embeddings") is not None:
        part["position_embeddings"] = tuple(x[..., start:stop, :] for x in given["position_embeddings"])  # fmt: skip
    return part


def after_attention(here: Plumbing, layer: Any, partial: Tensor, residual: Tensor) -> Tensor:
    """Go on in pieces after an attention that ran whole.

    Shape: partial, residual [batch, seq, hidden] -> [batch, seq, hidden]
    Collective: two all-reduces over the model's ranks for each piece; together the bytes of the whole.
    """
    sums = [start_all_reduce(x, here.stream.group) for x in pieces_of(partial, here.stream.pieces)]
    pieces = list(map(Piece, pieces_of(residual, here.stream.pieces), sums))
    through_mlp(here, layer, pieces)
    normed = [piece.arrive(here.following) for piece in pieces]
    out = torch.cat([piece.total for piece in pieces], 1).view_as(residual)
    read = [x for x in normed if x is not None]
    if read and not layer._overwritten(out):
        here.stream.hand_over(out, here.following, torch.cat(read, 1).view_as(residual))
    return out


def after_attention_recorded(
    here: Plumbing, layer: Any, partial: Tensor, residual: Tensor
) -> Tensor:
    """Go on in pieces after an attention that ran whole, and record it for a backward in pieces.

    Forward, a piece's sums travel behind the other's MLP; backward, so does the sum of the gradient of its MLP's input.

    Shape: partial, residual [batch, seq, hidden] -> [batch, seq, hidden]
    Collective: two all-reduces over the model's ranks for each piece, one more backward; together the bytes of the
        whole.
    """
    stream = here.stream
    sums = [autograd.leave_later(x, stream.group) for x in pieces_of(partial, stream.pieces)]
    early, out = torch.autograd._get_sequence_nr(), []
    residuals = pieces_of(residual, stream.pieces)
    for number, (total, (part, coming)) in enumerate(zip(residuals, sums, strict=True)):
        coming.wait()
        total = total + part
        normed = autograd.land(here.second.module(total), early)
        with span(f"MLP, piece {number}"):
            mlp, waiting = run(here.mlp, layer.mlp, normed)
        assert waiting
        out.append((total, *autograd.leave_later(mlp, stream.group)))
    totals = []
    for total, part, coming in out:
        coming.wait()
        totals.append(total + part)
    return torch.cat(totals, 1).view_as(residual)


def pieces_of(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Cut the tokens of all sequences, end to end, into pieces: [batch, seq, hidden] -> [1, rows, hidden] each."""
    return x.reshape(1, -1, x.shape[-1]).chunk(count, 1)


def through_mlp(here: Plumbing, layer: Any, pieces: list[Piece]) -> None:
    """Take each piece through the MLP when its attention has come, and leave its sum under way."""
    for number, piece in enumerate(pieces):
        normed = piece.arrive(here.second)
        with span(f"MLP, piece {number}"):
            out, waiting = run(here.mlp, layer.mlp, normed)
        assert waiting
        piece.coming = start_all_reduce(out.contiguous(), here.stream.group)
