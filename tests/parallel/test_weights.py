"""Meta models filled from safetensors: every family's names, computed buffers, bad files, memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from memory import Anonymous
from plait.parallel import Plan, parallelize
from plait.parallel.checkpoint import weights
from plait.parallel.checkpoint.stored import Joined, Stacked
from plait.parallel.errors import PlanError
from world import run_world

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SMALL = {
    "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 61, "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 64, "rope_theta": 10000.0, "factor": 4.0,
}  # fmt: skip


def make(kind: str) -> Any:
    """A model of seed 0, in float64."""
    import transformers as t

    torch.manual_seed(0)
    flat = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    makers: dict[str, Callable[[], Any]] = {
        "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True)),
        "untied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
        "base": lambda: t.LlamaModel(t.LlamaConfig(**SMALL)),
        "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
        "yarn": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=YARN)),
        "dynamic": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=DYNAMIC)),
        "longrope": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=LONGROPE)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**flat, num_key_value_heads=4, pad_token_id=0)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**flat)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_local_experts=4)),
        "deepseek": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **flat, num_key_value_heads=8, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
                v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                moe_intermediate_size=20, first_k_dense_replace=1,
            )
        ),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=5, pad_token_id=0)
        ),
    }  # fmt: skip
    model = makers[kind]().double().eval()
    model.config._experts_implementation = "eager"  # the grouped product refuses float64
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


def on_meta(like: Any, dtype: torch.dtype = torch.float64) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return type(like)(like.config).eval()
    finally:
        torch.set_default_dtype(before)


def saved(kind: str, folder: Path, shard: str = "50KB", **how: Any) -> Any:
    """Save the model of seed 0 as transformers does and return it as transformers reads it."""
    model = make(kind)
    model.save_pretrained(folder, max_shard_size=shard, **how)
    return reread(model, folder)


def reread(model: Any, folder: Path) -> Any:
    again = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    again.config._experts_implementation = "eager"
    return again


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return dict(
        [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    )


KINDS = [
    "tied", "untied", "base", "llama3", "yarn", "dynamic", "longrope", "qwen3", "phi3", "gpt_neox", "gemma3",
    "mixtral", "deepseek", "gpt_oss",
]  # fmt: skip


# --- one rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_reads_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    right = saved(kind, tmp_path)
    model = on_meta(right)
    parallelize(model, Plan(), weights=tmp_path)
    mine, theirs = tensors_of(model), tensors_of(right)
    assert mine.keys() == theirs.keys()
    assert not [n for n in theirs if not torch.equal(mine[n], theirs[n])]  # buffers too
    assert [n for n in theirs if mine[n].dtype != theirs[n].dtype] == []
    if kind == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], right(ids)[0])
    if kind != "base":
        assert model.generation_config.to_dict() == on_meta(right).generation_config.to_dict()


def test_no_parameter_lives_in_the_file(tmp_path: Path) -> None:
    """A file that is overwritten later must not change the model."""
    mapped = saved(
        "untied", tmp_path, shard="1GB"
    )  # from_pretrained keeps the file mapped: the control
    right = make("untied")
    model = on_meta(right)
    parallelize(model, Plan(), weights=tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as f:
        f.seek(-64 * 1024, 2)
        f.write(b"\xff" * 64 * 1024)
    assert [n for n, t in right.named_parameters() if not torch.equal(mapped.get_parameter(n), t)]
    assert not [n for n, t in tensors_of(right).items() if not torch.equal(tensors_of(model)[n], t)]


@pytest.mark.parametrize(("stored", "wanted"), [("base", "untied"), ("untied", "base")])
def test_prefixes_of_base_models(stored: str, wanted: str, tmp_path: Path) -> None:
    right = saved(stored, tmp_path)
    model = on_meta(make(wanted))
    if stored == "base":
        with pytest.raises(PlanError, match=r"lm_head\.weight of the model is not in the weights"):
            parallelize(model, Plan(), weights=tmp_path)
        model.config.tie_word_embeddings = True
        model = on_meta(model)
        parallelize(model, Plan(), weights=tmp_path)
        mine = model.model
    else:
        with pytest.warns(UserWarning, match=r"does not use: lm_head\.weight"):
            parallelize(model, Plan(), weights=tmp_path)
        mine, right = model, right.model
    assert not [n for n, t in tensors_of(right).items() if not torch.equal(tensors_of(mine)[n], t)]


@pytest.mark.parametrize("original", [True, False])
def test_experts_stored_one_by_one_or_packed(original: bool, tmp_path: Path) -> None:
    right = saved("mixtral", tmp_path, shard="1GB", save_original_format=original)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("experts.0." in n for n in names) == original
    model = on_meta(right)
    parallelize(model, Plan(), weights=tmp_path)
    assert not [n for n, t in tensors_of(right).items() if not torch.equal(tensors_of(model)[n], t)]


def test_the_model_s_dtype_rules(tmp_path: Path) -> None:
    right = saved("untied", tmp_path)
    model = on_meta(right, torch.bfloat16)
    parallelize(model, Plan(), weights=tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(p, right.get_parameter(name).to(torch.bfloat16))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_slices_of_stacked_and_joined_tensors() -> None:
    class Memory:
        dtype = "F64"

        def __init__(self, value: torch.Tensor) -> None:
            self.value = value
            self.shape = tuple(value.shape)

        def slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
            return self.value.narrow(dim, start, stop - start)

    torch.manual_seed(0)
    gates, ups = torch.randn(2, 4, 3, 5).unbind()
    right = torch.cat([gates, ups], 1)
    packed = Joined(tuple(Stacked(tuple(Memory(x) for x in part), 0) for part in (gates, ups)), 1)
    assert packed.shape == (4, 6, 5)
    for dim in range(3):
        for start in range(right.shape[dim]):
            for stop in range(start + 1, right.shape[dim] + 1):
                assert torch.equal(
                    packed.slice(dim, start, stop), right.narrow(dim, start, stop - start)
                )


# --- several ranks ----------------------------------------------------------------------------


def read_in_parallel(kind: str, plan: str, folder: str) -> tuple[float, list[str], list[str]]:
    right = reread(make(kind), Path(folder))
    model = on_meta(right)
    parallelize(model, plan, weights=folder)
    on_device = parallelize(reread(right, Path(folder)), plan)
    differ = [
        n for n, t in tensors_of(on_device).items() if not torch.equal(tensors_of(model)[n], t)
    ]
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        error = (model(ids)[0] - right(ids)[0]).abs().max().item()
    return error, [n for n, t in tensors_of(model).items() if t.is_meta], differ


@pytest.mark.parametrize(
    ("kind", "plan", "size"),
    [
        ("tied", "kvp2 tp2", 4),
        ("phi3", "tp2", 2),
        ("gemma3", "tp2", 2),
        ("mixtral", "tp2 etp2", 2),
        ("deepseek", "kvp2", 2),
    ],
)
def test_ranks_read_their_parts(kind: str, plan: str, size: int, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path, max_shard_size="50KB")
    for error, meta, differ in run_world(read_in_parallel, size, kind, plan, str(tmp_path)):
        assert error < 1e-6  # the norms of transformers compute in float32
        assert meta == []
        assert differ == []


# --- bad files --------------------------------------------------------------------------------


def break_file(folder: Path, how: str) -> None:
    """Damage a checkpoint of one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        return
    if how == "empty":
        file.unlink()
        return
    if how == "index":
        file.unlink()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {name: "model-1.safetensors"}})
        )
        return
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif how == "nan":
        tensors[name][-1, -1] = float("nan")  # in the last rank's part
    elif how == "quantised":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    elif how == "untied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})


