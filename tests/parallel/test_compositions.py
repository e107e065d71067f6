"""Compositions of axes train as one process does: losses, gradients, norm, and ten clipped steps of SGD, in float64.

The whole table is `make test-compositions`; a slice of it, and a few random plans, are in the default suite.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from exactness import Case, Pair, assert_exact, case, far, measure_all, world_of, worst
from jobs import finish, mpirun, start
from models import tiny
from plait.collectives import shm
from plait.parallel import Plan, PlanError, parallelize, unparallelize
from training import assert_as_one_process, batch_of, composed, labels_of, own_loss
from world import current_rank, run_calls, run_world

AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
WINDOWS = {"layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}

TWO = [
    case("pp2 ep1 etp1", "mixtral"),
    case("tp2:sp ep2", "qwen2_moe", **AUX),
    case("tp2:sp etp2", "mixtral"),
    case("cp2 ep2", "gpt_oss"),
    case("dp2:shard ep2", "qwen3_moe", **AUX),
    case("kvp2 etp2", "mixtral", **AUX),
]
FOUR = [
    case("pp2 cp2", "llama"),  # tied over stages
    case("pp2:interleaved,microbatches=4 cp2", "qwen3", layers=4),
    case("pp2:zero-bubble,microbatches=4 cp2:ulysses", "gemma3"),
    case("pp2:gpipe,microbatches=3 cp2", "mixtral"),
    case("pp2 cp2 ep2", "gpt_oss"),
    case("pp2 kvp2", "llama"),
    case("pp2:zero-bubble,microbatches=4 kvp2", "qwen3"),
    case("pp2:interleaved,microbatches=4 kvp2", "phi3", layers=4),
    case("pp2 kvp2 ep2", "qwen3_moe"),
    case("pp2 kvp2 cp2", "gemma3"),
    case("pp2 tp2:sp ep2", "deepseek", layers=3),
    case("pp2:zero-bubble,microbatches=4 tp2:sp", "llama"),  # activations that are views
    case("pp2 dp2:shard ep2", "qwen2_moe"),
    case("pp4 etp1", "gpt_neox", layers=5),
    case("tp2:sp cp2 ep2", "mixtral", **AUX),
    case("tp2:sp dp2 ep4", "qwen3_moe", **AUX),
    case("tp2:sp dp2:shard ep2 etp2", "mixtral"),
    case("cp2 dp2:shard ep4", "qwen3_moe", **AUX),
    case("cp4:ring,ulysses=2 ep4", "qwen3_moe"),
    case("kvp2 dp2 ep4", "mixtral", **AUX),
    case("kvp2 tp2 ep4 etp1", "qwen2_moe"),
    case("pp2:gpipe,microbatches=1 tp2:sp ep2", "qwen3_moe", **AUX),  # one microbatch: one balance
    case("pp2:gpipe,microbatches=1 kvp2 ep2", "mixtral", **AUX),
]
SIX = [
    case("pp3 tp2 ep2", "mixtral", layers=3),
    case("cp3 tp2:sp", "qwen3"),
    case("dp3 pp2", "llama", layers=3),
]
EIGHT = [
    case("dp2 cp2 pp2 ep2 etp2", "mixtral"),
    case("dp2:shard cp2 pp2 ep4", "qwen3_moe"),
    case("tp2 cp2 pp2 ep4", "gpt_oss"),
    case("tp2:sp cp2 pp2 ep2 etp2", "qwen2_moe"),
    case("tp2:sp dp2:shard pp2 ep4", "deepseek", layers=3),
    case("tp2 kvp2 pp2 ep4", "qwen3_moe"),
    case("dp2 kvp2 pp2 ep2 etp2", "gpt_oss", **WINDOWS),
    case("tp2 dp2 pp2:interleaved,microbatches=4 etp4", "mixtral", layers=4),
    case("dp2 cp2 pp2:zero-bubble,microbatches=4 ep4", "mixtral"),
    case("tp2 dp2 cp2 ep8", "qwen3_moe", **AUX),
    case("tp2:sp cp2 dp2:shard ep4 etp2", "mixtral", **AUX),
    case("tp2 dp2:shard cp2:ulysses ep4", "qwen2_moe"),
    case("dp4:shard pp2 ep4", "mixtral"),
    case("dp2 kvp2 tp2 ep8", "qwen3_moe"),
    case("cp4:ring,ulysses=2 pp2 ep2", "qwen3_moe"),
    case("pp4 cp2 ep2", "mixtral", layers=4),
    case("pp2 tp2,replicate_kv=true dp2", "qwen3", kv_heads=1),
    case("pp8", "llama", layers=8),
]
SIXTEEN = [
    case("tp2 cp2 dp2 pp2 ep4 etp2", "mixtral"),
    case("tp2:sp cp2 dp2:shard pp2 ep8", "qwen3_moe"),
]
TABLE = {2: TWO, 4: FOUR, 6: SIX, 8: EIGHT, 16: SIXTEEN}
SLICE = {
    4: [FOUR[0], FOUR[13]],
    8: [EIGHT[0], EIGHT[4]],
}  # cases, of two steps, in the default suite


@pytest.mark.parametrize("ranks", SLICE)
def test_steps_are_those_of_one_process(ranks: int) -> None:
    assert_as_one_process(composed, [(each, 2) for each in SLICE[ranks]], ranks)


@pytest.mark.table
@pytest.mark.parametrize(
    "each", [c for cases in TABLE.values() for c in cases], ids=lambda c: c.name
)
def test_ten_steps_are_those_of_one_process(each: Case) -> None:
    assert_as_one_process(composed, [(each, 10)], world_of(each.plan))


def test_the_table_is_large_and_holds_all_axes_at_once() -> None:
    plans = [Plan.parse(c.plan) for cases in TABLE.values() for c in cases]
    assert len({str(plan) for plan in plans if plan.world_size <= 8}) >= 40
    assert any(
        min(p.dp.size, p.cp.size, p.pp.size, p.ep.size, p.etp) > 1
        for p in plans
        if p.world_size == 8
    )
    assert any(min(p.size(a) for a in ("tp", "cp", "dp", "pp", "ep", "etp")) > 1 for p in plans)


# --- what is not training ---------------------------------------------------------------------


def staged_logits(plan: str) -> dict[str, float]:
    """Without labels the logits of all tokens are on every rank; the last ones only, where only they are wanted."""
    pair, (ids, mask) = Pair.of(case(plan, "llama")), batch_of(0, batch=3)
    with torch.no_grad():
        found, right = (m(ids, attention_mask=mask).logits for m in (pair.model, pair.reference))
        last = pair.model(ids, attention_mask=mask, logits_to_keep=2).logits
        labels = labels_of((ids, mask))
        losses = [own_loss(m, (ids, mask)) for m in (pair.model, pair.reference)]
    real = mask.bool()
    with pytest.raises(PlanError, match="cannot be cut over cp"):
        pair.model(ids, attention_mask=mask[:, None, None], labels=labels)
    return {
        "logits": far(found[real], right[real]),
        "last": far(last[0], right[0, -2:]),
        "loss": far(*losses),
    }


def test_stages_of_a_cut_sequence_give_whole_logits() -> None:
    for errors in run_world(staged_logits, 4, "pp2 cp2"):
        assert_exact(errors)


CACHED = [
    case("pp2 kvp2,interleave=2", "llama", ("steps", "generate", "undo")),
    case("pp2 kvp2,interleave=3", "gemma3", ("steps", "generate")),
    case("pp2 kvp2,interleave=2 cp2 ep2", "gpt_oss", ("steps", "generate", "undo")),
]


def test_stages_decode_under_helix() -> None:
    for answers in zip(*run_world(measure_all, 4, CACHED), strict=True):
        crashed = [a for a in answers if isinstance(a, str)]
        assert not crashed, crashed[0]
        assert_exact(worst(answers))  # type: ignore[arg-type]


def left_early(plan: str, folder: str) -> list[str]:
    """Whoever returns from save_pretrained, also a copy that wrote nothing, finds the files whole; undo works."""
    from transformers import AutoModelForCausalLM

    model, right = parallelize(tiny("llama"), plan), tiny("llama").state_dict()
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    unparallelize(model)
    held = model.state_dict()
    return [
        n for n in right if not (torch.equal(again[n], right[n]) and torch.equal(held[n], right[n]))
    ]


def test_nobody_leaves_before_the_files_are_whole(tmp_path: Path) -> None:
    plans = ["dp2 pp2", "cp2 pp2", "dp4", "dp2:shard cp2"]
    calls = [(left_early, plan, str(tmp_path / plan)) for plan in plans]
    assert run_calls(calls, 4) == [[[]] * len(plans)] * 4


# --- other backends ---------------------------------------------------------------------------


ELSEWHERE = [
    *("pp2 cp2", "tp2:sp dp2 ep4", "dp2:shard cp2 ep4", "pp2 kvp2 ep2"),
    *("dp2 tp2 ep2 etp2", "pp2:zero-bubble,microbatches=4 tp2:sp", "cp2:ulysses tp2 etp4"),
]


def over_shared_memory(plans: list[str], folder: str) -> list[dict[str, float]]:
    shm.register()
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=4)
    found = [composed(case(plan, "mixtral"), 2) for plan in plans]
    dist.destroy_process_group()
    return found


def test_steps_over_shared_memory(tmp_path: Path) -> None:
    answers = run_world(over_shared_memory, 4, ELSEWHERE[:2], str(tmp_path), backend=None)
    for errors in zip(*answers, strict=True):
        assert_exact(worst(errors))


@pytest.mark.table
@pytest.mark.parametrize("backend", ["mpi", "shm", "gloo"], ids="over {}".format)
def test_steps_under_mpirun(backend: str, tmp_path: Path) -> None:
    script = str(Path(__file__).parents[1] / "compositions_job.py")
    command = [*mpirun(4), script, backend, *ELSEWHERE]
    ended = finish(start(command, tmp_path, OMP_NUM_THREADS="1"), tmp_path, timeout=600)
    assert ended.code == 0, ended.output
    for plan in ELSEWHERE:
        assert_exact(worst([said[plan] for said in ended.reports.values()]))
