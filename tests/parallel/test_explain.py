"""plan.explain: closed forms, real ranks that send exactly what it says, and nothing disturbed."""

from __future__ import annotations

import copy
import json
import tracemalloc
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from models import tiny, tokens
from plait.collectives.trace import Trace
from plait.parallel import Attention, Plan, PlanError, parallelize
from plait.parallel.cli import app
from plait.parallel.explain.filling import kv_bytes
from plait.parallel.explain.footprint import Footprint
from plait.parallel.explain.scopes import Scopes
from plait.parallel.explain.text import ranges, size
from plait.parallel.explain.twin import config_at
from plait.parallel.planner.configs import CONFIGS
from plait.parallel.shape import ModelShape
from world import run_world


def explain(plan: str, model: Any, **options: Any) -> Any:
    return Plan.parse(plan).explain(model, **options)


def plain(events: Any) -> list[tuple[Any, ...]]:
    """Everything about collectives but how long they took."""
    return [
        (e.scope, e.op, e.axis, e.ranks, e.dtype, tuple(e.shape), e.payload_bytes, e.sent_bytes)
        for e in events
    ]


# -- real ranks ------------------------------------------------------------------------------


BATCH, CONTEXT = 2, 20


def watched(model: nn.Module, step: Any) -> Any:
    trace = Trace(model._plait.ranks.groups.axis_of)
    with Scopes(model, trace), trace:
        out = step()
    return out, plain(trace.events)


def real_lists(plan: str, family: str, extra: bool = False) -> dict[str, Any]:
    """Trace a real tiny model on this rank: prefill of one request, decode of a batch, training."""
    model = parallelize(tiny(family), plan)
    if extra:  # one collective that the plan knows nothing of
        model.lm_head.register_forward_hook(
            lambda m, i, o: dist.all_reduce(o.clone(), group=model._plait.ranks.all)
        )
    ids = tokens(BATCH, CONTEXT + 1)
    with torch.no_grad():
        _, prefill = watched(model, lambda: model(ids[:1, :-1], use_cache=True, logits_to_keep=1))
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        kept = kv_bytes(cache)
        _, decode = watched(
            model, lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True)
        )
    _, training = watched(
        model, lambda: model(ids[:, :-1], use_cache=False).logits.sum().backward()
    )
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"decode": decode, "prefill": prefill, "training": training, "weights": held, "kv": kept}


REAL = [
    ("tp2", "llama"), ("tp2:sp", "qwen3"), ("tp2", "deepseek"), ("tp2 etp2", "deepseek"), ("tp2", "gpt_oss"),
    ("tp2 ep2", "mixtral"), ("tp2 etp2", "gpt_oss"),
    ("kvp2", "llama"), ("kvp2", "deepseek"), ("kvp2 tp2", "gemma3"), ("kvp2 tp2", "llama"), ("tp4", "phi3"),
]  # fmt: skip


