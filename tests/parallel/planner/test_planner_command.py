"""`plait plan` as a person meets it: tables that paste, refusals that help, JSON, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from plait.parallel import Plan, PlanError
from plait.parallel.planner.answer import answer
from plait.parallel.planner.auto import auto
from plait.parallel.planner.command import plan
from plait.parallel.planner.goals import Goal, seconds_of
from plait.parallel.planner.reading import decoder

app = typer.Typer(pretty_exceptions_enable=False)
app.command("plan")(plan)


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


EXAMPLE = (
    "llama-405b",
    "--hardware",
    "gb200",
    "--gpus",
    "64",
    "--context",
    "1M",
    "--ttl",
    "20ms",
    "--kv",
    "mxfp4",
)


def test_the_example_of_the_readme() -> None:
    said = run(*EXAMPLE)
    assert said.exit_code == 0
    lines = said.output.splitlines()
    assert (
        "llama-405b on 64 x GB200 NVL72, 1,000,000 tokens of context, 20 ms per token" in lines[0]
    )
    first = lines[2]
    text = first[: lines[1].index("batch")].strip()
    assert str(Plan.parse(text)) == text
    assert Plan.parse(text).kvp.size > 1
    for part in (
        "tok/s/user",
        "tok/s/GPU",
        "GB/GPU",
        "extrapolated [1]",
        "no measured Helix point",
        "median error 13%",
    ):
        assert part in said.output, part


def test_json_is_whole_and_says_how_wrong_it_may_be() -> None:
    said = json.loads(run(*EXAMPLE, "--json").output)
    best = said["proposals"][0]
    assert best["ttl"] <= 0.02
    assert Plan.parse(best["plan"]).world_size == best["ranks"] == 64
    assert best["bottleneck"] == max(best["split"], key=best["split"].get)
    assert said["error_band"]["rows"] == 34
    assert len(said["frontier"]) > 5
    assert said["reached"] is True
    rates = [row["tokens_per_rank"] for row in said["proposals"]]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("llama-406b",), "did you mean 'llama-405b'"),
        (("llama-8b", "--hardware", "h1000"), "did you mean 'h100'"),
        (("llama-8b", "--kv", "mxfp5"), "did you mean 'mxfp8'"),
        (("llama-8b", "--ttl", "20"), "no time with a unit"),
        (("llama-8b", "--gpus", "0"), "ranks=0 is not positive"),
        (("llama-8b", "--gpus", "100000"), "2048 or fewer and run copies"),
        (("llama-8b", "--context", "lots"), "no number of tokens"),
        (("llama-8b", "--pareto", "x.gif"), "end its name in .png"),
        (("llama-8b", "--pareto", "nowhere/x.png"), "folder that is not there"),
        (("llama-405b", "--hardware", "h100", "--gpus", "4"), "--gpus 8"),
        (
            ("qwen3-32b", "--gpus", "16", "--plan", "tp3 kvp5"),
            "the nearest legal plan is 'kvp4 tp2'",
        ),
        (
            ("llama-70b", "--hardware", "h100", "--gpus", "1", "--weights", "bf16"),
            "does not fit by any plan",
        ),
        (
            ("llama-70b", "--hardware", "h100", "--plan", "dp8", "--weights", "bf16"),
            "the nearest plan that fits is 'dp",
        ),
        (("llama-8b", "--plan", "dp16"), "use --gpus 16"),
        (("llama-8b", "--acceptance", "2"), "is no chance"),
        (("llama-8b", "--arrivals", "2/s"), "give --prompt"),
        (("llama-8b", "--prompt", "1k", "--arrivals", "2"), "use e.g. 2/s"),
        (("llama-8b", "--prompt", "1k", "--arrivals", "2/s", "--plan", "tp2"), "without --plan"),
        (("llama-8b", "--comm", "fp4"), "use bf16 or fp8"),
        (("llama-8b", "--stall", "100"), "no time with a unit"),
        (("llama-8b", "--idle", "3"), "a context that is longer"),
        (("llama-8b", "--prompt", "1k", "--tiers", "dsik"), "did you mean 'disk'"),
        (("llama-8b", "--experts", "some"), "use uniform, zipf"),
    ],
)
def test_refusals_say_what_would_do(arguments: tuple[str, ...], says: str) -> None:
    said = run(*arguments)
    assert said.exit_code == 2
    assert "Refused:" in said.output
    assert says in said.output
    assert "Traceback" not in said.output


def test_an_impossible_goal_gives_the_best_there_is_and_what_would_reach_it() -> None:
    goal = Goal(ranks=2, context=65536, ttl=0.012, weights=("bf16",), kv=("bf16",))
    said = answer("qwen3-32b", "h200", goal)
    assert not said.reached
    assert len(said.proposals) == 1
    assert said.proposals[0].ttl == min(row.ttl for row in said.frontier) > goal.ttl
    assert "the best reachable is" in said.why
    assert any(way.startswith("--gpus") for way in said.remedies)
    more = int(next(way for way in said.remedies if way.startswith("--gpus")).split()[1])
    assert answer(
        "qwen3-32b", "h200", Goal(ranks=more, context=65536, ttl=0.012, weights=("bf16",))
    ).reached
    shown = run(
        "qwen3-32b",
        "--hardware",
        "h200",
        "--gpus",
        "2",
        "--context",
        "65536",
        "--ttl",
        "12ms",
        "--weights",
        "bf16",
    )
    assert shown.exit_code == 0
    assert "Out of reach: 12 ms per token: the best reachable is" in shown.output
    never = answer("qwen3-32b", "h200", Goal(ranks=2, context=4096, ttl=1e-5))
    assert never.remedies == ()


def test_prompts_compare_aggregated_with_disaggregated() -> None:
    said = run(
        "qwen3-32b",
        "--hardware",
        "h200",
        "--gpus",
        "16",
        "--prompt",
        "8k",
        "--ttl",
        "30ms",
        "--ftl",
        "2s",
    )
    assert said.exit_code == 0
    assert "aggregated" in said.output
    assert "1st token s" in said.output
    goal = Goal(ranks=16, context=8192, prompt=8192, ttl=0.03, ftl=2.0)
    modes = {row.mode for row in answer("qwen3-32b", "h200", goal, most=500).proposals}
    assert modes == {"aggregated", "disaggregated"}


def test_arrivals_are_simulated_apart_from_the_table() -> None:
    asked = (
        "qwen3-32b",
        "--hardware",
        "h200",
        "--prompt",
        "4k",
        "--output",
        "128",
        "--ttl",
        "30ms",
    )
    said, plain = run(*asked, "--arrivals", "120/m"), run(*asked)
    assert said.exit_code == 0
    before, title, after = said.output.partition("Under load: simulated, 2 requests/s")
    assert title
    for part in ("unloaded 1st token s", "p50 s", "p99 s", "ms/token p50", "carries requests/s"):
        assert part in after, part
    assert sum("aggregated " in line for line in after.splitlines()) == 2  # the best of each mode
    table = [line for line in before.splitlines() if "fp8/bf16" in line]
    assert table == [line for line in plain.output.splitlines() if "fp8/bf16" in line]
    loaded = json.loads(run(*asked, "--arrivals", "2/s", "--json").output)["loaded"]
    assert {row["mode"] for row in loaded} == {"aggregated", "disaggregated"}
    assert all(
        row["rate"] == 2.0 and row["first_token_p99"] >= row["first_token"] for row in loaded
    )


def test_a_plan_that_is_given_is_priced_as_the_search_prices_it() -> None:
    goal = ("--hardware", "h200", "--gpus", "8", "--context", "32k", "--json")
    best = json.loads(run("llama-70b", *goal).output)["proposals"][0]
    alone = run("llama-70b", *goal, "--plan", best["plan"], "--batch", str(best["batch"]))
    assert json.loads(alone.output)["proposals"][0] == best


def test_names_are_listed() -> None:
    for said in (run(), run("--list")):
        assert said.exit_code == 0
        assert "deepseek-r1" in said.output
        assert "gb200" in said.output


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    frontier, layers = tmp_path / "frontier.png", tmp_path / "layers.svg"
    said = run(*EXAMPLE, "--pareto", str(frontier), "--layers", str(layers))
    assert said.exit_code == 0
    assert frontier.read_bytes().startswith(b"\x89PNG")
    drawn = layers.read_text()
    assert "<svg" in drawn
    assert len(drawn) > 10_000


def test_auto_returns_a_plan_of_exactly_these_ranks() -> None:
    goal = Goal(ranks=8, context=131072, ttl=0.05, weights=("bf16",))
    for model in ("llama-70b", decoder("llama-70b").shape):
        found = auto(model, hardware="h200", goal=goal)
        assert isinstance(found, Plan)
        found.validate(decoder("llama-70b").shape, world_size=8)
    with pytest.raises(PlanError, match="out of reach"):
        auto("llama-70b", hardware="h200", goal=Goal(ranks=8, context=131072, ttl=1e-4))


def test_times_are_read() -> None:
    assert (seconds_of("20ms"), seconds_of("1.5s"), seconds_of("800 us")) == (
        0.02,
        1.5,
        pytest.approx(8e-4),
    )
    with pytest.raises(PlanError):
        seconds_of("0ms")
