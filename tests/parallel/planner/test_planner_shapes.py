"""Shapes the planner reads: parameter counts and KV bytes against published numbers and transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plait.parallel import PlanError
from plait.parallel.planner.configs import CONFIGS
from plait.parallel.planner.reading import decoder, from_config

# Parameters: the safetensors metadata on the Hub where exact; else the model card's "B" (the digits it gives).
EXACT = {
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
}
# total, active in billions, and whether the card's active count leaves the embedding out
CARDS: dict[str, tuple[float, float, bool]] = {
    "deepseek-r1": (671.0, 37.0, True),  # card: 671B, 37B
    "gpt-oss-120b": (116.8, 5.1, True),
    "gpt-oss-20b": (20.9, 3.6, True),
    "qwen3-30b-a3b": (30.5, 3.3, False),
    "qwen3-235b-a22b": (235.0, 22.0, False),
    "kimi-k2": (1026.0, 32.0, True),  # card: 1T, 32B
    "mixtral-8x7b": (46.7, 12.9, False),
    "step-3": (316.0, 38.0, True),  # card: language model 316B, 38B
}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_to_the_last_one(name: str) -> None:
    assert decoder(name).params == EXACT[name]


@pytest.mark.parametrize("name", CARDS)
def test_parameters_and_active_ones_of_the_cards(name: str) -> None:
    total, active, without_embedding = CARDS[name]
    model = decoder(name)
    used = model.active_params - (model.vocab * model.hidden if without_embedding else 0)
    assert model.params / 1e9 == pytest.approx(total, rel=0.002)
    assert used / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    "name", sorted(set(CONFIGS) - {"step-3", "minimax-m2.5", "qwen3.5-397b-a17b"})
)
def test_the_count_is_that_of_transformers(name: str) -> None:
    """Four layers of each, on meta, parameter for parameter."""
    transformers = pytest.importorskip("transformers")
    fields: dict[str, Any] = {**copy.deepcopy(CONFIGS[name][0]), "num_hidden_layers": 4}
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:4]
    known = {key: value for key, value in fields.items() if key != "topk_method"}
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**known)
        model = transformers.AutoModelForCausalLM.from_config(config)
    buffers = (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    count = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in buffers)
    assert from_config(fields).params == count


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek-r1", 61 * 576),  # 68.6 KiB in bf16 (arXiv 2507.15465)
        ("kimi-k2", 61 * 576),
        ("llama-405b", 126 * 2 * 8 * 128),
        ("llama-70b", 80 * 2 * 8 * 128),
        ("qwen3-32b", 64 * 2 * 8 * 128),
        ("qwen3-235b-a22b", 94 * 2 * 4 * 128),
        ("step-3", 61 * 2 * 256),
        ("gpt-oss-120b", 36 * 2 * 8 * 64),
    ],
)
def test_cached_elements_per_token(name: str, elements: int) -> None:
    assert decoder(name).kv_elements == elements


def test_published_cache_sizes() -> None:
    assert decoder("deepseek-r1").kv_elements * 2 / 1024 == pytest.approx(68.6, abs=0.05)
    assert decoder("llama-405b").kv_elements * 0.5 * 1e6 / 1e9 == pytest.approx(129.0, abs=0.05)
    assert decoder("deepseek-r1").kv_elements * 0.5 * 1e6 / 1e9 == pytest.approx(17.6, abs=0.05)


def test_layers_of_a_kind_are_one_kind() -> None:
    r1 = decoder("deepseek-r1")
    assert [(k.count, k.ffn.experts) for k in r1.kinds] == [(3, 0), (58, 256)]
    oss = decoder("gpt-oss-120b")
    assert [(k.count, k.attention.window) for k in oss.kinds] == [(18, 128), (18, None)]
    hybrid = decoder("qwen3.5-397b-a17b")
    assert [(k.count, k.attention.kv_elements) for k in hybrid.kinds] == [(45, 0), (15, 1024)]


def test_a_config_may_be_a_file_a_directory_an_object_or_multimodal(tmp_path: Path) -> None:
    fields = CONFIGS["qwen3-32b"][0]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vl", "text_config": fields}))
    expected = decoder("qwen3-32b").kinds
    assert decoder(tmp_path).kinds == expected
    assert decoder(str(tmp_path / "config.json")).kinds == expected
    assert decoder(SimpleNamespace(to_dict=lambda: fields, hidden_size=1)).kinds == expected
    assert decoder("Qwen/Qwen3-32B").kinds == expected


def test_latent_and_zero_experts_are_read() -> None:
    fields = {**CONFIGS["qwen3-30b-a3b"][0], "moe_latent_size": 512, "zero_expert_num": 64}
    plain, latent = decoder("qwen3-30b-a3b").kinds[0].ffn, from_config(fields).kinds[0].ffn
    assert latent.expert_params * 4 == plain.expert_params
    assert latent.shared_params == 2 * 2048 * 512
    assert latent.router_params == 2048 * 192
    assert (
        latent.active_params == round(8 * 128 / 192 * latent.expert_params) + latent.shared_params
    )


@pytest.mark.parametrize(
    "missing", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"]
)
def test_a_config_with_a_missing_field_names_it(missing: str) -> None:
    fields = {key: value for key, value in CONFIGS["llama-8b"][0].items() if key != missing}
    with pytest.raises(PlanError, match=f"has no {missing}"):
        from_config(fields, name="mine")


def test_layer_types_are_checked() -> None:
    fields = CONFIGS["qwen3.5-397b-a17b"][0]
    with pytest.raises(PlanError, match="layer_types of 60 entries is not num_hidden_layers=59"):
        from_config({**fields, "num_hidden_layers": 59})
    with pytest.raises(PlanError, match="has no linear_key_head_dim"):
        from_config({key: value for key, value in fields.items() if key != "linear_key_head_dim"})


def test_experts_without_a_count_per_token_are_refused() -> None:
    fields = {**CONFIGS["qwen3-30b-a3b"][0], "num_experts_per_tok": None}
    with pytest.raises(PlanError, match="num_experts_per_tok"):
        from_config(fields)


def test_unknown_models_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="did you mean 'deepseek-r1'"):
        decoder("deepseek-r2")
    bad = tmp_path / "config.json"
    bad.write_text("[1]")
    with pytest.raises(PlanError, match="not an object"):
        decoder(bad)
    bad.write_text("{")
    with pytest.raises(PlanError, match="not a config"):
        decoder(bad)
