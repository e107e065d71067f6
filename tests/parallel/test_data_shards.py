"""dp as shards (FSDP2 on local parameters): the same numbers, and state dicts cut by both axes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from exactness import Pair, assert_exact, case, far, worst
from models import keep_float64, tiny, tokens
from plait.parallel import parallelize, unparallelize
from plait.parallel.data.shards import ShardParameters
from plait.parallel.edits import SumGradient
from training import (
    assert_as_one_process,
    backward,
    batch_of,
    coordinate,
    gradient_errors,
    labelled,
    loss,
    parameter_errors,
    trained,
)
from world import run_calls, run_world

CASES = {
    2: [case("dp2:shard", "llama"), case("dp2:shard", "mixtral")],
    4: [
        case("dp2:shard tp2", "llama"),
        case("dp2:shard tp2:sp", "qwen3"),
        case("dp2:shard tp2,replicate_kv=true", "qwen3", kv_heads=1),
        case("dp2:shard kvp2", "phi3"),
        case("dp2:shard tp2 etp2", "mixtral"),
        case("dp4:shard", "gemma3"),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_ten_steps_are_those_of_one_process(ranks: int) -> None:
    assert_as_one_process(trained, CASES[ranks], ranks)


def accumulated(sync: bool) -> dict[str, float]:
    pair = Pair.of(case("dp2:shard tp2:sp", "qwen3"))
    for at in range(2):
        for d in range(2):
            (loss(pair.reference, batch_of(d, at)) / 2).backward()
    d = coordinate(pair.model)
    if sync:
        loss(pair.model, batch_of(d, 0)).backward()
    else:
        with pair.model.no_sync():
            loss(pair.model, batch_of(d, 0)).backward()
    loss(pair.model, batch_of(d, 1)).backward()
    return {f"sync {sync}": max(gradient_errors(pair).values())}


def checkpointed() -> dict[str, float]:
    pair = Pair.of(case("dp2:shard tp2", "llama"))
    pair.model.train()
    pair.model.gradient_checkpointing_enable({"use_reentrant": False})
    backward(pair)
    return {"gradients": max(gradient_errors(pair).values())}


def held(plan: str) -> dict[str, float]:
    """A rank holds 1/dp of its part between steps; frozen parameters are sharded too and take no gradient."""
    pair = Pair.of(case(plan, "llama"))
    whole = sum(p.numel() for p in pair.reference.parameters())
    mine = sum(p.to_local().numel() for p in pair.model.parameters())  # type: ignore[operator]
    assert mine < 0.3 * whole, (mine, whole)
    for model in (pair.reference, pair.model):
        for n, p in model.named_parameters():
            p.requires_grad_("mlp" not in n)
    backward(pair)
    assert all(p.grad is None for n, p in pair.model.named_parameters() if "mlp" in n)
    return {"gradients": max(gradient_errors(pair).values())}


def test_accumulation_checkpointing_and_memory() -> None:
    calls = [(accumulated, False), (accumulated, True), (checkpointed,), (held, "dp2:shard tp2")]
    for answers in zip(*run_calls(calls, 4), strict=True):
        assert_exact(worst(answers))


def undone(plan: str) -> list[str]:
    """Weights, classes and hooks are back; a second time works; moments made before go on with the parameters."""
    model = tiny("llama")
    reference = copy.deepcopy(model)
    before = surface(model)
    for _ in range(2):
        parallelize(model, plan)
        loss(model, batch_of(coordinate(model))).backward()
        model.zero_grad()
        unparallelize(model)
    after = surface(model)
    loss(model, batch_of(dist.get_rank())).backward()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def surface(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} class"] = type(module)
        found |= {f"{name}.{n}": True for n in vars(module)}
        for key, value in vars(module).items():
            if "hooks" in key:
                found[f"{name}.{key}"] = len(value)
    return found


def test_undo_leaves_nothing_behind() -> None:
    assert run_world(undone, 4, "dp2:shard tp2") == [[]] * 4


def generated() -> bool:
    """Copies whose prompts and answers differ in length generate together."""
    pair = Pair.of(case("dp2:shard tp2", "llama"))
    d = coordinate(pair.model)
    ids = tokens(1, 5 + d, seed=d)
    options: dict[str, Any] = {"max_new_tokens": 3 + 2 * d, "do_sample": False, "pad_token_id": 0}
    return torch.equal(pair.model.generate(ids, **options), pair.reference.generate(ids, **options))


def test_generate() -> None:
    assert all(run_world(generated, 4))


def lower() -> dict[str, tuple[float, float]]:
    """param_dtype=bf16: gradients as good as a bf16 process', reduced and kept in float32."""
    exact, single = tiny("llama"), tiny("llama", dtype=torch.bfloat16)
    model = parallelize(tiny("llama", dtype=torch.float32), "dp2:shard,param_dtype=bf16")
    for each in (exact, single):
        for d in range(2):
            (loss(each, batch_of(d)).double() / 2).backward()
    loss(model, batch_of(dist.get_rank())).backward()
    errors = {}
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32  # type: ignore[union-attr]
        right = exact.get_parameter(name).grad
        errors[name] = tuple(
            float((g.double() - right).norm() / right.norm())
            for g in (p.grad.full_tensor(), single.get_parameter(name).grad)  # type: ignore[union-attr]
        )
    return errors  # type: ignore[return-value]


