"""plan.explain(model): run the parallelised code on meta tensors over fake groups, and write down what it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...collectives.trace import Trace
from ..activations.ledger import Ledger
from ..activations.offload import LEAST_BYTES, attached, layers_of
from ..api import commit, prepare, refuse_later_axes, shape_of
from ..axes import Fssdp
from ..edits import Edits
from ..errors import PlanError
from ..families import is_transformers
from ..folding import Folding
from ..groups import Groups
from ..pipeline import split_of
from ..plan import Plan
from ..planner.catalogue import hardware as named
from ..planner.hardware import Hardware
from ..residual import StreamLayer
from ..rules import Rules
from .by_shape import ByShape
from .filling import empty_cache, fill, kv_bytes, shapes_of_one_token
from .footprint import Footprint
from .report import Communicator, Explanation, KeysAndValues, Traced, Weights
from .scopes import Scopes
from .timing import timed
from .twin import twin_of
from .unseen import unseen
from .weights import weights_of

Inputs = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]


def explain(
    plan: Plan,
    model: Any,
    *,
    rank: int = 0,
    batch: int = 1,
    context: int = 1024,
    rules: Rules | None = None,
    backward: bool = False,
    dtype: torch.dtype | None = None,
    inputs: Inputs | None = None,
    hardware: str | Hardware = "",
) -> Explanation:
    """Say what one rank would hold and send, and how long that takes. Needs no ranks, no devices and no weights.

    A meta twin of the model is cut by the same code as `parallelize` and run; collectives and bytes are those
    of that run; seconds are the planner's. The model, torch.distributed and the random state are left as they are.

    Args:
        model: a transformers model, its config, a checkpoint directory or config.json, a name we ship
            (``plait plan --list``), or any module with ``rules``.
        rank: whose view; ranks of one axis differ in bytes by rounding only.
        batch: requests in a decode step, and sequences in a training step.
        context: tokens in the cache of each request before a decode step; tokens of a prefill.
        backward: also a training step, forward and backward, of ``batch * context`` tokens.
        dtype: of weights, activations and KV; default the model's own.
        inputs: for a plain module, ``inputs(batch, tokens) -> (args, kwargs)`` on meta; default token ids.
        hardware: whose network the seconds are for: a name, a calibrated file or a Hardware; default the first
            that holds what a rank holds (`timing.fitting`).

    Raises:
        PlanError: the plan does not fit the model, a size is not one, or there is no such hardware.
    """
    _positive(batch=batch, context=context)
    # A wrong name is told at once.
    part = named(hardware) if isinstance(hardware, str) and hardware else hardware
    twin = twin_of(model, dtype)
    plan.validate(shape_of(twin))
    run, left_out = executed(plan, rules)
    with torch.random.fork_rng(devices=[]), Groups.fake(Folding.of(plan), rank) as groups:
        whole = sum(p.numel() * p.element_size() for p in twin.parameters())
        split = split_of(twin, plan.pp, rules) if plan.pp.size > 1 else None
        edits, done = prepare(twin, run, groups, rules=rules)
        runs = _Runs(commit(twin, edits, done), groups, batch, context, inputs)
        with ByShape():
            steps = runs.all(backward)
        weights = weights_of(twin, done, plan, split, whole)
        beside = unseen(twin, plan, split, batch, context) if backward else ()
        said = replace(_told(plan, run, runs, steps, weights, left_out), beside=beside)
    return timed(said, part)


def _told(
    plan: Plan, run: Plan, runs: _Runs, steps: tuple[Traced, ...], weights: Weights, left_out: tuple[str, ...]
) -> Explanation:  # fmt: skip
    """Write down what was found."""
    folding = runs.groups.folding
    return Explanation(
        plan=str(plan), executed=str(run), model=_name(runs.twin), rank=runs.groups.rank,
        world_size=plan.world_size, batch=runs.batch, context=runs.context,
        dtype=str(next(runs.twin.parameters()).dtype).removeprefix("torch."),
        picture=folding.picture(), attention=folding.attention.axes, experts=folding.experts.axes,
        communicators=tuple(Communicator(axes, ranks) for ranks, axes in runs.groups.made.items()),
        weights=weights, kv=runs.kv, steps=steps, left_out=left_out, notes=runs.notes(),
    )  # fmt: skip


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise PlanError(f"{name}={value}", "is not positive", f"use {name} >= 1")


def token_count(text: str) -> int:
    """Read a number of tokens: ``4096``, ``128k``, ``1M``; k and M are thousands and millions.

    >>> token_count("128k"), token_count("1.5M")
    (128000, 1500000)
    """
    scale = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 0)
    try:
        count = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        count = 0.5
    if count != int(count):
        raise PlanError(f"context={text!r}", "is no number of tokens", "use e.g. 4096, 128k or 1M")
    return int(count)


def executed(plan: Plan, rules: Rules | None) -> tuple[Plan, tuple[str, ...]]:
    """Take out of a plan what is refused, or does not run on meta tensors, each part on its own; name those parts."""
    parts: dict[str, tuple[dict[str, Any], str]] = {
        "dp": (
            {"dp": plan.dp},
            "gathering parameters and scattering gradients, which stand at the end (weights are a rank's own rows)",
        ),
        "pp": (
            {"pp": plan.pp},
            "what stages send, which stands at the end; but for weights, each rank is shown with the layers of all",
        ),
        "ep": ({"ep": plan.ep, "etp": plan.etp}, "every expert is counted whole on every rank"),
        "etp": ({"etp": plan.etp}, "every expert is counted whole on every rank"),
        "cp": ({"cp": plan.cp}, "every token is counted on every rank"),
        "sp": ({"tp": plan.tp}, "norms are computed on all tokens"),
    }
    plain = Plan(tp=plan.tp.size, kvp=plan.kvp)
    values: dict[str, Any] = {"tp": plain.tp, "kvp": plain.kvp}
    left_out: list[str] = []
    for name, (part, means) in parts.items():
        if all(getattr(plan, axis) == getattr(plain, axis) for axis in part):
            continue
        if name == "etp" and (plan.size("ep") > 1 or "ep" in values):
            continue
        if name == "cp" and plan.kvp.size > 1:
            values |= part
            continue
        # neither FSDP2 nor torch's pipelining runs on meta tensors
        unseen = name == "pp" or (name == "dp" and plan.dp.kind == "shard")
        if (
            unseen
            or _refused(Plan(**{"tp": plain.tp, "kvp": plain.kvp, **part}), rules)
            or _refused(Plan(**{**values, **part}), rules)
        ):
            said = " ".join(w for w in str(plan).split() if w.startswith(tuple(part)))
            left_out.append(f"{name} ({said}): {means}")
        else:
            values |= part
    return Plan(**values), tuple(left_out)


def _refused(plan: Plan, rules: Rules | None) -> bool:
    try:
        refuse_later_axes(plan, rules)
    except PlanError:
        return True
    return False


def _name(twin: nn.Module) -> str:
    return type(twin).__name__


class _Runs:
    """The runs of a cut twin: decode, prefill and training, each traced and weighed."""

    def __init__(
        self, twin: Any, groups: Groups, batch: int, context: int, inputs: Inputs | None
    ) -> None:
        self.twin, self.groups, self.batch, self.context = twin, groups, batch, context
        self.decoder = is_transformers(twin)
        self.caches = self.decoder and twin._plait.ranks.cp == 1
        self.pieces = twin._plait.ranks.plan.tp.weave
        self.inputs = inputs
        self.kv: KeysAndValues | None = None

    def all(self, backward: bool) -> tuple[Traced, ...]:
        """Run what the model can do."""
        steps = [self.decode()] if self.caches else []
        steps.append(self.prefill())
        if backward:
            steps.append(self.train())
        return tuple(steps)

    def decode(self) -> Traced:
        """One token for each of ``batch`` requests whose caches hold ``context`` tokens."""
        with torch.no_grad():
            shapes = shapes_of_one_token(self.twin)
            per_1024 = kv_bytes(fill(self.twin, shapes, 1, 1024))
            with Footprint() as footprint:
                cache = fill(self.twin, shapes, self.batch, self.context, room=1)
                held = kv_bytes(cache)
                self.kv = KeysAndValues(per_1024, held // self.batch, held)
                return self._traced(
                    "decode", footprint, self.batch, 1, cache,
                    lambda: self._forward(self.batch, 1, past_key_values=cache, use_cache=True),
                )  # fmt: skip

    def prefill(self) -> Traced:
        """One request of ``context`` tokens; only the last position's logits, as ``generate`` asks for."""
        with torch.no_grad(), Footprint() as footprint:
            options: dict[str, Any] = {}
            cache = None
            if self.caches:
                cache = empty_cache(self.twin, 1, self.context)
                options = {"use_cache": True, "past_key_values": cache}
            if self.decoder:
                options |= self._last_logits()
            return self._traced(
                "prefill", footprint, 1, self.context, cache,
                lambda: self._forward(1, self.context, **options),
            )  # fmt: skip

    def train(self) -> Traced:
        """Forward and backward of ``batch`` sequences of ``context`` tokens, with all logits."""
        options: dict[str, Any] = {"use_cache": False} if self.decoder else {}
        ledger, hooks = Ledger(), Edits()
        with suppress(PlanError):  # a module without layers has nothing that could wait elsewhere
            hooks = attached(*layers_of(self.twin), ledger, LEAST_BYTES)
        with torch.enable_grad(), Footprint() as footprint:
            try:
                traced = self._traced(
                    "training", footprint, self.batch, self.context, None,
                    lambda: self._loss(self._forward(self.batch, self.context, **options)).backward(),
                )  # fmt: skip
                return replace(traced, movable_bytes=ledger.moved_bytes)
            finally:
                hooks.undo()
                self.twin.zero_grad(set_to_none=True)

    def notes(self) -> tuple[str, ...]:
        """What a reader should know about these runs."""
        if self.decoder and not self.caches:
            return (
                "Ring and Ulysses keep no cache: no decode step; kvp decodes on the same ranks",
            )
        if not self.decoder:
            return ("a plain module has no cache: no decode step",)
        notes: list[str] = []
        config = self.twin.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and self.context > most:
            notes.append(f"context {self.context:,} is beyond the {most:,} positions of the config")
        fused = sum(isinstance(module, StreamLayer) for module in self.twin.modules())
        if fused:
            notes.append(
                f"in inference {fused} layers do all-reduce, residual add and norm as one step, on one host in one "
                "kernel (on CUDA if devices reach each other's memory, see `plait doctor`; else all-reduce, then add "
                "and norm); tp's fuse=false takes them apart"
            )
        if fused and self.pieces > 1:
            notes.append(
                f"a prefill or a training batch goes through them in {self.pieces} pieces of its tokens, one's "
                "all-reduce under way behind another's attention or MLP (MLP only in training)"
            )
        if isinstance(self.twin._plait.plan.ep, Fssdp):
            notes.append(
                "fssdp: a first step, which copies no experts; later ones send weights as routing asks for"
            )
        return tuple(notes)

    def _traced(
        self,
        name: str,
        footprint: Footprint,
        batch: int,
        tokens: int,
        cache: Any,
        step: Callable[[], Any],
    ) -> Traced:
        held, start = kv_bytes(cache), footprint.mark()
        trace = Trace(self.groups.axis_of)
        with Scopes(self.twin, trace, onlooks=self.pieces > 1) as scopes, trace:
            kept = step()
        workspace = footprint.peak - start - (kv_bytes(cache) - held)
        del kept
        events = tuple(replace(event, seconds=0.0, start=0.0) for event in trace.events)
        return Traced(name, batch, tokens, events, workspace, scopes.layers)

    def _forward(self, batch: int, tokens: int, **options: Any) -> Any:
        if self.inputs is not None:
            args, kwargs = self.inputs(batch, tokens)
            return self.twin(*args, **kwargs, **options)
        if not self.decoder and not any(isinstance(m, nn.Embedding) for m in self.twin.modules()):
            raise PlanError(
                f"explaining {_name(self.twin)}",
                "needs to know its inputs",
                "give inputs=lambda batch, tokens: ((torch.empty(batch, tokens, width, device='meta'),), {})",
            )
        return self.twin(torch.zeros(batch, tokens, dtype=torch.long, device="meta"), **options)

    def _last_logits(self) -> dict[str, Any]:
        known = inspect.signature(self.twin.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    @staticmethod
    def _loss(output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = output if isinstance(output, Tensor) else output[0]
        return logits.sum()
