"""Stages balanced by how long layers take: measured, agreed on, and exact; parameters alone would cut elsewhere."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exactness import assert_exact, case, worst
from models import tiny, tokens
from plait.parallel import Pipeline, Plan, PlanError, measure_layers, parallelize
from plait.parallel.pipeline.split import split_of
from plait.parallel.pipeline.times import LayerTimes
from training import labelled, trained
from world import run_world


def bounds(model: Any, times: Path | str = "", **options: Any) -> tuple[int, ...]:
    return split_of(model, Pipeline(2, times=str(times), **options)).bounds


def test_times_move_the_cut(tmp_path: Path) -> None:
    model, path = tiny("llama", layers=5), tmp_path / "times.json"
    assert bounds(model) == (0, 3, 5)
    LayerTimes(0.1, [5.0, 1, 1, 1, 1], 0.1).write(path)
    assert bounds(model, path) == (0, 1, 5)
    LayerTimes(0.1, [1.0, 1, 1, 1, 1], 3.5).write(path)
    assert bounds(model, path) == (0, 4, 5)
    LayerTimes(0, [0.0] * 5, 0).write(
        path
    )  # a clock that saw nothing: still a cut, of no empty stage
    assert bounds(model, path) == (0, 1, 5)
    assert bounds(tiny("llama", layers=5), path, schedule="interleaved") == (0, 1, 2, 3, 5)


def test_a_slow_layer_is_found(tmp_path: Path) -> None:
    """The last layer sleeps, in forward only; by parameters the cut is in the middle.

    The least of three times is no stall of the machine's.
    """
    model, path, ids = tiny("qwen3", layers=4), tmp_path / "times.json", tokens(2, 12)
    before = copy.deepcopy(model.state_dict())
    batch = {"input_ids": ids, "labels": ids}
    slow = model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    state = torch.get_rng_state()
    measure_layers(model, batch, path, repeats=3)
    slow.remove()
    assert bounds(model, path) == (0, 3, 4)
    assert bounds(model) == (0, 2, 4)
    found = LayerTimes.read(path, 4)
    assert found.layers[3] > 0.3 > 0.2 > found.before > 0
    assert found.after > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def uneven(path: str) -> dict[str, float]:
    """Rank 0 measures; both cut by it: one layer and four, with an embedding that both hold."""
    model, ids = tiny("llama", layers=5), tokens(2, 9)
    slow = model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
    measure_layers(model, {"input_ids": ids}, path, repeats=3)
    slow.remove()
    each = case(f"pp2:gpipe,microbatches=3,times={path}", "llama", layers=5)
    assert parallelize(model, each.plan)._plait.split.bounds == (0, 1, 5)
    return trained(each, 2, loss=labelled, batch=5)


def differing(folder: str) -> None:
    """Each rank measured for itself."""
    path = f"{folder}/{dist.get_rank()}/times.json"
    Path(path).parent.mkdir()
    LayerTimes(0.0, [1.0, 1, 1 + dist.get_rank()], 0.0).write(path)
    model = tiny("llama", layers=3)
    with pytest.raises(PlanError, match="the plan of ranks"):  # the plans' texts differ
        parallelize(model, f"pp2,times={path}")
    other = Path(folder) / "times.json"
    if dist.get_rank() == 0:
        LayerTimes(0.0, [1.0, 1, 1], 0.0).write(other)
    dist.barrier()
    with pytest.raises(PlanError, match="of 3 layers, and the model has 4"):
        parallelize(tiny("llama", layers=4), f"pp2,times={other}")
    with pytest.raises(FileNotFoundError if dist.get_rank() == 0 else PlanError):
        measure_layers(model, {"input_ids": tokens(1, 4)}, "/nowhere/at/all/times.json")
    parallelize(model, f"pp2,times={other}")
    with pytest.raises(PlanError, match="before parallelize"):
        measure_layers(model, {"input_ids": tokens(1, 4)}, other)


def test_stages_by_time_train_as_one_process(tmp_path: Path) -> None:
    assert_exact(worst(run_world(uneven, 2, str(tmp_path / "times.json"))))
    run_world(differing, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (None, "FileNotFoundError"),
        ("[]", "is no file of layer times"),
        (json.dumps({"format": "x"}), "its format is 'x'"),
        (json.dumps({"format": "plait layer times 1", "before": 0, "layers": [1, -1, 1], "after": 0}), "negative"),
        (json.dumps({"format": "plait layer times 1", "before": 0, "layers": [1, 1], "after": 0}), "of 2 layers"),
        ('{"format": "plait layer times 1", "before": 0, "layers": [1, NaN, 1], "after": 0}', "not a number"),
    ],
)  # fmt: skip
def test_bad_files(written: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(PlanError, match=words):
        bounds(tiny("llama", layers=3), path)


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="transformers decoder"):
        measure_layers(torch.nn.Linear(2, 2), {}, tmp_path / "x")
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    with pytest.raises(PlanError, match="on meta"):
        measure_layers(model, {}, tmp_path / "x")


def test_text() -> None:
    plan = Plan.parse("pp2,times=runs/times.json")
    assert Plan.parse(str(plan)) == plan == Plan.from_json(plan.to_json())
    with pytest.raises(PlanError, match="times="):
        Pipeline(2, times="a b")
