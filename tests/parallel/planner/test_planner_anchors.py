"""The model against measured serving points, each left out of the fit that predicts it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from plait.parallel import Plan
from plait.parallel.planner import accuracy
from plait.parallel.planner.anchors import ANCHORS, unique
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.efficiency import fitted, ideal
from plait.parallel.planner.provenance import provenance
from plait.parallel.planner.reading import decoder


def test_the_table_is_whole() -> None:
    assert len(ANCHORS) == 35
    assert len(unique()) == 34
    for anchor in ANCHORS:
        decoder(anchor.model)
        hardware(anchor.hardware)
        assert anchor.tpot_ms > 0
        shape = decoder(anchor.model).shape
        copied = shape.attention != "mla" and (shape.kv_heads or 1) % anchor.tp != 0
        text = f"tp{anchor.tp}{',replicate_kv=true' if copied else ''} dp{anchor.dp} ep{anchor.ep} etp{anchor.etp}"
        Plan.parse(text).validate(shape)


def test_left_out_errors_are_within_the_promise_and_as_published() -> None:
    held = accuracy.leave_one_out()
    found = accuracy.band(held)
    assert found.rows == 34  # all answered
    assert all(np.isfinite(row.predicted_ms) and row.predicted_ms > 0 for row in held)
    assert found.median <= 0.18
    assert found.mean <= 0.24
    said = accuracy.PUBLISHED
    for name in ("median", "mean", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(said, name), abs=0.005), name
    assert "median error 13%" in str(said)


def test_the_shipped_constants_are_the_fit_to_all() -> None:
    constants = fitted(hardware("h100"))
    assert {name: getattr(constants, name) for name in accuracy.GRID} == accuracy.fit()


def test_leaving_out_leaves_out() -> None:
    """A wild row must not pull its own prediction: its error grows in full."""
    rows = list(unique())[:8]
    before = accuracy.leave_one_out(rows)[0]
    rows[0] = replace(rows[0], tpot_ms=rows[0].tpot_ms * 100)
    after = accuracy.leave_one_out(rows)[0]
    assert after.predicted_ms == pytest.approx(before.predicted_ms)
    assert after.error < -0.95


def test_light_is_faster_than_every_measurement() -> None:
    """A bound that a measurement beats is no bound: decode alone, the cache in 8 bits, experts as they are routed."""
    light = replace(ideal(), zipf=1.25)
    bare = {anchor: replace(anchor, aggregated=False, engine="trtllm") for anchor in unique()}
    assert [a.name for a in bare if accuracy.predict(bare[a], light) > a.tpot_ms] == []


def test_provenance_says_what_was_not_measured() -> None:
    h200 = hardware("h200")
    assert provenance(h200, Plan.parse("tp8 ep8 etp1"), 2048) == "calibrated"
    assert "Helix" in provenance(h200, Plan.parse("kvp8"), 2048)
    assert "measured contexts end at 9,216" in provenance(h200, Plan.parse("tp8"), 10**6)
    assert "16 ranks" in provenance(h200, Plan.parse("dp4 tp8"), 2048)
    assert "MI300X (kernels as on H100 SXM)" in provenance(
        hardware("mi300x"), Plan.parse("tp8"), 2048
    )
