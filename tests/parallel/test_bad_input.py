"""Bad input: a clear error on every rank at once, no hang, and a model that is as it was."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from exactness import far
from models import tiny, tokens
from plait.parallel import Attention, Plan, PlanError, api, edits, parallelize, unparallelize
from plait.parallel.agreement import RanksDisagree
from world import run_world


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything parallelize touches: parameters by identity, classes, hooks, own attributes, configs."""
    found: dict[str, Any] = {
        f"parameter {n}": (id(p), p.detach().clone())
        for n, p in model.named_parameters(remove_duplicate=False)
    }
    for name, module in model.named_modules():
        found[f"class {name}"] = type(module)
        for key, value in vars(module).items():
            if key.endswith("_hooks"):
                found[f"{name}.{key}"] = len(value)
            elif key not in {"_parameters", "_buffers", "_modules"}:
                found[f"{name}.{key}"] = (
                    id(value)
                    if not isinstance(value, (int, float, str, bool, type(None)))
                    else value
                )
        config = getattr(module, "config", None)
        if config is not None:
            found[f"attention {name}"] = config._attn_implementation
    for name, p in model.named_parameters():
        found[f"gradient hooks {name}"] = len(p._backward_hooks or {})
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    wrong = [n for n in before.keys() | after.keys() if (n in before) != (n in after)]
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        alike = a[0] == b[0] and torch.equal(a[1], b[1]) if isinstance(a, tuple) else a == b
        if not alike and not (isinstance(a, tuple) and a[1].isnan().any()):
            wrong.append(name)
    return sorted(wrong)


def refused(make: Callable[[], Any], call: Callable[[Any], Any]) -> tuple[str, str]:
    """The kind and text of the error; checks that the model is as it was, and how long it took."""
    model = make()
    before = fingerprint(model)
    start = time.monotonic()
    try:
        call(model)
    except (PlanError, ValueError) as error:
        assert time.monotonic() - start < 60, "somebody waited for a rank that does not come"
        wrong = differences(before, fingerprint(model))
        assert not wrong, f"changed by a refused call: {wrong}"
        return type(error).__name__, str(error)
    raise AssertionError("not refused")


