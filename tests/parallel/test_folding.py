"""The two meshes of a plan over the same ranks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plait.parallel.errors import PlanError
from plait.parallel.folding import Folding
from plait.parallel.mesh import Mesh
from plait.parallel.plan import Plan


def fold(text: str) -> Folding:
    return Folding.of(Plan.parse(text))


# (plan, axes, groups): the tables of Megatron's folding, made by hand
PINNED = [
    ("tp2 cp2 dp2 ep2 etp2", ("etp",), ((0, 1), (2, 3), (4, 5), (6, 7))),
    ("tp2 cp2 dp2 ep2 etp2", ("ep",), ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("tp2 cp2 dp2 ep2 etp2", ("edp",), ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("tp2 cp2 dp2 ep2 etp2", ("tp",), ((0, 1), (2, 3), (4, 5), (6, 7))),
    ("tp2 cp2 dp2 ep2 etp2", ("cp",), ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("tp2 cp2 dp2 ep2 etp2", ("dp",), ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("pp2 cp2 dp2 ep2 etp2", ("ep",), ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("pp2 cp2 dp2 ep2 etp2", ("edp",), tuple((r,) for r in range(8))),
    ("pp2 cp2 dp2 ep2 etp2", ("pp",), ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("tp2 cp2 dp2 ep8", ("ep",), (tuple(range(8)),)),
    ("tp4 dp2 ep2", ("ep",), ((0, 1), (2, 3), (4, 5), (6, 7))),
    ("tp4 dp2 ep2", ("edp",), ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("kvp2 tp2 dp2", ("kvp",), ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("kvp2 tp2 dp2", ("ffn_tp",), ((0, 2, 1, 3), (4, 6, 5, 7))),
    ("cp2 tp2 dp2", ("kvp",), tuple((r,) for r in range(8))),
    ("cp2 tp2 dp2", ("ffn_tp",), ((0, 1), (2, 3), (4, 5), (6, 7))),
]


@pytest.mark.parametrize(("text", "axes", "groups"), PINNED)
def test_pinned(text: str, axes: tuple[str, ...], groups: tuple) -> None:
    assert fold(text).groups(*axes) == groups


@pytest.mark.parametrize("wrong", ["attention", "experts"])
def test_swapped_axes_fail_the_pinned_tables(wrong: str) -> None:
    """Negative control: exchange the two fastest axes of one side and a pinned table breaks."""
    broken = 0
    for text, axes, groups in PINNED:
        right = fold(text)
        a, b, *rest = getattr(right, wrong).axes
        sides = {"attention": right.attention, "experts": right.experts, wrong: Mesh((b, a, *rest))}
        broken += Folding(plan=right.plan, **sides).groups(*axes) != groups
    assert broken >= 2


def test_brute_force_to_64_ranks() -> None:
    """Both factorizations of every plan up to 64 ranks, by nested loops."""
    powers = (1, 2, 3, 4, 8)
    tried = 0
    for tp, cp, dp, pp in product(powers, powers, powers, (1, 2, 4)):
        if tp * cp * dp * pp > 64:
            continue
        for etp, ep in product(powers, powers):
            stage = tp * cp * dp
            plan = Plan(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep)
            if stage % (etp * ep):
                with pytest.raises(PlanError):
                    Folding.of(plan)
                continue
            folding, edp = Folding.of(plan), stage // (etp * ep)
            rows = product(range(pp), range(edp), range(ep), range(etp))
            for rank, (p, e, x, t) in enumerate(rows):
                assert folding.experts.coords(rank) == {"etp": t, "ep": x, "edp": e, "pp": p}
            rows = product(range(pp), range(dp), range(cp), range(tp))
            for rank, (p, d, c, t) in enumerate(rows):
                assert folding.attention.coords(rank) == {"tp": t, "cp": c, "dp": d, "pp": p}
            assert folding.attention.groups("pp") == folding.experts.groups("pp")
            tried += 1
    assert tried > 500


@st.composite
def foldings(draw: st.DrawFn) -> Folding:
    size = st.sampled_from((1, 2, 3, 4))
    axes = {axis: draw(size) for axis in ("tp", "dp", "pp", "ep", "etp")}
    axes[draw(st.sampled_from(("cp", "kvp")))] = draw(size)
    plan = Plan(**axes)
    assume(plan.world_size // plan.pp.size % (plan.ep.size * plan.etp) == 0)
    return Folding.of(plan)


@settings(deadline=None)
@given(foldings())
def test_laws(folding: Folding) -> None:
    assert folding.size == folding.attention.size == folding.experts.size
    assert folding.attention.groups("pp") == folding.experts.groups("pp")
    everyone = list(range(folding.size))
    for axes in (("tp",), ("kvp",), ("ffn_tp",), ("ep", "etp"), ("edp",), ("dp", "ffn_tp")):
        groups = folding.groups(*axes)
        assert sorted(r for group in groups for r in group) == everyone
        for group in groups:
            assert all(folding.group(r, *axes) == group for r in group)
            assert [folding.index(r, *axes) for r in group] == list(range(len(group)))


@settings(deadline=None)
@given(foldings())
def test_head_runs(folding: Folding) -> None:
    """The runs of one model copy are 0..N-1, and the ranks of a kvp group own consecutive runs."""
    plan = folding.plan
    runs = plan.size("ffn_tp")
    for group in folding.groups("ffn_tp"):
        assert folding.head_runs(group) == tuple(range(runs))
        assert sorted(group) == list(folding.group(group[0], "tp", "kvp"))
    for group in folding.groups("kvp"):
        owned = folding.head_runs(group)
        # after an all-to-all inside the kvp group, member k holds piece k of its tp slice
        first = folding.attention.coords(group[0])["tp"] * plan.kvp.size
        assert owned == tuple(range(first, first + plan.kvp.size))


def test_head_run_is_not_the_position_in_the_communicator() -> None:
    """Negative control: rank order (a bug that shipped elsewhere) differs as soon as both cut."""
    for text in ("kvp2 tp2", "kvp4 tp2", "kvp2 tp4", "kvp3 tp2 dp2"):
        folding = fold(text)
        by_rank = tuple(range(folding.plan.size("ffn_tp")))
        assert folding.head_runs(sorted(folding.group(0, "ffn_tp"))) != by_rank
    for text in ("kvp4", "tp4"):
        assert fold(text).head_runs(range(4)) == (0, 1, 2, 3)
    assert fold("kvp2 tp2").head_runs(range(4)) == (0, 2, 1, 3)


def test_neighbours_are_previous_then_next() -> None:
    folding = fold("kvp4 tp2 dp2 ep8")
    assert folding.neighbours(0, "kvp") == (6, 2)
    assert folding.neighbours(9, "ep") == (8, 10)


def test_communicators_are_shared_by_both_sides() -> None:
    made = fold("kvp4 tp2 ep4 etp2").communicators()
    assert made[0, 1] == ["tp", "etp"]
    assert made[0, 2, 4, 6] == ["kvp", "ep"]
    assert made[tuple(range(8))] == ["ffn_tp", "etp+ep", "world"]
    assert len(made) == 4 + 2 + 1
    ep_is_tp = fold("tp4 dp2 ep4").communicators()
    assert ep_is_tp[0, 1, 2, 3] == ["tp", "ep"]
    assert ep_is_tp[0, 4] == ["dp", "edp"]
    assert fold("tp1").communicators() == {}
    assert fold("tp2").communicators() == {(0, 1): ["tp", "edp", "world"]}


@settings(deadline=None)
@given(foldings(), st.data())
def test_communicators_of_one_rank(folding: Folding, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, folding.size - 1))
    every = folding.communicators()
    own = folding.communicators(rank)
    assert own == {ranks: names for ranks, names in every.items() if rank in ranks}
    assert all(list(ranks) == sorted(ranks) and len(ranks) > 1 for ranks in every)
    for ranks, names in own.items():
        for name in names:
            assert tuple(sorted(folding.group(rank, *name.split("+")))) == ranks


def test_refusals() -> None:
    folding = fold("tp2 cp2 ep4")
    with pytest.raises(PlanError, match="mixes the attention and the expert mesh"):
        folding.group(0, "tp", "ep")
    with pytest.raises(PlanError, match="did you mean 'etp'"):
        folding.group(0, "eetp")
    with pytest.raises(PlanError, match="outside the 4 ranks"):
        folding.group(4, "tp")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tp2 ep4", "attention 2 = tp2 * cp1 * dp1 * pp1"),
        ("tp2 ep4", "experts 2 = etp1 * ep4 * edp(2/4) * pp1"),
        ("tp2 ep4", "use ep in {1, 2} or a dp that is a multiple of 2"),
        ("kvp3 tp2 ep2 etp2", "tp2 * kvp3"),
        ("kvp3 tp2 ep2 etp2", "use ep in {1, 3} or etp in {1, 3} or a dp that is a multiple of 2"),
    ],
)
def test_what_does_not_fold_prints_both_sides_and_the_remedy(text: str, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        fold(text)
    assert told in str(caught.value)


def test_the_remedy_for_dp_works() -> None:
    for tp, ep, etp in product((1, 2, 3, 4, 6), (1, 2, 3, 4, 8), (1, 2, 3)):
        try:
            Folding.of(Plan(tp=tp, ep=ep, etp=etp))
        except PlanError as error:
            times = int(error.instead.split()[-1])
            for dp in range(1, 2 * times + 1):
                whole = tp * dp % (ep * etp) == 0
                assert whole == (dp % times == 0)


def test_picture() -> None:
    text = fold("kvp2 tp2 ep2 etp2").picture()
    assert "attention (tp2 kvp2 dp1 pp1)" in text
    assert "experts (etp2 ep2 edp1 pp1)" in text
    assert "kvp1    2    3" in text
    assert "ep1     2     3" in text
    assert "experts" not in fold("tp2").picture()


PEERS = json.loads((Path(__file__).parent / "rank_tables.json").read_text())["tables"]


@pytest.mark.parametrize("row", PEERS, ids=lambda row: f"{row['peer']}-{row['plan']}")
def test_the_groups_are_those_of_peers(row: dict) -> None:
    """Megatron-Core's and DeepSpeed's own tables (made by peer_rank_tables.py) are ours."""
    here = fold(row["plan"])
    for axes, groups in row["groups"].items():
        assert sorted(here.groups(*axes.split())) == sorted(map(tuple, groups)), axes


def test_an_expert_mesh_inside_dp_fails_the_peers_tables() -> None:
    """Negative control: ep taken out of the dp ranks, as before folding, is not what the peers do."""
    broken = 0
    for row in PEERS:
        here = fold(row["plan"])
        sizes = here.experts.axes
        inside = Mesh((*sizes[:1], sizes[2], sizes[1], *sizes[3:]))
        groups = Folding(plan=here.plan, attention=here.attention, experts=inside).groups("ep")
        broken += sorted(groups) != sorted(map(tuple, row["groups"]["ep"]))
    assert broken >= 8
