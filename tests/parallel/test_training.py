"""What surrounds training and undo: dropout, checkpointing, lower precision, hooks, failures between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exactness import EXACT, Pair, case, far, gradient_errors, loss_of, mask_of
from models import tiny, tokens
from plait.collectives import primitive
from plait.parallel import parallelize, unparallelize
from world import run_calls, run_world


def equal_on_all_ranks(x: torch.Tensor) -> bool:
    every = primitive.all_gather(x.detach().float()[None].contiguous(), dist.group.WORLD)
    return all(torch.equal(every[0], other) for other in every)


def dropout(plan: str) -> dict[str, bool]:
    """Attention masks differ between ranks, hidden states and generators do not."""
    model = parallelize(tiny("llama", attention_dropout=0.4), plan).train()
    ids = tokens(2, 15)
    torch.manual_seed(5)
    inner: dict[str, torch.Tensor] = {}
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: inner.update(heads=args[0])
    )
    hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    state = torch.get_rng_state()
    handle.remove()
    torch.manual_seed(5)
    again = model(ids, use_cache=False).logits
    torch.manual_seed(6)
    other = model(ids, use_cache=False).logits
    model.eval()
    with torch.no_grad():
        calm = model(ids).logits
    zeroed = zeros_of_dropout(model, ids)
    return {
        "hidden states agree": all(equal_on_all_ranks(h) for h in hidden),
        "generators agree": equal_on_all_ranks(state),
        "masks differ": not equal_on_all_ranks(zeroed),
        "replays": torch.equal(again, model.lm_head(hidden[-1])),
        "does something": not torch.equal(again, other),
        "off in eval": far(calm, again) > 1e-3,
    }


def zeros_of_dropout(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The random numbers a rank draws inside attention."""
    drawn: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    handle = attention.v_proj.register_forward_hook(lambda *_: drawn.append(torch.rand(64)))
    model.train()
    torch.manual_seed(5)
    model(ids, use_cache=False)
    model.eval()
    handle.remove()
    return drawn[0]


def test_dropout_differs_inside_attention_only() -> None:
    for answers in run_world(dropout, 2, "tp2"):
        assert answers == dict.fromkeys(answers, True)


def checkpointed(plan: str, family: str) -> dict[str, float]:
    """Recomputed activations give the gradients of the untouched model without checkpointing."""
    pair = Pair.of(case(plan, family))
    ids, mask = tokens(3, 21), mask_of()
    loss_of(pair.reference(ids, attention_mask=mask, use_cache=False).logits, mask).backward()
    pair.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pair.model.train()
    loss_of(pair.model(ids, attention_mask=mask, use_cache=False).logits, mask).backward()
    assert any(getattr(m, "gradient_checkpointing", False) for m in pair.model.modules())
    return gradient_errors(pair)


CHECKPOINTED = [
    ("tp2", "llama"),
    ("tp2:sp", "qwen3"),
    ("kvp2,interleave=2,exchange=partials", "llama"),
    ("kvp2,interleave=16,exchange=partials", "llama"),
    ("kvp2,interleave=2,exchange=kv", "llama"),
]


def test_gradient_checkpointing_is_exact() -> None:
    for answers in run_calls([(checkpointed, *cell) for cell in CHECKPOINTED], 2):
        for cell, errors in zip(CHECKPOINTED, answers, strict=True):
            name = max(errors, key=errors.__getitem__)
            print(cell, name, errors[name])
            assert errors[name] < EXACT, (cell, name)


def checkpointed_dropout() -> dict[str, float]:
    """With dropout, recomputation replays each rank's own masks: gradients as without checkpointing."""
    model = parallelize(tiny("llama", attention_dropout=0.3), "tp2").train()
    ids = tokens(2, 12)
    found = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        torch.manual_seed(3)
        model.zero_grad()
        loss_of(model(ids, use_cache=False).logits, torch.ones(2, 12)).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return {n: far(found[1][n], found[0][n]) for n in found[0]}


