"""A training step: Megatron's FLOPs and bubble, ZeRO's bytes, recompute and offload; never better for less hardware."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from plait.parallel import Plan, PlanError
from plait.parallel.planner.candidates import one
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.efficiency import fitted, ideal
from plait.parallel.planner.reading import decoder, from_config
from plait.parallel.planner.step_time import Machine
from plait.parallel.planner.training import Gpt, bubble
from plait.parallel.planner.training_step import Batch, rank_params, training_bytes, training_step

H100 = hardware("h100")
FREE = Machine(H100.scaled(memory_bandwidth=1e9), ideal())  # nothing but FLOPs takes time
MODEL = decoder("llama-70b")


@pytest.mark.parametrize(("layers", "hidden"), [(24, 2304), (80, 12288)])
def test_flops_are_megatrons(layers: int, hidden: int) -> None:
    """Equation 3 with causal attention (half its scores) and a gated FFN of the same size, 8/3 h."""
    fields = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64, "vocab_size": 51200,
    }  # fmt: skip
    row, batch = one(Plan()), Batch(2048, recompute="full")
    seconds = float(training_step(from_config(fields), FREE, row, batch).total[0])
    told = Gpt(layers, hidden).flops(1)
    scores = 96 * 2048 * layers * hidden**2 * 2048 / (6 * hidden)
    assert seconds * H100.peak("bf16") == pytest.approx(told - scores / 2, rel=2e-3)
    less = float(training_step(from_config(fields), FREE, row, Batch(2048)).total[0])
    assert 0.74 < less / seconds < 0.77  # three forwards instead of four, the head not among them


def test_a_pipeline_waits_its_bubble() -> None:
    for stages, micro in ((4, 8), (8, 8), (8, 64)):
        step = training_step(MODEL, FREE, one(Plan(pp=stages)), Batch(2048, micro)).compute
        alone = training_step(MODEL, FREE, one(Plan()), Batch(2048, micro)).compute
        assert float(step[0] * stages / alone[0]) == pytest.approx(
            1 + bubble(stages, micro), rel=1e-9
        )


def test_bytes_are_zeros_and_go_where_they_are_sent() -> None:
    row = one(Plan.parse("dp8 tp4"))
    params = float(sum(rank_params(MODEL, row))[0])
    assert params == pytest.approx(MODEL.params / 4, rel=1e-3)
    for stage, shares in (
        (0, (2, 2, 12)),
        (1, (2, 2, 1.5)),
        (2, (2, 0.25, 1.5)),
        (3, (0.25, 0.25, 1.5)),
    ):
        found = training_bytes(MODEL, row, Batch(4096, sharded=stage))
        told = [float(found[name][0]) / params for name in ("weights", "gradients", "optimizer")]
        assert told == pytest.approx(shares)
    plain, less = (
        training_bytes(MODEL, row, Batch(4096, recompute=r))["activations"]
        for r in ("none", "full")
    )
    assert float(plain[0]) == 80 * 4096 * 8192 * (10 + 24 / 4)
    assert float(less[0]) == 80 * 2 * 4096 * 8192
    for what in ("optimizer", "activations"):
        away, here = (
            training_bytes(MODEL, row, Batch(4096, offload=what)),
            training_bytes(MODEL, row, Batch(4096)),
        )
        assert away[what] == 0
        assert away["host"] == here[what]


def test_experts_are_reduced_over_their_own_copies() -> None:
    model, row = decoder("mixtral-8x7b"), one(Plan.parse("dp8 ep8 etp1"))
    common, routed = rank_params(model, row)
    assert float(routed[0]) == pytest.approx(32 * 3 * 4096 * 14336)
    machine = Machine(H100, fitted(H100))
    apart = training_step(model, machine, row, Batch(4096))
    copies = training_step(model, machine, one(Plan.parse("dp8")), Batch(4096))
    assert float(copies.communication[0]) > float(machine.network.all_reduce(8, 2 * 46.7e9)) * 0.95
    assert float(apart.total[0]) < float(copies.total[0])
    assert training_bytes(model, row, Batch(4096, sharded=1))["optimizer"] == 12 * (
        common / 8 + routed
    )


def test_better_links_and_less_work_never_hurt() -> None:
    row, machine = one(Plan.parse("dp2 tp4 pp2")), Machine(H100, fitted(H100))
    base = float(training_step(MODEL, machine, row, Batch(4096, 8, offload="optimizer")).total[0])
    for figure in ("memory_bandwidth", "bf16", "scale_up", "host_link", "scale_out"):
        fast = replace(machine, part=H100.scaled(**{figure: 3.0}))
        assert (
            float(training_step(MODEL, fast, row, Batch(4096, 8, offload="optimizer")).total[0])
            <= base
        )
    slow = replace(machine, part=H100.scaled(host_link=1e-4))
    assert (
        float(training_step(MODEL, slow, row, Batch(4096, 8, offload="optimizer")).total[0]) > base
    )
    times = [float(training_step(MODEL, machine, row, Batch(4096, m)).total[0]) for m in (1, 2, 8)]
    assert times == sorted(times)
    assert np.isfinite(base)
    for wrong in ({"tokens": 0}, {"recompute": "some"}, {"offload": "disc"}, {"sharded": 4}):
        with pytest.raises(PlanError):
            replace(Batch(4096), **wrong)  # type: ignore[arg-type]
