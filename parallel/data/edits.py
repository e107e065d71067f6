"""Which edits a plan's dp axis asks for."""

from __future__ import annotations

from torch import nn

from ..edits import Edit
from ..ranks import ModelRanks
from .replicas import replica_edits


def data_edits(model: nn.Module, ranks: ModelRanks, edits: list[Edit]) -> list[Edit]:
    """Edits of dp; the last to be applied, for they see the parameters as the other axes leave them.

    Collective: making the dp group, here.
    """
    group = ranks.groups.group("dp") if ranks.plan.dp.size > 1 else None
    # explain leaves out of the plan what does not run on meta, and keeps the mesh
    if group is None:
        return []
    if ranks.sharded:
        from .shards import shard_edits  # FSDP2 takes a while to import

        return shard_edits(model, ranks, edits)
    return replica_edits(model, group, edits)
