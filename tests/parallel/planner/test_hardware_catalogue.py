"""The hardware catalogue: complete, sourced, and readable by the names people type."""

from __future__ import annotations

import dataclasses

import pytest

from plait.parallel import PlanError
from plait.parallel.planner.catalogue import catalogue, hardware
from plait.parallel.planner.efficiency import fitted, ideal
from plait.parallel.planner.hardware import Figure
from plait.parallel.planner.precision import BITS, element_bytes

PARTS = catalogue()
WANTED = {
    "a100", "h100", "h200", "b200", "b300", "gb200", "gb300", "mi300x", "mi355x", "ascend910c", "h20", "h800",
}  # fmt: skip


def test_every_part_that_is_promised_is_there() -> None:
    assert set(PARTS) >= WANTED


@pytest.mark.parametrize("name", PARTS)
def test_every_figure_has_unit_direction_and_source(name: str) -> None:
    figures = PARTS[name].figures()
    assert len(figures) >= 9
    for field, figure in figures.items():
        assert figure.source.strip(), field
        assert (figure.unit == "B/s") == bool(figure.direction), field
    assert {figures[link].direction for link in ("scale_up", "scale_out", "host_link")} == {
        "per direction"
    }


@pytest.mark.parametrize(
    ("value", "unit", "source", "direction"),
    [
        (1.0, "B", "", ""),
        (1.0, "B", "  ", ""),
        (1.0, "GB", "sheet", ""),
        (1.0, "B/s", "sheet", ""),
        (1.0, "B/s", "sheet", "sideways"),
        (1.0, "FLOP/s", "sheet", "per direction"),
        (0.0, "B", "sheet", ""),
        (float("nan"), "B", "sheet", ""),
    ],
)
def test_a_figure_without_unit_direction_or_source_is_refused(
    value: float, unit: str, source: str, direction: str
) -> None:
    with pytest.raises(ValueError):
        Figure(value, unit, source, direction)


def test_both_directions_are_halved_once() -> None:
    assert Figure(900e9, "B/s", "sheet", "both directions").each_way == 450e9
    assert Figure(450e9, "B/s", "sheet", "per direction").each_way == 450e9


def test_figures_against_what_the_sources_say_together() -> None:
    """Nothing sparse or bidirectional slipped in: FP8 is twice BF16, and the ridge of each is known."""
    for part in PARTS.values():
        if part.fp8 is not None:
            assert part.fp8.value / part.bf16.value == pytest.approx(2.0, rel=0.001), part.name
        assert 30 < part.bf16.value / part.memory_bandwidth.value < 400, part.name
    assert PARTS["gb200"].domain.value == 72
    assert PARTS["ascend910c"].domain.value == 384


@pytest.mark.parametrize("said", ["gb200", "GB200 NVL72", "gb200-nvl72", "GB200"])
def test_names_as_people_write_them(said: str) -> None:
    assert hardware(said).name == "gb200"


def test_an_unknown_part_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="did you mean 'gb200'"):
        hardware("gb2000")


def test_a_precision_runs_on_the_best_unit_there_is() -> None:
    assert hardware("gb200").peak("nvfp4") == 10000e12
    assert hardware("h100").peak("nvfp4") == hardware("h100").peak("fp8") == 1979e12
    assert hardware("a800").peak("fp8") == 312e12
    with pytest.raises(PlanError, match="did you mean 'mxfp8'"):
        hardware("h100").peak("mxfp5")


def test_scales_are_counted() -> None:
    assert element_bytes("mxfp4") == (32 * 4 + 8) / 32 / 8
    assert element_bytes("nvfp4") == (16 * 4 + 8) / 16 / 8
    assert element_bytes("mxfp8") == (32 * 8 + 8) / 32 / 8
    assert all(bits > 0 for bits in BITS.values())


@pytest.mark.parametrize("name", PARTS)
def test_no_kernel_is_faster_than_light(name: str) -> None:
    constants = fitted(PARTS[name])
    for kernel in [*constants.gemm.values(), constants.attention]:
        assert 0 < kernel.compute <= 1
        assert 0 < kernel.memory <= 1
    assert set(constants.gemm) == {"bf16", "fp8", "fp4"}
    assert 0 < constants.link <= 1
    bound = ideal()
    assert bound.layer == bound.step == bound.attention.fixed == 0


def test_scaled_multiplies_and_says_so() -> None:
    fast = hardware("h100").scaled(memory_bandwidth=2)
    assert fast.memory_bandwidth.value == 2 * hardware("h100").memory_bandwidth.value
    assert "times 2" in fast.memory_bandwidth.source
    assert dataclasses.replace(
        fast, memory_bandwidth=hardware("h100").memory_bandwidth
    ) == hardware("h100")
