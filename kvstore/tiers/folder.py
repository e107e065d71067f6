"""What the disk tier asks of a file system: one directory, a few calls, replaceable as a whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import TierLocked, TierReadOnly, TierRefused

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a fifo in our place must not hang the open
_sync = getattr(os, "fdatasync", os.fsync)
Buffers = Sequence[Any]  # of writable or readable memory, see os.preadv


class Folder:
    """A private directory, reached by its descriptor: nothing that is renamed or linked can lead out of it.

    Files are 0600 in a directory 0700, both of this user; links and anything that is no plain file are refused.

    Attributes:
        direct: whether reads and writes of slabs go past the page cache (O_DIRECT); False where the file
            system refuses it, then everything works through the cache.

    Raises:
        TierRefused: if the path is not a directory that a cache may use.
        OSError: as the system says: no such directory, not permitted, read-only.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        self.direct = hasattr(os, "O_DIRECT")
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise TierRefused(
                    f"{self.path} is a link or no directory; name the directory"
                ) from error
            raise
        self._lock: int | None = None
        try:
            self._secure(create)
        except BaseException:
            self.close_all()
            raise

    def _secure(self, change: bool) -> None:
        about = os.fstat(self._fd)
        if about.st_uid != os.geteuid():
            raise TierRefused(f"{self.path} belongs to user {about.st_uid}, not to {os.geteuid()}")
        if stat.S_IMODE(about.st_mode) & 0o077:
            if not change or self.names():
                raise TierRefused(
                    f"{self.path} is open to others (mode {stat.S_IMODE(about.st_mode):o}) and not "
                    "empty; chmod 700 it if it is a cache of yours, or name another directory"
                )
            os.fchmod(self._fd, 0o700)

    def names(self) -> list[str]:
        """Names in the directory, sorted."""
        return sorted(os.listdir(self._fd))  # noqa: PTH208 - by descriptor, not by path

    def lock(self, name: str) -> None:
        """Become the only writer until `close_all` or the end of the process, however it ends.

        Raises:
            TierLocked: if another process is.
            TierReadOnly: if this user may not write here, or nobody may.
        """
        try:
            fd = self._open(name, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise TierReadOnly(
                f"{self.path} cannot be written ({error.strerror}); let this user write it, name another "
                "directory, or open it with mode='read' to use what it holds"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise TierLocked(
                f"{self.path} has a writer already; open it with mode='read' to share its pages, "
                "or give this process its own directory"
            ) from error
        self._lock = fd

    def open(self, name: str, write: bool = False, direct: bool = False) -> int:
        """Open a file of the directory; give a handle for the calls below.

        Raises:
            TierRefused: if it is not this user's own plain file.
        """
        return self._open(name, os.O_RDWR if write else os.O_RDONLY, direct)

    def create(self, name: str, direct: bool = False) -> int:
        """Make a new, empty file, in place of what a dead process left under that name."""
        with contextlib.suppress(FileNotFoundError):
            self.unlink(name)
        return self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct)

    def _open(self, name: str, flags: int, direct: bool = False) -> int:
        direct = direct and self.direct
        try:
            past_cache = os.O_DIRECT if direct else 0
            fd = os.open(name, _FLAGS | flags | past_cache, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise TierRefused(f"{self.path / name} is a link; remove it") from error
            if error.errno != errno.EINVAL or not direct:
                raise
            self.direct = False
            return self._open(name, flags & ~os.O_EXCL)
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1 or about.st_uid != os.geteuid():
            os.close(fd)
            raise TierRefused(f"{self.path / name} is not a plain file of ours; remove it")
        return fd

    def size(self, handle: int) -> int:
        """Length of a file in bytes."""
        return os.fstat(handle).st_size

    def preallocate(self, handle: int, size: int) -> None:
        """Take the disk space of a file now; what was never written reads as zeros."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)

    def read(self, handle: int, buffers: Buffers, offset: int) -> int:
        """Fill buffers in order from a place in the file; give the bytes read."""
        return os.preadv(handle, buffers, offset)

    def write(self, handle: int, buffers: Buffers, offset: int) -> int:
        """Write buffers in order to a place in the file; give the bytes written."""
        return os.pwritev(handle, buffers, offset)

    def sync(self, handle: int) -> None:
        """Make durable what was written to a file, and its length.

        Raises:
            FileNotFoundError: if the file was deleted meanwhile: nothing in it can be durable.
        """
        _sync(handle)
        if os.fstat(handle).st_nlink == 0:
            raise FileNotFoundError(
                errno.ENOENT, "a file was deleted while in use; open the directory again"
            )

    def sync_names(self) -> None:
        """Make durable which names the directory has."""
        os.fsync(self._fd)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of a file that has it."""
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        """Remove a name."""
        os.unlink(name, dir_fd=self._fd)

    def close(self, handle: int) -> None:
        """Give a handle back."""
        os.close(handle)

    def close_all(self) -> None:
        """Let go of the directory and of the writer's lock."""
        for fd in (self._lock, self._fd):
            if fd is not None:
                os.close(fd)
        self._lock = None
