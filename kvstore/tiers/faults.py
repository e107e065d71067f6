"""A file system in memory that loses power, flips bits and fails: what the disk tier is proved against.

    disk = FaultyDisk()
    tier = DiskTier(FaultyFolder(disk), page_bytes=4096, max_bytes=1 << 20)
    disk.power_cut(random.Random(1))    # what was not synced is lost, in part, sector by sector
    tier = DiskTier(FaultyFolder(disk))

It promises less than a real one: names, lengths and data that were not synced may be lost independently.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import TierLocked
from .folder import Buffers, Folder
from .memory import ALIGNMENT

_LOCK = threading.RLock()  # one for all disks, so that they can be deep-copied
SECTOR = 512  # what a disk writes whole or not at all


@dataclass
class FaultyFile:
    """A file: what a reader sees, what would survive, and the writes between the two."""

    current: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)

    def apply(self, offset: int, data: bytes) -> None:
        """Change what survives; it grows as needed."""
        self.durable.extend(bytes(max(0, offset + len(data) - len(self.durable))))
        self.durable[offset : offset + len(data)] = data

    def sync(self) -> None:
        """All of it survives from now on."""
        for offset, data in self.unsynced:
            self.apply(offset, data)
        self.durable.extend(bytes(max(0, len(self.current) - len(self.durable))))
        self.unsynced.clear()

    def cut(self, draw: random.Random) -> None:
        """Lose power: each unsynced sector survives or does not."""
        luck = draw.choice((0.0, 0.5, 1.0))
        if draw.random() < luck:
            self.durable.extend(bytes(max(0, len(self.current) - len(self.durable))))
        for offset, data in self.unsynced:
            for at in range(0, len(data), SECTOR):
                if draw.random() < luck:
                    self.apply(offset + at, data[at : at + SECTOR])
        self.current = bytearray(self.durable)
        self.unsynced.clear()


class FaultyDisk:
    """What outlives a crash: files and names; and the faults that wait to strike.

    Attributes:
        armed: operation -> (how many more of them succeed, what the next one does: "EIO", "ENOSPC", "short").
        struck: faults that struck.
        cuts: power cuts.
    """

    def __init__(self) -> None:
        self.names: dict[str, FaultyFile] = {}
        self._durable_names: dict[str, FaultyFile] = {}
        self._journal: list[dict[str, FaultyFile]] = []
        self.armed: dict[str, tuple[int, str]] = {}
        self.struck = self.cuts = 0
        self.writer: FaultyFolder | None = None

    def renamed(self) -> None:
        """Note that the names changed; the last states survive in order, as far as they do."""
        self._journal.append(dict(self.names))

    def sync_names(self) -> None:
        """The names survive from now on."""
        self._durable_names = dict(self.names)
        self._journal.clear()

    def power_cut(self, draw: random.Random) -> None:
        """Lose power: all handles and locks are gone, and what was not synced, in part."""
        with _LOCK:
            self.kill()
            self.cuts += 1
            states = [self._durable_names, *self._journal]
            self.names = dict(draw.choice(states))
            self.sync_names()
            for file in self.names.values():
                file.cut(draw)

    def kill(self) -> None:
        """End the process only: what was written stays."""
        self.writer = None
        self.armed.clear()

    def flip(self, name: str, bit: int) -> None:
        """Turn over one bit of a file."""
        file = self.names[name]
        for content in (file.current, file.durable):
            if bit // 8 < len(content):
                content[bit // 8] ^= 1 << bit % 8

    def truncate(self, name: str, size: int) -> None:
        """Cut a file off."""
        file = self.names[name]
        file.unsynced.clear()
        del file.current[size:]
        file.durable = bytearray(file.current)

    def delete(self, name: str) -> None:
        """Remove a file; who has it open keeps it."""
        del self.names[name]
        self.renamed()
        self.sync_names()

    def strike(self, operation: str) -> str | None:
        """Say what fault this operation meets now."""
        wait, fault = self.armed.get(operation, (-1, ""))
        if wait < 0:
            return None
        if wait:
            self.armed[operation] = wait - 1, fault
            return None
        del self.armed[operation]
        self.struck += 1
        return fault


class FaultyFolder(Folder):
    """The one directory of a `FaultyDisk`, as the disk tier sees it."""

    def __init__(self, disk: FaultyDisk) -> None:
        self._disk = disk
        self.path = Path("a faulty disk")
        self.direct = True
        self._files: dict[int, tuple[FaultyFile, bool]] = {}
        self._writes = False
        self._numbers = itertools.count(3)

    def _strike(self, operation: str) -> bool:
        if self._writes and self._disk.writer is not self:
            raise OSError(errno.EIO, "the process or the power of this folder is gone")
        fault = self._disk.strike(operation)
        if fault in ("EIO", "ENOSPC"):
            code = getattr(errno, fault)
            raise OSError(code, os.strerror(code))
        return fault == "short"

    def names(self) -> list[str]:
        """Names in the directory."""
        return sorted(self._disk.names)

    def lock(self, name: str) -> None:
        """Become the only writer."""
        if self._disk.writer is not None:
            raise TierLocked("there is a writer already")
        self._disk.writer, self._writes = self, True
        if name not in self._disk.names:
            self.close(self.create(name))

    def open(self, name: str, write: bool = False, direct: bool = False) -> int:
        """Open a file."""
        if name not in self._disk.names:
            raise FileNotFoundError(errno.ENOENT, name)
        handle = next(self._numbers)
        self._files[handle] = self._disk.names[name], direct
        return handle

    def create(self, name: str, direct: bool = False) -> int:
        """Make a new, empty file."""
        self._strike("create")
        self._disk.names[name] = FaultyFile()
        self._disk.renamed()
        return self.open(name, True, direct)

    def size(self, handle: int) -> int:
        """Length of a file."""
        return len(self._files[handle][0].current)

    def preallocate(self, handle: int, size: int) -> None:
        """Make a file longer."""
        self._strike("preallocate")
        current = self._files[handle][0].current
        current.extend(bytes(max(0, size - len(current))))

    def _aligned(self, handle: int, views: list[np.ndarray], offset: int) -> None:
        if not self._files[handle][1]:
            return
        numbers = [offset, *(view.size for view in views), *(view.ctypes.data for view in views)]
        if any(number % ALIGNMENT for number in numbers):
            raise OSError(errno.EINVAL, "not aligned, and the file was opened with O_DIRECT")

    def read(self, handle: int, buffers: Buffers, offset: int) -> int:
        """Fill buffers."""
        views = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        self._aligned(handle, views, offset)
        short = self._strike("read")
        current, done = self._files[handle][0].current, 0
        for view in views[: len(views) // 2] if short else views:
            piece = np.frombuffer(current[offset + done : offset + done + view.size], np.uint8)
            view[: piece.size] = piece
            done += piece.size
            if piece.size < view.size:
                break
        return done

    def write(self, handle: int, buffers: Buffers, offset: int) -> int:
        """Write buffers; seen at once, safe after `sync`."""
        views = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        self._aligned(handle, views, offset)
        data = b"".join(view.tobytes() for view in views)
        with _LOCK:
            if self._strike("write"):
                data = data[: len(data) // 2 // SECTOR * SECTOR]
            file = self._files[handle][0]
            file.current.extend(bytes(max(0, offset + len(data) - len(file.current))))
            file.current[offset : offset + len(data)] = data
            file.unsynced.append((offset, data))
        return len(data)

    def sync(self, handle: int) -> None:
        """Make a file's content safe; if that fails, what was not safe is forgotten, as Linux may."""
        file = self._files[handle][0]
        with _LOCK:
            alive = self._disk.writer is self
            try:
                self._strike("sync")
            except OSError:
                if alive:
                    file.current[: len(file.durable)] = file.durable
                    file.unsynced.clear()
                raise
            file.sync()
        if not any(file is named for named in self._disk.names.values()):
            raise FileNotFoundError(errno.ENOENT, "a file was deleted")

    def sync_names(self) -> None:
        """Make the names safe."""
        self._strike("sync_names")
        self._disk.sync_names()

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        self._strike("rename")
        self._disk.names[new] = self._disk.names.pop(old)
        self._disk.renamed()

    def unlink(self, name: str) -> None:
        """Remove a name."""
        self._strike("unlink")
        if name not in self._disk.names:
            raise FileNotFoundError(errno.ENOENT, name)
        del self._disk.names[name]
        self._disk.renamed()

    def close(self, handle: int) -> None:
        """Give a handle back."""
        del self._files[handle]

    def close_all(self) -> None:
        """Let go of the directory."""
        if self._disk.writer is self:
            self._disk.writer = None