def many_lists(cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Trace several cases, one after the other: a world costs more than a tiny model."""
    return [real_lists(*each) for each in cases]


@cache
def real_world(ranks: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    cases = [each for each in REAL if Plan.parse(each[0]).world_size == ranks]
    every = run_world(many_lists, ranks, cases)
    return {each: [rank[i] for rank in every] for i, each in enumerate(cases)}


@pytest.mark.parametrize(("plan", "family"), REAL, ids=lambda x: x.replace(" ", "-"))
def test_real_ranks_do_exactly_what_was_explained(plan: str, family: str) -> None:
    for rank, real in enumerate(real_world(Plan.parse(plan).world_size)[plan, family]):
        said = explain(plan, tiny(family), rank=rank, batch=BATCH, context=CONTEXT, backward=True)
        assert real["weights"] == said.weights.bytes
        assert real["kv"] == said.kv.batch_bytes
        for name in ("decode", "prefill", "training"):
            assert real[name], "an empty list would prove nothing"
            assert real[name] == plain(said.step(name).events), f"{name} on rank {rank}"


def test_one_more_collective_is_noticed() -> None:
    real = run_world(real_lists, 2, "tp2", "llama", True)[0]
    said = explain("tp2", tiny("llama"), batch=BATCH, context=CONTEXT, backward=True)
    for name in ("decode", "prefill", "training"):
        assert real[name] != plain(said.step(name).events)
        assert len(real[name]) == len(said.step(name).events) + 1


def inside_a_world() -> tuple[list[int], float]:
    before = dist.group.WORLD
    said = explain("kvp4 tp2", tiny("gpt_neox"), rank=5, context=100)
    assert dist.group.WORLD is before
    assert said.world_size == 8
    x = torch.ones(3)
    dist.all_reduce(x)
    return [dist.get_world_size(), dist.get_rank()], float(x.sum())


def test_a_running_world_is_not_disturbed() -> None:
    assert run_world(inside_a_world, 2) == [([2, 0], 6.0), ([2, 1], 6.0)]


# -- closed forms ----------------------------------------------------------------------------


def llama_405b(layers: int = 3) -> Any:
    config = config_at("llama-405b")
    config.num_hidden_layers = layers
    return config


@pytest.mark.parametrize("context", [1000, 1_000_000])
@pytest.mark.parametrize("batch", [1, 8])
def test_helix_decode_of_405b(context: int, batch: int) -> None:
    """research: A2A per peer B*H/(KVP*TPA) elements and an lse; two all-reduces a layer; KV cut 64 ways."""
    said = explain("kvp8 tp8", llama_405b(), context=context, batch=batch)
    layers = [unit for unit in said.step("decode").units() if unit.numbers]
    assert len(layers) == 1
    assert layers[0].numbers == (0, 1, 2)
    ops = [(e.op, e.axis) for e in layers[0].events]
    assert ops == [("all_to_all", "kvp"), ("all_reduce", "ffn_tp"), ("all_reduce", "ffn_tp")]
    exchange, *sums = layers[0].events
    heads, lse_bytes = 128 // (8 * 8), 4
    per_peer = batch * 16384 // (8 * 8) * 2 + batch * heads * lse_bytes
    assert exchange.payload_bytes == 8 * per_peer
    assert exchange.sent_bytes == 7 * per_peer
    for event in sums:
        assert event.payload_bytes == batch * 16384 * 2
        assert event.sent_bytes == round(2 * 63 / 64 * event.payload_bytes)
    logits = 128256 * batch * 2
    assert logits < said.step("decode").workspace_bytes < 3 * logits  # gathered, then transposed
    per_token = 2 * 3 * 8 * 128 * 2  # k and v, layers, kv heads, head dim, bf16
    assert said.kv.bytes_per_1024 == per_token * 1024 // 64
    here = context // 128 * 16 + min(context % 128, 16)  # rank 0's share with runs of 16 tokens
    assert said.kv.request_bytes == per_token // 8 * here
    assert said.kv.batch_bytes == batch * said.kv.request_bytes


def test_decode_does_not_depend_on_the_context() -> None:
    lists = [
        plain(explain("kvp8 tp8", llama_405b(), context=n).step("decode").events)
        for n in (1000, 1_000_000)
    ]
    assert lists[0] == lists[1]
    assert lists[0] != plain(explain("kvp8 tp8", llama_405b(), batch=2).step("decode").events)


def test_mla_keeps_one_latent_a_token() -> None:
    config = config_at("deepseek-r1")
    config.num_hidden_layers = 4
    said = explain("kvp16 etp16", config, context=16_000, batch=2)
    assert said.kv.bytes_per_1024 == 4 * (512 + 64) * 2 * 1024 // 16
    dense, routed = (unit for unit in said.step("decode").units() if unit.numbers)
    assert (dense.numbers, routed.numbers) == ((0, 1, 2), (3,))
    assert len(routed.events) == len(dense.events)  # routed and shared experts are summed at once
    latent = next(e for e in dense.events if e.op == "all_to_all")
    assert latent.payload_bytes == 2 * 128 * (512 * 2 + 4)  # batch, heads, latent in bf16 and lse


@pytest.mark.parametrize("plan", ["tp2", "kvp2 tp2", "tp4"])
def test_weights_of_all_ranks_make_the_model(plan: str) -> None:
    """What one copy holds beyond the model is what is kept whole: here norms, and q k v under kvp."""
    model = tiny("llama", attention_bias=False, mlp_bias=False)
    each = [explain(plan, model, rank=r).weights for r in range(Plan.parse(plan).world_size)]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    norms = sum(p.numel() * 8 for n, p in model.named_parameters() if "norm" in n)
    qkv = sum(
        p.numel() * 8
        for n, p in model.named_parameters()
        if n.split(".")[-2][0] in "qkv" and "proj" in n
    )
    kvp = Plan.parse(plan).size("kvp")
    assert {w.whole for w in each} == {whole}
    assert (
        sum(w.bytes for w in each)
        == each[0].copy_total
        == whole + (len(each) - 1) * norms + (kvp - 1) * qkv
    )
    assert [min(w.bytes for w in each), max(w.bytes for w in each)] == [each[0].least, each[0].most]


def test_windows_stay_short() -> None:
    model = tiny("gemma3")  # two of three layers see 6 tokens, and keep 5
    small, large = (explain("tp2", model, context=n).kv.request_bytes for n in (100, 1100))
    assert (
        large - small == 1000 * 2 * 2 * 8 * 8
    )  # k and v, 2 of 4 kv heads, head dim, float64: one layer
    assert small == 2 * 2 * 8 * 8 * (100 + 5 + 5)


def test_a_long_prefill_needs_little_memory_here() -> None:
    tracemalloc.start()
    said = explain("kvp8 tp8", llama_405b(2), context=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said.step("prefill").workspace_bytes > 1_000_000 * 16384 * 2
    assert peak < 500e6  # index arrays of one step; scores would be 10^12 elements


def test_footprint_counts_what_is_alive() -> None:
    weight = torch.empty(100, 1000, device="meta")
    with Footprint() as footprint:
        a = torch.empty(1000, device="meta")
        start = footprint.mark()
        b = a + 1
        b = b.view(10, 100) * 2  # one new tensor while b is alive, then b dies
        c = b.sum()
        assert footprint.peak - start == 2 * 4000
        assert footprint.live - start == 4000 + 4
        d = a @ weight.t()  # the weight was there before: neither it nor a view of it is made here
        assert footprint.live - start == 4000 + 4 + 400
        del a, b, c, d
    assert footprint.live == 0


# -- what is said ----------------------------------------------------------------------------


def test_the_model_is_left_alone() -> None:
    model = tiny("qwen3")
    before = {n: (id(p), p.clone()) for n, p in model.state_dict(keep_vars=True).items()}
    state, config = torch.get_rng_state(), copy.deepcopy(model.config.to_dict())
    explain("kvp2 tp2", model, backward=True)
    assert torch.equal(state, torch.get_rng_state())
    assert model.config.to_dict() == config
    assert not dist.is_initialized()
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and torch.equal(after[n], p) for n, (i, p) in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        ("dp2:shard tp2", "dp"),
        ("pp2 tp2", "pp"),
    ],
)
def test_what_does_not_run_on_meta_is_named(plan: str, word: str) -> None:
    said = explain(plan, tiny("mixtral"), batch=2)
    assert [part.split(" ")[0] for part in said.left_out] == [word.split(" ")[0]]
    assert "not in the numbers below" in str(said)
    assert said.plan == str(Plan.parse(plan))
    assert said.plan != said.executed
    assert said.world_size == Plan.parse(plan).world_size


def parameter_bytes(plan: str, family: str) -> int:
    """What this rank holds after parallelize."""
    model = parallelize(tiny(family), plan)
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in held)


@pytest.mark.parametrize(
    ("plan", "family"),
    [("pp2 tp2", "llama"), ("dp2:shard tp2", "phi3"), ("pp2 dp2:shard ep2", "mixtral")],
)
def test_weights_of_stages_and_shards_are_those_of_every_rank(plan: str, family: str) -> None:
    right = run_world(parameter_bytes, 4, plan, family)
    found = [explain(plan, tiny(family), rank=rank).weights for rank in range(4)]
    assert [w.bytes for w in found] == right
    assert len(set(right)) > 1 or "shard" in plan
    assert max(right) < 0.8 * found[0].whole
    assert all((w.least, w.most) == (min(right), max(right)) for w in found)


def test_an_executed_plan_leaves_nothing_out() -> None:
    said = explain("kvp2 tp2", tiny("llama"))
    assert not said.left_out
    assert said.executed == said.plan
    assert [(g.axes[0], len(g.ranks)) for g in said.communicators] == [("ffn_tp", 4), ("kvp", 2)]


def test_the_mean_over_dp_is_in_a_training_step() -> None:
    model = tiny("llama")
    said = explain("dp2", model, backward=True)
    assert not said.left_out
    sent = [
        e for step in said.steps for e in step.events if e.axis == "dp" and e.op == "all_reduce"
    ]
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters) + len(parameters)  # and whether each was used
    assert sum(e.sent_bytes for e in sent) == elements * parameters[0].element_size()


def test_text_and_json_say_the_same() -> None:
    said = explain("kvp2 tp2", tiny("gemma3"), batch=3, context=50)
    text, data = str(said), json.loads(said.to_json())
    assert "layers 0,2 (x2)" in text
    assert "layers 1 (x1)" in text
    assert "kvp1" in text  # the picture
    for step in data["steps"]:
        sums = sum(
            e["sent_bytes"] * max(1, len(u["numbers"])) for u in step["units"] for e in u["events"]
        )
        assert sums == step["sent_bytes"] == said.step(step["name"]).sent_bytes
        assert size(step["sent_bytes"]) in text


def test_the_fused_step_is_said() -> None:
    told = "2 layers do all-reduce, residual add and norm as one step"
    model = tiny("qwen3")
    assert told in str(explain("tp2", model, context=20))
    assert "as one step" not in str(explain("tp2,fuse=false", model, context=20))


def test_units_and_ranges() -> None:
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert [size(n) for n in (0, 999, 1000, 131072, 8_064_000_000)] == [
        "0 B", "999 B", "1.00 kB", "131.1 kB", "8.06 GB",
    ]  # fmt: skip


class Block(nn.Module):
    """A plain module with attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, nn.Linear(32, 32, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("plan", ["tp2", "kvp2"])
def test_plain_modules_by_rules(plan: str) -> None:
    rules = {"*": Attention(heads=4, kv_heads=4, head_dim=8, q="wq", k="wk", v="wv", o="wo")}
    model = nn.Sequential(Block(), Block())
    inputs = lambda batch, length: ((torch.empty(batch, length, 32, device="meta"),), {})  # noqa: E731
    said = explain(plan, model, rules=rules, inputs=inputs, context=12)
    assert [step.name for step in said.steps] == ["prefill"]
    ops = [e.op for e in said.step("prefill").events[1:]]
    assert ops == (["all_reduce"] * 2 if plan == "tp2" else ["all_to_all", "all_reduce"] * 2)
    with pytest.raises(PlanError, match="inputs=lambda"):
        explain(plan, model, rules=rules)


def test_bad_input_is_said() -> None:
    with pytest.raises(PlanError, match="tp=3 does not divide"):
        explain("tp3", tiny("llama"))
    with pytest.raises(PlanError, match="batch=0 is not positive"):
        explain("tp2", tiny("llama"), batch=0)
    with pytest.raises(PlanError, match="outside the 2 ranks"):
        explain("tp2", tiny("llama"), rank=2)
    with pytest.raises(PlanError, match="did you mean 'llama-405b'"):
        explain("tp2", "lama-405b")


def test_command_line(tmp_path: Any) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    run = CliRunner().invoke
    for where in (tmp_path, tmp_path / "config.json"):
        result = run(app, ["explain", str(where), "kvp2 tp2", "--context", "1k", "--batch", "3"])
        assert result.exit_code == 0, result.output
        assert "decode: 3 requests, 1 new token each, 1,000 cached" in result.output
    told = ["explain", str(tmp_path), "tp2", "--json", "--rank", "1", "--hardware", "h200"]
    data = json.loads(run(app, told).output)
    assert (data["rank"], data["world_size"], data["hardware"]) == (1, 2, "H200 SXM")
    for step in data["steps"]:
        each = sum(
            event["seconds"]
            for unit in step["units"]
            for event in unit["events"] * max(1, len(unit["numbers"]))
        )
        assert step["seconds"] == pytest.approx(each)
        assert each > 0
    wrong = run(app, ["explain", str(tmp_path), "tp2", "--hardware", "h20000"])
    assert wrong.exit_code == 2
    assert "did you mean 'h200'" in wrong.output
    wrong = run(app, ["explain", str(tmp_path), "tp2", "--context", "many"])
    assert wrong.exit_code == 2
    assert "many" in wrong.output


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_name_we_ship_has_a_config_to_run(name: str) -> None:
    if name == "step-3":
        with pytest.raises(PlanError, match="plait plan step-3"):
            config_at(name)
        return
    shape, fields = ModelShape.from_config(config_at(name.upper())), CONFIGS[name][0]
    assert (shape.hidden, shape.layers) == (fields["hidden_size"], fields["num_hidden_layers"])
    assert str(config_at(name).dtype) == "torch.bfloat16"


def test_events_differ_when_a_layer_differs() -> None:
    """The folding of layers is by everything that is shown: a changed shape makes another unit."""
    step = explain("tp2", tiny("llama")).step("decode")
    assert [u.numbers for u in step.units() if u.numbers] == [(0, 1)]
    changed = list(step.events)
    changed[1] = replace(changed[1], shape=(1, 1, 7))
    assert [u.numbers for u in replace(step, events=tuple(changed)).units() if u.numbers] == [
        (0,),
        (1,),
    ]
