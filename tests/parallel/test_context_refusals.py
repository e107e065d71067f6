"""What cp cannot run is refused on every rank, says what would do, and leaves the model usable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import tiny, tokens
from plait.parallel import PlanError, parallelize
from plait.parallel.context.masks import knows_documents
from world import run_calls

IDS = tokens(2, 9)
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "generate": (lambda m: m.generate(IDS, max_new_tokens=2), "use kvp=2"),
    "cache": (lambda m: m(IDS, use_cache=True), "use kvp=2"),
    "4-D mask": (
        lambda m: m(IDS, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool)),
        "padding mask [2, 9]",
    ),
    "mask of another length": (lambda m: m(IDS, attention_mask=torch.ones(2, 8)), "[2, 9]"),
    "positions": (lambda m: m(IDS, position_ids=torch.zeros(3, 2, 9).long()), "[2, 9]"),
    "labels": (lambda m: m(IDS, labels=IDS[:, 1:]), "give [2, 9]"),
    "unknown": (lambda m: m(IDS, token_type_ids=torch.zeros(2, 9)), "leave it out"),
    "nothing": (lambda m: m(IDS[:, :0]), "at least one token"),
}


def said(call: Callable[[], Any]) -> str:
    """What a call is refused with."""
    try:
        call()
    except PlanError as error:
        return str(error)
    return ""


def refused() -> dict[str, str]:
    """Every refusal, on one model that goes on working."""
    model = parallelize(tiny("qwen3"), "cp2").train()
    found = {name: said(lambda c=call: c(model)) for name, (call, _) in CALLS.items()}
    model.loss_function = lambda logits, labels, **_: logits.sum()
    found["own loss"] = said(lambda: model(IDS, labels=IDS))
    found["works"] = str(tuple(model(IDS).logits.shape))
    dropping = parallelize(tiny("llama", attention_dropout=0.5), "cp2").train()
    found["dropout"] = said(lambda: dropping(IDS, labels=IDS))
    for name, use in (
        ("mask index", lambda mask: mask[:, 0]),
        ("mask dtype", lambda mask: mask.dtype),
    ):
        found[name] = said(lambda use=use: reads_masks(use)(IDS))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    found["rope"] = said(lambda: parallelize(tiny("llama", rope_parameters=rope), "cp2"))
    return found


def reads_masks(use: Callable[[Any], Any]) -> Any:
    """A model under cp whose attention does more with its mask than to hand it on, as Doge's and HYV4's."""
    model = parallelize(tiny("llama"), "cp2").train()
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, given: use(given["attention_mask"]), with_kwargs=True
    )
    return model


def test_refusals_say_what_would_do() -> None:
    expected = {name: words for name, (_, words) in CALLS.items()}
    expected |= {
        "own loss": "logits, which are whole",
        "works": "(2, 9, 61)",
        "dropout": "attention_dropout=0",
        "mask index": "only reads its mask",
        "mask dtype": "only reads its mask",
        "rope": "another rope_type",
    }
    for (found,) in run_calls([(refused,)], 2):
        for name, words in expected.items():
            assert words in found[name], (name, found[name])


def test_a_forward_without_a_text_is_refused() -> None:
    known: dict[str, Any] = {"nn": torch.nn}
    exec("class Own(nn.Module):\n    def forward(self, ids): return ids", known)
    made = type("Made", (torch.nn.Module,), {"forward": lambda self, ids: ids})
    for kind in (known["Own"], made):
        with pytest.raises(PlanError, match=r"cp of .*text of its forward.*use cp=1"):
            knows_documents(kind())
