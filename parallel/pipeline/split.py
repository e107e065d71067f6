"""Which stage holds which parameter. Pure arithmetic on names and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from ..axes import Pipeline
from ..errors import PlanError
from ..families import decoder_layers, is_transformers
from ..rules import Rules
from .rule import Stages, find_stages, lists
from .times import LayerTimes


@dataclass(frozen=True)
class Split:
    """Chunks of consecutive layers; chunk c runs on stage ``c % stages`` (more chunks than stages: interleaved).

    Args:
        layers: path of the list of layers.
        bounds: chunk c holds layers ``bounds[c]:bounds[c + 1]``.
        first: paths that belong to the first chunk (embedding), ``last`` those of the last (norm, head).
        names: the names of every parameter; tied ones have several, and are held wherever one of them is.
        rule: of a module that is not transformers'.
    """

    layers: str
    bounds: tuple[int, ...]
    stages: int
    first: tuple[str, ...]
    last: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    rule: Stages | None = None

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self.bounds) - 1

    def stage_of(self, chunk: int) -> int:
        """The stage that runs a chunk."""
        return chunk % self.stages

    def chunks_of(self, stage: int) -> range:
        """The chunks of a stage."""
        return range(stage, self.chunks, self.stages)

    def runs_of(self, stage: int) -> list[tuple[int, int]]:
        """The runs of layers of a stage."""
        return [(self.bounds[c], self.bounds[c + 1]) for c in self.chunks_of(stage)]

    def owner(self, path: str) -> int | None:
        """The stage of a module or parameter by its name; None for what every stage keeps (rotary tables)."""
        if _under(path, self.layers):
            number = path[len(self.layers) + 1 :].split(".")[0]
            if not number:
                return None
            chunk = next(c for c in range(self.chunks) if int(number) < self.bounds[c + 1])
            return self.stage_of(chunk)
        if any(_under(path, p) for p in self.first):
            return 0
        return self.stage_of(self.chunks - 1) if any(_under(path, p) for p in self.last) else None

    def holds(self, path: str, stage: int) -> bool:
        """Say whether a stage keeps a module or parameter."""
        return self.owner(path) in (None, stage)

    def absent(self, model: nn.Module, stage: int) -> set[int]:
        """Ids of the parameters of a model that a stage does not hold under any name."""
        return {
            id(model.get_parameter(names[0]))
            for names in self.names
            if not any(self.holds(n, stage) for n in names)
        }

    def stages_of(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The stages that hold a parameter, by its names."""
        owners = [self.owner(n) for n in names]
        every = range(self.stages) if None in owners else {o for o in owners if o is not None}
        return tuple(sorted(every))

    def name_on(self, names: tuple[str, ...], stage: int) -> str:
        """The name under which a stage has a parameter."""
        return next(n for n in names if self.holds(n, stage))

    def tied(self) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Parameters that several stages hold: their names, and these stages."""
        every = [(names, self.stages_of(names)) for names in self.names]
        return [(names, stages) for names, stages in every if len(stages) > 1]

    def shared(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters that belong to no chunk, which every stage keeps."""
        return [
            model.get_parameter(names[0])
            for names in self.names
            if all(self.owner(n) is None for n in names)
        ]

    def paths_of(self, chunk: int) -> list[str]:
        """Paths of the modules that a chunk runs, in order."""
        start, stop = self.bounds[chunk : chunk + 2]
        layers = [f"{self.layers}.{i}" for i in range(start, stop)]
        first = self.first if chunk == 0 else ()
        return [*first, *layers, *(self.last if chunk == self.chunks - 1 else ())]


