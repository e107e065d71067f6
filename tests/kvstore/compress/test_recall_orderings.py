"""What the recall benchmark is for: a few orderings of methods on the trained model that hold with room to spare."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

RECALL = Path(__file__).parents[3] / "benchmarks" / "recall"
ROWS = 6


@pytest.fixture(scope="module")
def measured():
    """The benchmark's own rows, by a short name, on six sequences of the task; its files are no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(RECALL))
    try:
        caches, measure, model, tasks = map(
            importlib.import_module, ("caches", "measure", "model", "tasks")
        )
        methods = {
            "exact": caches.selecting("exact:budget=0.1"),
            "quest 4": caches.selecting("quest:budget=0.1,page=4,dense=0"),
            "quest 16": caches.selecting("quest:budget=0.1,page=16,dense=0"),
            "snapkv": caches.evicting("snapkv:window=16,budget=0.25"),
            "streaming": caches.evicting("streaming:budget=0.25"),
            "rocketkv": caches.rocket(0.1, "rocketkv"),
            "kivi 4": caches.coding("kivi:bits=4"),
            "kivi 2": caches.coding("kivi:bits=2"),
            "k4 v2": caches.coding("kivi:bits=4/int2"),
            "k2 v4": caches.coding("kivi:bits=2/int4"),
        }
        trained, batch = model.load(), tasks.needles(ROWS, 512, 64, 8, 448, 1_000_000_000)
        whole = measure.whole_logits(trained, batch)
        yield {
            name: measure.measure(trained, batch, whole, method, "first", "facts")
            for name, method in methods.items()
        }
    finally:
        sys.path.remove(str(RECALL))
        for name in set(sys.modules) - before:
            if str(RECALL) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def test_selectors_are_as_good_as_their_pages_are_short(measured) -> None:
    exact, short, long_ = (measured[name].later for name in ("exact", "quest 4", "quest 16"))
    assert exact > 0.95
    assert exact > short > 2 * long_


def test_snapkv_answers_the_question_it_saw_and_not_those_it_did_not(measured) -> None:
    snap, stream = measured["snapkv"], measured["streaming"]
    assert snap.first >= 0.8
    assert snap.first >= stream.first + 0.4
    assert snap.later <= 0.5, "who passes here looked into the future"
    assert snap.kl < stream.kl / 1.5


def test_rocketkv_reads_half_of_what_quest_reads_and_finds_more(measured) -> None:
    rocket, quest = measured["rocketkv"], measured["quest 16"]
    assert rocket.read < quest.read
    assert rocket.first >= quest.first + 0.2
    assert rocket.kl < quest.kl / 1.3


def test_bits_help_and_keys_need_them_more_than_values(measured) -> None:
    assert measured["kivi 4"].kl < measured["kivi 2"].kl / 20
    assert measured["kivi 4"].later >= measured["kivi 2"].later
    assert measured["k4 v2"].kl < measured["k2 v4"].kl / 5
