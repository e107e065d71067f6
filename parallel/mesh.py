"""Mesh: named axes over ranks. Arithmetic only; no process is needed for any of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from .errors import PlanError, listed, unknown


@dataclass(frozen=True, slots=True)
class Mesh:
    """Number ranks by coordinates along named axes, the fastest axis first.

    >>> mesh = Mesh((("tp", 2), ("cp", 2), ("dp", 1)))
    >>> mesh.coords(3)
    {'tp': 1, 'cp': 1, 'dp': 0}
    >>> mesh.group(3, "cp"), mesh.groups("tp")
    ((1, 3), ((0, 1), (2, 3)))
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        axes = tuple((name, size) for name, size in self.axes)
        object.__setattr__(self, "axes", axes)
        names = [name for name, _ in axes]
        if len(set(names)) != len(names):
            raise PlanError(f"mesh axes {names}", "name an axis twice", "name each axis once")
        for name, size in axes:
            if size < 1:
                raise PlanError(f"mesh axis {name}={size}", "is not positive", f"use {name} >= 1")

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names, fastest first."""
        return tuple(name for name, _ in self.axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(size for _, size in self.axes)

    def axis_size(self, axis: str) -> int:
        """Return the number of ranks along one axis."""
        self._known(axis)
        return dict(self.axes)[axis]

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinates of a rank, fastest axis first. Inverse: `rank`."""
        self._inside(rank)
        coords = {}
        for name, size in self.axes:
            rank, coords[name] = divmod(rank, size)
        return coords

    def rank(self, **coords: int) -> int:
        """Return the rank at these coordinates; only axes of size 1 may be left out."""
        self._known(*coords)
        rank, stride = 0, 1
        for name, size in self.axes:
            if name not in coords and size > 1:
                raise PlanError(f"rank({coords})", f"leaves out {name}", f"give {name} < {size}")
            at = coords.get(name, 0)
            if not 0 <= at < size:
                raise PlanError(f"{name}={at}", "is outside the mesh", f"use 0 <= {name} < {size}")
            rank += stride * at
            stride *= size
        return rank

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Return the ranks that agree with this one on all other axes.

        Ordered by the mesh's fastest axis first whatever the order of the arguments, which is
        ascending rank order.
        """
        self._known(*axes)
        self._inside(rank)
        ranks, stride = [rank], 1
        for name, size in self.axes:
            if name in axes:
                here = rank // stride % size
                ranks = [r + (at - here) * stride for at in range(size) for r in ranks]
            stride *= size
        return tuple(ranks)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Return every group along these axes, by its first rank. They partition the ranks."""
        self._known(*axes)
        rest = [range(1) if name in axes else range(size) for name, size in self.axes]
        # product runs its last factor fastest, so hand it the axes slowest first
        firsts = (
            self.rank(**dict(zip(self.names, reversed(at), strict=True)))
            for at in product(*reversed(rest))
        )
        return tuple(self.group(first, *axes) for first in firsts)

    def index(self, rank: int, *axes: str) -> int:
        """Return the position of a rank in its group along these axes."""
        self._known(*axes)
        coords, index, stride = self.coords(rank), 0, 1
        for name, size in self.axes:
            if name in axes:
                index += stride * coords[name]
                stride *= size
        return index

    def neighbours(self, rank: int, axis: str) -> tuple[int, int]:
        """Return the previous and the next rank around the ring of one axis."""
        ring, at = self.group(rank, axis), self.index(rank, axis)
        return ring[at - 1], ring[(at + 1) % len(ring)]

    def picture(self, most: int = 128, widest: int = 16) -> str:
        """Draw the ranks: fastest axis across, next one down, the others as titles.

        Axes of size 1 are left out; rows of more than `widest` ranks are broken. Beyond `most` ranks the rest is
        counted, not drawn.
        """
        axes = [(name, size) for name, size in self.axes if size > 1] or [self.axes[0]]
        (across, columns), *rest = axes
        (down, rows), *outer = rest or [("", 1)]
        width = max(len(str(self.size - 1)), len(f"{across}{columns - 1}"))
        left = len(f"{down}{rows - 1}") if down else 0
        lines, drawn = [], 0
        for first in range(0, self.size, rows * columns):
            if drawn >= most:
                lines.append(f"... and {self.size - drawn} more ranks")
                break
            coords = self.coords(first)
            title = " ".join(f"{name}{coords[name]}" for name, _ in reversed(outer))
            lines += [title] if title else []
            for start in range(0, columns, widest):
                part = range(start, min(columns, start + widest))
                lines.append(" " * left + "".join(f"  {across + str(c):>{width}}" for c in part))
                for row in range(rows):
                    label = f"{down}{row}" if down else ""
                    cells = (first + row * columns + column for column in part)
                    lines.append(
                        f"{label:<{left}}" + "".join(f"  {cell:>{width}}" for cell in cells)
                    )
            drawn += rows * columns
        return "\n".join(lines)

    def _known(self, *axes: str) -> None:
        for axis in axes:
            if axis not in self.names:
                raise unknown("mesh axis", axis, self.names)

    def _inside(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            sizes = listed(f"{name}{size}" for name, size in self.axes)
            why = f"is outside the {self.size} ranks of {sizes}"
            raise PlanError(f"rank {rank}", why, f"use 0 <= rank < {self.size}")
