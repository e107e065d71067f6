"""transformers' own folded expert parallel, unmodified, as an independent oracle: the same losses and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from exactness import far, worst
from models import tiny, tokens
from plait.parallel import Plan, parallelize
from world import run_world

pytest.importorskip("accelerate", reason="transformers shards on the CPU with accelerate only")
SIZES = {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}
PLAN = "dp2:shard tp2 ep4"


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean over tokens, computed outside of the model."""
    logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def both(folder: str) -> dict[str, float]:
    """Losses and gradients of their model and of ours, on this rank's batch."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        tiny("mixtral", dtype=torch.float32, hidden=64).save_pretrained(folder)
    dist.barrier()
    own = Plan.parse(PLAN).coords(dist.get_rank())["dp"]
    ids = tokens(2, 12 + own, seed=own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(**SIZES), dtype=torch.float32
        )
    ours = parallelize(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PLAN)
    losses = [next_token_loss(model.train(), ids) for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    errors = {"losses": far(losses[1], losses[0])}
    cuts = {edit.path: edit for edit in ours._plait.parameters()}  # type: ignore[union-attr]
    found = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        right, mine = (whole(g) for g in (p.grad, found[name].grad))
        if name in cuts:
            right = cuts[name].take(right, ours._plait.ranks)  # type: ignore[union-attr]
        if right.numel():
            errors[name] = far(mine, right)
    return errors


def whole(grad: Any) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def test_losses_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    errors = worst(run_world(both, 4, str(tmp_path / "model")))
    print(errors)
    assert len(errors) > 20
    assert max(errors.values()) < 2e-5
