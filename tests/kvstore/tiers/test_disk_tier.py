"""The disk tier on a real file system: durable, private, shared, versioned, and unmoved by damage."""

from __future__ import annotations

import ast
import contextlib
import copy
import errno
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import plait.kvstore.tiers
from plait.kvstore.errors import StoreError
from plait.kvstore.tiers import (
    DiskTier,
    Fifo,
    Folder,
    FormatTooNew,
    MemoryTier,
    PageForm,
    TierError,
    TierLocked,
    TierReadOnly,
    TierRefused,
)
from plait.kvstore.tiers import form as form_module
from plait.kvstore.tiers import index as index_module
from plait.kvstore.tiers import pages as pages_module
from plait.kvstore.tiers import recovery as recovery_module
from plait.kvstore.tiers.faults import FaultyDisk, FaultyFolder
from plait.kvstore.tiers.testing import TierConformance, sample

SIZE = {"page_bytes": 3000, "max_bytes": 4096 + 8 * 8192}
ROOT = Path(__file__).parents[3]


class TestDiskTier(TierConformance):
    def make_tier(self, tmp_path):
        return DiskTier(tmp_path / "cache", **SIZE)


class TestDiskTierInSlabs(TierConformance):
    """Aligned pages that fill their slots, moved in place, several slabs."""

    page_bytes = 8192

    @pytest.fixture(autouse=True)
    def small_slabs(self, monkeypatch) -> None:
        monkeypatch.setattr(recovery_module, "SLAB_BYTES", 4096 + 3 * 12288)

    def make_tier(self, tmp_path):
        return DiskTier(tmp_path / "cache", page_bytes=8192, max_bytes=4 * (4096 + 3 * 12288))


class TestDiskTierThroughTheCache(TierConformance):
    """A file system that has no O_DIRECT."""

    @pytest.fixture(autouse=True)
    def no_direct(self, monkeypatch) -> None:
        real = os.open

        def refuse(path, flags, *more, **named) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return real(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)

    def make_tier(self, tmp_path):
        return DiskTier(tmp_path / "cache", **SIZE)

    def test_it_is_said(self, tier) -> None:
        assert tier.put([b"k"], [b"page"]) == [True]
        assert not tier.folder.direct


def filled(path, count: int = 5, **more):
    made = [sample(i, 3000 - i) for i in range(count)]
    tier = DiskTier(path, **{**SIZE, **more})
    assert all(tier.put([key for key, _ in made], [page for _, page in made]))
    tier.commit()
    return tier, made


def right(tier, made) -> list[bool]:
    """Which pages are given; every one given must be right."""
    out = [np.zeros(3000, np.uint8) for _ in made]
    found = tier.get([key for key, _ in made], out)
    for (_, page), buffer, length in zip(made, out, found, strict=True):
        assert length is None or (length == page.size and np.array_equal(buffer[:length], page))
    return [length is not None for length in found]


def test_pages_outlive_the_process_and_the_loss_of_the_index(tmp_path) -> None:
    tier, made = filled(tmp_path / "c")
    tier.close()
    with DiskTier(tmp_path / "c", **SIZE) as tier:
        assert right(tier, made) == [True] * 5
        assert tier.counters()["recovered_by_scan"] == 0
    (tmp_path / "c/index").unlink()
    with DiskTier(tmp_path / "c") as tier:
        assert right(tier, made) == [True] * 5
        assert tier.counters()["recovered_by_scan"] == 1
        assert tier.remove([made[0][0]]) == [True]
    (tmp_path / "c/index").unlink()
    with DiskTier(tmp_path / "c") as tier:
        assert right(tier, made) == [False] + [True] * 4, "a removed page does not come back"


def test_aligned_pages_are_moved_in_place(tmp_path, monkeypatch) -> None:
    host = MemoryTier(4, 8192)
    pages = [host._region[i] for i in range(4)]
    for i, page in enumerate(pages):
        page[:] = i + 1
    seen: list[int] = []
    write = Folder.write
    monkeypatch.setattr(
        Folder,
        "write",
        lambda self, fd, buffers, at: (seen.append(len(buffers)), write(self, fd, buffers, at))[1],
    )
    with DiskTier(tmp_path / "c", page_bytes=8192, max_bytes="1MiB") as tier:
        seen.clear()
        tier.put([b"a", b"b", b"c"], pages[:3])
        assert seen == [1, 6], (
            "the slab's header; then one call: three headers, three pages in place"
        )
        assert tier.get([b"b"], [pages[3]]) == [8192]
        assert (pages[3] == 2).all()


