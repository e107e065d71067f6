"""`plait kv`: what it says and does, as a person and as a program reads it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from plait.kvstore.command import app
from plait.kvstore.tiers import DiskTier, PageForm
from plait.kvstore.tiers import recovery as recovery_module
from plait.kvstore.tiers.testing import sample

FORM = PageForm("llama-8b", "int8", "bfloat16", (2, 16, 8))


def run(*words, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def cache(tmp_path):
    with DiskTier(tmp_path / "c", FORM, page_bytes=3000, max_bytes="100kB") as tier:
        made = [sample(i, 3000) for i in range(6)]
        tier.put([key for key, _ in made], [page for _, page in made])
    return tmp_path / "c"


def damage(cache, slot: int, byte: int) -> None:
    with (cache / "slab-00000").open("r+b") as file:
        file.seek(4096 + slot * 8192 + byte)
        file.write(b"\xaa\xaa")


def test_inspect(cache) -> None:
    seen = json.loads(run("inspect", cache, "--json"))
    assert (seen["version"], seen["pages"], seen["slots"], seen["index_whole"]) == (1, 6, 11, True)
    assert seen["forms"] == [
        {
            "codec": "int8",
            "dtype": "bfloat16",
            "identity": "llama-8b",
            "shape": [2, 16, 8],
            "pages": 6,
            "bytes": 18000,
        }
    ]
    assert "llama-8b" in run("inspect", cache)


def test_verify_names_each_damaged_slot_and_repair_drops_it(cache) -> None:
    assert json.loads(run("verify", cache, "--json")) == []
    assert "every page" in run("verify", cache)
    damage(cache, 1, 5000)
    damage(cache, 2, 100)
    damage(cache, 3, 0)
    bad = json.loads(run("verify", cache, "--json", code=1))
    assert [(slot["slot"], slot["wrong"]) for slot in bad] == [
        (1, "page checksum"),
        (2, "header checksum"),
        (3, "no header"),
    ]
    assert bad[0]["offset"] == 4096 + 8192
    assert bad[0]["key"] == sample(1, 1)[0].hex()
    assert "page checksum" in run("verify", cache, code=1)
    assert json.loads(run("inspect", cache, "--json"))["unreadable"] == 2
    said = json.loads(run("repair", cache, "--json"))
    assert (len(said["dropped"]), said["index_rebuilt"]) == (3, False)
    assert json.loads(run("verify", cache, "--json")) == []
    (cache / "index").unlink()
    assert "made the index anew" in run("repair", cache)
    seen = json.loads(run("inspect", cache, "--json"))
    assert (seen["pages"], seen["index_whole"]) == (3, True)


def test_compact_shortens(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recovery_module, "SLAB_BYTES", 4096 + 2 * 8192)
    with DiskTier(tmp_path / "c", page_bytes=3000, max_bytes=3 * (4096 + 2 * 8192)) as tier:
        made = [sample(i, 3000) for i in range(6)]
        for key, page in made:
            tier.put([key], [page])
            tier.commit()
        tier.remove([key for key, _ in made[2:]])
    said = json.loads(run("compact", tmp_path / "c", "--json"))
    assert said["lines_after"] == 3 < said["lines_before"]
    assert said["slabs_removed"] == 2
    assert "2 empty" not in run("compact", tmp_path / "c")
    with DiskTier(tmp_path / "c", page_bytes=3000, max_bytes=3 * (4096 + 2 * 8192)) as tier:
        assert tier.contains([key for key, _ in made]) == [True] * 2 + [False] * 4
        assert all(tier.put([key for key, _ in made], [page for _, page in made]))


def test_bench(tmp_path) -> None:
    found = json.loads(run("bench", tmp_path, "--page", "64KiB", "--bytes", "1MiB", "--json"))
    assert all(found[name] > 0 for name in ("raw_store", "raw_load", "tier_store", "tier_load"))
    assert list(tmp_path.iterdir()) == []
    assert "of raw" in run("bench", tmp_path, "--page", "64KiB", "--bytes", "256KiB")


def test_errors_are_for_a_person(cache, tmp_path) -> None:
    assert "holds no cache" in run("inspect", tmp_path, code=2)
    assert "nowhere: No such file" in run("verify", tmp_path / "nowhere", code=2)
    assert "Invalid value for 'DIR'" in run("bench", tmp_path / "nowhere", code=2)
    with DiskTier(cache):
        assert "has a writer already" in run("repair", cache, code=2)
        assert "llama-8b" in run("inspect", cache), "looking needs no lock"