SAID = {
    "truncated": r"model\.safetensors cannot be read \(.*\); download or save it again",
    "empty": r"holds no safetensors file \(found \{config\.json",
    "index": r"model-1\.safetensors is named by model\.safetensors\.index\.json but is not there",
    "missing": r"model\.layers\.1\.mlp\.up_proj\.weight of the model is not in the weights",
    "shape": r"up_proj\.weight of shape \[35, 32\] in the weights does not fit the model's \[36, 32\]",
    "nan": r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN",
    "quantised": r"model\.layers\.1\.mlp\.up_proj\.weight of dtype F8_E4M3 in the weights is quantised",
    "untied": r"model\.embed_tokens\.weight and lm_head\.weight, which the config ties, have different values",
}


@pytest.mark.parametrize("how", SAID)
def test_bad_weights_are_named(how: str, tmp_path: Path) -> None:
    right = make("tied")
    right.save_pretrained(tmp_path)
    break_file(tmp_path, how)
    model = on_meta(right)
    with pytest.raises(PlanError, match=SAID[how]):
        parallelize(model, Plan(), weights=tmp_path)
    assert all(p.is_meta for p in model.parameters())
    assert not hasattr(model, "_plait")


def read_bad(folder: str) -> list[tuple[str, bool]]:
    said = []
    for how in sorted(Path(folder).iterdir()):
        model = on_meta(make("tied"))
        modules = [type(m) for m in model.modules()]
        try:
            parallelize(model, "tp2", weights=how)
            text = "no error"
        except PlanError as error:
            text = str(error)
        untouched = [type(m) for m in model.modules()] == modules and all(
            p.is_meta for p in model.parameters()
        )
        said.append((text, untouched))
    return said