def test_the_order_given_decides_what_is_evicted(tmp_path) -> None:
    tier, made = filled(tmp_path / "c", 8, evict=Fifo())
    right(tier, made[:1])
    tier.put([b"new"], [b"page"])
    assert right(tier, made) == [False] + [True] * 7
    assert tier.counters()["evicted"] == 1
    tier.close()

    class Wrong(Fifo):
        def victim(self) -> bytes:
            return b"unheard of"

    with DiskTier(tmp_path / "c", evict=Wrong()) as tier:
        with pytest.raises(StoreError, match="named a page that is not held"):
            tier.put([b"x", b"y"], [b"1", b"2"])
        tier.check_integrity()


def test_another_form_is_a_miss(tmp_path) -> None:
    ours, other = PageForm("weights a"), PageForm("weights b")
    tier, made = filled(tmp_path / "c", form=ours)
    tier.close()
    with DiskTier(tmp_path / "c", form=other) as tier:
        assert right(tier, made) == [False] * 5
        tier.put([made[0][0]], [b"another model's page"])
        assert right(tier, made[1:]) == [False] * 4
    with DiskTier(tmp_path / "c", form=ours) as tier:
        assert right(tier, made) == [True] * 5
        assert tier.counters()["pages"] == 6
    with pytest.raises(ValueError, match="make identity a digest"):
        PageForm("x" * 3000)


def test_geometry_is_for_life(tmp_path) -> None:
    filled(tmp_path / "c")[0].close()
    with pytest.raises(ValueError, match="slots for pages of 4096 bytes, not of 9000"):
        DiskTier(tmp_path / "c", page_bytes=9000, max_bytes="1MiB")
    with pytest.raises(ValueError, match="holds no page"):
        DiskTier(tmp_path / "d", page_bytes=9000, max_bytes=9000)
    with pytest.raises(FileNotFoundError, match="give page_bytes and max_bytes"):
        DiskTier(tmp_path / "e")
    with pytest.raises(FileNotFoundError):
        DiskTier(tmp_path / "f", mode="read")
    with pytest.raises(ValueError, match="mode"):
        DiskTier(tmp_path / "c", mode="append")  # type: ignore[arg-type]


def test_fewer_bytes_drop_whole_slabs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recovery_module, "SLAB_BYTES", 4096 + 4 * 8192)
    tier, made = filled(tmp_path / "c", 8, max_bytes=2 * (4096 + 4 * 8192))
    tier.close()
    assert (tmp_path / "c/slab-00001").exists()
    with DiskTier(tmp_path / "c", page_bytes=3000, max_bytes=4096 + 4 * 8192) as tier:
        assert right(tier, made) == [True] * 4 + [False] * 4
        assert tier.counters()["dropped_at_open"] == 4
    assert not (tmp_path / "c/slab-00001").exists()


# -- two processes --------------------------------------------------------------------------


def test_one_writer_many_readers(tmp_path) -> None:
    tier, made = filled(tmp_path / "c", 3)
    with pytest.raises(TierLocked, match="mode='read'"):
        DiskTier(tmp_path / "c", **SIZE)
    with (
        DiskTier(tmp_path / "c", mode="read") as reader,
        DiskTier(tmp_path / "c", mode="read") as second,
    ):
        assert right(reader, made) == right(second, made) == [True] * 3
        for change in (
            lambda: reader.put([b"k"], [b"p"]),
            lambda: reader.remove([b"k"]),
            reader.commit,
        ):
            with pytest.raises(TierReadOnly, match="mode='read'"):
                change()
        tier.put([b"new"], [made[0][1]])
        assert reader.contains([b"new"]) == [False]
        tier.commit()
        reader.refresh()
        assert right(reader, [*made, (b"new", made[0][1])]) == [True] * 4
        for i in range(20):  # everything the reader knows of is overwritten
            tier.put([b"later%d" % i], [made[1][1]])
        assert right(reader, made) == [False] * 3
        assert reader.counters()["damaged"] == 3
    tier.close()


