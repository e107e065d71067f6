"""State dicts of cut models: DTensors, torch.distributed.checkpoint from plan to plan, optimizers, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from plait.collectives import primitive
from plait.parallel import parallelize, unparallelize
from plait.parallel.checkpoint import state_dict as checkpoint
from plait.parallel.checkpoint.moments import track_optimizer
from plait.parallel.checkpoint.state_dict import in_place
from plait.parallel.edits import CutParameter
from world import RankError, run_world

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch.distributed.checkpoint warns about its own ways

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}

COPIED_KV = "tp4,replicate_kv=true"


def make(kind: str, seed: int = 0) -> Any:
    """A model whose weights depend on the seed only, float64. 61 tokens: no rank count divides them."""
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    if kind == "phi3":  # fused q, k, v and fused gate, up
        config = Phi3Config(**SMALL, num_key_value_heads=4, vocab_size=61, pad_token_id=0)
        return Phi3ForCausalLM(config).double().eval()
    kv_heads = 2 if kind == "few_kv" else 4
    config = LlamaConfig(
        **SMALL,
        num_key_value_heads=kv_heads,
        vocab_size=61,
        tie_word_embeddings=kind == "tied",
        attention_bias=True,
    )
    return LlamaForCausalLM(config).double().eval()


def cut_model(kind: str, plan: str | None, seed: int = 0) -> Any:
    return make(kind, seed) if plan is None else parallelize(make(kind, seed), plan)


def differing(model: nn.Module, kind: str) -> list[str]:
    """Names of tensors that are not bitwise those of seed 0, in the model made whole again."""
    if hasattr(model, "_plait"):
        unparallelize(model)
    right = make(kind).state_dict()
    mine = model.state_dict()
    assert mine.keys() == right.keys()
    return [name for name in right if not torch.equal(mine[name], right[name])]


# --- what a state dict holds ------------------------------------------------------------------


def contents(kind: str, plan: str) -> tuple[list[str], list[str], list[str], int]:
    model = cut_model(kind, plan)
    ranks, right = model._plait.ranks, make(kind).state_dict()
    before = ranks.groups.count
    cuts: dict[str, CutParameter] = {e.path: e for e in model._plait.parameters()}
    state = model.state_dict()
    assert list(state) == list(right)
    views, copies, plain = [], [], []
    for name, value in state.items():
        if not isinstance(value, DTensor):
            plain.append(name)
            assert torch.equal(value, right[name])
            continue
        cut = cuts[name].cut
        assert value.shape == right[name].shape
        assert value.placements == (Shard(cut.dim),)
        assert value.device_mesh.mesh_dim_names == ("ffn_tp",)
        assert value.device_mesh.get_local_rank() == ranks.run
        chunks = torch.chunk(right[name], ranks.size, cut.dim)
        expected = (
            chunks[ranks.run] if ranks.run < len(chunks) else right[name].narrow(cut.dim, 0, 0)
        )
        assert torch.equal(value.to_local(), expected)
        assert torch.equal(value.full_tensor(), right[name])
        shared = (
            value.to_local().untyped_storage().data_ptr()
            == model.get_parameter(name).untyped_storage().data_ptr()
        )
        assert shared == in_place(cut, ranks)
        (views if shared else copies).append(name)
    part = model.model.layers[1].state_dict()
    for name, value in part.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(whole, right[f"model.layers.1.{name}"])
    return views, copies, plain, ranks.groups.count - before


@pytest.mark.parametrize(
    ("kind", "plan", "size"),
    [
        ("tied", "tp2", 2),
        ("untied", "kvp2 tp2", 4),
        ("few_kv", COPIED_KV, 4),
        ("phi3", "tp2", 2),
        ("phi3", "kvp2 tp2", 4),
    ],
)
def test_a_state_dict_holds_chunks_of_the_whole_tensors(kind: str, plan: str, size: int) -> None:
    results = run_world(contents, size, kind, plan)
    assert all(r == results[0] for r in results)
    views, copies, plain, made = results[0]
    assert plain
    assert all("norm" in name or name.endswith("o_proj.bias") for name in plain)
    fused = {name for name in (*views, *copies) if "qkv_proj" in name or "gate_up" in name}
    assert set(copies) == fused
    assert bool(fused) == (kind == "phi3")
    assert made == (
        1 if plan == "kvp2 tp2" else 0
    )  # the communicator in run order, when that is not rank order


def traffic(kind: str, plan: str) -> int:
    """Count the collectives that parallelize's commit and a state dict cause."""
    model = cut_model(kind, plan)
    calls: list[Any] = []
    original = primitive.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    primitive.all_gather = counted
    try:
        model.state_dict()
    finally:
        primitive.all_gather = original
    return len(calls)