def test_bad_weights_are_errors_on_every_rank(tmp_path: Path) -> None:
    cases = sorted(["truncated", "missing", "shape", "nan"])
    for how in cases:
        make("tied").save_pretrained(tmp_path / how)
        break_file(tmp_path / how, how)
    for said in run_world(read_bad, 2, str(tmp_path)):
        for how, (text, untouched) in zip(cases, said, strict=True):
            assert re.search(SAID[how], text)  # NaN is seen by rank 1 only, and told by both
            assert untouched


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    model = on_meta(make("tied"))
    with pytest.raises(PlanError, match="is neither a directory nor a file here"):
        parallelize(model, Plan(), weights=tmp_path / "none")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(PlanError, match="cannot be read"):
        parallelize(model, Plan(), weights=tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(PlanError, match="tensor x is in two files"):
        parallelize(on_meta(make("tied")), Plan(), weights=tmp_path)


# --- memory -----------------------------------------------------------------------------------


def big(device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=4096, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


def growth(plan: str, folder: str) -> tuple[int, int, int]:
    """Return the peak growth while loading, this rank's bytes, and the largest tensor's."""
    model = big("meta")
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    if dist.is_initialized():
        dist.barrier()
    with Anonymous() as memory:
        parallelize(model, plan, weights=folder)
    return (
        memory.most - memory.first,
        sum(p.numel() * p.element_size() for p in model.parameters()),
        largest,
    )


SLACK = 8 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux to count anonymous memory"
)
def test_a_rank_holds_its_part_and_one_tensor_at_most(tmp_path: Path) -> None:
    model = big("cpu")
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    results = run_world(growth, 2, "tp2", str(tmp_path))
    for most, own, largest in results:
        figures = [f"{x / 2**20:.1f}" for x in (most, own, largest, total)]
        print("grew {} MiB; part {}, largest tensor {}, all {}".format(*figures))
        assert own < 0.51 * total
        assert 0.9 * own <= most <= own + largest + SLACK  # the heap may hold a little from before
    # negative control: a rank that loads the whole model breaks the bound of one that loads its half
    ((whole, _, _),) = run_world(growth, 1, "tp1", str(tmp_path), backend=None)
    assert whole > results[0][1] + results[0][2] + SLACK


def test_whole_tensors_are_not_read_for_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that is read is one of this rank's: counted through the slices asked for."""
    asked: list[int] = []
    original = weights.stored_tensors

    def counting(source: Any) -> dict[str, Any]:
        found = original(source)
        return {name: Counted(tensor, asked) for name, tensor in found.items()}

    monkeypatch.setattr(weights, "stored_tensors", counting)
    right = saved("untied", tmp_path)
    from plait.parallel.api import prepare
    from plait.parallel.edits import CutParameter
    from plait.parallel.folding import Folding
    from plait.parallel.groups import Groups

    plan = Plan.parse("kvp2 tp2")
    with Groups.fake(Folding.of(plan), 3) as groups:
        edits, _ = prepare(on_meta(right), plan, groups, weights=tmp_path)
    parts = sum(
        e.local.numel() for e in edits if isinstance(e, CutParameter) and e.local is not None
    )
    whole = sum(p.numel() for n, p in right.named_parameters() if "norm" in n)
    assert sum(asked) == parts + whole
    assert parts < 0.4 * sum(p.numel() for p in right.parameters())


class Counted:
    """A stored tensor that notes how many elements are read."""

    def __init__(self, inner: Any, asked: list[int]) -> None:
        self.inner = inner
        self.asked = asked
        self.shape = inner.shape
        self.dtype = inner.dtype

    def slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        out = self.inner.slice(dim, start, stop)
        self.asked.append(out.numel())
        return out
