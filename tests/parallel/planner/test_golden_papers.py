"""Published tables from the formulas: Step-3, MLA absorption, Megatron, CloudMatrix, ring attention, offload."""

from __future__ import annotations

import numpy as np
import pytest

from plait.parallel.planner import (
    attention_cost,
    communication,
    economics,
    ffn_cost,
    serving,
    tiers,
    training,
)
from plait.parallel.planner.attention_cost import PerToken, per_token
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.reading import decoder

MODELS = {
    "DSv3": "deepseek-r1",
    "Kimi K2": "kimi-k2",
    "Qwen3-235B": "qwen3-235b-a22b",
    "Qwen3-32B": "qwen3-32b",
    "Step-3": "step-3",
}
# Step-3 (arXiv 2507.19427) table 2: KV bytes, attention, linear and FFN FLOPs of one token at 8K; KV in 8 bits
TABLE_2 = {
    "DSv3": (2.88e8, 1.47e11, 2.28e10, 4.84e10),
    "Kimi K2": (2.88e8, 7.37e10, 1.23e10, 4.84e10),
    "Qwen3-235B": (7.89e8, 2.52e10, 1.34e10, 2.84e10),
    "Qwen3-32B": (1.07e9, 1.72e10, 1.21e10, 5.03e10),
    "Step-3": (2.56e8, 3.27e10, 2.07e10, 5.33e10),
}
PARTS = ("h800", "h20", "a800", "ascend910b")


def step3(model: str, tokens: int = 8192) -> PerToken:
    return per_token(decoder(MODELS[model]), tokens, 1.0, rounded=True)


def digits(value: float, count: int = 3) -> float:
    return float(f"{value:.{count - 1}e}")


@pytest.mark.parametrize("model", TABLE_2)
def test_step3_table_2_to_the_last_digit(model: str) -> None:
    cost = step3(model)
    found = (cost.kv_bytes, cost.attention_flops, cost.linear_flops, cost.ffn_flops)
    assert tuple(digits(x) for x in found) == TABLE_2[model]
    far = step3(model, 32768)
    assert far.kv_bytes == 4 * cost.kv_bytes
    assert far.attention_flops == 4 * cost.attention_flops
    assert far.linear_flops == cost.linear_flops


def test_step3_counts_mla_six_percent_high() -> None:
    exact = per_token(decoder("deepseek-r1"), 8192, 1.0)
    assert step3("DSv3").attention_flops / exact.attention_flops == pytest.approx(1152 / 1088)


@pytest.mark.parametrize(
    ("model", "dollars"),
    [
        ("DSv3", (0.054, 0.128, 0.114, 0.113)),
        ("Qwen3-235B", (0.135, 0.054, 0.091, 0.101)),
        ("Step-3", (0.048, 0.040, 0.040, 0.043)),
    ],
)
def test_step3_table_5_attention_cost(model: str, dollars: tuple[float, ...]) -> None:
    found = tuple(
        round(economics.attention_dollars(step3(model), hardware(part)), 3) for part in PARTS
    )
    assert found == pytest.approx(dollars, abs=1e-9)


@pytest.mark.parametrize(
    ("model", "dollars"),
    [
        ("DSv3", (0.014, 0.036, 0.032, 0.032)),
        ("Qwen3-235B", (0.008, 0.021, 0.019, 0.019)),
        ("Step-3", (0.015, 0.040, 0.036, 0.035)),
    ],
)
def test_step3_table_6_ffn_cost(model: str, dollars: tuple[float, ...]) -> None:
    found = tuple(round(economics.ffn_dollars(step3(model), hardware(part)), 3) for part in PARTS)
    assert found == pytest.approx(dollars, abs=1e-9)


@pytest.mark.parametrize(
    ("model", "near", "far", "split"),
    [
        ("Step-3", 0.055, 0.129, True),
        ("DSv3", 0.068, 0.211, False),
        ("Qwen3-235B", 0.062, 0.193, True),
    ],
)
def test_step3_totals_with_the_best_part_for_each_side(
    model: str, near: float, far: float, split: bool
) -> None:
    for tokens, total in ((8192, near), (32768, far)):
        cost = step3(model, tokens)
        attention = [economics.attention_dollars(cost, hardware(part)) for part in PARTS]
        ffn = [economics.ffn_dollars(cost, hardware(part)) for part in PARTS]
        found = min(attention) + min(ffn) if split else attention[0] + ffn[0]
        assert round(found, 3) == pytest.approx(total, abs=1e-9)


