"""What a model is given and done to: refused alike on every rank of every axis, and the model goes on working."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exactness import EXACT, Pair, case, far
from models import tiny, tokens
from plait.parallel import PlanError, parallelize
from training import gradient_errors, token_loss
from world import run_calls

IDS = tokens(2, 9)
EMBEDS = torch.zeros(2, 9, 48, dtype=torch.float64)


def changed(row: int, value: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[row, 3] = value
    return ids


# name: (call, words of its error)
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "ids beyond": (lambda m: m(changed(1, 61)), "input_ids of 61 are outside the vocabulary of 61"),
    "ids below": (lambda m: m(changed(0, -1), labels=IDS), "input_ids of -1 are outside"),
    "ids in a row": (lambda m: m(IDS[0]), "[batch, seq]"),
    "ids of floats": (lambda m: m(IDS.double()), "no whole numbers"),
    "both": (lambda m: m(IDS, inputs_embeds=EMBEDS), "exactly one"),
    "neither": (lambda m: m(labels=IDS), "exactly one"),
    "no rows": (lambda m: m(IDS[:0], labels=IDS[:0]), "no tokens"),
    "no columns": (lambda m: m(IDS[:, :0]), "no tokens"),
    "labels beyond": (lambda m: m(IDS, labels=changed(1, 61)), "labels of 61 are outside"),
    "labels below": (lambda m: m(IDS, labels=changed(1, -3)), "or the ignored label"),
    "labels short": (lambda m: m(IDS, labels=IDS[:, :8]), "give [2, 9]"),
    "labels of fewer rows": (lambda m: m(IDS, labels=IDS[:1]), "give [2, 9]"),
    "labels of floats": (lambda m: m(IDS, labels=IDS.double()), "no whole numbers"),
    "mask of other rows": (lambda m: m(IDS, attention_mask=IDS[:1]), "not of a batch of 2"),
    "copy": (copy.deepcopy, "copy the model before parallelize"),
    "other vocabulary": (lambda m: m.resize_token_embeddings(70), "resize the model before"),
}
STAGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "flat labels": (lambda m: m(IDS, labels=IDS.flatten()), "rows of the batch"),
    "tuples": (lambda m: m(IDS, return_dict=False), ".to_tuple()"),
    "embeddings that learn": (
        lambda m: m(inputs_embeds=EMBEDS.clone().requires_grad_(), labels=IDS),
        "detach them",
    ),
    "a loss of logits": (lambda m: m(IDS).logits.sum().backward(), "give labels"),
}


def one_without_gradients(model: Any) -> Any:
    with torch.set_grad_enabled(dist.get_rank() == 0):
        return model(IDS)


def said(plan: str, family: str) -> dict[str, str]:
    """Every refusal, of one model, which then has the loss of one process."""
    reference = tiny(family)
    model = parallelize(copy.deepcopy(reference), plan)
    calls = {**CALLS, **(STAGED if plan.startswith("pp") else {})}
    calls["one rank without gradients"] = one_without_gradients, "the gradients of ranks"
    found = {}
    for name, (call, words) in calls.items():
        with pytest.raises(PlanError) as error:
            call(model)
        assert words in str(error.value), (name, error.value)
        found[name] = str(error.value)
    if plan == "tp2":  # a step of decoding comes by no door
        with pytest.raises(RuntimeError, match="ids outside 0 to 60"):
            model.model.embed_tokens(changed(0, 61))
    for each in (reference, model):
        each.loss_function = token_loss
    if not plan.startswith("cp"):  # which sums no loss of others' making
        losses = [m(IDS, labels=IDS, use_cache=False).loss for m in (reference, model)]
        assert far(losses[1], losses[0]) < EXACT
    return found


def test_refused_alike_on_every_rank() -> None:
    families = {
        "tp2": "qwen3",
        "cp2": "qwen3",
        "kvp2": "qwen3",
        "pp2": "llama",
        "tp2 ep2": "mixtral",
    }
    calls = [(said, plan, family) for plan, family in families.items()]
    for mine, other in zip(*run_calls(calls, 2), strict=True):
        assert mine == other


def seen_between(plan: str) -> dict[str, float]:
    """A forward without backward between backward and step changes nothing, whoever then asks for parameters."""
    model, quiet = (parallelize(tiny("qwen3"), plan) for _ in range(2))
    for each in (model, quiet):
        each.loss_function = token_loss
        each(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        model(IDS)
    names = dict(quiet.named_parameters())
    grads = {n: p.grad.to_local() for n, p in names.items()}
    errors = {n: far(p.grad.to_local(), grads[n]) for n, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for n, p in model.named_parameters():
        errors[n] = max(errors[n], far(p.grad.to_local(), grads[n]))
    return errors


def test_shards_are_back_after_a_forward_without_backward() -> None:
    for (errors,) in run_calls([(seen_between, "dp2:shard")], 2):
        assert max(errors.values()) < EXACT


def hidden_states(plan: str, length: int) -> dict[str, float]:
    """Values, and gradients of a loss of all of them."""
    pair, ids = Pair.of(case(plan, "qwen3_moe")), tokens(2, length)
    states = [
        torch.cat(m(ids, use_cache=False, output_hidden_states=True).hidden_states)
        for m in (pair.reference, pair.model)
    ]
    for each in states:
        each.square().sum().backward()
    return {"states": far(states[1], states[0]), **gradient_errors(pair)}


def test_hidden_states_are_whole() -> None:
    calls = [(hidden_states, "tp2:sp", n) for n in (9, 1)] + [(hidden_states, "tp2", 5)]
    for answers in run_calls(calls, 2):
        for errors in answers:
            assert max(errors.values()) < EXACT, errors
