"""Pipeline stages: an ordinary loop, the same loss everywhere, gradients and generation of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from exactness import Pair, assert_exact, case, far, generate, worst
from models import tiny, tokens
from plait.parallel import PlanError, parallelize, unparallelize
from plait.parallel.pipeline.run import PipelinedModel
from training import assert_as_one_process, backward, batch_of, gradient_errors, labelled, trained
from world import run_world

CASES = {
    2: [
        case("pp2:gpipe,microbatches=3", "llama", layers=3),  # tied, five rows, uneven layers
        case("pp2", "qwen3"),
        case("pp2:zero-bubble,microbatches=4", "gemma3"),
        case("pp2:interleaved,microbatches=4", "mixtral", layers=4),
        case("pp2", "gpt_neox"),
        case("pp2", "granite"),
        case("pp2:interleaved,microbatches=4", "olmo", layers=4),
    ],
    4: [
        case("pp2 tp2", "llama"),
        case("dp2 pp2", "llama"),
        case("pp2:zero-bubble tp2", "qwen3", layers=2),
        case("pp4:1f1b,microbatches=5", "phi3", layers=5),
        case("pp2 tp2 ep2", "mixtral"),
        case("pp2 dp2 ep2", "qwen2_moe"),
        case("pp2 dp2:shard", "llama"),
        case("pp2 tp2:sp", "granite"),
        case("pp2 tp2:sp", "olmo"),
        case("pp2:interleaved,microbatches=4 dp2:shard", "qwen3", layers=4),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_ten_steps_are_those_of_one_process(ranks: int) -> None:
    assert_as_one_process(several, CASES[ranks], ranks)


def several(each: Any) -> dict[str, float]:
    return trained(each, loss=labelled, batch=5)


def test_three_axes() -> None:
    cases = [case("dp2 pp2 tp2", "llama"), case("dp2 pp2 tp2 ep4", "mixtral")]
    assert_as_one_process(several, cases, 8)


# --- the loop ---------------------------------------------------------------------------------


def ordinary(plan: str) -> dict[str, float]:
    """The loss is a number on every stage; accumulation, scaling and a forward that nobody differentiates."""
    pair = Pair.of(case(plan, "llama"))
    errors = {}
    labelled(pair.model, batch_of(0, batch=4))  # no backward: leaves nothing
    assert all(p.grad is None for p in pair.model.parameters())
    for step in range(2):
        found, right = (
            labelled(m, batch_of(0, step, batch=4)) for m in (pair.model, pair.reference)
        )
        errors[f"loss {step}"] = far(found, right)
        (found * 3).backward()
        (right * 3).backward()
        errors[f"gradients {step}"] = max(gradient_errors(pair).values())
    once = labelled(pair.model, batch_of(0, batch=4))
    once.backward()
    with pytest.raises(RuntimeError, match=r"used up|second time"):
        once.backward()
    with torch.no_grad():
        ids, mask = batch_of(0, batch=4)
        both = [m(ids, attention_mask=mask, labels=ids) for m in (pair.model, pair.reference)]
    errors["loss without gradients"] = far(both[0].loss, both[1].loss)
    errors["logits"] = far(both[0].logits, both[1].logits)
    return errors


def another_label_is_ignored(plan: str) -> dict[str, float]:
    """Rows that fill the last microbatch do not count either when the caller leaves out a label of its own."""
    pair = Pair.of(case(plan, "llama"))
    for model in (pair.reference, pair.model):
        labelled(model, batch_of(0, batch=5), ignore_index=7).backward()
    return {"gradients": max(gradient_errors(pair).values())}


def checkpointed(plan: str) -> dict[str, float]:
    pair = Pair.of(case(plan, "llama"))
    pair.model.train()
    pair.model.gradient_checkpointing_enable({"use_reentrant": False})
    backward(pair, loss=labelled)
    return {"gradients": max(gradient_errors(pair).values())}


def generated(plan: str) -> dict[str, float]:
    """Through a cache of each stage's own layers; window layers too; a sampled token is the same everywhere."""
    errors = {}
    for family in ("llama", "gemma3"):
        pair = Pair.of(case(plan, family))
        errors |= {f"{family} {n}": e for n, e in generate(pair).items()}
        torch.manual_seed(dist.get_rank())
        ids = pair.model.generate(tokens(1, 5), max_new_tokens=4, do_sample=True, pad_token_id=0)
        every = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
        dist.all_gather(every, ids)
        errors[f"{family} sampled"] = 0.0 if all(torch.equal(ids, e) for e in every) else 1.0
    return errors


