"""The plug-ins in the real engine: same answers from disk, across restarts; damage and foreigners are misses."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ENGINE = Path(__file__).with_name("engine.py")
SECONDS = 900  # an engine starts in 15 s on a free machine
PROMPT = 576  # tokens of the 600 that stand in whole blocks


def run_engine(scenario: str, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Do a scenario of engine.py in a process of its own."""
    command = [sys.executable, str(ENGINE), scenario, str(folder), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert len(lines) == 1, (done.stdout + done.stderr)[-8000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """The same tokens, of the same probabilities but for the order of sums."""
    return a["tokens"] == b["tokens"] and a["logprobs"] == pytest.approx(b["logprobs"], abs=2e-3)


def flip_bits(directory: Path) -> int:
    """Spoil every fifth page as a failing disk would; say how many."""
    from plait.kvstore.tiers.form import BLOCK, SLAB, read_geometry

    (slab,) = directory.rglob("slab-00000")
    spoiled = 0
    with slab.open("r+b") as file:
        geometry, _ = read_geometry(file.read(BLOCK), SLAB)
        for slot in range(0, geometry.slots_per_slab, 5):
            at = BLOCK + slot * geometry.slot_bytes
            file.seek(at)
            if file.read(8) == b"plaitKV\x01":
                file.seek(at + BLOCK + 1000)
                byte = file.read(1)[0]
                file.seek(at + BLOCK + 1000)
                file.write(bytes([byte ^ 4]))
                spoiled += 1
    return spoiled


@pytest.mark.parametrize(
    ("way", "kind"), [("connector", "llama"), ("tiered", "llama"), ("connector", "gemma")]
)
def test_pages_outlive_the_engine(way: str, kind: str, tmp_path: Path) -> None:
    """One directory through five engines: filled, found, damaged, of other weights, and full of noise."""
    run = partial(run_engine, folder=tmp_path, kind=kind, way=way)
    first = run("first")
    cold = first["cold"]
    assert cold["cached"] == [0]
    assert first["own"]["cached"] == [PROMPT], "the engine's own cache works"
    assert first["disk"]["cached"] == first["longer"]["cached"] == [PROMPT]
    assert first["second turn"]["cached"] == [608], "generated tokens are found too"
    assert same(cold, first["own"])
    assert same(cold, first["disk"])
    assert not same(cold, first["longer"])

    assert first["salted"]["cached"] == first["other salt"]["cached"] == [0]
    assert first["salted again"]["cached"] == [PROMPT], "a tenant finds its own"
    assert same(cold, first["salted again"])

    restarted = run("again")
    assert restarted["disk"]["cached"] == [PROMPT]
    assert same(cold, restarted["disk"])

    assert flip_bits(tmp_path) > 10
    damaged = run("again")
    assert damaged["counters"]["damaged"] >= 3
    assert same(cold, damaged["disk"]), "it was computed again"
    assert damaged["disk again"]["cached"] == [PROMPT], "and kept again"
    assert same(cold, damaged["disk again"])

    other = run("weights")
    assert other["other"]["cached"] == [0], "pages of other weights"
    assert not same(cold, other["other"])
    assert other["other again"]["cached"] == [PROMPT]
    if way == "connector":
        assert other["reset"]["cached"] == [0]
        assert other["after reset"]["cached"] == [PROMPT]
    assert same(other["other"], other["after reset"])

    noisy = run("noise")
    assert noisy["disk"]["cached"] == [PROMPT]
    assert not same(cold, noisy["disk"]), "the negative control: what is on disk is what is used"


@pytest.mark.parametrize(
    ("way", "kind"), [("connector", "llama"), ("tiered", "llama"), ("connector", "gemma")]
)
def test_a_crowd_with_little_room(way: str, kind: str, tmp_path: Path) -> None:
    """Sharing, chunked prefill, preemption and eviction change no answer."""
    alone = run_engine("crowd", tmp_path, kind=kind, way=None)
    cached = run_engine("crowd", tmp_path, kind=kind, way=way, max_bytes="4MiB")
    for when in ("once", "twice"):
        assert same(alone[when], cached[when])
    counters = cached["counters"]
    assert counters["evicted"] > 0
    assert counters["damaged"] == counters["write_failures"] == 0
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("slab-*"))
    assert 0 < on_disk <= 4 << 20
    roomy = run_engine("crowd", tmp_path / "roomy", kind=kind, way=way)
    assert same(alone["twice"], roomy["twice"])
    assert sum(roomy["twice"]["cached"]) > sum(alone["twice"]["cached"])


def test_a_page_counts_when_every_rank_has_it(tmp_path: Path) -> None:
    """Tensor parallel: two directories; what one of them lost is computed again by both."""
    cold = run_engine("sharded", tmp_path)
    assert cold["first"]["cached"] == [0]
    assert cold["disk"]["cached"] == [PROMPT]
    assert same(cold["first"], cold["disk"])
    ranks = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert ranks == ["engine-0-rank-0", "engine-0-rank-1"]
    assert flip_bits(tmp_path / "cache" / ranks[1]) > 3
    damaged = run_engine("sharded", tmp_path)
    assert same(cold["first"], damaged["first"])
    assert damaged["disk"]["cached"] == [PROMPT]
    assert same(cold["first"], damaged["disk"])


REFUSED = {
    "hash": "ValueError: plait cannot keep this engine's pages: prefix_caching_hash_algo='xxhash' can be made",
    "scales": "ValueError: plait cannot keep this engine's pages: calculate_kv_scales",
    "context parallel": "ValueError: plait cannot keep this engine's pages: context parallel",
    "draft": "ValueError: plait cannot keep this engine's pages: speculative decoding with a draft",
    "policy": 'ValueError: a damaged or evicted page is a miss, so PlaitConnector needs "kv_load_failure_policy"',
    "options": "ValueError: PlaitConnector needs path and max_bytes",
    "mamba": "ValueError: PlaitConnector keeps full and sliding-window attention; layers ['m.0']... have Mamba",
    "weights": "ValueError: cannot tell which weights 'no/where' has",
    "strides": "ValueError: layer l has blocks of shape (2, 32)",
    "tuple": "ValueError: layer l keeps tuple",
    "secret": "ValueError: secret must be 16 to 64 random bytes",
    "model": "ValueError: PlaitTier must know the model",
}


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    said = run_engine("refusals", tmp_path)
    assert said.pop("fine") == said.pop("ngram") == "nothing"
    assert said.keys() == REFUSED.keys()
    for what, begin in REFUSED.items():
        assert said[what].startswith(begin), what


def test_the_tier_below_vllms_own_manager(tmp_path: Path) -> None:
    """vLLM's TieringOffloadingManager with room for four chunks: the others come from disk, or are misses."""
    command = [sys.executable, str(ENGINE.with_name("manager.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert "RESULT " in done.stdout, done.stdout + done.stderr
    said = json.loads(done.stdout.split("RESULT ")[1])
    assert said["given"] == ["right"] * 8
    assert said["unknown"] == ["MISS"]
    assert said["jobs"] == {
        "while storing": "RETRY",
        "stored": [True, 2 * 65536],
        "then": "HIT",
        "in part": [False, True],
        "bytes": [201, 201],
    }
    assert said["restarted"] == ["right"] * 3 + ["MISS"] + ["right"] * 4, "one was damaged"
    assert said["damaged"] == 1
    assert said["metrics known"]
    assert said["metrics"] == 6
    assert said["after many"] == [["MISS"], ["right"]]
    assert said["evicted"]
    assert said["another model"] == ["MISS"]
    assert said["no room to wait"] == 1
    assert "exported pointers" not in done.stderr, "vLLM's region was not let go"
