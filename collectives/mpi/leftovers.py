"""Segments of shared memory that MPI libraries left over: a crashed job's keep their names, and their memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PATTERNS = ("sm_segment.*", "mpich_shm_*")  # of Open MPI and of MPICH
OLD_S = 600.0  # a younger one may be of a job that starts, whose ranks have yet to map it


def sweep(folder: Path = Path("/dev/shm")) -> list[str]:
    """Remove those of this user that are old and that no process has mapped; say which.

    Ranks may do it at the same time.
    """
    old = [path for pattern in PATTERNS for path in folder.glob(pattern) if _is_old(path)]
    used = set(_mapped()) if old else set()
    gone = [path for path in old if str(path) not in used]
    for path in gone:
        with suppress(OSError):
            path.unlink()
    return [path.name for path in gone]


def _is_old(path: Path) -> bool:
    with suppress(OSError):
        found = path.stat()
        return found.st_uid == os.getuid() and time.time() - found.st_mtime > OLD_S
    return False


def _mapped() -> Iterator[str]:
    """Give the files that processes have mapped; of other users' they cannot be seen, nor are they ours."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                if (at := line.find("/")) >= 0:
                    yield line[at:]
