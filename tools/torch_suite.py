"""Run torch's own distributed tests, as its wheel carries them, over one of our backends.

    python tools/torch_suite.py shm                    # all of torch.testing's DistributedTest on 4 ranks
    python tools/torch_suite.py mpi --only all_reduce --ranks 3
    python tools/torch_suite.py shm --table found.md   # the list, as Markdown

torch starts new processes for each test, which takes longer than the test. Here the ranks stay, in one process group;
after a test that failed or hung the next failure is tried again in new ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 90.0  # for one test; more is a hang
START_S = 400.0  # for the ranks to import torch and meet, on a busy machine
NAMES = {"shm": "shm", "mpi": "plait_mpi", "gloo": "plait_gloo"}
ALONE = ("dist.init_process_group(", "dist.destroy_process_group()")
WELL = ("passed", "skipped")


def main() -> None:
    """Start ranks as often as needed, and print what became of every test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=list(NAMES))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="tests with one of these in their names"
    )
    parser.add_argument("--table", type=Path, help="write the list here")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        Rank(args.backend, args.rank_of).run()
        return
    chosen = {n: own for n, own in all_tests().items() if any(part in n for part in args.only)}
    found = Runner(args.backend, args.ranks, [n for n, own in chosen.items() if not own]).run()
    found |= {n: ("not run", "opens or ends the default group itself") for n in chosen if chosen[n]}
    print(said := summary(args.backend, args.ranks, found))
    if args.table:
        args.table.write_text(table(said, found))
    raise SystemExit(any(outcome in ("failed", "hung") for outcome, _ in found.values()))


def all_tests() -> dict[str, bool]:
    """Names of the tests, read without importing them, and whether each ends or opens the default group itself."""
    import torch.testing._internal.distributed as folder

    source = Path(next(iter(folder.__path__))) / "distributed_test.py"
    pieces = source.read_text().split("\n        def test_")[1:]
    found = {f"test_{piece.partition('(')[0]}": piece for piece in pieces}
    return {name: any(w in piece for w in ALONE) for name, piece in sorted(found.items())}


def summary(backend: str, ranks: int, found: dict[str, tuple[str, str]]) -> str:
    """Count the outcomes."""
    import torch

    counts = Counter(outcome for outcome, _ in found.values())
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    return f"{backend}, {ranks} ranks, torch {torch.__version__}: {len(found)} tests: {said}"


