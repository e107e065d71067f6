"""How a module of the user's own runs over stages: its forward on all, each box of it on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..arguments import by_name
from ..errors import PlanError
from ..ranks import ModelRanks
from .lesson import Lesson, Places
from .microbatches import Microbatch, microbatches
from .passage import place_of
from .rule import Stages
from .run import PipelinedModel
from .split import Split
from .tree import Layout, share_tensors, share_text, sources, tensors_of
from .wire import Meta


class Left(BaseException):
    """A forward that came to what a later chunk runs; there is no more to do here."""


@dataclass
class Passing:
    """One run of the forward for one chunk: what other chunks' boxes returned, and what this one's did."""

    chunk: int
    known: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)


class Absent(nn.Module):
    """Stands where a box of another chunk is, and returns what that returned there."""

    def __init__(self, run: PipelinedModule, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path, self._run = path, [run]  # in a list: the model is not a part of its part
        for name, value in vars(module).items():  # models ask a layer for its kind
            if isinstance(value, str | int | float) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run[0].answer(self.path)


class PipelinedModule(PipelinedModel):
    """A module with a list of layers; it trains where gradients are wanted and its forward returns a loss.

    Every stage runs the whole forward, with all its inputs. A box (a layer, or a module that the rule names) runs on
    its own stage only; elsewhere what it returned is put in its place, if later boxes or the outputs depend on it. What
    that is one first forward shows, by autograd's graph (`Lesson`): for layers that hand on one tensor, that tensor.

    State: what was learned of each way of calling the model, and the shapes of what its boxes returned.
    """

    def __init__(self, model: Any, split: Split, ranks: ModelRanks, rule: Stages) -> None:
        floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
        widest = max(floats, key=lambda d: torch.finfo(d).bits, default=torch.float32)
        super().__init__(model, split, ranks, widest)
        self.rule = rule
        dropping = (m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        self.dropout = next((f"dropout p={m.p}" for m in dropping if m.p), "")
        self.chunk_of = {path: c for c in range(split.chunks) for path in split.paths_of(c)}
        self._lessons: dict[Any, Lesson] = {}
        self._layouts: dict[Any, dict[str, Layout]] = {}
        self._passing: Passing | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model over all stages."""
        values, self.beside = by_name(self.signature, args, kwargs), None
        rows, device = rows_of(values, self.rule), next(self.model.parameters()).device
        count = self.choice.microbatches or self.choice.size
        if not torch.is_grad_enabled():
            return self.infer(values, device)
        pieces = microbatches(values, rows, count, self.rule.whole)
        lesson = self.lesson_of(pieces[0].values, device)
        if lesson.loss is None:
            with torch.no_grad():
                return self.infer(values, device)
        self.refuse_training(device)
        for piece in pieces:
            if key_of(piece.values) not in self._layouts:
                with torch.no_grad(), self.trial():
                    self.through(piece.values, lesson, device)
        told = self.train(self.weighed(pieces), device)
        found: list[Any] = [None] * len(lesson.output.leaves)
        for at, value in zip(lesson.numbers, told, strict=True):
            found[at] = value
        return tree_unflatten(found, lesson.output.spec)

    def weighed(self, pieces: list[Microbatch]) -> list[Microbatch]:
        """Say by how much the loss of each microbatch is multiplied, so that they add up to the batch's."""
        if self.rule.items is not None:
            counts = [self.rule.items(**p.values) * (p.share > 0) for p in pieces]
            weights = [n / sum(counts) for n in counts]
        else:
            weights = [float(p.share > 0) if self.rule.loss == "sum" else p.share for p in pieces]
        return [replace(p, weight=w) for p, w in zip(pieces, weights, strict=True)]

    # --- boxes ------------------------------------------------------------------------------------

    def answer(self, path: str) -> Any:
        """What a box of another chunk returned."""
        passing = self._passing
        if passing is None:
            raise RuntimeError(f"{path} is on another pipeline stage; call the whole model")
        if self.chunk_of[path] > passing.chunk:
            raise Left
        if path not in passing.known:
            raise PlanError(
                f"{path} under pp",
                "is called here and was not on its own stage",
                "let what is called not depend on the stage",
            )
        self.once(path, passing)
        return passing.known[path]

    def note(self, path: str, output: Any) -> None:
        """Take note of what a box of this chunk returned."""
        if (passing := self._passing) is not None:
            self.once(path, passing)
            # a model may write into it before it leaves
            passing.made[path] = tree_map_only(Tensor, torch.clone, output)

    def once(self, path: str, passing: Passing) -> None:
        """Refuse a box that is called twice."""
        if path in passing.asked:
            raise PlanError(
                f"{path} under pp",
                "is called twice in one forward",
                "call it once, or leave it out of first and last: it is then on every stage",
            )
        passing.asked.add(path)

    def run_boxes(
        self, chunk: int, known: dict[str, Any], values: dict[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """Run the model's forward for one chunk: what its boxes returned, and the output of the last."""
        self._passing = passing = Passing(chunk, known)
        try:
            with self.only(chunk):
                return passing.made, self.original(**values)
        except Left:
            return passing.made, None
        finally:
            self._passing = None

    def stand_ins(self, chunk: int) -> list[tuple[nn.Module, str, nn.Module]]:
        """Nothing but what they returned, in the places of this stage's boxes of other chunks."""
        others = (c for c in self.split.chunks_of(self.stage) if c != chunk)
        return [
            (*place_of(self.model, path), Absent(self, path, self.model.get_submodule(path)))
            for c in others
            for path in self.split.paths_of(c)
        ]

    # --- all chunks after one another -------------------------------------------------------------

    def through(
        self, values: dict[str, Any], lesson: Lesson | None, device: torch.device
    ) -> tuple[Lesson, Any, Layout]:
        """Run all chunks, one after another; without a lesson learn it. Only the last stage has the output.

        Collective: all stages; after every chunk a broadcast of what later ones use (all, while learning).
        """
        known: dict[str, Any] = {}
        used: list[Places] = []
        layouts: dict[str, Layout] = {}
        made, output, told = dict[str, Any](), None, dict[str, Any]()
        for chunk in range(self.split.chunks):
            source = self.members[self.split.stage_of(chunk)]
            failure: Exception | None = None
            if self.split.stage_of(chunk) == self.stage:
                try:
                    made, output, told = self.report(chunk, known, values, lesson)
                except Exception as error:
                    failure, told = error, {"failed": f"{type(error).__name__}: {error}"}
            told = self.hear(told, source, device, failure)
            for path, text in told["made"].items():
                layouts[path] = layout = Layout.loads(text)
                wanted = [
                    i for i in layout.tensors() if lesson is None or lesson.sent(path, i, chunk)
                ]
                mine = tensors_of(made.get(path))
                found = share_tensors(mine, layout, wanted, source, self.group, device)
                known[path] = layout.filled(found, device)
            used.append(frozenset((p, i) for p, i in told["used"]))
        if lesson is None:
            lesson = Lesson.of(used, self.chunk_of, told)
        self._layouts[key_of(values)] = layouts
        return lesson, output, Layout.loads(told["output"])

    def report(
        self, chunk: int, known: dict[str, Any], values: dict[str, Any], lesson: Lesson | None
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Run a chunk of this stage, and say what it returned and used."""
        names: dict[int, tuple[str, int]] = {}
        held: list[Tensor] = []  # while their ids are asked for
        if lesson is None:
            known, held = marked(known, names)
        with torch.set_grad_enabled(lesson is None):
            made, output = self.run_boxes(chunk, known, values)
        told: dict[str, Any] = {"made": {p: Layout.of(t, p).dumps() for p, t in made.items()}}
        told["used"] = []
        if held or lesson is None:
            outputs = [x for x in tree_leaves((made, output)) if isinstance(x, Tensor)]
            told["used"] = sorted({*sources(outputs, names), *whole_numbers(known)})
        if chunk == self.split.chunks - 1:
            told |= Lesson.told_by(output)
        return made, output, told

    def hear(
        self, told: dict[str, Any], source: int, device: torch.device, failure: Exception | None
    ) -> dict[str, Any]:
        """Give every stage one's report; where it failed, all raise."""
        text = json.dumps(told) if dist.get_rank() == source else None
        told = json.loads(share_text(text, source, self.group, device))
        if failure is not None:
            raise failure
        if "failed" in told:
            raise PlanError(
                "a forward under pp", f"failed on rank {source}: {told['failed']}", "see there"
            )
        return told

    def lesson_of(self, values: dict[str, Any], device: torch.device) -> Lesson:
        """What is known of this way of calling the model; learned in a run of its own at first."""
        key = (self.model.training, *how(values))
        if key not in self._lessons:
            if any(p.kind is p.VAR_POSITIONAL for p in self.signature.parameters.values()):
                raise PlanError(
                    f"forward{self.signature} under pp", "does not name its arguments", "name them"
                )
            with self.trial():
                self._lessons[key], _, _ = self.through(values, None, device)
        return self._lessons[key]

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Leave random state, buffers and counts as they were."""
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        device = next(self.model.parameters()).device
        self.piece = Microbatch({}, 0, 0.0)
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device]):
                yield
        finally:
            self.piece = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def infer(self, values: dict[str, Any], device: torch.device) -> Any:
        """One pass of the whole batch; every stage gets the outputs."""
        _, output, layout = self.through(values, self.lesson_of(values, device), device)
        self._layouts.pop(key_of(values), None)  # lengths are many where text is generated
        source = self.members[self.last]
        found = share_tensors(
            tensors_of(output), layout, layout.tensors(), source, self.group, device
        )
        return output if self.stage == self.last else layout.filled(found, device)

    # --- training ---------------------------------------------------------------------------------

    def links(self, piece: Microbatch) -> list[list[Meta]]:
        layouts, lesson = self._layouts[key_of(piece.values)], self._lesson(piece)
        return [
            [layouts[path].leaves[i] for path, i in lesson.sends[chunk]]
            for chunk in range(self.split.chunks - 1)
        ]

    def run_chunk(self, chunk: int, received: list[Tensor], piece: Microbatch) -> list[Tensor]:
        layouts, lesson = self._layouts[key_of(piece.values)], self._lesson(piece)
        given = dict(zip(lesson.sends[chunk - 1] if chunk else (), received, strict=True))
        known = {
            path: layout.filled(
                {i: x for (p, i), x in given.items() if p == path}, received[0].device
            )
            for path, layout in layouts.items()
            if self.chunk_of[path] < chunk
        }
        made, output = self.run_boxes(chunk, known, piece.values)
        if chunk < self.split.chunks - 1:
            leaves = {path: tree_flatten(tree)[0] for path, tree in made.items()}
            left = [
                given[p, i].clone() if (p, i) in given else leaves[p][i]
                for p, i in lesson.sends[chunk]
            ]
        else:
            leaves = tree_flatten(output)[0]
            left = [leaves[i].reshape(()) * piece.weight for i in lesson.numbers]
        if received:
            at = next(i for i, x in enumerate(left) if x.is_floating_point())
            left[at] = _Uses.apply(left[at], *received)  # type: ignore[call-overload]
        return left

    def _lesson(self, piece: Microbatch) -> Lesson:
        return self._lessons[self.model.training, *how(piece.values)]


class _Uses(torch.autograd.Function):
    """Give all that arrived a gradient, of zeros where nothing else does: the stage before waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *received: Tensor) -> Tensor:
        ctx.metas = [(r.shape, r.dtype, r.device, r.is_floating_point()) for r in received]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if floats else None
            for shape, dtype, device, floats in ctx.metas
        )
        return grad, *zeros


def marked(
    known: dict[str, Any], names: dict[int, tuple[str, int]]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Make every float tensor a leaf of autograd's graph of its own, and write down whose it is."""
    held: list[Tensor] = []  # ids are of living tensors

    def mark(path: str, tree: Any) -> Any:
        leaves, spec = tree_flatten(tree)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.is_floating_point():
                leaf = x.detach().requires_grad_()
                names[id(leaf)] = path, i
                held.append(leaf)
                leaves[i] = leaf.clone()
        return tree_unflatten(leaves, spec)

    with torch.enable_grad():
        return {path: mark(path, tree) for path, tree in known.items()}, held


def whole_numbers(known: dict[str, Any]) -> set[tuple[str, int]]:
    """Tensors of no float dtype: autograd does not say who uses them, so everyone gets them."""
    return {
        (path, i)
        for path, tree in known.items()
        for i, x in tensors_of(tree).items()
        if not x.is_floating_point()
    }


def rows_of(values: dict[str, Any], rule: Stages) -> int:
    """Rows of the batch: those of the first tensor that is not to stay whole."""
    for name, value in values.items():
        for x in tree_leaves(value) if name not in rule.whole else ():
            if isinstance(x, Tensor) and x.dim() and len(x):
                return x.shape[0]
    raise PlanError(
        "a forward under pp", "was given no tensor with rows", "give a batch, [rows, ...]"
    )


def how(values: dict[str, Any]) -> tuple[Any, ...]:
    """The way a model is called: which arguments are tensors, and what the others are."""
    leaves, spec = tree_flatten(values)
    return str(spec), *("tensor" if isinstance(x, Tensor) else repr(x) for x in leaves)


def key_of(values: dict[str, Any]) -> tuple[Any, ...]:
    """The shapes of a call, which those of what boxes return follow from."""
    leaves, spec = tree_flatten(values)
    cast = tuple(
        (k, torch.get_autocast_dtype(k)) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)
    )
    return str(spec), cast, *(Meta.of(x) if isinstance(x, Tensor) else repr(x) for x in leaves)