def test_step3_table_7_least_sparsity() -> None:
    found = [round(economics.least_sparsity(hardware(part), 7168, 61), 3) for part in PARTS]
    assert found == [0.058, 0.007, 0.031, 0.034]


def test_step3_stages_and_scaling_rule() -> None:
    assert economics.stage_seconds(50e-3, 61) * 1e6 == pytest.approx(
        273, abs=1
    )  # quoted 272 from 16.6 ms
    assert economics.scaled_throughput(4039, 4) == pytest.approx(2693, abs=0.5)


def test_intensities_of_step3() -> None:
    kinds = {name: decoder(MODELS[name]).kinds[0].attention for name in MODELS}
    found = {
        name: attention_cost.intensity(kind, 1.0, rounded=True) for name, kind in kinds.items()
    }
    assert (found["DSv3"], found["Step-3"], found["Qwen3-235B"]) == (512, 128, 32)
    assert round(hardware("h800").peak("fp8") / hardware("h800").memory_bandwidth.value) == 591


def test_absorption_table() -> None:
    """arXiv 2507.15465 table III at B=128, S=4096 for DeepSeek-R1."""
    rows = attention_cost.absorption_table(decoder("deepseek-r1").kinds[0].attention, 128, 4096)
    by = {(row.operator, row.phase, row.absorbed): row for row in rows}
    assert [round(row.intensity) for row in rows] == [512, 102, 128, 512, 512, 128, 1, 102]
    assert by["score", "decode", True].flops == 4 * by["score", "decode", False].flops
    assert by["decompress", "decode", True].flops * 4096 == by["decompress", "decode", False].flops
    assert by["decompress", "prefill", True].flops == by["decompress", "prefill", False].flops


