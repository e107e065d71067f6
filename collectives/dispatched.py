"""A collective as torch's dispatcher shows it: which it is, over which group, and what this rank brings to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
    "gather_": "gather",
    "scatter_": "scatter",
}
_BELOW = torch._C.DispatchKey.CompositeExplicitAutograd  # where functional collectives call c10d


@dataclass(frozen=True)
class Dispatched:
    """One call of an operator of c10d.

    Attributes:
        op: the collective; one that is not known keeps torch's name.
        kept: the share of an exchange that stays on this rank, where the parts may be uneven.
        root: the group's rank that the others send to, or that sends to them.
        work: None where the call has waited, and where there is nothing on the host to wait for.
        waits: its caller waits for the work at once.
    """

    op: str
    group: dist.ProcessGroup
    brought: list[Tensor]
    kept: float | None
    root: int | None
    work: dist.Work | None
    waits: bool


def read(func: Any, args: Any, kwargs: Any, result: Any) -> Dispatched | None:
    """Read a call of an operator that has given a result; None if it was no collective."""
    if func.namespace != "c10d":
        return None
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
    group = _group_of(given)
    if group is None:
        return None
    name = str(func._schema.name)
    op = _NAMES.get(name.removeprefix("c10d::"), name)
    brought = [] if op == "barrier" else _brought(given)
    kept = _share_kept(given, brought, group) if op == "all_to_all" else None
    # Elsewhere than on the CPU a work that is complete is only queued; on meta there is nothing to wait for.
    work = _work_of(result) if any(t.device.type == "cpu" for t in _tensors_in(args)) else None
    waits = given.get("async_op") is False
    return Dispatched(op, group, brought, kept, given.get("root_rank"), work, waits)


def kernel_of_c10d(func: Any, args: Any) -> Callable[..., Any] | None:
    """Find what a functional collective (DTensor's) does by c10d; None for other operators, and tensors of its own."""
    if func.namespace != "_c10d_functional" or not func.has_kernel_for_dispatch_key(_BELOW):
        return None
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in _tensors_in(args))
    return partial(func._op_dk, _BELOW) if plain else None


def _tensors_in(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _group_of(given: dict[str, Any]) -> dist.ProcessGroup | None:
    group = given.get("process_group")
    return dist.ProcessGroup.unbox(group) if isinstance(group, torch.ScriptObject) else None


def _work_of(result: Any) -> dist.Work | None:
    """Find the work that an operator gave back."""
    last = result[-1] if isinstance(result, (tuple, list)) and result else result
    return dist.Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


def _brought(given: dict[str, Any]) -> list[Tensor]:
    """Find what a rank gives: what is called an input; where nothing is, all there is (it is written over)."""
    inputs = [x for name, x in given.items() if name.startswith("input")]
    return _tensors_in(inputs or list(given.values()))


def _share_kept(
    given: dict[str, Any], brought: list[Tensor], group: dist.ProcessGroup
) -> float | None:
    """The share of an exchange that a rank keeps; None where a single tensor is cut evenly."""
    parts = given.get("input_split_sizes") or [x.numel() for x in brought]
    return parts[group.rank()] / max(sum(parts), 1) if len(parts) == group.size() else None
