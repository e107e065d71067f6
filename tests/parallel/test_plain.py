"""Odd models are refused by name on every rank, with nothing changed; what looks odd and is not, is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from exactness import far
from models import tiny, tokens
from plait.parallel import PlanError, parallelize
from world import run_world


def in_place(model: Any) -> None:
    model.compile(backend="eager")


def layer(model: Any) -> None:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")


def shared(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def weight_norm(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def gradient_hook(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g * 2)


def grown_hook(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda p: None)


ODD: list[tuple[Callable[[Any], None], str]] = [
    (in_place, "LlamaForCausalLM was given to torch.compile"),
    (layer, "model.layers.0 was given to torch.compile"),
    (shared, "is the module of model.layers.0.mlp"),
    (weight_norm, "model.layers.0.mlp.up_proj makes its weight from other parameters"),
    (gradient_hook, "model.layers.0.mlp.up_proj.weight has hooks"),
    (grown_hook, "model.layers.0.mlp.up_proj.weight has hooks"),
]


def refused(plan: str) -> list[str]:
    said = []
    for change, _ in ODD:
        model = tiny("llama")
        change(model)
        before = [id(p) for p in model.parameters()]
        try:
            parallelize(model, plan)
        except PlanError as error:
            said.append(str(error))
        else:
            said.append("")
        assert [id(p) for p in model.parameters()] == before
    twice = parallelize(tiny("llama"), plan)
    with pytest.raises(PlanError, match="was called before on this model"):
        parallelize(twice, plan)
    whole = torch.compile(tiny("llama"), backend="eager")
    with pytest.raises(PlanError, match="OptimizedModule was given to"):
        parallelize(whole, plan)  # type: ignore[arg-type]
    return said


def test_odd_models_are_refused_by_name() -> None:
    for said in run_world(refused, 2, "tp2"):
        for text, (_, expected) in zip(said, ODD, strict=True):
            assert expected in text


def refused_again() -> str:
    model = parallelize(tiny("llama"), "dp2:shard")
    with pytest.raises(PlanError) as refusal:
        parallelize(model, "dp2:shard")
    return str(refusal.value)


def test_a_second_call_is_named_where_parameters_are_shards() -> None:
    assert all("was called before" in said for said in run_world(refused_again, 2))


def hooked(model: Any) -> Any:
    """Outputs of modules are whole where hooks see them; weights may be shared by modules."""
    layers = model.model.layers
    layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: torch.tanh(o))
    layers[1].mlp.down_proj.register_forward_hook(lambda m, a, o: torch.tanh(o))
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    return model


def error() -> float:
    ids = tokens(2, 12)
    cut = parallelize(hooked(tiny("llama")), "kvp2 tp2")
    plain = tiny("llama")(ids).logits
    expected = hooked(tiny("llama"))(ids).logits
    assert far(plain, expected) > 1e-3  # the hooks do something
    return far(cut(ids).logits, expected)


def test_hooks_and_shared_weights_are_exact() -> None:
    assert max(run_world(error, 4)) < 1e-9