class Plain(nn.Module):
    """A module no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"wq": nn.Linear(8, 8), "wo": nn.Linear(8, 8)}) for _ in range(2)]
        )
        self.head = nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["wo"](block["wq"](x).relu())  # type: ignore[index]
        return self.head(x)


def rank() -> int:
    return dist.get_rank()


def llama() -> Any:
    return tiny("llama")


def with_nan(where: int | None) -> Any:
    model = tiny("llama")
    if where is None or where == rank():
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[-1, 5] = torch.nan
    return model


def other_weights() -> Any:
    return tiny("llama", seed=rank())


def other_shape() -> Any:
    return tiny("llama", vocab=61 + rank())


def fail_on_rank_1(*_: Any, **__: Any) -> Any:
    if rank() == 1:
        raise RuntimeError("disk on fire")
    return []


def weights_fail(model: Any) -> None:
    with patch.object(api, "load", fail_on_rank_1):
        parallelize(model, "tp2")


def commit_fails(model: Any) -> None:
    """The last edit fails, after all the others were made."""
    original = edits.SwapClass.apply

    def apply(self: Any) -> None:
        if isinstance(self.module, nn.Linear) and self.module is model.lm_head:
            raise ValueError("late failure")
        original(self)

    with patch.object(edits.SwapClass, "apply", apply):
        parallelize(model, "tp2")


def twice(model: Any) -> None:
    parallelize(model, "tp2")
    try:
        parallelize(model, "tp2")
    finally:
        restore_identity(model)


def restore_identity(model: Any) -> None:
    """Undo; the weights come back as new tensors, so the fingerprint is made to compare values only."""
    unparallelize(model)
    fresh = dict(model.named_parameters())
    original = dict(ORIGINAL[0])
    for name, p in fresh.items():
        assert torch.equal(p, original[name])
        module, _, last = name.rpartition(".")
        model.get_submodule(module)._parameters[last] = original[name]
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is fresh["model.embed_tokens.weight"]
        model.lm_head._parameters["weight"] = model.model.embed_tokens.weight


ORIGINAL: list[dict[str, nn.Parameter]] = []


def remembered() -> Any:
    model = tiny("llama")
    ORIGINAL[:] = [dict(model.named_parameters())]
    return model


def plans(model: Any) -> None:
    parallelize(model, "tp2" if rank() == 0 else "kvp2")


def one_plan_fails(model: Any) -> None:
    parallelize(model, "tp2" if rank() == 0 else "tp3")


REFUSALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str, tuple[str, ...]]] = {
    # name: (model, call, kind of error, words in its text on every rank)
    "plan text": (llama, lambda m: parallelize(m, "tq2"), "PlanError", ("tq",)),
    "plan option": (llama, lambda m: parallelize(m, "tp2:spp"), "PlanError", ("spp",)),
    "world too small": (
        llama,
        lambda m: parallelize(m, "tp4"),
        "PlanError",
        ("world_size=2", "4 ranks"),
    ),
    "world too large": (
        llama,
        lambda m: parallelize(m, Plan()),
        "PlanError",
        ("world_size=2", "1 ranks"),
    ),
    "heads": (
        lambda: tiny("llama", heads=3, kv_heads=3),
        lambda m: parallelize(m, "tp2"),
        "PlanError",
        ("tp=2", "kv_heads=3", "use tp in"),
    ),
    "kv heads": (
        lambda: tiny("llama", heads=8, kv_heads=1),
        lambda m: parallelize(m, "tp2"),
        "PlanError",
        ("tp=2", "kv_heads=1", "replicate_kv=true"),
    ),
    "kvp heads": (
        lambda: tiny("llama", heads=3, kv_heads=1),
        lambda m: parallelize(m, "kvp2"),
        "PlanError",
        ("heads=3",),
    ),
    "sp and kvp": (llama, lambda m: parallelize(m, "tp2:sp kvp2"), "PlanError", ("sp", "kvp")),
    "dp": (llama, lambda m: parallelize(m, "dp4"), "PlanError", ("world_size=2", "4 ranks")),
    "pp": (
        llama,
        lambda m: parallelize(m, "pp2:interleaved"),
        "PlanError",
        ("pp=2", "4 runs of layers", "pp <= 1"),
    ),
    "cp with rules": (
        Plain,
        lambda m: parallelize(m, "cp2", rules={"one": "colwise"}),
        "PlanError",
        ("cp=2 with rules", "plait.Sequence("),
    ),
    "ulysses heads": (
        lambda: tiny("llama", heads=9, kv_heads=3, hidden=72),
        lambda m: parallelize(m, "cp2:ulysses"),
        "PlanError",
        ("cp=2 (ulysses) * tp=1", "heads=9", "use cp in {1, 3, 9}"),
    ),
    "ep of three": (
        lambda: tiny("mixtral"),
        lambda m: parallelize(m, "dp3 ep3"),
        "PlanError",
        ("ep=3", "does not divide experts=4", "use ep in {1}"),
    ),
    "sums over dp": (
        lambda: tiny("mixtral"),
        lambda m: parallelize(m, "dp2 ep2,exchange=sums"),
        "PlanError",
        ("ep=2", "exchange=sums", "use exchange=tokens"),
    ),
    "ep without experts": (
        llama,
        lambda m: parallelize(m, "tp2 ep2"),
        "PlanError",
        ("ep=2", "none"),
    ),
    "chunks": (
        llama,
        lambda m: parallelize(m, "kvp2,chunks=some"),
        "PlanError",
        ("chunks='some'", "not a whole number"),
    ),
    "unknown model": (
        Plain,
        lambda m: parallelize(m, "tp2"),
        "PlanError",
        ("Plain", "rules", '"blocks.*.wq": "colwise"'),
    ),
    "rule without a match": (
        Plain,
        lambda m: parallelize(m, "tp2", rules={"blocks.*.wk": "colwise"}),
        "PlanError",
        ("blocks.*.wk", "matches no module", "blocks.*.wq"),
    ),
    "rule of a wrong style": (
        Plain,
        lambda m: parallelize(m, "tp2", rules={"blocks.*.wq": "colwize"}),
        "PlanError",
        ("colwize", "colwise"),
    ),
    "rule of wrong heads": (
        Plain,
        lambda m: parallelize(
            m,
            "tp2",
            rules={
                "blocks.*": Attention(
                    heads=4, kv_heads=4, head_dim=3, q="wq", k="wq", v="wq", o="wo"
                )
            },
        ),
        "PlanError",
        ("wq.weight has shape [8, 8]",),
    ),
    "rule of no linear": (
        Plain,
        lambda m: parallelize(m, "tp2", rules={"blocks.*": "colwise"}),
        "PlanError",
        ("ModuleDict", "Linear"),
    ),
    "NaN on all": (
        lambda: with_nan(None),
        lambda m: parallelize(m, "tp2"),
        "PlanError",
        ("NaN", "up_proj"),
    ),
    "missing weights": (
        llama,
        lambda m: parallelize(m, "tp2", weights="/no/such/folder"),
        "PlanError",
        ("/no/such/folder",),
    ),
    "other plans": (llama, plans, "RanksDisagree", ("plan", "tp2", "kvp2")),
    "one plan fails": (llama, one_plan_fails, "PlanError", ("tp=3", "use tp in {1, 2, 4}")),
    "other weights": (
        other_weights,
        lambda m: parallelize(m, "tp2"),
        "RanksDisagree",
        ("model", "rank"),
    ),
    "other shapes": (
        other_shape,
        lambda m: parallelize(m, "tp2"),
        "RanksDisagree",
        ("model", "rank"),
    ),
    "twice": (remembered, twice, "PlanError", ("was called before", "tp2", "unparallelize")),
    "late failure": (llama, commit_fails, "ValueError", ("late failure",)),
    "undo of nothing": (llama, unparallelize, "PlanError", ("unparallelize", "no plan")),
}


def refusals(names: list[str]) -> dict[str, tuple[str, str]]:
    return {name: refused(*REFUSALS[name][:2]) for name in names}


ANSWERS: dict[str, list[tuple[str, str]]] = {}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_on_every_rank(name: str) -> None:
    if not ANSWERS:
        for answers in run_world(refusals, 2, list(REFUSALS)):
            for key, said in answers.items():
                ANSWERS.setdefault(key, []).append(said)
    _, _, kind, words = REFUSALS[name]
    for got, text in ANSWERS[name]:
        print(got, text)
        assert got == kind
        for word in words:
            assert word in text
    if name not in {
        "one plan fails",
        "NaN on all",
    }:  # there one rank fails, and the other is told so
        assert len(set(ANSWERS[name])) == 1, "the ranks were told different things"


def failures_on_one_rank() -> list[tuple[str, str]]:
    """What one rank cannot do, no rank does; the others are told which rank and why."""
    found = []
    for make, call in (
        (llama, weights_fail),
        (lambda: with_nan(1), lambda m: parallelize(m, "tp2")),
    ):
        model = make()
        before = fingerprint(model)
        with pytest.raises(Exception) as error:
            call(model)
        assert not differences(before, fingerprint(model))
        found.append((type(error.value).__name__, str(error.value)))
    return found


def test_a_failure_of_one_rank_is_told_to_all() -> None:
    for number, answers in enumerate(run_world(failures_on_one_rank, 2)):
        (kind, disk), (_, nan) = answers
        assert "disk on fire" in disk
        assert "rank 1" in disk if number == 0 else kind == "RuntimeError"
        assert "NaN" in nan
        assert "rank 1" in nan or number == 1


# --- inputs of a model that is parallel -------------------------------------------------------


def inputs(plan: str) -> dict[str, str]:
    """Errors of calls to a parallel model; afterwards it still answers as it should."""
    reference = tiny("llama")
    model = parallelize(copy.deepcopy(reference), plan)
    ids, r = tokens(2, 7), rank()
    cache = model.kv_cache()
    from transformers import DynamicCache, StaticCache

    calls: dict[str, Callable[[], Any]] = {
        "other tokens": lambda: model(ids + r),
        "other lengths": lambda: model(tokens(2, 7 + r)),
        "other masks": lambda: model(
            ids, attention_mask=torch.ones(2, 7).index_fill(1, torch.tensor([0]), float(r)).long()
        ),
        "other prompts": lambda: model.generate(ids + r, max_new_tokens=3, pad_token_id=0),
    }
    calls |= {
        "mask too short": lambda: model(
            ids, attention_mask=torch.ones(2, 5).long(), past_key_values=cache
        ),
        "other batch": lambda: (
            model(ids, past_key_values=cache),
            model(ids[:1], past_key_values=cache),
        ),
    }
    if plan.startswith("kvp"):
        full = torch.zeros(2, 1, 7, 7)
        calls |= {
            "dynamic cache": lambda: model(
                ids, past_key_values=DynamicCache(config=reference.config)
            ),
            "static cache": lambda: model(
                ids, past_key_values=StaticCache(config=reference.config, max_cache_len=16)
            ),
            "mask of 4 dims": lambda: model(ids, attention_mask=full),
            "attention dropout": lambda: with_dropout(model, ids),
        }
    said = {}
    with torch.no_grad():
        for name, call in calls.items():
            try:
                call()
            except (PlanError, ValueError) as error:
                said[name] = f"{type(error).__name__}: {error}"
        assert far(model(ids).logits, reference(ids).logits) < 1e-9
    return said


def with_dropout(model: Any, ids: torch.Tensor) -> Any:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    try:
        return model(ids, use_cache=False)
    finally:
        model.eval()


@pytest.mark.parametrize("plan", ["tp2", "kvp2"])
def test_bad_inputs_are_named(plan: str) -> None:
    ranks = run_world(inputs, 2, plan)
    assert ranks[0] == ranks[1]
    words = {
        "other tokens": "rank",
        "other lengths": "rank",
        "other masks": "rank",
        "other prompts": "rank",
        "dynamic cache": "DynamicCache",
        "static cache": "StaticCache",
        "mask of 4 dims": "4 dims",
        "mask too short": "must be",
        "other batch": "2 requests",
        "attention dropout": "attention_dropout=0",
    }
    under_tp = ("other ", "mask too short")  # the rest works there, on the model's own attention
    expected = {n: w for n, w in words.items() if plan == "kvp2" or n.startswith(under_tp)}
    print(ranks[0])
    assert ranks[0].keys() == expected.keys()
    for name, word in expected.items():
        assert word in ranks[0][name], (name, ranks[0][name])
        if name.startswith("other ") and name != "other batch":
            assert ranks[0][name].startswith(RanksDisagree.__name__)
            assert "input" in ranks[0][name]
