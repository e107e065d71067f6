"""Which schedule the fused norm takes on CUDA: measured tables as data, and the rule for devices without one."""

from __future__ import annotations

ONE, TWO, SWITCH = "norm_one_shot", "norm_two_shot", "norm_multimem"
Steps = tuple[tuple[int, str], ...]  # up to so many bytes of x this schedule; beyond the last: none

MOST_BYTES = 4 << 20  # of x
# of a (parity, source) place, with statistics: 65 MiB of each device at 8 ranks
SLOT_BYTES = MOST_BYTES + (64 << 10)

# (device, ranks, whether a switch adds) -> what was fastest there; `benchmarks/gpu_norms.py` prints such lines.
# Empty: no device has been measured.
MEASURED: dict[tuple[str, int, bool], Steps] = {}

# Else by the least number of ranks: where peers' fused kernels change over on 8 x H100 (vLLM's tables for FlashInfer
# and its own all-reduce, TokenWeave's for multimem), cut to our slots. Not measured with these kernels.
ONE_SHOT_BYTES = {2: MOST_BYTES, 3: 1 << 20, 5: 256 << 10}


def steps_for(device: str, ranks: int, switch: bool) -> Steps:
    """Give the table of a device, or the rule: one-shot for few bytes, then the switch, else two-shot."""
    found = MEASURED.get((device, ranks, switch))
    if found is not None:
        return found
    small = next(size for least, size in reversed(ONE_SHOT_BYTES.items()) if ranks >= least)
    if switch:  # it needs two places only, so its x may be larger
        return ((small, ONE), (ranks * MOST_BYTES // 2, SWITCH))
    return ((small, ONE), (MOST_BYTES, TWO))


def choose(steps: Steps, size: int) -> str | None:
    """Choose for so many bytes of x; None: an all-reduce and a norm apart."""
    return next((schedule for most, schedule in steps if size <= most), None)
