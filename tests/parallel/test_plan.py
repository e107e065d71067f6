"""The plan as data: equality, text, JSON, digest, and what it refuses."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.parallel.axes import (
    SCHEDULES,
    Experts,
    Helix,
    Pipeline,
    Replicate,
    Ring,
    Shard,
    Tensor,
    Ulysses,
)
from plait.parallel.errors import PlanError
from plait.parallel.plan import Plan

SIZE = st.integers(1, 64)


def _choices(axis: str) -> st.SearchStrategy:
    flag = st.booleans()
    match axis:
        case "dp":
            return SIZE | st.builds(Replicate, SIZE) | st.builds(Shard, SIZE)
        case "cp":
            return SIZE | st.builds(Ring, SIZE) | st.builds(Ulysses, SIZE)
        case "tp":
            return SIZE | st.builds(Tensor, SIZE, sp=flag, replicate_kv=flag)
        case "pp":
            few = st.none() | st.integers(1, 32)
            schedule = st.sampled_from(SCHEDULES)
            return SIZE | st.builds(Pipeline, SIZE, schedule=schedule, microbatches=few)
        case "kvp":
            return SIZE | st.builds(
                Helix,
                SIZE,
                interleave=st.integers(1, 64),
                chunks=st.one_of(st.integers(1, 8), st.just("auto")),
                exchange=st.sampled_from(("auto", "partials", "kv")),
                mla=st.sampled_from(("latent", "value")),
            )
    return SIZE


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    axes = draw(st.sets(st.sampled_from(("dp", "tp", "cp", "kvp", "pp", "ep", "etp"))))
    given_axes = {axis: draw(_choices(axis)) for axis in sorted(axes)}
    if "cp" in given_axes and "kvp" in given_axes:
        given_axes.pop(draw(st.sampled_from(("cp", "kvp"))))
    return Plan(**given_axes)


@settings(deadline=None)
@given(plans())
def test_round_trips(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert eval(repr(plan), {"Plan": Plan}) == plan
    assert hash(Plan.parse(str(plan))) == hash(plan)
    assert Plan.parse(str(plan)).digest() == plan.digest()


@settings(deadline=None)
@given(plans(), plans())
def test_text_and_digest_tell_plans_apart(a: Plan, b: Plan) -> None:
    assert (a == b) == (str(a) == str(b)) == (a.to_json() == b.to_json())
    assert (a == b) == (a.digest() == b.digest())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="tpckvde0123456789:,= .ringsp", max_size=30))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except PlanError as error:
        refused = error
    else:
        assert Plan.parse(str(plan)) == plan
        return
    assert all((refused.asked, refused.because, refused.instead))


def test_integers_are_the_default_choice() -> None:
    assert Plan(tp=2) == Plan(tp=Tensor(2))
    assert Plan(dp=2, cp=4, pp=2) == Plan(dp=Replicate(2), cp=Ring(4), pp=Pipeline(2))
    assert Plan(kvp=2) == Plan(kvp=Helix(2))
    assert Plan(cp=Ring(2)) != Plan(cp=Ulysses(2))
    assert Plan(dp=Shard(2)) != Plan(dp=2)
    assert Plan(tp=2).tp.size == 2
    assert not Plan(tp=2).tp.sp


@pytest.mark.parametrize(
    ("text", "plan", "printed"),
    [
        ("kvp4 tp2 ep4 etp2", Plan(kvp=4, tp=2, ep=4, etp=2), "kvp4 tp2 ep4 etp2"),
        ("tp2:sp", Plan(tp=Tensor(2, sp=True)), "tp2:sp"),
        ("tp2,sp=true", Plan(tp=Tensor(2, sp=True)), "tp2:sp"),
        ("tp8,replicate_kv=true", Plan(tp=Tensor(8, replicate_kv=True)), "tp8,replicate_kv=true"),
        (
            "tp8:sp,replicate_kv=true",
            Plan(tp=Tensor(8, sp=True, replicate_kv=True)),
            "tp8:sp,replicate_kv=true",
        ),
        ("cp4:ring", Plan(cp=4), "cp4:ring"),
        ("cp4", Plan(cp=Ring(4)), "cp4:ring"),
        ("cp4:ulysses", Plan(cp=Ulysses(4)), "cp4:ulysses"),
        (
            "pp2:1f1b,microbatches=8",
            Plan(pp=Pipeline(2, schedule="1f1b", microbatches=8)),
            "pp2:1f1b,microbatches=8",
        ),
        ("dp2:shard", Plan(dp=Shard(2)), "dp2:shard"),
        ("dp2", Plan(dp=Replicate(2)), "dp2"),
        ("kvp4:interleave=8,chunks=2", Plan(kvp=Helix(4, interleave=8, chunks=2)),
         "kvp4,interleave=8,chunks=2"),
        ("kvp4,interleave=16,chunks=auto", Plan(kvp=4), "kvp4"),
        ("kvp4,chunks=1", Plan(kvp=Helix(4, chunks=1)), "kvp4,chunks=1"),
        ("ep8", Plan(ep=8), "ep8 etp1"),
        ("ep8:exchange=tokens", Plan(ep=Experts(8, exchange="tokens")), "ep8,exchange=tokens etp1"),
        ("ep8,capacity=1.25,drop=position", Plan(ep=Experts(8, capacity=1.25, drop="position")),
         "ep8,capacity=1.25,drop=position etp1"),
        ("ep8,capacity=2", Plan(ep=Experts(8, capacity=2)), "ep8,capacity=2.0 etp1"),
        ("tp1", Plan(), "tp1"),
        ("  tp2\n\tdp3 ", Plan(tp=2, dp=3), "dp3 tp2"),
    ],
)  # fmt: skip
def test_text_forms(text: str, plan: Plan, printed: str) -> None:
    assert Plan.parse(text) == plan
    assert str(plan) == printed


def test_the_design_examples() -> None:
    text = "tp2:sp cp4:ring ep8 etp1 pp2:1f1b,microbatches=8 dp2:shard kvp4:interleave=16,chunks=2"
    plan = Plan.parse(text)
    assert plan == Plan(
        tp=Tensor(2, sp=True),
        cp=Ring(4),
        ep=8,
        etp=1,
        pp=Pipeline(2, schedule="1f1b", microbatches=8),
        dp=Shard(2),
        kvp=Helix(4, interleave=16, chunks=2),
    )
    assert plan.world_size == 32
    assert plan.size("edp") == 2
    other = Plan(dp=Shard(2), tp=2, cp=Ring(2), ep=8, etp=1, pp=Pipeline(2, microbatches=8))
    other.validate()
    assert other.world_size == 16
    assert other.size("edp") == 1


def test_sizes() -> None:
    helix = Plan.parse("kvp4 tp2 dp3 ep2 etp2 pp5")
    sizes = {axis: helix.size(axis) for axis in ("dp", "tp", "cp", "kvp", "pp", "ep", "etp")}
    assert sizes == {"dp": 3, "tp": 2, "cp": 4, "kvp": 4, "pp": 5, "ep": 2, "etp": 2}
    assert helix.size("edp") == 6
    assert helix.size("ffn_tp") == 8
    assert helix.world_size == 120
    ring = Plan(cp=4, tp=2)
    assert (ring.size("cp"), ring.size("kvp"), ring.size("ffn_tp")) == (4, 1, 2)
    assert Plan(cp=4, kvp=4).world_size == 4
    with pytest.raises(PlanError, match="did you mean 'tp'"):
        helix.size("tpp")


BAD = [
    ("", "names no axis", "tp1"),
    ("   ", "names no axis", "tp1"),
    ("tp", "not tp with a size", "tp2"),
    ("tp0", "not positive", "tp >= 1"),
    ("tp-2", "not tp with a size", "tp2"),
    ("tp=2", "not tp with a size", "tp2"),
    ("tp2.5", "not tp with a size", "tp2"),
    ("tp9999999999", "not tp with a size", "tp2"),
    ("TP2", "not an axis", "did you mean 'tp'"),
    ("8", "not an axis", "kvp4 tp2"),
    ("kv4", "not known", "did you mean 'kvp'"),
    ("tp2 tp2", "second time", "once"),
    ("tp2,cp4", "not known", "sp"),
    ("tp2:sq", "not known", "sp"),
    ("cp4:rnig", "not known", "did you mean 'ring'"),
    ("cp4:ring,ulysses", "two choices", "keep one"),
    ("pp2:gpipe,1f1b", "two choices", "keep one"),
    ("pp2:gpipe,schedule=1f1b", "second time", "once"),
    ("pp2:1f1", "not known", "did you mean '1f1b'"),
    ("pp2,microbatches=0", "not positive", ">= 1"),
    ("pp2,microbatches=x", "not a whole number", "=4"),
    ("pp2,schedule=none", "not known", "gpipe"),
    ("tp2::sp", "not known", "sp"),
    ("tp2:", "not known", "sp"),
    ("tp2,replicat_kv=true", "not known", "did you mean 'replicate_kv'"),
    ("tp2,replicate_kv=1", "not true or false", "=true"),
    ("tp2,sp=true,sp=true", "second time", "once"),
    ("kvp2,exchange=latent", "not known", "partials"),
    ("kvp2,interleave=0", "not positive", ">= 1"),
    ("kvp2,mla=values", "not known", "did you mean 'value'"),
    ("ep2:x", "not known", "exchange"),
    ("ep2,capacity=-1", "not a number", "1.25"),
    ("ep2,capacity=many", "not a number", "1.25"),
    ("ep2,drop=last", "not known", "position"),
    ("dp2:shard,foo=1", "not known", "param_dtype"),
    ("kvp2 cp4", "same axis", "kvp alone"),
    ("kvp٢", "not kvp with a size", "kvp2"),
]


@pytest.mark.parametrize(("text", "because", "instead"), BAD)
def test_bad_texts(text: str, because: str, instead: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert because in f"{caught.value.asked} {caught.value.because}"
    assert instead in caught.value.instead
    assert (
        str(caught.value) == f"{caught.value.asked} {caught.value.because}; {caught.value.instead}"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.asked == caught.value.asked


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "{", "3", '{"tp": 2, "tp": 2}', '{"xp": 2}', '{"tp": "2"}', '{"tp": true}',
        '{"tp": {"sp": true}}', '{"tp": {"size": 2, "choice": "ring"}}', '{"etp": {"size": 2}}',
        '{"tp": {"size": 2, "sq": true}}', '{"tp": {"size": 2, "sp": 1}}', '{"tp": 2.0}',
        '{"kvp": {"size": 2, "interleave": "16"}}', '{"tp": null}', '{"cp": {"size": 0}}',
        '{"cp": {"size": 2, "choice": ["ring"]}}', '{"pp": {"size": 2, "schedule": []}}',
        '{"tp": {"size": 2, "axis": "tp"}}',
    ],
)  # fmt: skip
def test_bad_json(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "axes",
    [
        {"tp": 0}, {"tp": -1}, {"tp": True}, {"tp": 2.0}, {"tp": "2"}, {"tp": None},
        {"tp": Ring(2)}, {"cp": Tensor(2)}, {"ep": Shard(2)}, {"cp": 2, "kvp": 4},
    ],
)  # fmt: skip
def test_bad_values(axes: dict) -> None:
    with pytest.raises(PlanError):
        Plan(**axes)


def test_the_plan_is_frozen_and_small() -> None:
    plan = Plan(tp=2)
    with pytest.raises(AttributeError):
        plan.tp = Tensor(4)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        plan.tp.size = 4  # type: ignore[misc]
    assert list(Plan.__dataclass_fields__) == ["dp", "tp", "cp", "kvp", "pp", "ep", "etp"]


def test_json_is_plain() -> None:
    plan = Plan(tp=Tensor(2, sp=True), dp=2, ep=4)
    assert json.loads(plan.to_json()) == {
        "dp": 2,
        "tp": {"size": 2, "choice": "tensor", "sp": True},
        "ep": 4,
        "etp": 1,
    }


def test_equal_on_all_ranks() -> None:
    """Text, digest and errors do not depend on the process' hash seed."""
    code = (
        "from plait.parallel.plan import Plan\n"
        "from plait.parallel.shape import ModelShape\n"
        "p = Plan.parse('tp8:sp ep2 dp2:shard cp2:ulysses')\n"
        "print(p, p.digest(), p.to_json())\n"
        "try: p.validate(ModelShape(heads=24, kv_heads=6, layers=2))\n"
        "except ValueError as e: print(e)\n"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "12345")
    }
    assert len(outs) == 1
    assert "use tp in" in outs.pop()


@pytest.mark.parametrize("name", ["errors", "text", "plan", "mesh", "folding"])
def test_the_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"plait.parallel.{name}")
    ran = doctest.testmod(module)
    assert ran.attempted > 0
    assert ran.failed == 0