def _under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def split_of(model: Any, choice: Pipeline, rules: Rules | None = None) -> Split:
    """Split a module by its rule of stages, or a transformers decoder by its own table of them.

    Balanced by parameters, or by measured times.

    Raises:
        PlanError: it is not said where to cut, a decoder's parameter belongs to no stage, there are too few layers, or
            the times are of another model.
    """
    path, first, last, rule = parts_of(model, choice, rules)
    layers = [layer for _, layer in model.get_submodule(path).named_children()]
    chunks = choice.size * choice.chunks_per_stage
    if len(layers) < chunks:
        raise PlanError(
            f"pp={choice.size} ({choice.schedule})",
            f"cuts {chunks} runs of layers, and the model has {len(layers)}",
            f"use pp <= {max(1, len(layers) // choice.chunks_per_stage)}",
        )
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    weights = by_parameters(model, layers, first, last)
    if choice.times:
        weights = LayerTimes.read(choice.times, len(layers)).weights
    bounds = balanced(weights[1:-1], chunks, weights[0], weights[-1])
    split = Split(path, bounds, choice.size, first, last, tuple(map(tuple, names.values())), rule)
    for name in (n for group in split.names for n in group) if rule is None else ():
        if split.owner(name) is None:
            raise PlanError(
                f"pp={choice.size}: parameter {name}",
                "lies neither before, in nor after the decoder layers",
                "use pp1 for this model",
            )
    return split


def parts_of(
    model: Any, choice: Pipeline, rules: Rules | None
) -> tuple[str, tuple[str, ...], tuple[str, ...], Stages | None]:
    """Find the list of layers, and what stands before and after it."""
    given = find_stages(model, rules)
    decoder = is_transformers(model)
    if given is not None and not decoder:
        path, rule = given
        return path, rule.first, rule.last, rule
    if given is not None:
        raise PlanError(
            f"Stages at {given[0]!r} of {type(model).__name__}",
            "is for modules of your own; of transformers decoders the stages are known",
            "leave it out",
        )
    if not decoder:
        known = ", ".join(repr(path) for path in lists(model)) or "it has none"
        raise PlanError(
            f"pp={choice.size} of {type(model).__name__}",
            f"needs to know its list of layers ({known})",
            'say it in the rules: "blocks": plait.Stages(first=("embedding",), last=("norm", "head"))',
        )
    path, _ = decoder_layers(model)
    return path, *ends(model, path.rpartition(".")[0], path.rpartition(".")[2]), None


def by_parameters(
    model: nn.Module, layers: Sequence[nn.Module], first: tuple[str, ...], last: tuple[str, ...]
) -> list[int]:
    """Count parameters: before the layers, of each layer, after them."""
    sides = [[model.get_submodule(q) for q in side] for side in (first, last)]
    parts = [sides[0], *([layer] for layer in layers), sides[1]]
    return [sum(p.numel() for m in part for p in m.parameters()) for part in parts]


def ends(model: Any, parent: str, layers: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths before and after the layers: by the model's table where it ships one, else by what they are."""
    table = list(getattr(model.base_model.config, "base_model_pp_plan", None) or {})
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = [paths[id(embedding)]], []
    at = table.index(layers) if layers in table else None
    for name, child in model.get_submodule(parent).named_children():
        path = f"{parent}.{name}" if parent else name
        if name == layers or path in first or not any(True for _ in child.parameters()):
            continue
        if at is not None and name in table:
            (first if table.index(name) < at else last).append(path)
        elif "norm" in name:
            last.append(path)
    if head is not None:
        last.append(paths[id(head)])
    return tuple(first), tuple(dict.fromkeys(last))


def balanced(
    counts: Sequence[int], chunks: int, before: int = 0, after: int = 0
) -> tuple[int, ...]:
    """Cut a row into consecutive runs, none empty, so that the heaviest is as light as can be.

    ``before`` and ``after`` weigh on the first and the last run. Of equal cuts the one with earlier bounds is taken.

    >>> balanced([1, 1, 1, 1, 1], 2), balanced([1] * 6, 3, before=2, after=1)
    ((0, 2, 5), (0, 1, 4, 6))
    """
    sums = [0, *accumulate(counts)]
    n = len(counts)

    def weight(run: int, start: int, stop: int) -> int:
        extra = before * (run == 0) + after * (run == chunks - 1)
        return sums[stop] - sums[start] + extra

    best: list[dict[int, tuple[int, tuple[int, ...]]]] = [{0: (0, (0,))}]
    for run in range(chunks):
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (heaviest, bounds) in best[-1].items():
            for stop in range(start + 1, n - (chunks - 1 - run) + 1):
                found = max(heaviest, weight(run, start, stop)), (*bounds, stop)
                if stop not in reached or found < reached[stop]:
                    reached[stop] = found
        best.append(reached)
    return best[-1][n][1]
