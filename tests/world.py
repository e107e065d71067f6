"""Run a rank function in a world of fresh processes: the multi-process half of every test.

    from world import run_world

    def sums(x):                      # module level, in the test file itself
        t = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(t)
        return t.item()

    def test_sums():
        assert run_world(sums, 4, 10) == [46, 46, 46, 46]

Processes come from a fork server that has torch, pytest, transformers and plait in memory, so a
world costs a fraction of a second. Ranks meet through a file, never a port. A failing rank's own
traceback is what the test shows, and the other ranks are killed at once. A world that does not end
in `timeout` seconds is killed, and the error holds the stacks of every rank.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parent
TAIL_BYTES = 6000
PATIENCE_S = 400.0  # of a world that hangs; no measure of speed: a busy machine takes a minute for what takes 5 s alone


def current_rank() -> int:
    """The number of the calling rank, also in a world without a process group."""
    return int(os.environ["TEST_WORLD_RANK"])


class RankError(AssertionError):
    """A rank failed; the message holds its own traceback.

    Attributes:
        rank: the rank that failed first.
        kind: the class name of its exception, e.g. "PlanError".
        reason: str() of its exception.
    """

    def __init__(self, rank: int, kind: str, reason: str, report: str) -> None:
        super().__init__(report)
        self.rank = rank
        self.kind = kind
        self.reason = reason


class WorldTimeout(RankError):
    """The world did not end in time; the message holds the stacks of every rank."""


@dataclass(frozen=True)
class FunctionRef:
    """Where a rank function is found: pickling by module name fails for files that pytest imported by path."""

    file: str
    module: str
    qualname: str

    @staticmethod
    def to(fn: Callable[..., Any]) -> FunctionRef:
        qualname = fn.__qualname__
        if "<" in qualname or not inspect.isfunction(fn):
            raise TypeError(f"{fn!r} is not a module-level function; ranks can only load those")
        return FunctionRef(inspect.getfile(fn), fn.__module__, qualname)

    def load(self) -> Callable[..., Any]:
        found: Any = _load_module(self.module, Path(self.file))
        for part in self.qualname.split("."):
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Order:
    """What one rank is told to do; plain data, pickled to the rank."""

    rank: int
    size: int
    backend: str | None
    threads: int
    timeout: float
    folder: str
    env: dict[str, str]
    calls: tuple[FunctionRef, ...]
    arguments: bytes  # unpickled last, for that needs the test module


def run_world(
    fn: Callable[..., Any],
    size: int,
    *args: Any,
    backend: str | None = "gloo",
    timeout: float = PATIENCE_S,
    threads: int = 1,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` on `size` ranks and return what each returned, in rank order.

    Args:
        fn: a module-level function of a test file or of any importable module.
        backend: of the default process group; None starts the ranks without one.
        timeout: seconds after which the world is killed, showing every rank's stacks.
        threads: of torch, in each rank.
        env: environment variables to set in every rank before `fn` is loaded.
    """
    __tracebackhide__ = True
    return [
        r[0]
        for r in run_calls(
            [(fn, *args)], size, backend=backend, timeout=timeout, threads=threads, env=env
        )
    ]


def run_calls(
    calls: Sequence[tuple[Any, ...]],
    size: int,
    *,
    backend: str | None = "gloo",
    timeout: float = PATIENCE_S,
    threads: int = 1,
    env: dict[str, str] | None = None,
) -> list[list[Any]]:
    """Run several `(fn, *args)` one after another in one world; returns [rank][call].

    State lives on between the calls (process groups, caches), so use it for cheap questions about one world.
    """
    __tracebackhide__ = True
    server = _fork_server()
    folder = tempfile.mkdtemp(prefix="world-")
    refs = tuple(FunctionRef.to(call[0]) for call in calls)
    arguments = pickle.dumps([call[1:] for call in calls])
    ranks: list[BaseProcess] = []
    pipes: list[connection.Connection] = []
    try:
        for rank in range(size):
            ours, theirs = server.Pipe()
            order = Order(rank, size, backend, threads, timeout, folder, env or {}, refs, arguments)
            process = server.Process(target=_rank_main, args=(order, theirs), daemon=True)
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        results = _collect(ranks, pipes, Path(folder), timeout)
        _echo(Path(folder), size)
        return results
    finally:
        for pipe in pipes:
            pipe.close()
        _end(ranks)
        shutil.rmtree(folder, ignore_errors=True)


# ---- the parent's side


def _fork_server() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["world_preload"])
    # The server looks for world_preload on PYTHONPATH (it does not get our sys.path). No BLAS threads: it forks.
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OPENBLAS_NUM_THREADS")}
    try:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), before["PYTHONPATH"]]))
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return server


