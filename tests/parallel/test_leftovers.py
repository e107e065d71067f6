"""What stands in a cut block and has no role: refused by name, or, where it is an activation's, summed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import tiny
from plait.parallel import Plan, PlanError
from plait.parallel.api import shape_of
from plait.parallel.families import roles_of
from plait.parallel.families.leftovers import refuse_alibi
from plait.parallel.roles import Shared


def roles(model: nn.Module, plan: str = "tp2") -> dict[str, object]:
    return dict(roles_of(model, shape_of(model), Plan.parse(plan)))


@pytest.mark.parametrize("block", ["mlp", "self_attn"])
def test_a_norm_between_the_projections_is_refused(block: str) -> None:
    model = tiny("llama")
    model.get_submodule(f"model.layers.1.{block}").sub_norm = nn.RMSNorm(70)
    with pytest.raises(PlanError, match=rf"layers\.1\.{block} would cut what sub_norm\.weight"):
        roles(model)
    with pytest.raises(PlanError, match=r"sub_norm\.weight"):
        roles(model, "kvp2")
    assert roles(model, "dp2"), "a plan that cuts no block"


def test_a_number_of_the_block_is_refused() -> None:
    model = tiny("qwen3")
    model.model.layers[0].mlp.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(PlanError, match="would cut what scale is used on"):
        roles(model)


def test_routers_and_what_experts_share_are_known() -> None:
    for family in ("qwen2_moe", "deepseek", "mixtral", "gpt_oss"):
        assert roles(tiny(family))


def test_numbers_of_an_activation_are_summed() -> None:
    assert isinstance(roles(tiny("apertus"))["model.layers.0.mlp.act_fn"], Shared)


def test_positions_by_a_bias_of_all_heads_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=61))
    with pytest.raises(PlanError, match="ALiBi"):
        refuse_alibi(model)
