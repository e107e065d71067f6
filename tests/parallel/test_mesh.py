"""Mesh arithmetic against brute force and by its laws."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.parallel.errors import PlanError
from plait.parallel.mesh import Mesh

NAMES = ("tp", "cp", "dp", "pp")
meshes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
    lambda sizes: Mesh(tuple(zip(NAMES, sizes, strict=False)))
)


def factorizations(ranks: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(ranks,)]
    return [
        (first, *rest)
        for first in range(1, ranks + 1)
        if ranks % first == 0
        for rest in factorizations(ranks // first, parts - 1)
    ]


def counted(mesh: Mesh) -> list[dict[str, int]]:
    """Every rank's coordinates, by counting with the first axis fastest: no division."""
    names = [name for name, _ in mesh.axes]
    sizes = [size for _, size in mesh.axes]
    rows = product(*(range(size) for size in reversed(sizes)))
    return [dict(zip(names, reversed(row), strict=True)) for row in rows]


@pytest.mark.parametrize("ranks", range(1, 65))
def test_against_brute_force(ranks: int) -> None:
    for sizes in factorizations(ranks, 4):
        mesh = Mesh(tuple(zip(NAMES, sizes, strict=True)))
        table = counted(mesh)
        assert mesh.size == len(table) == ranks
        assert [mesh.coords(rank) for rank in range(ranks)] == table
        assert [mesh.rank(**coords) for coords in table] == list(range(ranks))
        for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("tp", "dp"), ("dp", "cp"), NAMES, ()):
            buckets: dict[tuple, list[int]] = {}
            for rank, coords in enumerate(table):
                rest = tuple(at for name, at in coords.items() if name not in axes)
                buckets.setdefault(rest, []).append(rank)
            assert mesh.groups(*axes) == tuple(tuple(group) for group in buckets.values())


@settings(deadline=None)
@given(meshes, st.data())
def test_laws(mesh: Mesh, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, mesh.size - 1))
    axes = data.draw(st.permutations(mesh.names).flatmap(
        lambda names: st.integers(0, len(names)).map(lambda n: names[:n])))  # fmt: skip
    group = mesh.group(rank, *axes)
    assert mesh.rank(**mesh.coords(rank)) == rank
    assert group[mesh.index(rank, *axes)] == rank
    assert len(group) == prod(mesh.axis_size(axis) for axis in axes)
    assert list(group) == sorted(group)
    assert all(mesh.group(member, *axes) == group for member in group)
    assert sorted(r for g in mesh.groups(*axes) for r in g) == list(range(mesh.size))
    fixed = [name for name in mesh.names if name not in axes]
    here = mesh.coords(rank)
    assert all(mesh.coords(r)[name] == here[name] for r in group for name in fixed)


@settings(deadline=None)
@given(meshes, st.data())
def test_neighbours_go_round(mesh: Mesh, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, mesh.size - 1))
    axis = data.draw(st.sampled_from(mesh.names))
    ring, at = [rank], rank
    for _ in range(mesh.axis_size(axis) - 1):
        before, at = at, mesh.neighbours(at, axis)[1]
        assert mesh.neighbours(at, axis)[0] == before
        ring.append(at)
    assert mesh.neighbours(at, axis)[1] == rank
    assert sorted(ring) == list(mesh.group(rank, axis))


def test_neighbours_are_previous_then_next() -> None:
    mesh = Mesh((("tp", 2), ("cp", 4)))
    assert mesh.neighbours(2, "cp") == (0, 4)
    assert mesh.neighbours(7, "cp") == (5, 1)
    assert mesh.neighbours(0, "tp") == (1, 1)


def test_the_order_of_axes_matters() -> None:
    """Negative control: with the axes the other way round the tables are different."""
    right, wrong = Mesh((("tp", 2), ("cp", 4))), Mesh((("cp", 4), ("tp", 2)))
    assert right.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert wrong.groups("tp") != right.groups("tp")
    assert right.group(0, "tp", "cp") == right.group(0, "cp", "tp")


def test_refusals() -> None:
    mesh = Mesh((("tp", 2), ("cp", 3)))
    for call in (
        lambda: mesh.coords(6),
        lambda: mesh.coords(-1),
        lambda: mesh.group(6, "tp"),
        lambda: mesh.group(0, "tpp"),
        lambda: mesh.rank(tp=1),
        lambda: mesh.rank(tp=2, cp=0),
        lambda: mesh.rank(tp=0, cp=0, dp=0),
        lambda: mesh.neighbours(0, "dp"),
        lambda: Mesh((("tp", 2), ("tp", 2))),
        lambda: Mesh((("tp", 0),)),
    ):
        with pytest.raises(PlanError):
            call()
    assert Mesh((("tp", 2), ("dp", 1))).rank(tp=1) == 1


def test_picture() -> None:
    mesh = Mesh((("tp", 2), ("cp", 2), ("dp", 2), ("pp", 1)))
    assert mesh.picture() == "\n".join(
        [
            "dp0",
            "     tp0  tp1",
            "cp0    0    1",
            "cp1    2    3",
            "dp1",
            "     tp0  tp1",
            "cp0    4    5",
            "cp1    6    7",
        ]
    )
    assert Mesh((("tp", 1),)).picture() == "  tp0\n    0"
    many = Mesh((("tp", 8), ("cp", 8), ("dp", 64))).picture()
    assert "... and 3968 more ranks" in many
    assert len(many.splitlines()) < 30


def test_picture_breaks_long_rows() -> None:
    lines = Mesh((("ep", 20),)).picture().split("\n")
    assert [line.split() for line in lines] == [
        [f"ep{i}" for i in range(16)], [str(i) for i in range(16)],
        ["ep16", "ep17", "ep18", "ep19"], ["16", "17", "18", "19"],
    ]  # fmt: skip