def _collect(
    ranks: list[BaseProcess], pipes: list[connection.Connection], folder: Path, timeout: float
) -> list[list[Any]]:
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    results: dict[int, list[Any]] = {}
    while len(results) < len(ranks):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _timed_out(ranks, sorted(waiting.values()), folder, timeout)
        failures = []
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                when, outcome = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failures.append((time.monotonic(), rank, _died(ranks[rank])))
                continue
            if isinstance(outcome, tuple):
                failures.append((when, rank, outcome))
            else:
                results[rank] = outcome
        if failures:
            # who raised lives on until all are told: a death is a cause, what others say of it is not
            _, rank, outcome = min(failures, key=lambda each: (each[2][0] != "Died", each[0]))
            raise _failed(rank, outcome, folder)
    return [results[rank] for rank in range(len(ranks))]


def _died(process: BaseProcess) -> tuple[str, str, str]:
    process.join(60)
    code = process.exitcode
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return "Died", how, f"the rank ended without an answer: {how}"


def _failed(rank: int, outcome: tuple[str, str, str], folder: Path) -> BaseException:
    kind, reason, trace = outcome
    if kind == "Skipped":
        return pytest.skip.Exception(reason)
    report = f"rank {rank} failed\n{trace}"
    if said := _tail(folder / f"out{rank}"):
        report += f"\n--- rank {rank} printed\n{said}"
    return RankError(rank, kind, reason, report)


def _timed_out(
    ranks: list[BaseProcess], late: list[int], folder: Path, timeout: float
) -> WorldTimeout:
    for rank in late:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(ranks[rank].pid, signal.SIGUSR1)  # type: ignore[arg-type]
    _until_written([folder / f"stack{rank}" for rank in late])
    report = [f"no end after {timeout} s; still running: ranks {late} of {len(ranks)}"]
    for rank in late:
        report.append(
            f"--- rank {rank}\n{_tail(folder / f'stack{rank}') or '(no stack: it never started)'}"
        )
        if said := _tail(folder / f"out{rank}"):
            report.append(f"--- rank {rank} printed\n{said}")
    return WorldTimeout(late[0], "Timeout", report[0], "\n".join(report))


def _until_written(stacks: list[Path], seconds: float = 10) -> None:
    """Wait for faulthandler: it writes at once, also where Python code cannot run, but not where no core is free."""
    until, before = time.monotonic() + seconds, []
    while time.monotonic() < until:
        time.sleep(0.5)
        sizes = [path.stat().st_size if path.exists() else 0 for path in stacks]
        if all(sizes) and sizes == before:
            return
        before = sizes


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    return path.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()


def _echo(folder: Path, size: int) -> None:
    for rank in range(size):
        for line in _tail(folder / f"out{rank}").splitlines():
            print(f"[rank {rank}] {line}")


def _end(ranks: Iterable[BaseProcess]) -> None:
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join(60)
        process.close()


# ---- the rank's side


def _rank_main(order: Order, pipe: connection.Connection) -> None:
    _redirect_output(Path(order.folder) / f"out{order.rank}")
    stacks = (Path(order.folder) / f"stack{order.rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.dump_traceback_later(
        order.timeout + 30, exit=True, file=stacks
    )  # should the parent be gone
    try:
        outcome: Any = _work(order)
        message = pickle.dumps((time.monotonic(), outcome))
    except BaseException as error:  # whatever it was, the test must show it
        outcome = (type(error).__name__, str(error), _trace(error))
        message = pickle.dumps((time.monotonic(), outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    # Stay until all are done: no rank sees a closed connection before the first failure is told.
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(message)
        pipe.recv_bytes()
    os._exit(0)


def _work(order: Order) -> list[Any]:
    import torch
    import torch.distributed as dist

    os.environ.update(order.env, TEST_WORLD_RANK=str(order.rank))
    torch.set_num_threads(order.threads)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    functions = [ref.load() for ref in order.calls]
    arguments = pickle.loads(order.arguments)
    if order.backend is not None:
        dist.init_process_group(
            order.backend,
            store=dist.FileStore(str(Path(order.folder) / "store"), order.size),
            rank=order.rank,
            world_size=order.size,
            timeout=datetime.timedelta(
                seconds=order.timeout + 60
            ),  # ours ends first, and tells more
        )
    return [fn(*args) for fn, args in zip(functions, arguments, strict=True)]


def _redirect_output(path: Path) -> None:
    out = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)


def _trace(error: BaseException) -> str:
    """Format from the first frame that is not this file."""
    frames = error.__traceback__
    while (
        frames is not None
        and frames.tb_next is not None
        and frames.tb_frame.f_code.co_filename == __file__
    ):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _load_module(name: str, path: Path) -> ModuleType:
    """Load the file under the name that pytest gave it, with pytest's explanation of asserts."""
    loaded = sys.modules.get(name)
    if (
        loaded is not None
        and Path(getattr(loaded, "__file__", None) or "").resolve() == path.resolve()
    ):
        return loaded
    if not path.name.startswith(("test_", "conftest")):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    source = path.read_bytes()
    tree = ast.parse(source, filename=str(path))
    with contextlib.suppress(ImportError):
        from _pytest.assertion.rewrite import rewrite_asserts

        rewrite_asserts(tree, source)
    exec(compile(tree, str(path), "exec", dont_inherit=True), module.__dict__)
    return module
