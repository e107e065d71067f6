"""Explanation: what `plan.explain` found, as data, JSON and text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from ...collectives.trace import Event

Axes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Communicator:
    """A communicator that the run made on this rank; the axis sets it serves, and its ranks."""

    axes: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Bytes of parameters: of this rank, the least and the most of any rank, of all ranks, and uncut."""

    bytes: int
    least: int
    most: int
    copy_total: int
    whole: int


@dataclass(frozen=True)
class KeysAndValues:
    """Bytes of keys and values on this rank: of 1024 tokens, of one request of the context, of the batch."""

    bytes_per_1024: int
    request_bytes: int
    batch_bytes: int


@dataclass(frozen=True)
class Unit:
    """Collectives of one layer, or between layers; ``numbers`` are the layers that do exactly the same."""

    path: str
    numbers: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def times(self) -> int:
        """How often this happens in a step."""
        return max(1, len(self.numbers))

    @property
    def seconds(self) -> float:
        """Predicted seconds of its collectives, once, one after the other."""
        return sum(event.seconds for event in self.events)


@dataclass(frozen=True)
class Traced:
    """One run: every collective in order, and the workspace.

    ``workspace_bytes`` is the most that was alive at once of what the step itself made (activations, and in training
    gradients), without the KV it keeps and without what kernels allocate inside themselves. ``movable_bytes`` of what
    it saves for backward would wait elsewhere under ``offload_activations``.
    """

    name: str
    batch: int
    tokens: int
    events: tuple[Event, ...]
    workspace_bytes: int
    layers: tuple[str, ...] = ()
    movable_bytes: int = 0

    @property
    def sent_bytes(self) -> int:
        """What this rank sends."""
        return sum(event.sent_bytes for event in self.events)

    @property
    def seconds(self) -> float:
        """Predicted seconds of all collectives, one after the other."""
        return sum(event.seconds for event in self.events)

    def units(self) -> tuple[Unit, ...]:
        """Fold layers with identical collectives into one, in order of first appearance."""
        found: dict[tuple[str, tuple[Event, ...]], list[int]] = {}
        for path, events in self._runs():
            parent, _, number = path.rpartition(".")
            if path in self.layers:
                found.setdefault((parent, events), []).append(int(number))
            else:
                found.setdefault((path, events), [])
        return tuple(Unit(path, tuple(n), events) for (path, events), n in found.items())

    def _runs(self) -> Iterator[tuple[str, tuple[Event, ...]]]:
        """Consecutive events of one layer (or of none), their scopes relative to it."""
        for path, events in groupby(self.events, self._layer):
            yield path, tuple(_relative(event, path) for event in events)

    def _layer(self, event: Event) -> str:
        scope = event.scope.removeprefix("backward:")
        mark = event.scope[: len(event.scope) - len(scope)]
        inside = next((p for p in self._by_length if scope == p or scope.startswith(f"{p}.")), None)
        return scope and f"{mark}{scope}" if inside is None else inside

    @property
    def _by_length(self) -> list[str]:
        return sorted(self.layers, key=len, reverse=True)


def _relative(event: Event, path: str) -> Event:
    mark = "backward:" if event.scope.startswith("backward:") else ""
    inner = event.scope.removeprefix("backward:").removeprefix(path).removeprefix(".")
    return replace(event, scope=f"{mark}{inner}")


@dataclass(frozen=True)
class Explanation:
    """What one rank of a plan holds and sends. ``str()`` is for people, `to_json` for programs.

    ``seconds`` of events are predictions for ``hardware``, by the planner's model of its network. ``beside`` is what a
    training step sends beyond its run: FSDP2's gathers and scatters, and what stages hand on, by formula.
    """

    plan: str
    executed: str
    model: str
    rank: int
    world_size: int
    batch: int
    context: int
    dtype: str
    picture: str
    attention: Axes
    experts: Axes
    communicators: tuple[Communicator, ...]
    weights: Weights
    kv: KeysAndValues | None
    steps: tuple[Traced, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: tuple[Event, ...] = ()
    hardware: str = ""

    def step(self, name: str) -> Traced:
        """Return one of the runs: ``decode``, ``prefill`` or ``training``.

        Raises:
            KeyError: naming the runs there are.
        """
        if name not in (names := [step.name for step in self.steps]):
            raise KeyError(f"{name!r} is not among the runs {names}; ask for it with backward=True")
        return next(step for step in self.steps if step.name == name)

    def to_json(self, indent: int | None = 2) -> str:
        """Write everything, with layers folded as in the text."""
        data = asdict(self)
        for made, step in zip(data["steps"], self.steps, strict=True):
            made["sent_bytes"] = step.sent_bytes
            made["seconds"] = step.seconds
            made["collectives"] = len(step.events)
            made["units"] = [asdict(unit) | {"seconds": unit.seconds} for unit in step.units()]
            del made["events"], made["layers"]
        return json.dumps(data, indent=indent)

    def __str__(self) -> str:
        from .text import text

        return text(self)
