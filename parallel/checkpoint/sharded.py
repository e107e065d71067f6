"""Parameters that dp shards too: a state dict shows them cut by both, first over the model copy, then over dp.

FSDP2 chunks dim 0 of what is left on a rank, which is DTensor's rule for a second mesh dim: ``[Shard(cut.dim),
Shard(0)]`` over (ranks of the copy in run order, dp). No strided shards, because the mesh is in the order of the cuts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...collectives.primitive import chunk_sizes
from ..layout import Cut
from ..ranks import ModelRanks


def cut_twice(
    shard: DTensor, cut: Cut, shape: tuple[int, ...], ranks: ModelRanks
) -> DTensor | None:
    """Show dp's shard of a cut tensor in the whole one; None if the parts are not chunks and must be gathered first.

    Shape: shard ``[part/dp, ...]`` -> DTensor of ``shape``; a view of the shard's memory
    """
    if not parts_are_chunks(cut, ranks):
        return None
    return from_chunk(shard.to_local(), cut, shape, ranks)


def from_chunk(chunk: Tensor, cut: Cut, shape: tuple[int, ...], ranks: ModelRanks) -> DTensor:
    """Make the DTensor of ``shape`` of which this rank holds ``chunk``."""
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        chunk,
        shard_mesh(ranks, chunk.device),
        [Shard(cut.dim), Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def parts_are_chunks(cut: Cut, ranks: ModelRanks) -> bool:
    """Say whether every rank's part is its chunk of the whole, no more and in one piece; the same on all ranks."""
    sizes = chunk_sizes(cut.length, ranks.size)
    starts = [sum(sizes[:n]) for n in range(ranks.size)]
    return all(
        cut.runs[j] == ((starts[n], starts[n] + sizes[n]),) for j, n in enumerate(ranks.run_order)
    )


def dp_chunk(part: Tensor, parameter: DTensor) -> Tensor:
    """This rank's rows of its part, by torch.chunk's rule.

    Shape: [part, ...] -> [part/dp, ...]
    """
    mesh = parameter.device_mesh
    sizes = chunk_sizes(part.shape[0], mesh.size())
    at = mesh.get_local_rank()
    return part.narrow(0, sum(sizes[:at]), sizes[at])


def as_shard(part: Tensor, parameter: Tensor | None) -> Tensor:
    """Show a part as the model's own parameter is held: dp's shard of it, or the part itself."""
    if not isinstance(parameter, DTensor) or isinstance(part, DTensor):
        return part
    return DTensor.from_local(
        dp_chunk(part, parameter),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def taken_back(
    value: Tensor, parameter: Tensor | None, cut: Cut, ranks: ModelRanks
) -> DTensor | None:
    """Undo `cut_twice` without communication; None if the value is not of its form."""
    if not isinstance(parameter, DTensor) or not isinstance(value, DTensor):
        return None
    same = value.placements == (Shard(cut.dim), Shard(0)) and parts_are_chunks(cut, ranks)
    if not same or value.device_mesh != shard_mesh(ranks, value.device):
        return None
    return DTensor.from_local(
        value.to_local(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_mesh(ranks: ModelRanks, device: torch.device) -> DeviceMesh:
    """The mesh (ranks of the model copy in run order, dp).

    Collective: all of them, where the communicator in run order is not made yet.
    """
    order = sorted(range(ranks.size), key=lambda j: ranks.run_order[j])
    rows = tuple(ranks.groups.folding.group(ranks.members[j], "dp") for j in order)
    return ranks.groups.mesh_over(rows, ("ffn_tp", "dp"), device.type)
