"""Who am I: the variables that launchers leave, as tables; nothing is started here."""

from __future__ import annotations

import pytest

from plait.collectives.errors import LaunchError
from plait.collectives.launch import Launch, first_host

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "OMP_NUM_THREADS": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node0-17@1",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (OPENMPI, "openmpi"),
        (MPICH, "mpich"),
        (SLURM, "slurm"),
        (BY_HAND, "env"),
    ],
)
def test_every_launcher_tells_the_same_place(environ: dict[str, str], launcher: str) -> None:
    launch = Launch.detect(environ)
    assert (launch.rank, launch.world_size) == (3, 4)
    assert (launch.local_rank, launch.local_size) == (1, 2)
    assert launch.launcher == launcher
    assert not launch.one_host


def test_nothing_is_a_world_of_one() -> None:
    assert Launch.detect({}) == Launch(0, 1, 0, 1, "alone")


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MPICH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Launch.detect() == Launch.detect(MPICH)
    assert Launch.detect({}).launcher == "alone"


def test_torchrun_brings_its_store_and_counts_restarts() -> None:
    launch = Launch.detect(TORCHRUN)
    assert (launch.address, launch.port, launch.hosted) == ("node0", 29500, True)
    assert launch.job == "abc.2"
    assert launch.threads_given
    assert not Launch.detect(OPENMPI).threads_given


@pytest.mark.parametrize("environ", [OPENMPI, MPICH, BY_HAND, SLURM])
def test_a_given_meeting_point_is_taken(environ: dict[str, str]) -> None:
    launch = Launch.detect(environ | {"MASTER_ADDR": "node9", "MASTER_PORT": "1234"})
    assert (launch.address, launch.port, launch.hosted) == ("node9", 1234, False)
    assert Launch.detect(environ | {"MASTER_ADDR": "node9"}).address != "node9"


@pytest.mark.parametrize(
    ("outer", "launcher"),
    [
        (OPENMPI | BY_HAND, "openmpi"),  # RANK=$OMPI_COMM_WORLD_RANK, exported by hand
        (
            OPENMPI | SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "openmpi",
        ),  # srun started the daemons
        (MPICH | SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "mpich"),
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "slurm"),  # srun --mpi=pmi2
        (SLURM | {"PMIX_RANK": "3"}, "slurm"),  # srun --mpi=pmix
        (
            TORCHRUN | SLURM | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            "torchrun",
        ),  # srun torchrun
        # mpirun -n 2 torchrun: one agent for each node; its rank is not ours
        (
            TORCHRUN | OPENMPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            "torchrun",
        ),
    ],
)
def test_nested_launchers_the_inner_one_counts(outer: dict[str, str], launcher: str) -> None:
    launch = Launch.detect(outer)
    assert (launch.launcher, launch.rank, launch.world_size) == (launcher, 3, 4)


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        (
            OPENMPI | {"RANK": "0", "WORLD_SIZE": "4"},
            ["Open MPI", "rank 3 of 4", "RANK and WORLD_SIZE say rank 0 of 4"],
        ),
        (OPENMPI | {"RANK": "3", "WORLD_SIZE": "8"}, ["rank 3 of 8"]),
        (OPENMPI | MPICH | {"PMI_RANK": "1"}, ["Open MPI", "MPICH", "rank 1 of 4"]),
        # torchrun --nproc-per-node 1 mpirun -n 4
        (
            OPENMPI
            | TORCHRUN
            | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "1"},
            ["torchrun"],
        ),
    ],
)
def test_launchers_that_disagree_are_named(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(LaunchError, match="launchers disagree") as caught:
        Launch.detect(environ)
    for part in [*parts, "unset"]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        (
            OPENMPI | {"OMPI_COMM_WORLD_SIZE": "four"},
            "OMPI_COMM_WORLD_SIZE='four' is not a whole number",
        ),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 of 4; it must be 0 to 3"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "rank -1 of 4"),
        (MPICH | {"MPI_LOCALRANKID": "2"}, "local rank 2 of 2"),
        (BY_HAND | {"MASTER_ADDR": "x", "MASTER_PORT": "y"}, "MASTER_PORT='y'"),
        (BY_HAND | {"MASTER_ADDR": "x", "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x2"}, "2x2"),
    ],
)
def test_incomplete_or_wrong_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        Launch.detect(environ)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_STEP_ID": ""},  # sbatch on older Slurm: no step
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell of salloc
        {"SLURM_PTY_PORT": "3456"},  # srun --pty bash
    ],
)
def test_a_lone_shell_inside_an_allocation_is_a_world_of_one(shell: dict[str, str]) -> None:
    assert Launch.detect(SLURM | shell).launcher == "alone"


def test_slurm_meets_on_the_first_host_at_a_port_of_the_job() -> None:
    launch = Launch.detect(SLURM)
    assert launch.address == "gpu07"
    assert launch.port is not None
    assert 20000 <= launch.port < 32000
    assert launch.port != Launch.detect(SLURM | {"SLURM_STEP_ID": "1"}).port
    one_host = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert Launch.detect(one_host).address is None
    uneven = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_STEP_NODELIST": "a,b"}
    assert Launch.detect(uneven).local_size == 3


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("node1,node2", "node1"),
        ("single", "single"),
        ("rack[1-2]-blade,x", "rack1-blade"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