def undone(plan: str) -> dict[str, float]:
    model = tiny("llama")
    reference = copy.deepcopy(model)
    names = [n for n, _ in model.named_modules()]
    for _ in range(2):
        parallelize(model, plan)
        mine = sum(p.numel() for p in model.parameters())
        assert mine < 0.8 * sum(p.numel() for p in reference.parameters())
        labelled(model, batch_of(0)).backward()
        unparallelize(model)
        model.zero_grad()
    assert [n for n, _ in model.named_modules()] == names
    assert "forward" not in vars(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pairs = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    return {"weights": 0.0 if all(torch.equal(p, q) for p, q in pairs) else 1.0}


def around() -> list[dict[str, float]]:
    ignored = another_label_is_ignored("pp2:gpipe,microbatches=3")
    return [ordinary("pp2"), ignored, checkpointed("pp2"), generated("pp2"), undone("pp2")]


def around_tp() -> list[dict[str, float]]:
    return [generated("pp2 tp2"), undone("pp2 tp2")]


@pytest.mark.parametrize(("rank_function", "ranks"), [(around, 2), (around_tp, 4)])
def test_the_ordinary_loop(rank_function: Callable[[], Any], ranks: int) -> None:
    for errors in zip(*run_world(rank_function, ranks), strict=True):
        assert_exact(worst(errors))


# --- checkpoints ------------------------------------------------------------------------------


def save(plan: str, folder: str) -> None:
    model = parallelize(tiny("llama"), plan)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)


def load(plan: str, folder: str) -> list[str]:
    model, right = parallelize(tiny("llama", seed=7), plan), tiny("llama").state_dict()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    model.load_state_dict(
        {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in right.items()}
    )
    unparallelize(model)
    return [n for n, v in model.state_dict().items() if not torch.equal(v, right[n])]


def meta(folder: str) -> dict[str, float]:
    """A model on meta: a stage reads its own layers only."""
    if dist.get_rank() == 0:
        tiny("llama").save_pretrained(folder)
    dist.barrier()
    reference = tiny("llama")
    with torch.device("meta"):
        model = type(reference)(reference.config).double().eval()
    parallelize(model, "pp2", weights=folder)
    return {n: far(p, reference.get_parameter(n)) for n, p in model.named_parameters()}


def saved(folder: str) -> list[str]:
    from transformers import AutoModelForCausalLM

    parallelize(tiny("llama"), "pp2 tp2").save_pretrained(folder)
    right = tiny("llama").state_dict()
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    return [n for n in right if not torch.equal(again[n], right[n])]


@pytest.mark.filterwarnings("ignore")
def test_checkpoints(tmp_path: Path) -> None:
    run_world(save, 2, "pp2", str(tmp_path / "a"))
    assert run_world(load, 4, "pp2 tp2", str(tmp_path / "a")) == [[]] * 4
    assert run_world(saved, 4, str(tmp_path / "c")) == [[]] * 4
    assert_exact(worst(run_world(meta, 2, str(tmp_path / "b"))), 1e-6)


# --- bad input and negative controls ----------------------------------------------------------


REFUSED = [
    ("pp2:zero-bubble dp2:shard", {}, "zero-bubble and dp:shard"),
    ("pp2:interleaved tp2", {}, "cuts 4 runs of layers"),
]


def refusals() -> list[str]:
    said = []
    dropping = parallelize(tiny("llama", attention_dropout=0.1), "pp2 tp2")
    labelled(dropping, batch_of(0))  # nothing is dropped in eval mode
    with pytest.raises(PlanError, match=r"training with attention_dropout=0.1"):
        labelled(dropping.train(), batch_of(0))
    for plan, changes, _ in REFUSED:
        with pytest.raises(PlanError) as refused:
            parallelize(tiny("llama", **changes), plan)
        said.append(str(refused.value))
    return said


def test_refusals() -> None:
    for said in run_world(refusals, 4):
        for text, (_, _, words) in zip(said, REFUSED, strict=True):
            assert words in text


def untied() -> dict[str, float]:
    """A mutation: the two copies of a tied embedding keep their own gradients."""
    PipelinedModel._sum_tied = lambda *_: None  # type: ignore[method-assign]
    return trained(case("pp2", "llama"), 1, loss=labelled, batch=4)


def miscounted() -> dict[str, float]:
    """A mutation: each microbatch's loss is its own mean, and the mean of these is taken."""
    from plait.parallel.pipeline import decoder, run

    decoder.item_count = lambda values: None  # type: ignore[assignment]
    scaled = run.deposited
    run.deposited = lambda total, z, p, g, both: scaled(
        total / 3, z, p, [None if x is None else x / 3 for x in g], both
    )  # type: ignore[assignment]
    return trained(case("pp2:gpipe,microbatches=3", "qwen3"), 1, loss=labelled, batch=5)


@pytest.mark.parametrize("mutation", [untied, miscounted])
def test_wrong_gradients_are_seen(mutation: Callable[[], dict[str, float]]) -> None:
    assert worst(run_world(mutation, 2))["gradients"] > 1e-3