def test_readers_of_a_busy_writer_never_see_a_wrong_byte(tmp_path) -> None:
    tier, _ = filled(tmp_path / "c", 0)
    made = [sample(i, 3000) for i in range(40)]
    stop = threading.Event()

    def write() -> None:
        draw = random.Random(0)
        while not stop.is_set():
            key, page = draw.choice(made)
            tier.put([key], [page])
            tier.commit()

    writer = threading.Thread(target=write)
    writer.start()
    hits, end = 0, time.monotonic() + 60
    with DiskTier(tmp_path / "c", mode="read") as reader:
        for turn in itertools.count():
            reader.refresh()
            hits += sum(right(reader, made))
            if turn >= 60 and (hits or time.monotonic() > end):
                break
    stop.set()
    writer.join(60)
    tier.close()
    assert hits > 0


def test_the_lock_goes_with_the_process(tmp_path) -> None:
    code = (
        "import os, signal, sys; from plait.kvstore.tiers import DiskTier; "
        "t = DiskTier(sys.argv[1], page_bytes=3000, max_bytes=100000); t.put([b'k'], [b'page']); t.commit(); "
        "print('ready', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", code, tmp_path / "c"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(TierLocked):
            DiskTier(tmp_path / "c")
        child.kill()
        child.wait()
    with DiskTier(tmp_path / "c") as tier:
        assert tier.contains([b"k"]) == [True]


def test_a_fork_may_not_write(tmp_path, monkeypatch) -> None:
    tier, _ = filled(tmp_path / "c")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(TierReadOnly, match="fork"):
        tier.put([b"k"], [b"page"])
    monkeypatch.undo()
    tier.close()


# -- what a directory may be ----------------------------------------------------------------


def test_modes_are_private(tmp_path) -> None:
    os.umask(old := os.umask(0))
    os.umask(0)
    try:
        filled(tmp_path / "c")[0].close()
    finally:
        os.umask(old)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["index", "lock", "slab-00000"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {0o600}


def as_nobody(call: Callable[[], object]) -> str:
    """Run a call in a child without root's rights; say what it raised, or else gave."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = repr(call())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_directory_that_may_not_be_written_can_still_be_read() -> None:
    with tempfile.TemporaryDirectory() as home:
        place = Path(home) / "c"
        tier, made = filled(place)
        tier.close()
        Path(home).chmod(0o755)
        for path in (place, *place.iterdir()):
            if os.geteuid() == 0:
                os.chown(path, 65534, 65534)
            path.chmod(0o500 if path == place else 0o400)

        def read() -> list[bool]:
            with DiskTier(place, mode="read") as reader:
                return right(reader, made)

        said = as_nobody(lambda: DiskTier(place, **SIZE))
        assert said.startswith("TierReadOnly: ")
        assert "cannot be written (Permission denied); let this user" in said
        assert as_nobody(read) == repr([True] * 5)
        assert "Permission denied" in as_nobody(lambda: DiskTier(place / "new", **SIZE))
        place.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_file_system_is_named(code, tmp_path, monkeypatch) -> None:
    filled(tmp_path / "c")[0].close()
    real = os.open

    def refuse(path, flags, *more, **named) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TierReadOnly, match=rf"{os.strerror(code)}.*mode='read'"):
        DiskTier(tmp_path / "c")
    with DiskTier(tmp_path / "c", mode="read") as reader:
        assert reader.counters()["pages"] == 5


def test_links_and_strangers_are_refused(tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("do not touch")
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(TierRefused, match="link or no directory"):
        DiskTier(tmp_path / "link", **SIZE)
    with pytest.raises(TierRefused, match="no directory"):
        DiskTier(secret, **SIZE)
    for name in ("index", "slab-00000", "lock"):
        for trick in ("symlink", "hardlink", "fifo", "directory"):
            folder = tmp_path / f"{name}-{trick}"
            folder.mkdir(mode=0o700)
            if trick == "symlink":
                (folder / name).symlink_to(secret)
            elif trick == "hardlink":
                (folder / name).hardlink_to(secret)
            elif trick == "fifo":
                os.mkfifo(folder / name)
            else:
                (folder / name).mkdir()
            with pytest.raises((TierRefused, OSError)):
                DiskTier(folder, **SIZE)
    assert secret.read_text() == "do not touch"
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home/thesis.tex").write_text("x")
    with pytest.raises(TierRefused, match=r"thesis\.tex"):
        DiskTier(tmp_path / "home", **SIZE)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "open/index").write_text("")
    with pytest.raises(TierRefused, match="open to others"):
        DiskTier(tmp_path / "open", **SIZE)


def test_a_directory_deleted_under_it(tmp_path) -> None:
    tier, made = filled(tmp_path / "c")
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    (tmp_path / "c").rmdir()
    assert right(tier, made) == [True] * 5, "open files stay readable"
    assert tier.put([b"k"], [b"page"]) == [True]
    tier.commit()
    assert tier.contains([b"k"]) == [False]
    assert tier.counters()["lost_with_slab"] == 6
    with pytest.raises(TierError, match="deleted"):
        tier.close()
    filled(tmp_path / "c")[0].close()


def test_a_slab_deleted_under_an_open_writer_costs_its_pages_only(tmp_path) -> None:
    page = b"p" * 5000
    keys = [f"k{i}".encode() for i in range(40)]
    with DiskTier(tmp_path / "c", page_bytes=8192, max_bytes="1MiB") as tier:
        per_slab = tier._opened.geometry.slots_per_slab
        assert tier.put(keys, [page] * 40) == [True] * 40
        tier.commit()
        (tmp_path / "c" / "slab-00000").unlink()
        assert tier.put([b"new"], [page]) == [True]
        tier.commit()
        assert tier.contains([*keys, b"new"]) == [False] * 41
        assert tier.counters()["lost_with_slab"] == 41
        tier.check_integrity()
        tier.commit()
        assert tier.put([b"newer"], [page]) == [True], "the slab was made again"
        tier.commit()
        assert tier._opened.geometry.slots_per_slab == per_slab
    with DiskTier(tmp_path / "c") as tier:
        assert tier.contains([b"newer", b"new", keys[0]]) == [True, False, False]
        assert not tier.counters()["recovered_by_scan"]


@pytest.mark.parametrize("how", ["cut", "zeros to the end", "zeros before the end"])
def test_an_index_that_lost_its_last_lines_is_not_believed(how, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 8192)
    page = b"p" * 100
    keys = [f"k{i}".encode() for i in range(100)]
    with DiskTier(tmp_path / "c", page_bytes=4096, max_bytes="2MiB") as tier:
        for first in range(0, 100, 10):
            tier.put(keys[first : first + 10], [page] * 10)
            tier.commit()
    path = tmp_path / "c" / "index"
    data = path.read_bytes()
    assert len(data) == 3 * 8192
    if how == "cut":
        data = data[: 2 * 8192]
    elif how == "zeros to the end":
        data = data[:9000].ljust(len(data), b"\0")
    else:
        data = data[:9088] + bytes(len(data) - 9088 - 128) + data[-128:]
    path.write_bytes(data)
    with DiskTier(tmp_path / "c") as tier:
        assert tier.counters()["recovered_by_scan"]
        assert tier.contains(keys) == [True] * 100


# -- versions, damage, fuzz -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["index", "slab-00000"])
def test_a_later_version_is_refused_and_not_touched(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(form_module, "VERSION", 2)
    filled(tmp_path / "c")[0].close()
    monkeypatch.undo()
    if name != "index":
        (tmp_path / "c/index").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    for mode in ("write", "read"):
        with pytest.raises(FormatTooNew, match="version 2, this plait reads up to 1"):
            DiskTier(tmp_path / "c", mode=mode)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}


@pytest.mark.parametrize("byte", [0, 8, 9, 20, 60, 200, 4090, 4096, 6000])
def test_one_wrong_bit_is_one_miss(byte, tmp_path) -> None:
    tier, made = filled(tmp_path / "c")
    tier.close()
    with (tmp_path / "c/slab-00000").open("r+b") as file:
        file.seek(4096 + 2 * 8192 + byte)
        old = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([old ^ 16]))
    with DiskTier(tmp_path / "c") as tier:
        assert right(tier, made) == [True, True, False, True, True]
        assert tier.counters()["damaged"] == 1
        assert tier.put([made[2][0]], [made[2][1]]) == [True]
        assert right(tier, made) == [True] * 5


@pytest.mark.parametrize("line", [0, 3, 6, 7])
def test_a_wrong_bit_of_the_index_loses_nothing(line, tmp_path) -> None:
    tier, made = filled(tmp_path / "c")
    tier.close()
    with (tmp_path / "c/index").open("r+b") as file:
        file.seek(4096 + 128 * line + 30 if line else 30)
        file.write(b"!")
    with DiskTier(tmp_path / "c") as tier:
        assert tier.counters()["recovered_by_scan"] == 1
        assert right(tier, made) == [True] * 5


def image() -> tuple[FaultyDisk, list]:
    disk = FaultyDisk()
    tier, made = filled(FaultyFolder(disk), 6)
    tier.close()
    return disk, made


def mutate(disk: FaultyDisk, draw: random.Random) -> None:
    """Change a file as no fault would."""
    name = draw.choice(["index", "slab-00000"])
    content = disk.names[name].current
    used = min(len(content), 4096 + 128 * 9 if name == "index" else len(content))
    for _ in range(draw.choice((1, 1, 3, 50))):
        kind = draw.randrange(6)
        at = draw.randrange(used)
        if kind == 0:
            content[at] = draw.randrange(256)
        elif kind == 1:
            piece = draw.randbytes(draw.choice((4, 128, 4096)))
            content[at : at + len(piece)] = piece
        elif kind == 2:  # a line or slot in another's place
            size = 128 if name == "index" else 8192
            a, b = (4096 + size * draw.randrange(6) for _ in range(2))
            content[a : a + size] = content[b : b + size]
        elif kind == 3:
            del content[draw.randrange(len(content)) :]
            content.extend(bytes(4096))
        elif kind == 4:
            content[at : at + 64] = b"\xff" * 64
        else:
            content[:] = draw.randbytes(len(content))
        used = max(1, min(used, len(content)))
    disk.names[name].durable = bytearray(content)


@pytest.mark.parametrize("part", range(4))
def test_fuzzed_files(part, monkeypatch) -> None:
    monkeypatch.setattr(pages_module, "RUN_BYTES", 8192)
    clean, made = image()
    outcomes = {"opened": 0, "refused": 0, "misses": 0}
    for number in range(60):
        disk = copy.deepcopy(clean)
        mutate(disk, random.Random(f"{part}/{number}"))
        for mode in ("read", "write"):
            try:
                tier = DiskTier(FaultyFolder(disk), mode=mode)
            except (StoreError, OSError):
                outcomes["refused"] += 1
                continue
            outcomes["opened"] += 1
            outcomes["misses"] += right(tier, made).count(False)
            tier.check_integrity()
            if mode == "write":
                assert all(tier.put([key for key, _ in made], [page for _, page in made]))
                tier.commit()
                assert right(tier, made) == [True] * 6, "what was missed can be stored again"
            tier.close()
    assert outcomes["opened"] > 60
    assert outcomes["misses"] > 20


@pytest.mark.parametrize("unchecked", ["checksum of the page", "key of the page"])
def test_the_fuzzer_sees_a_reader_that_does_not_check(unchecked, monkeypatch) -> None:
    compare = pages_module.what_is_wrong

    def careless(block, record, page) -> str | None:
        said = compare(block, record, page)
        return None if said == "another page" else said

    if unchecked == "checksum of the page":
        monkeypatch.setattr(pages_module, "page_checksum", lambda page: bytes(16))
    else:
        monkeypatch.setattr(pages_module, "what_is_wrong", careless)
    with pytest.raises(AssertionError):
        test_fuzzed_files(0, monkeypatch)


@pytest.mark.parametrize("size", [1 << 40, 1 << 29])
def test_a_monstrous_index_takes_no_memory(size, tmp_path) -> None:
    tier, made = filled(tmp_path / "c")
    tier.close()
    os.truncate(tmp_path / "c/index", size if size > 1 << 30 else (1 << 26) + 5)
    tracemalloc.start()
    with DiskTier(tmp_path / "c", mode="read") as tier:
        assert right(tier, made) == [True] * 5
        assert tier.counters()["recovered_by_scan"] == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_commit_tells_of_errors_and_of_what_was_lost() -> None:
    disk = FaultyDisk()
    tier, made = filled(FaultyFolder(disk), 3)
    tier.put([b"k"], [b"page"])
    disk.armed["sync"] = 0, "EIO"
    with pytest.raises(TierError, match="1 pages could not be made durable"):
        tier.commit()
    assert tier.contains([b"k"]) == [False]
    assert right(tier, made) == [True] * 3
    assert tier.put([b"k"], [b"page"]) == [True]
    disk.armed["sync"] = 1, "EIO"  # the index's turn
    with pytest.raises(TierError, match="index"):
        tier.commit()
    tier.commit()
    disk.power_cut(random.Random(0))
    with DiskTier(FaultyFolder(disk)) as tier:
        assert right(tier, made) == [True] * 3
        assert tier.contains([b"k"]) == [True]


@pytest.mark.parametrize("stays", [False, True])
def test_a_slab_whose_name_was_not_made_durable_is_not_trusted(stays: bool, monkeypatch) -> None:
    """Its pages would go with its name in a power cut, committed or not; also after the next opening."""
    monkeypatch.setattr(recovery_module, "SLAB_BYTES", 4096 + 2 * 8192)
    size = {"page_bytes": 3000, "max_bytes": 10 * (4096 + 2 * 8192)}
    for seed in range(8):  # which of the names since the last sync survive is drawn
        disk = FaultyDisk()
        DiskTier(FaultyFolder(disk), **size).close()
        tier = DiskTier(FaultyFolder(disk), **size)
        disk.armed["sync_names"] = 0, "EIO"
        if stays:  # it cannot be removed either
            disk.armed["unlink"] = 1, "EIO"
        tier.put([b"first"], [b"page"])
        disk.kill()
        assert disk.struck == 1 + stays
        with DiskTier(FaultyFolder(disk), **size) as tier:
            assert tier.put([b"k"], [b"page"]) == [True]
            tier.commit()
            disk.power_cut(random.Random(seed))
        with DiskTier(FaultyFolder(disk)) as tier:
            assert tier.contains([b"k"]) == [True]


def test_a_full_disk_evicts_instead_of_growing(monkeypatch) -> None:
    monkeypatch.setattr(recovery_module, "SLAB_BYTES", 4096 + 2 * 8192)
    disk = FaultyDisk()
    tier, made = filled(FaultyFolder(disk), 2, max_bytes=10 * (4096 + 2 * 8192))
    disk.armed["preallocate"] = 0, "ENOSPC"
    assert tier.put([b"k"], [b"page"]) == [True]
    assert sum(right(tier, made)) == 1
    assert tier.counters()["growth_refused"] == 1
    assert sorted(disk.names) == ["index", "lock", "slab-00000"]
    tier.commit()
    assert tier.put([made[0][0], made[1][0]], [made[0][1], made[1][1]]) == [True, True]
    assert tier.contains([b"k"]) == [True], "there is room again"


def test_no_decision_looks_at_the_clock_on_the_wall() -> None:
    """So two hosts whose clocks differ, or one that is set back, change nothing."""
    for path in Path(plait.kvstore.tiers.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("time", "time"), ("time", "time_ns")}, (
                    path
                )
            assert not (
                isinstance(node, ast.Import) and any(a.name == "datetime" for a in node.names)
            )


def test_os_errors_are_misses_not_crashes() -> None:
    disk = FaultyDisk()
    tier, made = filled(FaultyFolder(disk), 4)
    disk.armed["read"] = 0, "EIO"
    assert right(tier, made[:1]) == [False]
    disk.armed["write"] = 0, "short"
    assert tier.put([b"k"], [b"page"]) == [False]
    assert tier.counters()["write_failures"] == 1
    tier.check_integrity()


def test_without_erasing_removed_pages_come_back(tmp_path, monkeypatch) -> None:
    """Negative controls: what the tests above would see."""
    monkeypatch.setattr("plait.kvstore.tiers.slabs.Slabs.erase", lambda self, slot: None)
    with pytest.raises(AssertionError, match="does not come back"):
        test_pages_outlive_the_process_and_the_loss_of_the_index(tmp_path)


def test_believing_a_damaged_index_loses_pages(tmp_path, monkeypatch) -> None:
    replay = index_module.Index._replay
    monkeypatch.setattr(index_module.Index, "_replay", lambda self: replay(self) or True)
    monkeypatch.setattr(index_module.Index, "_end", lambda self: 0)
    with pytest.raises(AssertionError):
        test_a_wrong_bit_of_the_index_loses_nothing(3, tmp_path)


def test_forgiving_a_failed_sync_is_seen(monkeypatch) -> None:
    def forgiving(self, records, dirty) -> dict:
        with contextlib.suppress(OSError):
            for number in dirty:
                self._opened.slabs.sync(number)
        return records

    monkeypatch.setattr(DiskTier, "_sync_slabs", forgiving)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_commit_tells_of_errors_and_of_what_was_lost()