def test_only_fused_projections_are_gathered() -> None:
    assert run_world(traffic, 2, "untied", "tp2") == [0, 0]
    assert run_world(traffic, 2, "phi3", "tp2") == [4, 4]  # qkv and gate_up of two layers


# --- from plan to plan ------------------------------------------------------------------------


def save(kind: str, plan: str | None, folder: str) -> None:
    dcp.save(
        {"model": cut_model(kind, plan).state_dict()},
        checkpoint_id=folder,
        no_dist=not dist.is_initialized(),
    )


def load(kind: str, plan: str | None, folder: str) -> list[str]:
    model = cut_model(kind, plan, seed=7)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    return differing(model, kind)


SINGLE = (None, 1)
HELIX = ("kvp2 tp2", 4)


def backend_of(place: Any) -> str | None:
    return None if place is SINGLE else "gloo"


PAIRS = [
    ("tied", ("tp2", 2), ("kvp2 tp2", 4)),
    ("untied", ("kvp2 tp2", 4), SINGLE),
    ("few_kv", SINGLE, (COPIED_KV, 4)),
    ("phi3", ("tp2", 2), ("kvp2 tp2", 4)),
    ("phi3", ("kvp2 tp2", 4), SINGLE),
    ("phi3", SINGLE, ("tp4", 4)),
]


@pytest.mark.parametrize(("kind", "source", "target"), PAIRS)
def test_what_one_plan_saves_another_loads(
    kind: str, source: Any, target: Any, tmp_path: Path
) -> None:
    run_world(save, source[1], kind, source[0], str(tmp_path), backend=backend_of(source))
    result = run_world(load, target[1], kind, target[0], str(tmp_path), backend=backend_of(target))
    assert result == [[]] * target[1]


def save_in_rank_order(kind: str, plan: str, folder: str) -> None:
    """The mutation: the mesh in group order, as if chunks were numbered by rank."""
    checkpoint.run_mesh = lambda ranks, device: ranks.groups.mesh_of(
        ranks.members, "ffn_tp", device.type
    )
    save(kind, plan, folder)


def test_a_checkpoint_in_rank_order_is_wrong(tmp_path: Path) -> None:
    run_world(save_in_rank_order, 4, "untied", "kvp2 tp2", str(tmp_path))
    (wrong,) = run_world(load, 1, "untied", None, str(tmp_path), backend=None)
    assert "model.layers.0.mlp.gate_proj.weight" in wrong


# --- loading ----------------------------------------------------------------------------------


def load_forms(kind: str, plan: str) -> list[list[str]]:
    """Load the right weights into a wrong model, given in several forms."""
    right = make(kind).state_dict()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    ours = cut_model(kind, plan).state_dict()
    forms = [
        right,
        {n: distribute_tensor(v, mesh, [Replicate()]) for n, v in right.items()},
        {n: distribute_tensor(v, mesh, [Shard(v.dim() - 1)]) for n, v in right.items()},
        ours,
    ]
    wrong = []
    for form in forms:
        model = cut_model(kind, plan, seed=7)
        kept = {n: id(p) for n, p in model.named_parameters()}
        assert not model.load_state_dict(form).missing_keys
        assert {
            n: id(p) for n, p in model.named_parameters()
        } == kept  # an optimizer made before still works
        wrong.append(differing(model, kind))
    return wrong


@pytest.mark.parametrize(
    ("kind", "plan", "size"),
    [("tied", "kvp2 tp2", 4), ("few_kv", COPIED_KV, 4), ("phi3", "tp2", 2)],
)
def test_state_dicts_of_every_form_are_taken(kind: str, plan: str, size: int) -> None:
    assert run_world(load_forms, size, kind, plan) == [[[], [], [], []]] * size


def views_write_through(kind: str, plan: str) -> tuple[bool, bool, bool]:
    """Write into the state dict in place, as dcp.load does, without load_state_dict."""
    model = cut_model(kind, plan)
    state = model.state_dict()
    names = ("mlp.down_proj", "self_attn.k_proj")
    down, key = (model.get_parameter(f"model.layers.0.{n}.weight") for n in names)
    for name in names:
        state[f"model.layers.0.{name}.weight"].to_local().fill_(5.0)
    before = bool((down == 5).all()), bool((key == 5).all())
    model.load_state_dict(state)
    return *before, bool((key == 5).all())


