"""How long each layer of a model takes, as a file that ranks can share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..documents import read_document, refusing, write_document
from ..errors import PlanError

FORMAT = "plait layer times 1"


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of forward and backward: of what comes before the layers, of each layer, of what comes after them."""

    before: float
    layers: Sequence[float]
    after: float

    @property
    def weights(self) -> list[int]:
        """The same in whole nanoseconds, in one row."""
        return [round(1e9 * seconds) for seconds in (self.before, *self.layers, self.after)]

    def write(self, path: str | Path) -> None:
        """Write them as JSON."""
        write_document(path, FORMAT, asdict(self))

    @classmethod
    def read(cls, path: str | Path, layers: int) -> LayerTimes:
        """Read the times of a model of so many layers.

        Raises:
            PlanError: no such file, something else, or of another model.
        """
        with refusing(
            f"times={path}", "is no file of layer times", "make one with plait.measure_layers"
        ):
            data = read_document(path, FORMAT)
            found = cls(
                float(data["before"]), [float(t) for t in data["layers"]], float(data["after"])
            )
            if not all(0 <= t < math.inf for t in (found.before, *found.layers, found.after)):
                raise ValueError("a time is negative or not a number")
        if len(found.layers) != layers:
            raise PlanError(
                f"times={path}",
                f"is of {len(found.layers)} layers, and the model has {layers}",
                "measure this model: plait.measure_layers",
            )
        return found
