"""Which plans a model allows, what the refusals say, and what a model's config tells."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.parallel.axes import Pipeline, Ring, Tensor, Ulysses
from plait.parallel.errors import PlanError
from plait.parallel.plan import Plan
from plait.parallel.shape import ModelShape

GQA = ModelShape(layers=4, hidden=96, heads=24, kv_heads=6, head_dim=4, ffn=100, vocab=257)
MLA = replace(GQA, kv_heads=24, attention="mla", kv_lora_rank=8, qk_rope_head_dim=4)
MOE = replace(GQA, experts=12, experts_per_token=2, moe_ffn=7)

LEGAL = [
    (GQA, "tp1"), (GQA, "tp6"), (GQA, "tp3:sp"), (GQA, "tp12,replicate_kv=true"),
    (GQA, "tp2,replicate_kv=true"), (GQA, "kvp4 tp6"), (GQA, "kvp24"), (GQA, "kvp12 tp2"),
    (GQA, "cp5:ring"), (GQA, "cp12:ulysses tp2"), (GQA, "pp4"), (GQA, "dp7:shard"),
    (GQA, "cp4:ulysses kvp4 tp3"),
    (MLA, "tp24"), (MLA, "tp8"), (MLA, "kvp24"), (MLA, "kvp8 dp2"),
    (MOE, "kvp4 ep4"), (MOE, "tp6 ep3 etp2"), (MOE, "tp3 dp2 ep6"), (MOE, "dp5 etp5"),
    (GQA, "pp4:gpipe,microbatches=2"), (GQA, "pp2:1f1b,microbatches=2"),
]  # fmt: skip
ILLEGAL = [
    (GQA, "tp4", ("tp=4 does not divide kv_heads=6; use tp in {1, 2, 3, 6} or, with "
                 "replicate_kv=true, tp in {12, 24}")),
    (GQA, "tp12", ("tp=12 does not divide kv_heads=6; use tp in {1, 2, 3, 6} or "
                  "tp12,replicate_kv=true")),
    (GQA, "tp8,replicate_kv=true", ("tp=8 with replicate_kv neither divides nor is a multiple of "
                                   "kv_heads=6; use tp in {1, 2, 3, 6, 12, 24}")),
    (GQA, "tp18,replicate_kv=true", "tp=18 does not divide heads=24"),
    (replace(GQA, kv_heads=24), "tp16", "tp=16 does not divide kv_heads=24"),
    (GQA, "kvp5", ("kvp=5 with tp=1 needs 5 * 1 = 5 equal runs of heads=24; use kvp in "
                  "{1, 2, 3, 4, 6, 8, 12, 24}")),
    (GQA, "kvp5 tp3", ("kvp=5 with tp=3 needs 5 * 3 = 15 equal runs of heads=24; use kvp in "
                      "{1, 2, 4, 8}")),
    (GQA, "kvp2 tp12", "tp=12 does not divide kv_heads=6; use tp in {1, 2, 3, 6}"),
    (GQA, "kvp2 tp12,replicate_kv=true", ("tp=12 does not divide kv_heads=6, and kvp has no "
                                         "replicate_kv; use tp in {1, 2, 3, 6}")),
    (GQA, "kvp4 tp4", "tp=4 does not divide kv_heads=6; use tp in {1, 2, 3, 6}"),
    (GQA, "kvp2 tp2:sp", "use tp2 without sp"),
    (MLA, "kvp2 tp2", ("tp=2 with kvp=2 exceeds the one latent KV head that MLA caches; use tp in "
                      "{1}")),
    (MLA, "tp16", "tp=16 does not divide heads=24; use tp in {1, 2, 3, 4, 6, 8, 12, 24}"),
    (GQA, "cp5:ulysses", ("cp=5 (ulysses) * tp=1 does not divide heads=24; use cp in "
                         "{1, 2, 3, 4, 6, 8, 12, 24}")),
    (GQA, "cp8:ulysses tp6", "use cp in {1, 2, 4}"),
    (GQA, "pp5", "pp=5 is more stages than layers=4; use pp <= 4"),
    (GQA, "pp4:1f1b,microbatches=3", "use microbatches >= 4"),
    (GQA, "dp2 ep2", "ep=2 cuts experts, and this model has none; use ep=1"),
    (GQA, "dp2 etp2", "etp=2 cuts experts"),
    (MOE, "kvp8 ep8", "ep=8 does not divide experts=12; use ep in {1, 2, 4}"),
    (MOE, "tp2 dp3 ep3 etp4", "does not fold onto the ranks"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "text"), LEGAL)
def test_legal(shape: ModelShape, text: str) -> None:
    plan = Plan.parse(text)
    plan.validate(shape, plan.world_size)


@pytest.mark.parametrize(("shape", "text", "told"), ILLEGAL)
def test_illegal(shape: ModelShape, text: str, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text).validate(shape)
    assert told.replace("use tp2 without", "write tp2 without") in str(caught.value)


def allowed(plan: Plan, shape: ModelShape) -> bool:
    """The rules, written down again as one expression."""
    tp, kvp, cp, pp = plan.tp.size, plan.kvp.size, plan.size("cp"), plan.pp.size
    heads, kv, mla = shape.heads or 1, shape.kv_heads or 1, shape.attention == "mla"
    if kvp > 1:
        attention = (tp == 1 if mla else kv % tp == 0) and heads % (kvp * tp) == 0
        attention = attention and not plan.tp.sp
    elif mla:
        attention = heads % tp == 0
    else:
        copied = plan.tp.replicate_kv and tp % kv == 0
        attention = heads % tp == 0 and (kv % tp == 0 or copied)
    ulysses = not isinstance(plan.cp, Ulysses) or heads % (plan.cp.size * tp) == 0
    cut = plan.ep.size * plan.etp
    experts = cut == 1 or ((shape.experts or 0) > 0 and (shape.experts or 0) % plan.ep.size == 0)
    folds = tp * cp * plan.dp.size % cut == 0
    return attention and ulysses and experts and folds and pp <= (shape.layers or pp)


sizes = st.sampled_from((1, 1, 2, 3, 4, 6, 8, 12))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    flag = st.booleans()
    tp = Tensor(draw(sizes), sp=draw(flag), replicate_kv=draw(flag))
    axes: dict = {"tp": tp, "dp": draw(sizes), "pp": draw(sizes)}
    match draw(st.integers(0, 2)):
        case 0:
            axes["kvp"] = draw(sizes)
        case 1:
            axes["cp"] = draw(st.sampled_from((Ring, Ulysses)))(draw(sizes))
    if draw(flag):
        axes |= {"ep": draw(sizes), "etp": draw(sizes)}
    return Plan(**axes)


@settings(deadline=None)
@given(plans(), st.sampled_from((GQA, MLA, MOE, replace(MOE, kv_heads=1, heads=8))))
def test_the_rules_and_their_restatement_agree(plan: Plan, shape: ModelShape) -> None:
    refused = refusal(plan, shape)
    assert (refused is None) == allowed(plan, shape), refused
    if refused is not None:
        assert all((refused.asked, refused.because, refused.instead))


def refusal(plan: Plan, shape: ModelShape) -> PlanError | None:
    try:
        plan.validate(shape)
    except PlanError as error:
        return error
    return None


@settings(deadline=None)
@given(plans(), st.sampled_from((GQA, MLA)))
def test_what_a_refusal_offers_would_do(plan: Plan, shape: ModelShape) -> None:
    """Every size listed for a choice is one which that choice accepts."""
    plan = replace(plan, ep=1, etp=1)
    refused = refusal(plan, shape)
    found = re.match(r"use (tp|cp|kvp) in \{([0-9, ]+)\}", refused.instead if refused else "")
    for size in found.group(2).split(", ") if found else ():
        axis = found.group(1) if found else ""
        choice = replace(getattr(plan, axis), size=int(size))
        choice.validate(replace(plan, **{axis: choice}), shape)


def test_world_size() -> None:
    plan = Plan(kvp=2, tp=2)
    plan.validate(world_size=4)
    with pytest.raises(PlanError) as caught:
        plan.validate(world_size=8)
    told = str(caught.value)
    assert told == (
        "world_size=8 is not the plan's 4 ranks (4 = tp2 * kvp2 * dp1 * pp1); "
        "launch 4 ranks (torchrun --nproc-per-node 4 ...), or use dp=2"
    )
    with pytest.raises(PlanError, match="launch 4 ranks") as caught:
        plan.validate(world_size=6)
    assert "dp" not in caught.value.instead


def test_absurd_sizes_are_refused_at_once() -> None:
    for text in ("tp999999999", "kvp999999999", "dp999999999 ep999999998", "tp999999999 ep2"):
        with pytest.raises(PlanError):
            Plan.parse(text).validate(GQA)


def test_unknown_numbers_are_not_judged() -> None:
    Plan.parse("tp7 pp9 ep7").validate()
    Plan.parse("tp7 kvp3").validate(ModelShape(layers=3))
    with pytest.raises(PlanError):
        Plan.parse("tp2:sp kvp2").validate()
    with pytest.raises(PlanError):
        Plan(pp=Pipeline(4, microbatches=2)).validate()


def test_uneven_ffn_and_vocab_are_fine() -> None:
    assert (GQA.ffn or 0) % 3
    assert (GQA.vocab or 0) % 3
    Plan(tp=3).validate(GQA)


# --- shapes from configs ---------------------------------------------------------------------

EXPECTED = {
    "LlamaConfig": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128, "ffn": 11008,
                        "vocab": 32000, "experts": 0, "window_layers": (), "tied": False},
    "Qwen2Config": {"layers": 32, "heads": 32, "head_dim": 128, "window": None, "window_layers": ()},
    "Qwen3Config": {"layers": 32, "heads": 32, "head_dim": 128, "ffn": 22016, "window_layers": ()},
    "MistralConfig": {"kv_heads": 8, "head_dim": 128, "window": 4096, "window_layers": (True,) * 32},
    "Gemma3TextConfig": {"heads": 8, "kv_heads": 4, "head_dim": 256, "tied": True, "window": 4096,
                             "window_layers": tuple(i % 6 != 5 for i in range(26))},
    "Gemma3Config": {"heads": 8, "kv_heads": 4, "head_dim": 256, "layers": 26},
    "Phi3Config": {"hidden": 3072, "head_dim": 96, "kv_heads": 32, "window_layers": ()},
    "GPTNeoXConfig": {"layers": 44, "heads": 64, "kv_heads": 64, "head_dim": 96, "ffn": 24576},
    "GPT2Config": {"layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64, "ffn": 3072, "tied": True},
    "MixtralConfig": {"experts": 8, "experts_per_token": 2, "moe_ffn": 14336, "head_dim": 128,
                          "expert_layers": (True,) * 32, "window_layers": ()},
    "Qwen3MoeConfig": {"experts": 128, "experts_per_token": 8, "moe_ffn": 768, "kv_heads": 4},
    "DeepseekV3Config": {"attention": "mla", "layers": 61, "heads": 128, "head_dim": 192, "cache_heads": 1,
                             "value_head_dim": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
                             "qk_rope_head_dim": 64, "experts": 256, "experts_per_token": 8, "moe_ffn": 2048,
                             "shared_experts": 1, "shared_ffn": 2048,
                             "expert_layers": (False,) * 3 + (True,) * 58},
    "GptOssConfig": {"heads": 64, "kv_heads": 8, "head_dim": 64, "experts": 128, "moe_ffn": 2880, "sinks": True,
                         "window": 128, "window_layers": tuple(i % 2 == 0 for i in range(36))},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_shape_of_transformers_configs(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = ModelShape.from_config(getattr(transformers, name)())
    assert {field: getattr(shape, field) for field in EXPECTED[name]} == EXPECTED[name]
    Plan().validate(shape)


def test_shape_of_odd_configs() -> None:
    bare = SimpleNamespace(hidden_size=8, num_attention_heads=2)
    assert ModelShape.from_config(bare) == ModelShape(
        hidden=8, heads=2, kv_heads=2, head_dim=4, value_head_dim=4
    )
    assert ModelShape.from_config(SimpleNamespace()) == ModelShape()
    falcon = SimpleNamespace(num_attention_heads=8, num_kv_heads=8, multi_query=True)
    assert ModelShape.from_config(falcon).kv_heads == 1
    off = SimpleNamespace(num_hidden_layers=2, sliding_window=16, use_sliding_window=False)
    assert ModelShape.from_config(off).window_layers == ()
    nested = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=3))
    assert ModelShape.from_config(nested).layers == 3
    null = SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=None,
                           num_key_value_heads=None, sliding_window=None)  # fmt: skip
    assert ModelShape.from_config(null).head_dim == 8


def test_deepseek_under_helix() -> None:
    shape = replace(MLA, heads=128, kv_heads=128, experts=256, layers=61)
    Plan.parse("kvp64 ep64").validate(shape)
    Plan.parse("tp16 ep16").validate(shape)
    with pytest.raises(PlanError, match="one latent KV head"):
        Plan.parse("kvp32 tp2").validate(shape)
