"""Ranks that meet, or say why not: init() in worlds of forked processes with made-up launcher variables."""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from plait.collectives import meeting_point, rendezvous
from plait.collectives import world as world_module
from plait.collectives.errors import BackendUnavailable, LaunchError
from plait.collectives.launch import Launch
from plait.collectives.world import init
from world import current_rank, run_world


def hydra(size: int, **more: str) -> dict[str, str]:
    """The environment that MPICH's mpiexec gives this rank."""
    rank = str(current_rank())
    mine = {
        "PMI_RANK": rank,
        "PMI_SIZE": str(size),
        "MPI_LOCALRANKID": rank,
        "MPI_LOCALNRANKS": str(size),
    }
    return mine | more


def outcome(size: int, timeout_s: float = 100, **more: str) -> str:
    try:
        init(timeout_s=timeout_s, environ=hydra(size, **more))
    except (LaunchError, BackendUnavailable) as error:
        return f"{type(error).__name__}: {error}"
    return "joined"


def join_and_sum(size: int, folder: str) -> tuple[int, int, str, float]:
    tempfile.tempdir = folder
    world = init(timeout_s=100, environ=hydra(size))
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    return world.rank, world.size, world.launcher, total.item()


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_meet_without_a_port_given(size: int, tmp_path: Path) -> None:
    assert run_world(join_and_sum, size, size, str(tmp_path), backend=None) == [
        (rank, size, "mpich", size * (size + 1) / 2) for rank in range(size)
    ]
    (ours,) = tmp_path.iterdir()
    assert not list(ours.iterdir())  # nothing is left behind


def share_memory(size: int) -> tuple[str, float]:
    with init("shm", timeout_s=100, environ=hydra(size)) as world:
        total = torch.tensor([world.rank + 1.0])
        dist.all_reduce(total)
        return world.backend, total.item()


def test_shared_memory_by_name() -> None:
    assert run_world(share_memory, 3, 3, backend=None) == [("shm", 6.0)] * 3


def close_and_join_again(size: int) -> list[float]:
    totals = []
    for _ in range(3):
        with init(timeout_s=100, environ=hydra(size)):
            total = torch.tensor([current_rank() + 1.0])
            dist.all_reduce(total)
            totals.append(total.item())
        assert not dist.is_initialized()
    return totals


def test_a_world_can_be_closed_and_opened_again() -> None:
    assert run_world(close_and_join_again, 3, 3, backend=None) == [[6.0] * 3] * 3


def with_a_broken_device(size: int, folder: str) -> tuple[str, float]:
    def broken(device: torch.device) -> str:
        raise RuntimeError("the device has fallen off the bus")

    tempfile.tempdir = folder
    if current_rank() == 1:
        world_module._device_name = broken
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        init(timeout_s=180, environ=hydra(size))
    return f"{raised.type.__name__}: {raised.value}", time.monotonic() - begin


def test_what_goes_wrong_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    (first, waited), (second, _) = run_world(
        with_a_broken_device, 2, 2, str(tmp_path), backend=None
    )
    assert first == "LaunchError: rank 1: the device has fallen off the bus"
    assert second == "RuntimeError: the device has fallen off the bus"
    assert waited < 100


def close_an_old_one(size: int) -> list[bool]:
    old = init(timeout_s=100, environ=hydra(size))
    old.close()
    new = init(timeout_s=100, environ=hydra(size))
    old.close()
    alive = [dist.is_initialized()]
    new.close()
    return [*alive, dist.is_initialized()]


def test_a_closed_world_does_not_close_the_next() -> None:
    assert run_world(close_an_old_one, 2, 2, backend=None) == [[True, False]] * 2


def twice(size: int) -> tuple[bool, bool, str]:
    first = init(timeout_s=100, environ=hydra(size))
    second = init(environ=hydra(size))
    second.close()  # it did not start it: nothing happens
    alive = dist.is_initialized()
    try:
        init("nccl", environ=hydra(size))
        message = ""
    except LaunchError as error:
        message = str(error)
    return first == second == pickle.loads(pickle.dumps(first)), alive, message


def test_init_twice_is_the_same_world() -> None:
    for same, alive, message in run_world(twice, 2, 2, backend=None):
        assert same
        assert alive
        assert "already runs 'gloo'" in message


def adopted() -> tuple[int, int, str, str]:
    world = init(environ={})
    return world.rank, world.size, world.launcher, world.backend


def contradicted() -> str:
    try:
        init(environ={"RANK": "0", "WORLD_SIZE": "1"})
    except LaunchError as error:
        return str(error)
    return "no error"


def test_a_process_group_of_the_caller_is_taken_as_it_is() -> None:
    assert run_world(adopted, 2) == [(0, 2, "caller", "gloo"), (1, 2, "caller", "gloo")]
    for answer in run_world(contradicted, 2):
        assert "of 2, but env started rank 0 of 1" in answer


def all_but(missing: list[int], size: int, folder: str) -> tuple[str, float]:
    started_up = dist.FileStore(
        f"{folder}/started", size
    )  # none is late because the machine is busy
    started_up.set(str(current_rank()), "")
    started_up.wait([str(rank) for rank in range(size)])
    started = time.monotonic()
    if current_rank() in missing:
        return "away", 0.0
    return outcome(size, timeout_s=4), time.monotonic() - started