def test_checkpointing_replays_dropout() -> None:
    for errors in run_world(checkpointed_dropout, 2):
        assert max(errors.values()) < EXACT


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error over all elements: the largest one alone is chance at low precision."""
    return float((found.double() - expected).norm() / expected.norm())


def precision(plan: str, family: str) -> dict[str, tuple[float, float]]:
    """Errors against float64 of the untouched model, of one process and of the plan, by dtype."""
    exact = tiny(family)
    ids, mask = tokens(3, 21), mask_of()
    with torch.no_grad():
        expected = exact(ids, attention_mask=mask).logits[mask.bool()]
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        single = tiny(family, dtype=dtype)
        with torch.no_grad():
            alone = single(ids, attention_mask=mask).logits[mask.bool()]
            model = parallelize(copy.deepcopy(single), plan)
            together = model(ids, attention_mask=mask).logits[mask.bool()]
            cache = model(ids[2:, :13], use_cache=True).past_key_values
            stepped = model(ids[2:, 13:], past_key_values=cache, use_cache=True).logits[0]
        whole = expected[-21:][13:]
        step_alone = rms(alone[-21:][13:], whole)
        errors[f"{dtype}"] = (rms(together, expected), rms(alone, expected))
        errors[f"{dtype} steps"] = (rms(stepped, whole), step_alone)
    return errors


PRECISION = [
    ("tp2", "llama"),
    ("tp2:sp", "llama"),
    ("kvp2,interleave=2,exchange=partials", "llama"),
    ("kvp2,interleave=2,exchange=kv", "llama"),
    ("kvp2,interleave=16,exchange=partials", "qwen3"),
]


def test_lower_precision_is_as_good_as_one_process() -> None:
    """float32 to 1e-5; bfloat16 to 1.5 times the error of one bfloat16 process (DESIGN section 6)."""
    for answers in run_calls([(precision, *cell) for cell in PRECISION], 2):
        for cell, errors in zip(PRECISION, answers, strict=True):
            for name, (found, alone) in errors.items():
                print(cell, name, f"{found:.1e} one process {alone:.1e}")
                assert found < (1e-5 if "float32" in name else 1.5 * alone), (
                    cell,
                    name,
                    found,
                    alone,
                )


def undone(plan: str, family: str) -> list[str]:
    """Everything that parallelize changed is back: classes, hooks, attributes, configs, forward and generate."""
    model = tiny(family)
    reference = copy.deepcopy(model)
    before = facts(model)
    for _ in range(2):  # twice: undoing leaves nothing that would trouble the next time
        parallelize(model, plan)
        assert facts(model) != before
        model(tokens(1, 5))
        unparallelize(model)
    after = facts(model)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    assert len({id(p) for p in model.parameters()}) == len({id(p) for p in reference.parameters()})
    for name, p in model.named_parameters():
        q = reference.get_parameter(name)
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
        assert p.dtype == q.dtype
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def facts(model: Any) -> dict[str, Any]:
    """Classes, hook counts, plain attributes and attention of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} class"] = type(module)
        for key, value in vars(module).items():
            if key.endswith("_hooks"):
                found[f"{name}.{key}"] = len(value)
            elif isinstance(value, (int, float, str, bool, tuple, type(None))):
                found[f"{name}.{key}"] = value
            elif key not in {"_parameters", "_buffers", "_modules"}:
                found[f"{name}.{key}"] = id(value)
        if getattr(module, "config", None) is not None:
            found[f"{name} attention"] = module.config._attn_implementation
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"{name} hooks"] = len(p._backward_hooks or {})
        found[f"{name} shape"] = tuple(p.shape)
    return found


UNDONE = [
    ("tp2", "llama"),
    ("tp2:sp", "qwen3"),
    ("kvp2", "phi3"),
    ("kvp2", "deepseek"),
    ("kvp2", "gemma3"),
    ("tp2 etp2", "mixtral"),
]


def test_undo_leaves_nothing_behind() -> None:
    for answers in run_calls([(undone, *cell) for cell in UNDONE], 2):
        for cell, left in zip(UNDONE, answers, strict=True):
            assert not left, (cell, left)


def trained(plan: str) -> float:
    """A few steps of an optimizer end at the weights of the untouched model."""
    pair = Pair.of(case(plan, "qwen3"))
    ids, mask = tokens(3, 21), mask_of()
    for model in (pair.reference, pair.model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model(ids, attention_mask=mask, use_cache=False).logits, mask).backward()
            optimizer.step()
    unparallelize(pair.model)
    start = dict(tiny("qwen3").named_parameters())
    found = dict(pair.model.named_parameters())
    assert all(
        far(p, start[n]) > 1e-4 for n, p in pair.reference.named_parameters()
    )  # every weight moved
    return max(far(found[n], p) for n, p in pair.reference.named_parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_training_steps_are_exact(size: int) -> None:
    plans = {2: ["tp2", "kvp2,interleave=2"], 4: ["kvp2,interleave=2 tp2", "tp4:sp"]}[size]
    for answers in run_calls([(trained, plan) for plan in plans], size):
        print(answers)
        assert max(answers) < EXACT