def test_mixed_precision() -> None:
    for errors in run_world(lower, 2):
        found, alone = (sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in range(2))
        print(found, alone)
        assert 1e-4 < found < 1.5 * alone


# --- state dicts ------------------------------------------------------------------------------


def save(plan: str | None, family: str, folder: str) -> None:
    model = tiny(family)
    if plan is not None:
        parallelize(model, plan)
    state = model.state_dict()
    if plan is not None and "shard" in plan:
        assert all(isinstance(v, DTensor) for v in state.values())
    dcp.save({"model": state}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(plan: str | None, family: str, folder: str) -> list[str]:
    model, right = tiny(family, seed=7), tiny(family).state_dict()
    if plan is not None:
        parallelize(model, plan)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    whole = {
        n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in model.state_dict().items()
    }
    wrong = [n for n in right if not torch.equal(whole[n], right[n])]
    if plan is not None:
        model.load_state_dict(tiny(family, seed=3).state_dict())  # whole tensors are taken too
        unparallelize(model)
        other = tiny(family, seed=3).state_dict()
        wrong += [n for n, v in model.state_dict().items() if not torch.equal(v, other[n])]
    return wrong


PAIRS = [
    ("llama", ("dp2:shard tp2", 4), (None, 1)),
    ("phi3", (None, 1), ("dp2:shard tp2", 4)),
    ("phi3", ("dp2:shard tp2", 4), ("dp3:shard", 3)),
    ("qwen3", ("dp2 tp2", 4), ("dp2:shard kvp2", 4)),
]


@pytest.mark.parametrize(("family", "source", "target"), PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_what_one_plan_saves_another_loads(
    family: str, source: Any, target: Any, tmp_path: Path
) -> None:
    def backend(place: Any) -> str | None:
        return None if place[0] is None else "gloo"

    run_world(save, source[1], source[0], family, str(tmp_path), backend=backend(source))
    found = run_world(load, target[1], target[0], family, str(tmp_path), backend=backend(target))
    assert found == [[]] * target[1]


def saved(folder: str) -> list[str]:
    from transformers import LlamaForCausalLM

    model = parallelize(tiny("llama"), "dp2:shard tp2")
    model.save_pretrained(folder)
    right = tiny("llama").state_dict()
    again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    return [n for n in right if not torch.equal(again[n], right[n])]


def test_save_pretrained(tmp_path: Path) -> None:
    assert run_world(saved, 4, str(tmp_path)) == [[]] * 4


def read(plan: str, family: str, folder: str) -> dict[str, float]:
    """From meta and files a rank never holds more of a sharded parameter than its rows, and trains the same."""
    if dist.get_rank() == 0:
        tiny(family).save_pretrained(folder)
    dist.barrier()
    reference = tiny(family)
    with torch.device("meta"):
        model = type(reference)(reference.config).double().eval()
    held: list[int] = []
    apply = ShardParameters.apply

    def weighed(self: ShardParameters) -> None:
        experts = {e.module.get_parameter(e.name) for e in self.sums if e.over_dp}
        assert all(p.is_meta or p in experts for p in self.model.parameters())
        held.append(sum(rows.numel() for rows in self.rows.values()))
        apply(self)

    with patch.object(ShardParameters, "apply", weighed):
        parallelize(keep_float64(model), plan, weights=folder)
    assert held[0] == sum(
        p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)
    )
    pair = Pair(reference, model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (pair.reference, pair.model)]
    backward(pair, loss=labelled, batch=4)
    errors = {"gradients": max(gradient_errors(pair).values())}
    for optimizer in optimizers:
        optimizer.step()
    errors["parameters"] = max(parameter_errors(pair).values())
    unparallelize(model)
    right = reference.state_dict()
    return errors | {"after undo": max(far(v, right[n]) for n, v in model.state_dict().items())}


READ = [
    ("dp2:shard tp2", "llama"),
    ("dp2:shard tp2 ep4", "mixtral"),
    ("pp2 dp2:shard", "phi3"),
]


def test_weights_are_read_as_shards(tmp_path: Path) -> None:
    calls = [(read, *each, str(tmp_path / each[1])) for each in READ]
    for answers in zip(*run_calls(calls, 4), strict=True):
        assert_exact(worst(answers))


# --- a negative control -----------------------------------------------------------------------


def unmoved() -> dict[str, float]:
    """A mutation: sums of partial gradients stay on the parameters that FSDP2 does not compute with."""
    SumGradient.undo = lambda self: None  # type: ignore[method-assign]
    original = SumGradient.apply
    applied: set[int] = set()

    def once(self: SumGradient) -> None:
        if id(self) not in applied:
            applied.add(id(self))
            original(self)

    SumGradient.apply = once  # type: ignore[method-assign]
    return trained(case("dp2:shard tp2:sp", "qwen3"), 1)


def test_partial_gradients_that_are_not_summed_are_seen() -> None:
    assert worst(run_world(unmoved, 4))["gradients"] > 1e-3
