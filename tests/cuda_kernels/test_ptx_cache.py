"""PTX that is kept: found again, never for other words, sources, compilers or constants, and never torn."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.cuda_kernels.gpu import ptx_cache
from plait.cuda_kernels.gpu.page_forms import PageForm
from plait.cuda_kernels.gpu.ptx import words
from plait.cuda_kernels.paged_decode import decode_pages


class Compiler:
    """Counts what it is asked to compile."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> str:
        self.times += 1
        return f".version 9.0\n// {self.times}\n"


def test_what_was_compiled_is_found_again(tmp_path: Path) -> None:
    compiler, folder = Compiler(), tmp_path / "deep" / "ptx"
    first = ptx_cache.compiled("copy width=8", (9, 0), compiler, folder)
    assert ptx_cache.compiled("copy width=8", (9, 0), compiler, folder) == first
    assert compiler.times == 1
    assert folder.stat().st_mode & 0o077 == 0
    assert [file.suffix for file in folder.iterdir()] == [".ptx"]


@pytest.mark.parametrize("other", ["constants", "arch", "words", "sources", "compilers"])
def test_another_kernel_is_not_taken_for_it(tmp_path, monkeypatch, other: str) -> None:
    compiler, name, arch = Compiler(), "copy width=8", (9, 0)
    ptx_cache.compiled(name, arch, compiler, tmp_path)
    if other == "constants":
        name = "copy width=16"
    elif other == "arch":
        arch = (10, 0)
    elif other == "words":
        word = next(iter(words.WORDS))
        changed = words.Instruction("nop;", (), (), False, False)
        monkeypatch.setitem(words.WORDS, word, changed)
    else:
        monkeypatch.setattr(ptx_cache, f"_{other}", lambda: "changed")
    ptx_cache.compiled(name, arch, compiler, tmp_path)
    assert compiler.times == 2


@pytest.mark.parametrize("damage", ["torn", "longer", "rubbish"])
def test_a_damaged_entry_is_compiled_again(tmp_path: Path, damage: str) -> None:
    compiler = Compiler()
    ptx_cache.compiled("copy", (9, 0), compiler, tmp_path)
    (entry,) = tmp_path.iterdir()
    held = entry.read_bytes()
    entry.write_bytes({"torn": held[:-3], "longer": held + b"x", "rubbish": b"\xff\xfe"}[damage])
    assert ptx_cache.compiled("copy", (9, 0), compiler, tmp_path) == ".version 9.0\n// 2\n"
    assert ptx_cache.compiled("copy", (9, 0), compiler, tmp_path) == ".version 9.0\n// 2\n"
    assert compiler.times == 2


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler = Compiler()
    for times in (1, 2):
        assert ptx_cache.compiled("copy", (9, 0), compiler, tmp_path / "file" / "ptx")
        assert compiler.times == times


def test_a_name_for_people_is_no_key() -> None:
    """Pages of codes of two sizes have one name, and another stride compiled in."""
    forms = [PageForm("int4", 16, page_bytes) for page_bytes in (1 << 14, 1 << 15)]
    usual = {"group": 4, "kv_heads": 8, "head_dim": 64, "page_tokens": 16, "capped": False}
    one, other = (decode_pages(**usual, k_form=form, v_form=form) for form in forms)
    assert one.name == other.name
    assert one.whole_name != other.whole_name
