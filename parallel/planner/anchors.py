"""Measured serving points: what the planner's decode times are held against.

Source: InferenceX runs and NVIDIA's own, as collected in aiconfigurator's accuracy tracking
(tools/accuracy_tracking/silicon_refs.csv, Apache-2.0, github.com/ai-dynamo/aiconfigurator); medians in milliseconds.
`batch` is per attention dp rank of the decode side. Two rows are one run told twice (R1 on H200 under SGLang,
1k/1k): they count once in `unique`. Whether a run used multi-token prediction is not said anywhere; none is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Anchor:
    """One measurement. ``prefill`` is empty where prefill shares the ranks (aggregated)."""

    model: str
    hardware: str
    engine: str
    precision: str
    input_tokens: int
    output_tokens: int
    tp: int
    dp: int
    etp: int
    ep: int
    batch: int
    ttft_ms: float
    tpot_ms: float
    aggregated: bool = True

    @property
    def name(self) -> str:
        """What a person calls it."""
        how = "" if self.aggregated else " disaggregated"
        grid = f"tp{self.tp} dp{self.dp} ep{self.ep} etp{self.etp} batch {self.batch}"
        return f"{self.model} {self.hardware} {self.engine} {self.precision}{how} {grid}"


def _rows() -> tuple[Anchor, ...]:
    r1, k2, m2, q3 = "deepseek-r1", "kimi-k2", "minimax-m2.5", "qwen3-32b"
    big, hybrid = "qwen3-235b-a22b", "qwen3.5-397b-a17b"
    return (
        # model, part, engine, precision, in, out, tp, dp, etp, ep, batch, TTFT, TPOT
        Anchor(r1, "h200", "trtllm", "fp8", 1024, 8192, 8, 1, 1, 8, 16, 616.88, 11.389),
        Anchor(k2, "b300", "vllm", "nvfp4", 1024, 1024, 4, 1, 1, 4, 16, 109.58, 13.019),
        Anchor(m2, "b200", "vllm", "fp8", 1024, 1024, 2, 1, 2, 1, 32, 146.33, 17.850),
        Anchor(m2, "h100", "vllm", "fp8", 1024, 1024, 4, 1, 1, 4, 16, 113.78, 15.541),
        Anchor(r1, "b200", "sglang", "fp8", 1024, 1024, 8, 1, 8, 1, 16, 586.30, 11.710),
        Anchor(r1, "b200", "trtllm", "fp8", 8192, 1024, 8, 1, 8, 1, 32, 647.71, 15.874),
        Anchor(r1, "h200", "sglang", "fp8", 1024, 1024, 8, 1, 8, 1, 16, 285.88, 16.630),
        Anchor(hybrid, "b200", "sglang", "fp8", 1024, 1024, 4, 1, 4, 1, 32, 794.58, 13.796),
        Anchor(r1, "gb200", "trtllm", "nvfp4", 4000, 1000, 8, 1, 1, 8, 28, 39682.84, 31.491),
        Anchor(r1, "b200", "sglang", "fp8", 1024, 1024, 8, 1, 1, 8, 4, 214.34, 9.804, False),
        Anchor(r1, "b200", "trtllm", "nvfp4", 1024, 1024, 1, 8, 1, 8, 137, 2825.13, 23.952, False),
        Anchor(r1, "b200", "trtllm", "fp8", 1024, 8192, 8, 1, 8, 1, 32, 262.03, 16.407),
        Anchor(r1, "b300", "sglang", "nvfp4", 1024, 1024, 16, 1, 4, 4, 32, 596.09, 14.126),
        Anchor(r1, "gb200", "sglang", "fp8", 1024, 1024, 1, 4, 4, 1, 1, 467.54, 10.116, False),
        Anchor(r1, "gb200", "trtllm", "nvfp4", 1024, 1024, 8, 1, 1, 8, 1, 131.04, 6.347, False),
        Anchor(r1, "gb300", "sglang", "fp8", 1024, 1024, 1, 8, 1, 8, 512, 3229.64, 58.852, False),
        Anchor(r1, "gb300", "trtllm", "fp8", 1024, 1024, 8, 1, 1, 8, 1, 239.04, 7.381, False),
        Anchor(r1, "h100", "trtllm", "fp8", 1024, 1024, 16, 1, 1, 16, 10, 5052.40, 19.926, False),
        Anchor(r1, "h200", "sglang", "fp8", 1024, 1024, 8, 1, 8, 1, 16, 285.88, 16.630),
        Anchor(r1, "h200", "sglang", "fp8", 8192, 1024, 1, 8, 1, 8, 16, 3644.37, 40.624, False),
        Anchor(r1, "h200", "trtllm", "fp8", 1024, 1024, 8, 1, 8, 1, 16, 379.66, 20.394),
        Anchor(r1, "h200", "trtllm", "fp8", 1024, 1024, 1, 8, 1, 8, 16, 3288.08, 34.821, False),
        Anchor(k2, "b200", "vllm", "nvfp4", 1024, 1024, 4, 1, 1, 4, 16, 207.73, 14.220),
        Anchor(k2, "gb200", "trtllm", "nvfp4", 1024, 1024, 4, 1, 1, 4, 1, 175.95, 5.772, False),
        Anchor(
            k2, "gb200", "vllm", "nvfp4", 1024, 1024, 16, 1, 1, 16, 1024, 1946.37, 20.890, False
        ),
        Anchor(m2, "b300", "vllm", "fp8", 1024, 1024, 2, 1, 2, 1, 64, 194.18, 22.225),
        Anchor(m2, "h200", "vllm", "fp8", 1024, 1024, 8, 1, 8, 1, 32, 148.17, 13.688),
        Anchor(q3, "gb200", "trtllm", "nvfp4", 4000, 1000, 2, 1, 1, 1, 256, 53877.01, 53.526),
        Anchor(q3, "h100", "sglang", "fp8", 4000, 1000, 8, 1, 1, 1, 424, 16117.82, 113.392, False),
        Anchor(hybrid, "b300", "sglang", "fp8", 1024, 1024, 4, 1, 4, 1, 32, 279.44, 15.160),
        Anchor(big, "h100", "trtllm", "fp8", 1024, 128, 4, 1, 1, 4, 32, 253.09, 31.225),
        Anchor(big, "h200", "vllm", "fp8", 1000, 100, 2, 1, 2, 1, 16, 243.96, 52.160),
        Anchor(q3, "h100", "sglang", "bf16", 1024, 128, 2, 1, 1, 1, 64, 2530.07, 30.122),
        Anchor(q3, "h100", "trtllm", "fp8", 1024, 128, 1, 1, 1, 1, 32, 356.66, 36.154),
        Anchor(q3, "h100", "vllm", "bf16", 1024, 1024, 2, 1, 1, 1, 32, 236.77, 20.064),
    )


ANCHORS = _rows()


def unique() -> tuple[Anchor, ...]:
    """Return the rows, a run that is told twice once."""
    return tuple(dict.fromkeys(ANCHORS))
