"""Hardware: what one accelerator can do, every figure with its unit, direction and source."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from .precision import UNITS, element_bytes

if TYPE_CHECKING:
    from .efficiency import Efficiency

UNITS_OF_MEASURE = ("B", "B/s", "FLOP/s", "s", "ranks", "USD/h")
DIRECTIONS = ("read", "per direction", "both directions")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number about hardware.

    Args:
        direction: of a bandwidth: ``read`` (memory), ``per direction`` or ``both directions``
            (a link; data sheets mix the two). Nothing else has one.

    Raises:
        ValueError: a figure without unit or source, a bandwidth without direction.
    """

    value: float
    unit: str
    source: str
    direction: str = ""

    def __post_init__(self) -> None:
        if self.unit not in UNITS_OF_MEASURE:
            raise ValueError(f"figure {self.value}: unit {self.unit!r} is none of ours")
        if not self.source.strip():
            raise ValueError(f"figure {self.value} {self.unit} has no source")
        if (self.unit == "B/s") != (self.direction in DIRECTIONS):
            raise ValueError(f"figure {self.value} {self.unit}: direction {self.direction!r}")
        if not self.value > 0:
            raise ValueError(f"figure {self.value} {self.unit} is not positive")

    @property
    def each_way(self) -> float:
        """The value per direction."""
        return self.value / 2 if self.direction == "both directions" else self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of accelerator and the links around it.

    ``scale_up`` is the fast link (NVLink, Infinity Fabric, UB) among ``domain`` ranks; ``scale_out`` the
    network card beyond. The latencies are those of one small collective in a captured graph. ``host_memory``,
    ``disk`` and ``disk_link`` are one rank's share of its server; None is a tier it has not.

    Args:
        like: whose measured kernel and collective constants stand for this part's where it has none.
        constants: what was calibrated on this very machine; None: the fitted ones.
    """

    name: str
    title: str
    memory: Figure
    memory_bandwidth: Figure
    bf16: Figure
    fp8: Figure | None = None
    fp4: Figure | None = None
    scale_up: Figure
    domain: Figure
    scale_up_latency: Figure
    scale_out: Figure
    scale_out_latency: Figure
    host_link: Figure
    host_memory: Figure | None = None
    disk: Figure | None = None
    disk_link: Figure | None = None
    price: Figure | None = None
    like: str = ""
    constants: Efficiency | None = None
    notes: tuple[str, ...] = field(default=())

    def figures(self) -> dict[str, Figure]:
        """Return every figure by name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Figure)}

    def unit_of(self, precision: str) -> str:
        """Return the matrix unit a precision runs on here: ``bf16``, ``fp8`` or ``fp4``."""
        element_bytes(precision)  # refuses what is not known
        return next(unit for unit in UNITS[precision] if getattr(self, unit) is not None)

    def peak(self, precision: str) -> float:
        """Return dense FLOP/s of the matrix unit that a precision runs on."""
        return getattr(self, self.unit_of(precision)).value

    def scaled(self, **factors: float) -> Hardware:
        """Return this part with some figures multiplied, e.g. ``memory_bandwidth=2``."""
        changed = {
            name: replace(
                getattr(self, name),
                value=getattr(self, name).value * factor,
                source=f"{getattr(self, name).source}, times {factor:g}",
            )
            for name, factor in factors.items()
        }
        return replace(self, **changed)
