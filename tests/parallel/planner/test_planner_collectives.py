"""What the model assumes is held to what `explain` finds by running the code: collectives, weights and KV bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from plait.parallel import Plan, PlanError
from plait.parallel.planner.candidates import one
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.collectives import decode_collectives
from plait.parallel.planner.communication import Network
from plait.parallel.planner.efficiency import fitted, ideal
from plait.parallel.planner.memory import request_bytes, weight_bytes
from plait.parallel.planner.reading import decoder
from plait.parallel.planner.step_time import Machine, decode_step

transformers = pytest.importorskip("transformers")

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 512, "dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "vocab_size": 512, "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 512, "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 64, "dtype": "bfloat16", "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
CASES = [
    (LLAMA, "tp4"), (LLAMA, "kvp4"), (LLAMA, "kvp2 tp4"), (LLAMA, "kvp4 tp2"),
    (DEEPSEEK, "kvp8"), (DEEPSEEK, "tp4"), (GPT_OSS, "tp4"), (GPT_OSS, "kvp2 tp2"),
    (DEEPSEEK, "kvp4 ep4"), (DEEPSEEK, "tp4 ep2 etp2"), (GPT_OSS, "tp4 ep4"), (GPT_OSS, "kvp2 tp2 ep2 etp2"),
]  # fmt: skip
ROWS, CONTEXT = 4, 1024


@pytest.mark.parametrize(
    ("fields", "text"), CASES, ids=[f"{f['model_type']} {t}" for f, t in CASES]
)
def test_the_model_assumes_what_the_code_does(fields: dict[str, Any], text: str) -> None:
    plan = Plan.parse(text)
    config = transformers.AutoConfig.for_model(**fields)
    said = plan.explain(config, context=CONTEXT, batch=ROWS)
    model = decoder(config)
    found: Counter[tuple[str, int, int]] = Counter()
    for event in said.step("decode").events:
        found[event.op, event.ranks, event.sent_bytes] += 1
    assumed: Counter[tuple[str, int, int]] = Counter()
    for c in decode_collectives(model, plan, ROWS):
        assumed[c.op, c.ranks, round(c.sent_bytes)] += c.times
    assert assumed == found
    row = one(plan, ROWS)
    cached = sum(
        kind.count * kind.attention.cache_heads * (0 if kind.attention.window else 1)
        for kind in model.kinds
    )
    assert cached > 0
    assert said.kv is not None
    if not any(kind.attention.window for kind in model.kinds):
        assert float(request_bytes(model, row, CONTEXT, 2.0)[0]) == said.kv.request_bytes


@pytest.mark.parametrize("text", ["tp4", "kvp2 tp4", "kvp4"])
def test_weights_are_what_the_cut_leaves(text: str) -> None:
    """Norms are copies on every rank and are not counted: under a percent of even this small model."""
    plan, config = Plan.parse(text), transformers.AutoConfig.for_model(**LLAMA)
    said = plan.explain(config, context=64)
    told = float(weight_bytes(decoder(config), one(plan), 2.0)[0])
    assert told == pytest.approx(said.weights.bytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "text"), [("llama-405b", "kvp8 tp8"), ("deepseek-r1", "kvp64"), ("llama-70b", "tp8")]
)
def test_the_price_is_that_of_the_list(name: str, text: str) -> None:
    plan, model, part = Plan.parse(text), decoder(name), hardware("gb200")
    machine = Machine(part, ideal())
    net = Network(part, machine.constants)
    span = plan.kvp.size * plan.tp.size  # Helix's group lies across tp; the others are dense
    listed = sum(
        c.times * float(net.collective(c.op, c.ranks, c.sent_bytes, span))
        for c in decode_collectives(model, plan, 8)
    )
    step = decode_step(model, machine, one(plan, 8), 4096)
    assert float(np.ravel(step.communication)[0]) == pytest.approx(listed, rel=1e-9)


@pytest.mark.parametrize("part", ["gb200", "h100"])
@pytest.mark.parametrize("text", ["tp4", "kvp4 tp4", "kvp2 tp8"])
def test_explained_seconds_are_the_price(text: str, part: str) -> None:
    """What the run's own collectives take by `explain` is what `decode_step` charges, also beyond a domain of 8."""
    plan = Plan.parse(text)
    config = transformers.AutoConfig.for_model(**{**LLAMA, "num_key_value_heads": 8})
    said = plan.explain(config, context=CONTEXT, batch=ROWS, hardware=part)
    chip = hardware(part)
    step = decode_step(decoder(config), Machine(chip, fitted(chip)), one(plan, ROWS), CONTEXT)
    assert said.hardware == chip.title
    told = float(np.ravel(step.communication)[0])
    assert said.step("decode").seconds == pytest.approx(told, rel=1e-6)
    (layers,) = [unit for unit in said.step("decode").units() if unit.numbers]
    rest = [unit.seconds for unit in said.step("decode").units() if not unit.numbers]
    assert layers.seconds * 3 + sum(rest) == pytest.approx(told, rel=1e-6)
    exchange = [event for event in layers.events if event.op == "all_to_all"]
    far = (
        part == "h100" and plan.world_size > 8
    )  # the exchange leaves the domain although its ranks are few
    for event in exchange:
        least = chip.scale_out_latency if far else chip.scale_up_latency
        assert least.value <= event.seconds < least.value * 1.5


def test_hardware_is_chosen_to_hold_what_a_rank_holds() -> None:
    config = transformers.AutoConfig.for_model(**LLAMA)
    assert Plan.parse("tp4").explain(config, context=64).hardware == "H100 SXM"
    assert (
        Plan.parse("kvp4 tp4").explain(config, context=64).hardware == "GB200 NVL72"
    )  # 16 in one domain
    with pytest.raises(PlanError, match="did you mean 'h100'"):
        Plan.parse("tp4").explain(config, context=64, hardware="h1000")