# params B, layers, hidden, GPUs, batch, TFLOP/s per GPU, PFLOP/s in all (arXiv 2104.04473 table 1)
WEAK_SCALING = [
    (1.7, 24, 2304, 32, 512, 137, 4.4), (3.6, 30, 3072, 64, 512, 138, 8.8), (7.5, 36, 4096, 128, 512, 142, 18.2),
    (18.4, 40, 6144, 256, 1024, 135, 34.6), (39.1, 48, 8192, 512, 1536, 138, 70.8),
    (76.1, 60, 10240, 1024, 1792, 140, 143.8), (145.6, 80, 12288, 1536, 2304, 148, 227.1),
    (310.1, 96, 16384, 1920, 2160, 155, 297.4), (529.6, 105, 20480, 2520, 2520, 163, 410.2),
    (1008.0, 128, 25600, 3072, 3072, 163, 502.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("billions", "layers", "hidden", "ranks", "batch", "rate", "total"), WEAK_SCALING
)
def test_megatron_weak_scaling(
    billions: float, layers: int, hidden: int, ranks: int, batch: int, rate: float, total: float
) -> None:
    gpt = training.Gpt(layers, hidden)
    assert round(gpt.params / 1e9, 1) == pytest.approx(billions, rel=0.003)
    assert rate * ranks / 1e3 == pytest.approx(total, abs=0.05 + 0.003 * total)


def test_megatron_iteration_and_days() -> None:
    gpt = training.Gpt(128, 25600)
    assert gpt.flops(3072) / 502e15 == pytest.approx(102.6, rel=0.003)
    assert training.training_days(300e9, 175e9, 1024, 140e12) == pytest.approx(33.9, abs=0.05)
    assert training.training_days(450e9, 1008e9, 3072, 163e12) == pytest.approx(83.9, abs=0.1)
    assert training.training_days(450e9, 1e12, 3072, 163e12) == pytest.approx(83.2, abs=0.05)
    assert training.bubble(8, 32) == 7 / 32
    assert training.bubble(8, 32, 4) == 7 / 128
    assert communication.pipeline_bytes(1, 2048, 12288, 2, tp=8) == 2048 * 12288 * 2 / 8


@pytest.mark.parametrize(
    ("tokens", "peak_of", "ratio"),
    [
        (5655, "ascend910c", 3.76), (6688, "ascend910c", 4.45), (6288, "h100", 3.18), (4026, "h800", 2.03),
        (7839, "h800", 3.96), (1943, "ascend910c", 1.29), (1850, "h800", 0.93), (2325, "h800", 1.17),
        (2172, "h100", 1.10),
    ],
)  # fmt: skip
def test_cloudmatrix_tokens_per_tflops(tokens: float, peak_of: str, ratio: float) -> None:
    """arXiv 2506.12708: tokens/s per TFLOP/s tell which peaks were meant (1504 INT8, 1979 FP8)."""
    assert tokens / (hardware(peak_of).peak("int8") / 1e12) == pytest.approx(ratio, abs=0.006)


def test_cloudmatrix_speculation_and_connections() -> None:
    assert serving.speculation_gain(1.7, 1260 / 874) == pytest.approx(1.18, abs=0.005)
    # tp_p=4, tp_d=1, dp_d=8: r=4, g=2, decode ranks in pairs take from one prefill rank
    assert [serving.connection(4, 1, 8, i) for i in range(8)] == [
        (0,),
        (0,),
        (1,),
        (1,),
        (2,),
        (2,),
        (3,),
        (3,),
    ]


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_ring_attention_sends_what_tensor_parallel_sends(ranks: int) -> None:
    """arXiv 2105.13120: forward 2, backward 6, together 8 (N-1) B Z (L/N) A."""
    sizes = (ranks, 3, 16, 4096, 64)
    forward = communication.ring_attention_elements(*sizes)
    backward = communication.ring_attention_elements(*sizes, backward=True)
    assert backward == 3 * forward
    assert forward + backward == 8 * (ranks - 1) * 3 * 16 * (4096 / ranks) * 64
    assert forward + backward == pytest.approx(communication.tensor_parallel_elements(*sizes))


def test_sequence_cut_wins_beyond_32_h_and_16_az() -> None:
    hidden, heads, head_dim = 1024, 16, 64
    for rows, wins in ((31 * hidden, False), (33 * hidden, True)):
        cut = training.mlp_memory(hidden, 1, rows, 8, sequence_cut=True)
        assert (cut < training.mlp_memory(hidden, 1, rows, 8, sequence_cut=False)) == wins
    for rows, wins in ((15 * heads * head_dim, False), (17 * heads * head_dim, True)):
        pair = [
            training.attention_memory(hidden, heads, head_dim, 1, rows, 8, sequence_cut=cut)
            for cut in (True, False)
        ]
        assert (pair[0] < pair[1]) == wins


@pytest.mark.parametrize(
    ("intensity", "bandwidth", "percent"),
    [
        (training.parameter_intensity(1024, 1), 70e9, 50.6),
        (training.optimizer_intensity(1024, 2), 1.5e12, 91.6),
        (training.checkpoint_intensity(2048), 2e9, 58.4),
    ],
)
def test_zero_infinity_efficiencies(intensity: float, bandwidth: float, percent: float) -> None:
    assert training.offload_efficiency(intensity, bandwidth, 70e12) * 100 == pytest.approx(
        percent, abs=0.1
    )


def test_moe_lens_closed_form() -> None:
    model = decoder("mixtral-8x7b")
    token = model.kv_elements * 2
    said = tiers.streamed(94e9, 100e9, token, 19.5e9, 100, 128)
    assert said.kv_tokens == pytest.approx(763e3, rel=0.001)
    assert said.stream_seconds == pytest.approx(4.82, abs=0.005)
    assert said.tokens_per_second == pytest.approx(1719, rel=0.001)
    assert said.bound == "weight stream"
    assert tiers.streamed(94e9, 100e9, token, 19.5e9, 100, 128, 1000.0).bound == "compute"


def test_transfer_rates_of_disaggregation() -> None:
    """R1 in FP8, 16k/2k, 64 requests per GPU: 0.36 GB/s per GPU at 50 ms and 0.90 at 20 ms."""
    request = decoder("deepseek-r1").kv_elements * 16384
    found = [serving.ingress(request, 64, ttl, 2048, 1) / 1e9 for ttl in (50e-3, 20e-3)]
    assert found == [pytest.approx(0.36, abs=0.005), pytest.approx(0.90, abs=0.005)]
    assert serving.egress(request, 1, 2.0, 8) == request / 16


def test_rate_matching_balances() -> None:
    """Prefill instances twice as fast: half as many. The inverse rule would double them."""
    slow = serving.rate_match(1.0, 4, 3.0, 8)
    fast = serving.rate_match(2.0, 4, 3.0, 8)
    assert (slow.prefill, slow.decode) == (3, 1)
    assert (fast.prefill, fast.decode) == (3, 2)
    assert slow.prefill / slow.decode == 2 * fast.prefill / fast.decode
    assert slow.ranks == 3 * 4 + 8
    assert slow.requests_per_second == 3.0
    odd = serving.rate_match(1.0, 1, 0.317, 1)
    assert odd.prefill / odd.decode == pytest.approx(0.317, rel=0.03)


def test_coverage_of_experts_as_measured() -> None:
    """Qwen3-30B-A3B: 55 % of experts at 32 tokens, 86 % at 128; uniform routing says 87 % and 100 %."""
    zipf = ffn_cost.zipf(1.25)(128, 8, np.array([1, 32, 128]))
    assert zipf == pytest.approx([8 / 128, 0.55, 0.87], abs=0.02)
    assert ffn_cost.uniform(128, 8, np.array([32, 128])) == pytest.approx([0.873, 1.0], abs=0.001)
    assert ffn_cost.zipf(0.0)(128, 8, 32) == pytest.approx(float(ffn_cost.uniform(128, 8, 32)))


def test_moe_arithmetic() -> None:
    r1 = decoder("deepseek-r1").kinds[1].ffn
    assert ffn_cost.sparsity(r1) == pytest.approx(9 / 257)
    assert ffn_cost.compute_bound_batch(r1, 1979e12, 3.35e12) == pytest.approx(
        591 / (2 * 9 / 257), rel=0.001
    )
    assert ffn_cost.dispatch_bytes(r1, 1, 256, 1.0) == pytest.approx(7168 * 8 * 255 / 256)
    assert ffn_cost.zero_expert_time(ffn_cost.zero_expert_work(1.0, 8, 4)) == pytest.approx(0.86)
    measured = {
        0.1: 202.4,
        0.25: 277.8,
        0.5: 387.3,
        0.75: 427.6,
        1.0: 449.6,
    }  # ms of 535.3, MoE++ 0.6B/(8+4)
    for tau, milliseconds in measured.items():
        told = ffn_cost.zero_expert_time(ffn_cost.zero_expert_work(tau, 8, 4))
        assert told == pytest.approx(milliseconds / 535.3, rel=0.06)
    each, zero = ffn_cost.zero_expert_capacity(0.5, 8, 4, 1024, 1.0)
    assert 8 * each + 4 * zero == pytest.approx(1024)


def test_prefill_in_chunks_and_layers() -> None:
    assert serving.reread_chunks(2048, 512) == 6
    assert serving.tile_waste(257) == pytest.approx(1 - 257 / 512)
    assert serving.decodes_per_chunk(1000, 100, 512) == pytest.approx(51.2)  # P:D = C/(B-1)
    cover = ffn_cost.zipf(1.25)
    chunked = serving.chunked_expert_reads(cover, 128, 8, 9194, 512, 16)
    layered = serving.layered_expert_reads(cover, 128, 8, 9194, 16)
    assert (
        layered < 0.61 * chunked
    )  # measured: 39 % less expert traffic on such prompts, decodes of others included
    assert serving.accepted_tokens(1, 0.7) == pytest.approx(1.7)
    assert serving.accepted_tokens(3, 1.0) == 4


def test_training_memory() -> None:
    assert training.state_bytes(1e9).total == 16e9
    assert training.state_bytes(1e9, 8, sharded=3).total == 2e9
    assert training.state_bytes(1e9, 8, sharded=1).total == pytest.approx(4e9 + 1.5e9)
    kept = training.activation_bytes(1, 2048, 12288, 96, 8, sp=True)
    assert kept == 96 * 2048 * 12288 * 34 / 8
    assert (
        training.activation_bytes(1, 2048, 12288, 96, 8, recompute="full") == 96 * 2 * 2048 * 12288
    )
    assert training.activation_bytes(1, 2048, 12288, 96, 8) == 96 * 2048 * 12288 * 13
    assert training.step_flops(1e9, 10) == 6e10
    assert training.offload_write_rate(10e9, 4.0) == 5e9
    assert training.offloaded_step((1.0, 2.0), (1.5, 1.0), (0.5, 2.5), 3.0) == 4.5
    assert tiers.cheaper(1e5, 70e3, 50e9, 1.0) == "fetch"
    assert tiers.cheaper(1e5, 70e3, 1e9, 1.0) == "recompute"
    assert tiers.hideable_bytes(0.02, 50e9) == 1e9