def test_a_view_writes_into_the_model_and_load_state_dict_completes_it() -> None:
    # every rank holds all of its down_proj chunk; of a replicated KV head its chunk is a half
    assert run_world(views_write_through, 4, "few_kv", COPIED_KV) == [(True, False, True)] * 4


def tied_stay_tied(plan: str) -> None:
    model = cut_model("tied", plan, seed=7)
    model.load_state_dict(make("tied").state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    assert torch.equal(
        state["lm_head.weight"].full_tensor(), state["model.embed_tokens.weight"].full_tensor()
    )


def test_tied_parameters_stay_tied() -> None:
    run_world(tied_stay_tied, 4, "kvp2 tp2")


def full_state(plan: str) -> None:
    model = cut_model("untied", plan)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    right = make("untied").state_dict()
    assert whole.keys() == right.keys()
    assert all(torch.equal(whole[n], right[n]) for n in right)


def test_torch_gathers_a_full_state_dict() -> None:
    run_world(full_state, 4, "kvp2 tp2")


# --- bad input --------------------------------------------------------------------------------


def caught(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def bad_states(plan: str) -> list[str]:
    model = cut_model("untied", plan)
    right = make("untied").state_dict()
    before = {n: p.clone() for n, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    on_one = {**right, name: right[name][:-1]} if dist.get_rank() == 1 else dict(right)
    forms = model.state_dict() if dist.get_rank() == 1 else right
    said = [
        caught(model.load_state_dict, {**right, name: right[name][:-1]}),
        caught(model.load_state_dict, on_one),
        caught(model.load_state_dict, forms),
        caught(model.load_state_dict, right, assign=True),
        caught(
            model.model.layers[1].mlp.load_state_dict,
            {"up_proj.weight": right[name][:-1]},
            strict=False,
        ),
        caught(model.load_state_dict, {n: v for n, v in right.items() if n != name}),
    ]
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    return [*said, str(changed)]


def test_bad_state_dicts_are_errors_on_every_rank() -> None:
    one, two = run_world(bad_states, 2, "tp2")
    shapes = "model.layers.1.mlp.up_proj.weight of shape [35, 32] in the state dict does not fit the model's [36, 32]"
    for said in (one, two):
        assert shapes in said[0]
        assert shapes in said[1]  # also on the rank whose own state dict was right
        assert "RanksDisagree" in said[2]
        assert "assign=True" in said[3]
        assert shapes in said[4]
        assert "Missing key(s)" in said[5]
        assert said[6] == "[]"
    assert "rank 1 of 2" in one[1]


# --- optimizers -------------------------------------------------------------------------------


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    ids = torch.arange(24).reshape(2, 12) % 61
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def trained(plan: str | None, tracked: bool = True) -> tuple[Any, torch.optim.Optimizer]:
    model = cut_model("untied", plan).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, track_optimizer(model, optimizer) if tracked else optimizer


def save_training(plan: str | None, folder: str, tracked: bool = True) -> None:
    model, optimizer = trained(plan, tracked)
    train(model, optimizer, 1)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def resume_training(plan: str | None, folder: str) -> float:
    """Load model and optimizer, make two more steps, and compare with three in one process."""
    model, optimizer = trained(plan)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, 2)
    if plan is not None:
        unparallelize(model)
    right, alone = trained(None)
    train(right, alone, 3)
    return max(
        (p - q).abs().max().item()
        for p, q in zip(model.parameters(), right.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("source", "target"), [(("tp2", 2), SINGLE), (SINGLE, HELIX), (HELIX, ("tp2", 2))]
)
def test_training_goes_on_under_another_plan(source: Any, target: Any, tmp_path: Path) -> None:
    run_world(save_training, source[1], source[0], str(tmp_path), backend=backend_of(source))
    off = run_world(
        resume_training,
        target[1],
        target[0],
        str(tmp_path),
        backend=backend_of(target),
    )
    # transformers' norms compute in float32; a wrong optimizer state is off by the learning rate, 1e-2
    assert max(off) < 1e-5


def test_an_optimizer_that_is_not_tracked_saves_one_rank_s_part(tmp_path: Path) -> None:
    """Why track_optimizer is there: torch takes local tensors for replicated ones."""
    run_world(save_training, 2, "tp2", str(tmp_path), False)
    with pytest.raises(RankError):
        assert max(run_world(resume_training, 1, None, str(tmp_path), backend=None)) < 1e-5
