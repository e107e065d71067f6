"""Who am I among the ranks? The only reader of environment variables in plait.

`Launch.detect` is a pure function of a mapping: torchrun, Open MPI, MPICH (Hydra) and Slurm each
leave their own variables, which often nest (torchrun started by srun, mpirun inside an
allocation). The innermost launcher is the one that counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import LaunchError

# Slurm numbers real steps from 0; the batch, extern and interactive steps have ids above this.
SLURM_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Launch:
    """One rank's place, as its launcher tells it.

    Attributes:
        launcher: "torchrun", "openmpi", "mpich", "slurm", "env" (RANK and WORLD_SIZE set by hand) or "alone".
        job: an id of this start of the job, equal on all ranks; "" if the launcher gives none.
        address: host of the meeting point, None if the ranks must agree on one by other means.
        hosted: a store already listens at address:port (torchrun's agent); no rank opens one.
        threads_given: OMP_NUM_THREADS is set, so the number of CPU threads was chosen already.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str
    job: str = ""
    address: str | None = None
    port: int | None = None
    hosted: bool = False
    threads_given: bool = False

    def __post_init__(self) -> None:
        for name, index, size in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_size),
        ):
            if not 0 <= index < size:
                raise LaunchError(
                    f"{self.launcher} gives {name} {index} of {size}; it must be 0 to {max(size, 1) - 1}. "
                    "Look for a variable left over from another job, and unset it"
                )

    @property
    def one_host(self) -> bool:
        """Do all ranks run on this host?"""
        return self.local_size == self.world_size

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> Launch:
        """Read the place of this process from its environment.

        Raises:
            LaunchError: two launchers left different answers, or one answer is incomplete.
        """
        env = os.environ if environ is None else environ
        torchrun = _torchrun(env)
        found = [
            launch
            for launch in (torchrun, _openmpi(env), _mpich(env), _by_hand(env))
            if launch is not None
        ]
        if torchrun is not None:
            found = [found[0], *(other for other in found[1:] if not _starts_agents(other, env))]
        _must_agree(found)
        launch = found[0] if found else _slurm(env) or _alone(env)
        return replace(launch, threads_given="OMP_NUM_THREADS" in env)


def _torchrun(env: Mapping[str, str]) -> Launch | None:
    if "TORCHELASTIC_RUN_ID" not in env:
        return None
    return Launch(
        rank=_number(env, "RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_rank=_number(env, "LOCAL_RANK"),
        local_size=_number(env, "LOCAL_WORLD_SIZE"),
        launcher="torchrun",
        job=f"{env['TORCHELASTIC_RUN_ID']}.{env.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        **_meeting_point(env),
    )


def _openmpi(env: Mapping[str, str]) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    return Launch(
        rank=_number(env, "OMPI_COMM_WORLD_RANK"),
        world_size=_number(env, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size=_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        launcher="openmpi",
        job=env.get("PMIX_NAMESPACE", ""),
        **_meeting_point(env),
    )


def _mpich(env: Mapping[str, str]) -> Launch | None:
    # srun --mpi=pmi2 sets PMI_RANK too; the Slurm variables then say more, and Hydra's local ones are absent.
    if "PMI_RANK" not in env or ("MPI_LOCALRANKID" not in env and _slurm(env) is not None):
        return None
    rank, size = _number(env, "PMI_RANK"), _number(env, "PMI_SIZE")
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "MPI_LOCALRANKID", rank),
        local_size=_number(env, "MPI_LOCALNRANKS", size),
        launcher="mpich",
        **_meeting_point(env),
    )


def _by_hand(env: Mapping[str, str]) -> Launch | None:
    if "TORCHELASTIC_RUN_ID" in env or not ("RANK" in env or "WORLD_SIZE" in env):
        return None
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "LOCAL_RANK", rank),
        local_size=_number(env, "LOCAL_WORLD_SIZE", size),
        launcher="env",
        **_meeting_point(env),
    )


def _slurm(env: Mapping[str, str]) -> Launch | None:
    """A task of srun; not the lone shell of sbatch, salloc or `srun --pty` inside an allocation."""
    step = env.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in env or not step.isdigit() or "SLURM_PTY_PORT" in env:
        return None
    if int(step) >= SLURM_FIRST_SPECIAL_STEP:
        return None
    size = _number(
        env,
        "SLURM_STEP_NUM_TASKS",
        None if "SLURM_NTASKS" not in env else _number(env, "SLURM_NTASKS"),
    )
    tasks = _tasks_per_node(
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size)
    )
    node = _number(env, "SLURM_NODEID", 0)
    job = f"{env.get('SLURM_JOB_ID', '0')}.{step}.{env.get('SLURM_RESTART_COUNT', '0')}"
    launch = Launch(
        rank=_number(env, "SLURM_PROCID"),
        world_size=size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=tasks[node] if node < len(tasks) else tasks[-1],
        launcher="slurm",
        job=job,
        **_meeting_point(env),
    )
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if launch.address is None and not launch.one_host and nodes:
        # Every task must know the port without talking: one from the job's numbers, below the ephemeral range.
        port = 20000 + (_number(env, "SLURM_JOB_ID", 0) * 7 + int(step)) % 12000
        return replace(launch, address=first_host(nodes), port=port)
    return launch


def _alone(env: Mapping[str, str]) -> Launch:
    return Launch(rank=0, world_size=1, local_rank=0, local_size=1, launcher="alone")


def _starts_agents(other: Launch, env: Mapping[str, str]) -> bool:
    """Is `other` what started torchrun's agents, one for each node, and not these ranks?"""
    return other.world_size == _number(env, "GROUP_WORLD_SIZE", 1)


def _must_agree(found: list[Launch]) -> None:
    for other in found[1:]:
        first = found[0]
        if (first.rank, first.world_size) != (other.rank, other.world_size):
            raise LaunchError(
                f"launchers disagree: {_says(first)}, but {_says(other)}. "
                "Start with one launcher only, or unset the variables that the other one left behind"
            )


def _says(launch: Launch) -> str:
    variables = {
        "torchrun": "torchrun (RANK, WORLD_SIZE)",
        "openmpi": "Open MPI (OMPI_COMM_WORLD_RANK, _SIZE)",
        "mpich": "MPICH (PMI_RANK, PMI_SIZE)",
        "env": "RANK and WORLD_SIZE",
    }
    verb = "say" if launch.launcher == "env" else "says"
    return f"{variables[launch.launcher]} {verb} rank {launch.rank} of {launch.world_size}"


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise LaunchError(
            f"{name} is not set, but other variables of the same launcher are; set it, or unset them"
        )
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{name}={text!r} is not a whole number; set it to one, or unset it"
        ) from None


def _meeting_point(env: Mapping[str, str]) -> dict:
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        return {}
    port = _number(env, "MASTER_PORT")
    if not 0 <= port < 1 << 16:
        raise LaunchError(f"MASTER_PORT={port} is no port; set it to one, 1 to 65535, or unset it")
    return {"address": env["MASTER_ADDR"], "port": port}


def _tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's "2(x3),1" to [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[07-09,12],cpu1" -> "gpu07"."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None or not match[0]:
        raise LaunchError(
            f"cannot read the Slurm node list {nodes!r}; set MASTER_ADDR and MASTER_PORT"
        )
    return match[1] + (match[2] or "") + (match[3] or "")