@pytest.mark.parametrize("missing", [[1], [0], [1, 3], [0, 2]])
def test_missing_ranks_are_named_on_every_rank_in_bounded_time(
    missing: list[int], tmp_path: Path
) -> None:
    answers = run_world(all_but, 4, missing, 4, str(tmp_path), backend=None)
    names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing[0]}, {missing[1]}"
    for rank, (answer, seconds) in enumerate(answers):
        if rank in missing:
            continue
        assert answer.startswith(f"LaunchError: {names} of 4 did not reach plait.init() within 4 s")
        assert seconds < 30


def late(size: int) -> str:
    if current_rank() == 0:
        time.sleep(1.0)
    return outcome(size)


def test_a_slow_rank_is_waited_for() -> None:
    assert run_world(late, 3, 3, backend=None) == ["joined"] * 3


def asks_differently(size: int) -> str:
    try:
        init("gloo" if current_rank() else None, timeout_s=100, environ=hydra(size))
    except LaunchError as error:
        return str(error)
    return "joined"


def test_ranks_that_ask_for_different_backends() -> None:
    answers = run_world(asks_differently, 2, 2, backend=None)
    assert answers[0] == answers[1]
    assert "[None, 'gloo']" in answers[0]


def one_asks_for_the_absent(size: int) -> str:
    try:
        init(
            "carrier-pigeon" if current_rank() == 1 else "gloo", timeout_s=100, environ=hydra(size)
        )
    except (LaunchError, BackendUnavailable) as error:
        return f"{type(error).__name__}: {error}"
    return "joined"


def test_a_refusal_on_one_rank_reaches_every_rank() -> None:
    answers = run_world(one_asks_for_the_absent, 3, 3, backend=None)
    assert answers[0] == answers[2]
    assert answers[0].startswith("LaunchError: rank 1: there is no backend 'carrier-pigeon' here")
    assert answers[1].startswith("BackendUnavailable: there is no backend 'carrier-pigeon' here")


def ask(backend: str) -> str:
    try:
        init(backend, environ={})
    except BackendUnavailable as error:
        return str(error)
    return "joined"


def ask_without_mpi4py() -> str:
    sys.modules["mpi4py"] = None  # type: ignore[assignment]
    return ask("mpi")


def test_absent_backends_say_what_to_install() -> None:
    (answer,) = run_world(ask_without_mpi4py, 1, backend=None)
    assert "pip install 'plait[mpi]'" in answer
    if not torch.cuda.is_available():
        (answer,) = run_world(ask, 1, "nccl", backend=None)
        assert "needs a CUDA device" in answer
        assert "pip install" in answer


def without_mpi4py(size: int) -> str:
    meeting_point.importlib.util.find_spec = lambda name: None  # type: ignore[assignment]
    return outcome(size, MPI_LOCALNRANKS="1", MPI_LOCALRANKID="0")


def test_several_hosts_without_mpi4py_ask_for_a_meeting_point() -> None:
    for answer in run_world(without_mpi4py, 2, 2, backend=None):
        assert answer.startswith("LaunchError: 2 ranks run on several hosts (1 on this one)")
        assert "MASTER_ADDR" in answer
        assert "pip install 'plait[mpi]'" in answer


def shares_threads(size: int, given: bool) -> int:
    torch.set_num_threads(7)
    return init(
        timeout_s=100, environ=hydra(size, **({"OMP_NUM_THREADS": "7"} if given else {}))
    ).threads


def test_ranks_of_a_host_share_its_cpus() -> None:
    import os

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert run_world(shares_threads, 2, 2, False, backend=None) == [max(1, cpus // 2)] * 2
    assert run_world(shares_threads, 2, 2, True, backend=None) == [7, 7]


# ---- the private directory: nothing that an earlier job left may hurt


def place(rank: int, job: str = "a-job") -> Launch:
    return Launch(
        rank=rank, world_size=2, local_rank=rank, local_size=2, launcher="openmpi", job=job
    )


def test_stale_address_files_are_not_trusted(tmp_path: Path) -> None:
    file = tmp_path / "address"
    deadline = time.monotonic() + 0.5
    assert meeting_point._join(place(1), file, deadline) is None
    file.write_text("half wr")
    assert meeting_point._join(place(1), file, deadline) is None
    live = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    live.set("plait/nonce", "mine")
    file.write_text(json.dumps({"port": live.port, "nonce": "of another job"}))
    assert meeting_point._join(place(1), file, deadline) is None
    file.write_text(json.dumps({"port": live.port, "nonce": "mine"}))
    assert meeting_point._join(place(1), file, time.monotonic() + 5) is not None
    port = live.port
    del live
    file.write_text(json.dumps({"port": port, "nonce": "mine"}))
    assert meeting_point._join(place(1), file, time.monotonic() + 0.5) is None


def test_the_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with meeting_point._private_directory(place(0)) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        with meeting_point._private_directory(place(1)) as same:
            assert same == folder
        with meeting_point._private_directory(place(1, job="another")) as other:
            assert other != folder
    assert not folder.exists()
    folder.parent.chmod(0o755)
    with (
        pytest.raises(LaunchError, match="of yours alone"),
        meeting_point._private_directory(place(0)),
    ):
        pass


def test_a_link_in_place_of_the_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"plait-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(LaunchError, match="of yours alone"),
        meeting_point._private_directory(place(0)),
    ):
        pass


def test_a_taken_port_is_said() -> None:
    taken = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    import socket

    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        launch = Launch(0, 2, 0, 2, "env", address="127.0.0.1", port=busy.getsockname()[1])
        with pytest.raises(LaunchError, match="Set MASTER_PORT to a free port"):
            rendezvous.meet(launch, {}, timeout_s=2)
    del taken
