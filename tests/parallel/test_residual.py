"""The fused residual stream: used where it may be, exact, and out of the way where it may not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from exactness import far
from models import tiny, tokens
from plait.collectives import primitive
from plait.cuda_kernels.add_rms_norm import add_rms_norm
from plait.parallel import parallelize, residual
from plait.parallel.residual import as_norm, is_pre_norm
from world import run_world

NEAR = 1e-5  # DESIGN section 6: float32


class Counted:
    """Stands in for the fused step and counts its calls; ``mutation`` makes it wrong."""

    def __init__(self, mutation: str = "") -> None:
        self.calls, self.mutation = 0, mutation

    def __call__(self, x: Any, stream: Any, weight: Any, eps: float, group: Any) -> Any:
        self.calls += 1
        total = x if self.mutation == "no sum" else primitive.all_reduce(x, group)
        old = stream.mul(0.9) if self.mutation == "stream" else stream
        normed, new = add_rms_norm(total, old, weight, 0.3 if self.mutation == "eps" else eps)
        return (normed, stream) if self.mutation == "old stream" else (normed, new)


@torch.no_grad()
def fused(family: str, plan: str, mutation: str = "") -> dict[str, float]:
    """Error in float32 of a prompt and two steps, with the fused step and without, and how often it ran."""
    plain = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    exact = tiny(family, **plain)
    ids = tokens(2, 11, exact.config.vocab_size)
    expected = exact(ids).logits.float()
    answers = {}
    for name, text in (("fused", plan), ("apart", f"{plan},fuse=false")):
        model = parallelize(tiny(family, dtype=torch.float32, **plain), text)
        residual.all_reduce_rms_norm = counted = Counted(mutation)
        cache, logits = None, []
        for start, stop in ((0, 8), (8, 9), (9, 11)):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        answers[name] = far(torch.cat(logits, 1), expected)
        answers[f"{name} calls"] = counted.calls
    answers["layers"] = exact.config.num_hidden_layers
    return answers


ALL = [("llama", "tp2"), ("qwen3", "tp2"), ("qwen2", "tp2"), ("llama", "kvp2 tp1")]
SOME = [("deepseek", "tp2", True), ("gemma3", "tp2", False)]
WRONG = ["no sum", "stream", "eps", "old stream"]


def every_case() -> list[dict[str, float]]:
    exact = [fused(*case[:2]) for case in [*ALL, *SOME]]
    return exact + [fused("llama", "tp2", mutation) for mutation in WRONG]


def test_fused_steps_are_near_float64_and_wrong_ones_are_not() -> None:
    for answers in run_world(every_case, 2):
        for said in answers:
            assert (said["apart"] < NEAR, said["apart calls"]) == (True, 0), said
        for case, said in zip(ALL, answers, strict=False):
            assert said["fused"] < NEAR, (case, said)
            # The first forward proves that a sum may wait. After the last MLP comes the model's own norm.
            assert said["fused calls"] == 2 * (2 * said["layers"] - 1), (case, said)
        for case, said in zip(SOME, answers[len(ALL) :], strict=False):
            assert said["fused"] < NEAR, (case, said)
            assert (said["fused calls"] > 0) == case[2], (case, said)  # experts sum by themselves
        for mutation, said in zip(WRONG, answers[-len(WRONG) :], strict=True):
            assert said["fused"] > 100 * NEAR, (mutation, said)


def watched() -> dict[str, float]:
    """Hooks of users see and change what they did in the untouched model."""
    reference = tiny("qwen3", dtype=torch.float32)
    model = parallelize(copy.deepcopy(reference), "tp2")
    ids, errors = tokens(2, 9), {}

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    def write(module: nn.Module, args: Any, output: Any) -> None:
        output[:, 3:] += 1.0

    places: dict[str, Callable[[Any], nn.Module]] = {
        "attention": lambda m: m.model.layers[0].self_attn,
        "mlp": lambda m: m.model.layers[0].mlp,
        "norm": lambda m: m.model.layers[1].input_layernorm,
        "layer": lambda m: m.model.layers[0],
    }
    with torch.no_grad():
        plain = reference(ids).logits
        for name, place in places.items():
            model(ids)  # by now every sum may wait
            handles = [place(m).register_forward_hook(shift) for m in (reference, model)]
            changed = reference(ids).logits
            errors[name] = far(model(ids).logits, changed)
            assert far(changed, plain) > 1e-3
            for handle in handles:
                handle.remove()
        handles = [m.model.layers[0].register_forward_hook(write) for m in (reference, model)]
        changed = reference(ids).logits
        errors["in place"] = far(model(ids).logits, changed)
        with torch.inference_mode():
            errors["in place, inference mode"] = far(model(ids).logits.clone(), changed)
        for handle in handles:
            handle.remove()
        errors["afterwards"] = far(model(ids).logits, plain)
        model.train()
        errors["training mode"] = far(model(ids).logits, plain)
    return errors


def test_hooks_of_users_keep_their_meaning() -> None:
    for errors in run_world(watched, 2):
        assert {name: e for name, e in errors.items() if not e < NEAR} == {}


def test_only_the_very_text_is_taken() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

    assert is_pre_norm(LlamaDecoderLayer)
    assert not is_pre_norm(Olmo2DecoderLayer)
    assert not is_pre_norm(Gemma3DecoderLayer)
    assert not is_pre_norm(nn.Identity)


def test_a_norm_is_known_by_what_it_computes() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    seen: dict[Any, bool] = {}
    assert as_norm(LlamaRMSNorm(16, eps=1e-5), seen).eps == 1e-5
    assert as_norm(nn.RMSNorm(16, eps=1e-6), seen).eps == 1e-6
    assert as_norm(LlamaRMSNorm(16, eps=1e-5).to("meta"), {}).eps == 1e-5
    assert as_norm(Gemma3RMSNorm(16), seen).eps is None  # scales by 1 + weight
    assert as_norm(nn.LayerNorm(16), seen).eps is None
    assert as_norm(nn.Identity(), seen).eps is None
