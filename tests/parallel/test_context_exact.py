"""Context parallelism equals one process: logits, loss, gradients and training steps, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from context_exactness import batch_of, measure

from exactness import EXACT, Case, Pair, case, far, gradient_errors, worst
from models import StayFloat64, tiny, tokens
from plait.parallel import parallelize, unparallelize
from world import run_calls

BOTH = ["logits", "loss"]
CASES: list[tuple[Case, str]] = [
    *((case("cp2", f, ["loss"]), "padded") for f in ("qwen2", "phi3", "gpt_neox")),
    (case("cp2", "llama", BOTH), "padded"),
    (case("cp2", "gemma3", BOTH), "documents"),
    (case("cp2", "mistral", ["loss", "steps1"]), "documents"),
    (case("cp2:ulysses", "deepseek", ["loss"]), "padded"),
    (case("cp2:ulysses", "gpt_oss", ["loss"]), "documents"),
    (case("cp3", "llama", BOTH), "documents"),
    (case("cp3", "gpt_oss", ["loss", "steps1"]), "padded"),
    (case("cp3:ulysses", "qwen3", ["loss"], heads=12, kv_heads=4), "padded"),
    (case("cp4", "deepseek", ["loss"]), "short5"),
    (case("cp4", "qwen3", BOTH), "short3"),
    (case("cp4:ulysses", "llama", ["loss"], kv_heads=2), "short3"),
    (case("cp4:ring,ulysses=2", "gpt_oss", BOTH), "padded"),
    (case("cp4:ring,ulysses=2", "llama", BOTH), "short3"),
    (case("cp2 tp2", "llama", ["loss", "steps10"]), "padded"),
    (case("cp2:ulysses tp2", "gemma3", BOTH), "padded"),
    (case("cp2 tp2:sp", "qwen3", BOTH), "documents"),
    (case("cp2 tp2", "deepseek", ["loss"]), "padded"),
    (case("cp2 tp2 etp2", "mixtral", ["loss"], output_router_logits=True), "padded"),
]  # fmt: skip
SIZES = {c.name + b: 4 if "4" in c.plan or "tp" in c.plan else int(c.plan[2]) for c, b in CASES}
ANSWERS: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize(("each", "batch"), CASES, ids=[f"{c.name}-{b}" for c, b in CASES])
def test_equals_one_process(each: Case, batch: str) -> None:
    name, size = each.name + batch, SIZES[each.name + batch]
    if name not in ANSWERS:
        alike = [(c, b) for c, b in CASES if SIZES[c.name + b] == size]
        ranks = run_calls([(measure, c, b) for c, b in alike], size)
        for i, (c, b) in enumerate(alike):
            ANSWERS[c.name + b] = worst([answers[i] for answers in ranks])
    print(ANSWERS[name])
    assert max(ANSWERS[name].values()) < EXACT, ANSWERS[name]


def over_dp(plan: str) -> float:
    """Each dp rank brings its own batches; the oracle takes the mean of the losses. Weights after two steps."""
    with StayFloat64():
        pair = Pair.of(case(plan, "qwen3"))
        at = pair.model._plait.ranks.groups.folding.coords(dist.get_rank())["dp"]
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.05) for m in (pair.reference, pair.model)
        ]
        for step in range(2):
            batches = [tokens(2, 11, seed=2 * step + s) for s in range(2)]
            for ids in batches:
                (pair.reference(ids, labels=ids).loss / 2).backward()
            pair.model(batches[at], labels=batches[at]).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        unparallelize(pair.model)
        expected = dict(pair.reference.named_parameters())
        return max(far(p, expected[n]) for n, p in pair.model.named_parameters())


def checkpointed(plan: str) -> float:
    """Recomputed attention passes its keys around again."""
    with StayFloat64():
        pair = Pair.of(case(plan, "llama"))
        pair.model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = batch_of("padded", 61)
        for model in (pair.reference, pair.model):
            model.train()
            model(**batch, use_cache=False).loss.backward()
        return max(gradient_errors(pair).values())


def other_ways_in() -> dict[str, float]:
    """Embeddings instead of ids, the base model alone, wanted logits, own item counts, and accumulation."""
    errors: dict[str, float] = {}
    with StayFloat64():
        pair = Pair.of(case("cp2", "qwen3"))
        ids, models = tokens(2, 13), (pair.reference, pair.model)
        embeds = [
            torch.randn(2, 13, 48, generator=torch.Generator().manual_seed(1)) for _ in models
        ]
        embeds = [e.double().requires_grad_() for e in embeds]
        base = [
            m.model(inputs_embeds=e, output_hidden_states=True, use_cache=False)
            for m, e in zip(models, embeds, strict=True)
        ]
        for out in base:
            out.last_hidden_state.square().sum().backward()
        errors["states"] = far(base[1].last_hidden_state, base[0].last_hidden_state)
        errors["every state"] = far(base[1].hidden_states[1], base[0].hidden_states[1])
        errors["gradient of embeddings"] = far(embeds[1].grad, embeds[0].grad)  # type: ignore[arg-type]
        for keep in (3, torch.tensor([1, 12])):
            kept = [m(ids, logits_to_keep=keep).logits for m in models]
            errors[f"keep {keep}"] = far(kept[1], kept[0])
            with torch.no_grad():
                errors[f"keep {keep} without gradients"] = far(
                    models[1](ids, logits_to_keep=keep).logits, kept[0]
                )
        pair.model.zero_grad()
        pair.reference.zero_grad()
        for model in models:
            for _ in range(2):
                model(ids, labels=ids, num_items_in_batch=50).loss.backward()
        errors["accumulated"] = max(gradient_errors(pair).values())
        with torch.no_grad():
            errors["evaluated"] = far(*(m(ids, labels=ids).loss for m in models))
    return errors


def test_compositions_and_other_ways_in() -> None:
    calls = [(over_dp, "dp2 cp2"), (over_dp, "dp2:shard cp2"), (checkpointed, "cp2 tp2")]
    for answers in run_calls(calls, 4):
        assert max(answers) < EXACT, answers
    for (errors,) in run_calls([(other_ways_in,)], 2):
        assert max(errors.values()) < EXACT, errors


def lower_precision() -> tuple[float, float]:
    """bf16 under cp is as near to float64 as bf16 in one process."""
    ids = tokens(2, 64)
    exact = tiny("qwen3")(ids).logits
    one = tiny("qwen3", dtype=torch.bfloat16)
    found = parallelize(tiny("qwen3", dtype=torch.bfloat16), "cp2")(ids).logits
    return far(found.double(), exact), far(one(ids).logits.double(), exact)


def test_bf16_is_as_good_as_in_one_process() -> None:
    for ((ours, theirs),) in run_calls([(lower_precision,)], 2):
        assert ours < 1.5 * theirs
