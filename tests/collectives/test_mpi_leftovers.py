"""What a crashed MPI job left in shared memory is swept away; what a job uses, or may be about to, stays."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from plait.collectives.mpi.leftovers import OLD_S, sweep


def test_only_what_is_old_and_unused_goes(tmp_path: Path) -> None:
    names = ("sm_segment.h.0.1.0", "mpich_shm_1_0", "sm_segment.h.0.2.0", "sm_segment.h.0.3.0")
    for name in (*names, "another"):
        (tmp_path / name).write_bytes(bytes(4096))
        if name != names[3]:
            begun = time.time() - OLD_S - 1
            os.utime(tmp_path / name, (begun, begun))
    with (tmp_path / names[2]).open("rb") as file:
        used = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert sorted(sweep(tmp_path)) == sorted(names[:2])
    assert {path.name for path in tmp_path.iterdir()} == {names[2], names[3], "another"}
    used.close()
    assert sweep(tmp_path) == [names[2]]