def table(said: str, found: dict[str, tuple[str, str]]) -> str:
    """Write the list as Markdown: the passed ones together, the others by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, why in found.items():
        reasons.setdefault(why, []).append(name.removeprefix("test_"))
    rows = [f"{said}.", "", "| | reason | tests |", "|---|---|---|"]
    for (outcome, reason), names in sorted(reasons.items()):
        rows.append(f"| {outcome} | {reason.replace('|', '/')} | {', '.join(sorted(names))} |")
    return "\n".join(rows) + "\n"


class Runner:
    """Starts worlds and follows them through a store; a world ends at a hang, or at the second failure."""

    def __init__(self, backend: str, ranks: int, names: Sequence[str]) -> None:
        import torch.distributed as dist

        self.backend, self.ranks, self.names = backend, ranks, list(names)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.found: dict[str, tuple[str, str]] = {}

    def run(self) -> dict[str, tuple[str, str]]:
        """Run all; each world takes up where the one before ended."""
        world = 0
        while left := self.names[len(self.found) :]:
            folder = tempfile.mkdtemp(prefix="torch-suite-")
            started = self._start(folder, world, left)
            try:
                self._follow(f"world{world}", left, started)
                if self.found[self.names[len(self.found) - 1]][0] not in WELL:
                    said = Path(folder, "output").read_text(errors="replace")
                    print(said[-3000:], file=sys.stderr, flush=True)
            finally:
                for process in started:
                    process.kill()
                    process.wait()
                shutil.rmtree(folder, ignore_errors=True)
            world += 1
        return self.found

    def _start(self, folder: str, world: int, left: list[str]) -> list[subprocess.Popen[bytes]]:
        for name in ("barrier", "test_dir", "init_dir"):
            (Path(folder) / name).mkdir()
        environ = {
            **os.environ,
            "BACKEND": "gloo",  # torch's tests know what to ask of gloo, and ours can what gloo can
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "WORLD_SIZE": str(self.ranks),
            "TEMP_DIR": folder,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self.store.set(f"world{world}/names", json.dumps(left))
        self.store.set(f"world{world}/ranks", str(self.ranks))
        command = [
            sys.executable,
            __file__,
            self.backend,
            "--rank-of",
            f"{self.store.port}:world{world}",
        ]
        with Path(folder, "output").open("wb") as out:
            if self.backend == "mpi":
                mpirun = ["mpirun", "--oversubscribe", "-n", str(self.ranks), *command]
                return [subprocess.Popen(mpirun, env=environ, stdout=out, stderr=out)]
            return [
                subprocess.Popen(
                    command, env={**environ, "RANK": str(rank)}, stdout=out, stderr=out
                )
                for rank in range(self.ranks)
            ]

    def _follow(self, world: str, left: list[str], ranks: list[subprocess.Popen[bytes]]) -> None:
        """Gather outcomes until all tests are done, or one was not well."""
        limit, tainted = START_S, False
        for number, name in enumerate(left):
            key = f"{world}/{number}/done"
            deadline = time.monotonic() + limit
            while self.store.add(key, 0) < self.ranks and time.monotonic() < deadline:
                ended = any(rank.poll() is not None for rank in ranks)
                if ended or self.store.check([f"{world}/{number}/failed"]):
                    deadline = min(deadline, time.monotonic() + 5)  # others may fail too
                time.sleep(0.02)
            done = self.store.add(key, 0)
            outcome, reason = self._outcome(world, number, done)
            if outcome not in WELL and tainted:
                return  # perhaps by what failed before: again, in a fresh world
            print(f"{outcome:7} {name}  {reason}", flush=True)
            self.found[name] = outcome, reason
            if done < self.ranks:
                return
            tainted = tainted or outcome not in WELL
            limit = LIMIT_S

    def _outcome(self, world: str, number: int, done: int) -> tuple[str, str]:
        if self.store.check([f"{world}/{number}/failed"]):
            return "failed", self.store.get(f"{world}/{number}/failed").decode()
        if done < self.ranks:
            return "hung", f"{self.ranks - done} of {self.ranks} ranks did not end it"
        if self.store.check([f"{world}/{number}/skipped"]):
            return "skipped", self.store.get(f"{world}/{number}/skipped").decode()
        return "passed", ""


class Rank:
    """One rank of a world: runs test after test in one process group."""

    def __init__(self, backend: str, control: str) -> None:
        import torch.distributed as dist

        port, self.world = control.split(":")
        self.backend = backend
        self.store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
        self.ranks = int(self.store.get(f"{self.world}/ranks"))
        self.rank = int(
            os.environ.get("OMPI_COMM_WORLD_RANK")
            or os.environ.get("PMI_RANK")
            or os.environ["RANK"]
        )

    def run(self) -> None:
        """Run the tests of this world."""
        import torch.distributed as dist

        register(self.backend)
        dist.init_process_group(
            NAMES[self.backend],
            store=dist.PrefixStore(f"{self.world}/group", self.store),
            rank=self.rank,
            world_size=self.ranks,
            timeout=datetime.timedelta(seconds=START_S),
        )
        dist.group.WORLD.set_timeout(datetime.timedelta(seconds=30))  # type: ignore[union-attr]
        suite = load_suite(self._barrier)
        for number, name in enumerate(json.loads(self.store.get(f"{self.world}/names"))):
            self.number, self.barriers = number, 0
            outcome, reason = self._one(suite, name)
            if outcome != "passed":
                self.store.set(f"{self.world}/{number}/{outcome}", reason)
            self.store.add(f"{self.world}/{number}/done", 1)
            self._meet(f"{number}/done", self.ranks, LIMIT_S)
        time.sleep(5)

    def _one(self, suite: Any, name: str) -> tuple[str, str]:
        import unittest

        import torch
        from torch.testing._internal.common_distributed import TEST_SKIPS

        if not hasattr(suite, name):
            return "skipped", "a template of tests that torch makes by parameters"
        skips = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}
        torch.manual_seed(1234)
        try:
            case = suite(name)
            case.rank, case.file_name = (
                self.rank,
                str(Path(os.environ["TEMP_DIR"]) / f"file{self.number}"),
            )
            getattr(case, name)()
        except unittest.SkipTest as skip:
            return "skipped", str(skip)
        except SystemExit as ended:
            return "skipped", skips.get(int(ended.code or 0), f"exit {ended.code}")
        except BaseException as error:
            if isinstance(error, IndexError) and "rank_to_GPU" in traceback.format_exc():
                return "skipped", "counts CUDA devices, and there is none"
            if isinstance(error, NameError) and error.name == "torchvision":
                return "skipped", "needs torchvision"
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0]
            return "failed", f"rank {self.rank}: {type(error).__name__}: {first[:200]}"
        return "passed", ""

    def _barrier(self, wait_for: int | None = None, timeout: float = 60) -> None:
        """Stand in for the files by which torch's tests meet."""
        self.barriers += 1
        key = f"{self.number}/barrier{self.barriers}"
        self.store.add(f"{self.world}/{key}", 1)
        self._meet(key, wait_for or self.ranks, timeout)

    def _meet(self, key: str, count: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.store.add(f"{self.world}/{key}", 0) < count:
            if time.monotonic() > deadline:
                raise RuntimeError("barrier timeout")
            time.sleep(0.002)


def register(backend: str) -> None:
    """Make our backend known to torch."""
    if backend == "shm":
        from plait.collectives.shm import register as register_shm

        register_shm()
    elif backend == "mpi":
        from plait.collectives.mpi import register as register_mpi

        register_mpi()
    else:
        from plait.collectives.gloo import register as register_gloo

        register_gloo()


def load_suite(barrier: Any) -> Any:
    """Import torch's tests; what they do goes to the default group, which is ours."""
    from torch.testing._internal.distributed import distributed_test as tests

    # Read when a test runs, to skip sub-groups of gloo on fewer than 8 ranks; not so of MPI.
    os.environ["BACKEND"] = "mpi"
    theirs: Any = tests.Barrier
    theirs.sync = classmethod(lambda cls, *args, **options: barrier(*args, **options))
    return type("Suite", (tests.TestDistBackend, tests.DistributedTest._DistTestBase), {})


if __name__ == "__main__":
    main()
