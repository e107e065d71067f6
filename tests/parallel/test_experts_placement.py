"""Placements: who holds which experts, with copies, is honoured exactly in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactness import EXACT, case, measure, worst
from models import tiny
from plait.parallel import Experts, Plan, PlanError
from plait.parallel.experts import role
from plait.parallel.experts.placement import Placement, read_placements, write_placements
from training import trained
from world import run_calls, run_world

LAYERS = [f"model.layers.{n}.mlp.experts" for n in range(2)]


def write(folder: Path, name: str, experts: int, *ranks: tuple[int, ...]) -> str:
    path = folder / f"{name}.json"
    write_placements(path, {layer: Placement(experts, ranks) for layer in LAYERS})
    return str(path)


def test_a_slot_is_an_expert_on_a_rank() -> None:
    placement = Placement(3, ((2, 0), (1,), (0, 1)))
    assert placement.sizes == (2, 1, 2)
    assert placement.homes == ((1, 3), (2, 4), (0,))
    index = torch.tensor([[0, 2], [0, 1], [0, 3]])
    assert placement.spread(index).tolist() == [[1, 0], [3, 2], [1, 5]]
    assert placement.spread(index, turn=1).tolist() == [[3, 0], [1, 4], [3, 5]]
    assert placement.cut().shared(2) == {(0, 2): ((0, 1),), (1, 2): ((1, 2),)}


@settings(deadline=None)
@given(st.data())
def test_copies_share_evenly(data: st.DataObject) -> None:
    experts, ranks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    own = [data.draw(st.permutations(range(experts))) for _ in range(ranks)]
    cuts = [data.draw(st.integers(0, experts)) for _ in range(ranks - 1)]
    placement = Placement(
        experts, (tuple(own[0]), *(tuple(o[:c]) for o, c in zip(own[1:], cuts, strict=True)))
    )
    index = torch.tensor(data.draw(st.lists(st.integers(0, experts), min_size=1, max_size=40)))
    slots = placement.spread(index[:, None], data.draw(st.integers(0, 9)))[:, 0]
    held = torch.tensor([e for rank in placement.ranks for e in rank] + [experts])
    assert torch.equal(held[slots], index), "a slot holds the expert that was asked for"
    for home in placement.homes:
        rows = [int((slots == slot).sum()) for slot in home]
        assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize(
    ("ranks", "told"),
    [(((0, 1), (2,)), "leaves out \\[3\\]"), (((0, 1, 2, 3), (1, 1)), "rank 1 twice"), (((0, 1), (2, 9)), "leaves")],
)  # fmt: skip
def test_refusals(ranks: Any, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Placement(4, ranks)


def test_files(tmp_path: Path) -> None:
    path = write(tmp_path, "file", 4, (3, 1), (0, 2, 1))
    assert read_placements(path)[LAYERS[1]] == Placement(4, ((3, 1), (0, 2, 1)))
    plan = Plan(ep=Experts(2, placement=path), dp=2)
    assert Plan.parse(str(plan)) == plan == Plan.from_json(plan.to_json())
    with pytest.raises(PlanError, match="no path that a plan can say"):
        Experts(2, placement="my file.json")
    with pytest.raises(PlanError, match="one place for all experts"):
        Plan(ep=Experts(1, placement=path)).validate()
    (tmp_path / "other.json").write_text(json.dumps({"format": "?"}))
    for name in ("other.json", "missing.json"):
        with pytest.raises(PlanError, match="is no file of placements"):
            read_placements(tmp_path / name)
    for plan, told in (("dp4 ep4", "on 2 ranks"), ("dp2 ep2", "4 experts on 2 ranks")):
        with pytest.raises(PlanError, match=told):
            Plan.parse(f"{plan},placement={path}").explain(tiny("qwen3_moe"), context=8)


def placed(plan: str, family: str, steps: int, max_norm: float | None = None) -> dict[str, float]:
    return trained(case(plan, family), steps, max_norm=max_norm)


def copies_apart(plan: str, family: str, steps: int) -> dict[str, float]:
    """Negative control: the gradients of an expert's copies are not summed."""
    original = role.RoutedExperts._gradients
    with patch.object(role.RoutedExperts, "_gradients", lambda *a: original(*a)[:1]):
        return trained(case(plan, family), steps)


def homes_swapped(plan: str, family: str, steps: int) -> dict[str, float]:
    """Negative control: tokens go to the slot of the expert's number, whoever is there."""
    with patch.object(Placement, "spread", lambda self, index, turn=0: index):
        return trained(case(plan, family), steps)


def disagree(folder: str) -> str:
    """Each rank is given another file of the same name."""
    rank = torch.distributed.get_rank()
    path = write(Path(folder, str(rank)), "placement", 4, *(((0, 1), (2, 3))[:: 1 - 2 * rank]))
    try:
        with patch("os.getcwd"):
            trained(case(f"dp2 ep2,placement={path}", "mixtral"), 1)
    except PlanError as error:
        return str(error)
    return ""


def test_two_ranks(tmp_path: Path) -> None:
    moved = write(tmp_path, "moved", 4, (3, 0), (2, 1))
    copied = write(tmp_path, "copied", 4, (3, 0, 1), (2, 1))
    eight = write(tmp_path, "eight", 8, (7, 0, 1, 4, 5, 6), (2, 3, 1, 7))
    three = write(tmp_path, "three", 3, (2,), (0, 1))
    cases: list[Any] = [
        (placed, f"dp2 ep2,placement={copied}", "mixtral", 4),
        (placed, f"tp2 ep2,placement={eight}", "qwen3_moe", 2),
        (placed, f"tp2 ep2,exchange=tokens,placement={copied}", "gpt_oss", 2),
        (placed, f"dp2:shard ep2,placement={copied}", "qwen2_moe", 2),
        (measure, case(f"kvp2 ep2,placement={moved}", "deepseek", ("steps", "undo"))),
        (trained, case(f"dp2 ep2,placement={three}", "mixtral", None, num_local_experts=3), 2),
        (copies_apart, f"dp2 ep2,placement={copied}", "mixtral", 1),
        (homes_swapped, f"dp2 ep2,placement={moved}", "mixtral", 1),
    ]
    answers = run_calls(cases, 2)
    for i, each in enumerate(cases):
        errors = worst([answer[i] for answer in answers])
        print(each[0].__name__, each[1:], errors)
        if each[0] in (placed, trained, measure):
            assert max(errors.values()) < EXACT, each
        else:
            assert not errors["gradients"] < 1e-3, each[0].__name__


def test_four_ranks(tmp_path: Path) -> None:
    copied = write(tmp_path, "copied", 4, (3, 0), (2, 1, 3))
    uneven = write(tmp_path, "uneven", 4, (0,), (1, 2, 3))
    cases: list[Any] = [
        (placed, f"dp2 tp2 ep2,placement={copied} etp2", "gpt_oss", 2, 0.01),
        (placed, f"dp4 ep2,placement={uneven}", "mixtral", 2),
    ]
    answers = run_calls(cases, 4)
    for i, each in enumerate(cases):
        errors = worst([answer[i] for answer in answers])
        print(each, errors)
        assert max(errors.values()) < EXACT, each


def test_ranks_with_other_files_are_told(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    for told in run_world(disagree, 2, str(tmp_path)):
        assert "plan" in told or "placement" in told
