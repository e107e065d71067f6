"""What torch builds on a process group, run over any backend: DDP, FSDP2, DTensor, pipelining, checkpoints.

Checks for `conformance.run_all`, apart because they import most of torch. Each compares with the same
computation in one process, in float64.
"""

from __future__ import annotations

import shutil
import tempfile
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from conformance import Abilities, Check, rank, same, size

WIDTH = 12


def model() -> nn.Sequential:
    """The same layers on every rank."""
    torch.manual_seed(7)
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)]
    return nn.Sequential(*layers)


def batch(of: int) -> Tensor:
    """The rows that a rank brings."""
    source = torch.Generator().manual_seed(of)
    return torch.randn(6, WIDTH, generator=source, dtype=torch.float64)


def mean_gradients() -> list[Tensor]:
    """Gradients of the mean over all ranks' losses, computed by this process alone."""
    whole = model()
    for r in range(size()):
        (whole(batch(r)).square().mean() / size()).backward()
    return [p.grad for p in whole.parameters() if p.grad is not None]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def ddp_averages_gradients(can: Abilities) -> None:
    parallel = DistributedDataParallel(model(), bucket_cap_mb=0.001)
    parallel(batch(rank())).square().mean().backward()
    for p, expected in zip(parallel.parameters(), mean_gradients(), strict=True):
        close(p.grad, expected)


def fsdp2_trains(can: Abilities) -> None:
    sharded = model()
    mesh = init_device_mesh("cpu", (size(),))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(batch(rank())).square().mean().backward()
    for p, expected in zip(sharded.parameters(), mean_gradients(), strict=True):
        assert isinstance(p.grad, DTensor)
        close(p.grad.full_tensor(), expected)


def dtensors_change_their_placement(can: Abilities) -> None:
    mesh = init_device_mesh("cpu", (2, size() // 2), mesh_dim_names=("a", "b"))
    x = torch.arange(10 * 7, dtype=torch.float64).view(10, 7)
    cut = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    same(cut.full_tensor(), x)
    for placements in ([Shard(1), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        same(cut.redistribute(placements=placements).full_tensor(), x)
    parts = DTensor.from_local(x / size(), mesh, [Partial(), Partial()], run_check=False)
    close(parts.full_tensor(), x)
    close(parts.redistribute(placements=[Shard(0), Replicate()]).full_tensor(), x)
    y = distribute_tensor(x.T.contiguous(), mesh, [Replicate(), Shard(0)])
    close((cut @ y).full_tensor(), x @ x.T)


def pipelines_train(can: Abilities) -> None:
    layer, whole = model()[rank()], model()
    stage = PipelineStage(layer, rank(), size(), torch.device("cpu"))
    schedule = Schedule1F1B(stage, 6, loss_fn=lambda out, target: (out - target).square().sum())
    losses: list[Tensor] = []
    if rank() == 0:
        schedule.step(batch(0))
    elif rank() == size() - 1:
        schedule.step(target=batch(1), losses=losses)
    else:
        schedule.step()
    (whole(batch(0)) - batch(1)).square().sum().backward()
    for p, expected in zip(layer.parameters(), whole[rank()].parameters(), strict=True):
        assert expected.grad is not None
        close(p.grad, expected.grad / 6)  # the schedule takes the mean over microbatches


def checkpoints_change_their_sharding(can: Abilities) -> None:
    folder = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    mesh = init_device_mesh("cpu", (size(),))
    x = torch.arange(9 * 8, dtype=torch.float64).view(9, 8)
    checkpoint.save({"x": distribute_tensor(x, mesh, [Shard(0)])}, checkpoint_id=folder[0])
    state = {"x": distribute_tensor(torch.zeros_like(x), mesh, [Shard(1)])}
    checkpoint.load(state, checkpoint_id=folder[0])
    same(state["x"].full_tensor(), x)
    if rank() == 0:
        shutil.rmtree(str(folder[0]))


def tools_ask_for_the_backend(can: Abilities) -> None:
    """As training frameworks do to set a timeout: torch sets those of its own alone, and says so."""
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    assert group._get_backend(torch.device("cpu")) is group
    with pytest.raises(RuntimeError, match="sends no tensors of meta"):
        group._get_backend(torch.device("meta"))
    with pytest.warns(UserWarning, match="Set timeout"):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=5))


USERS: tuple[Check, ...] = (
    ddp_averages_gradients,
    fsdp2_trains,
    dtensors_change_their_placement,
    pipelines_train,
    checkpoints_change_their_sharding,
    tools_ask_for_the_backend,
)
