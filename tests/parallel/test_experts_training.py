"""Experts over ranks train as one process does: gradients, and parameters after steps of SGD, in float64."""

from __future__ import annotations

import pytest

from exactness import case
from training import assert_as_one_process, trained

CASES = {
    2: [
        (case("dp2 ep2", "mixtral"), 10),
        (case("dp2 ep2", "gpt_oss"), 1),
        (case("dp2 etp2", "gpt_oss"), 2),
        (case("dp2:shard ep2", "qwen2_moe"), 2),
        (case("tp2 ep2", "qwen3_moe"), 10),
        (case("cp2 ep2", "mixtral"), 2),
    ],
    4: [
        (case("dp2 tp2 ep4", "deepseek"), 10),
        (case("dp2 tp2 ep2", "mixtral"), 3),
        (case("dp2 tp2 ep2,exchange=tokens", "qwen2_moe"), 1),
        (case("dp2 tp2 ep2 etp2", "gpt_oss"), 2),
        (case("dp4 ep2", "qwen3_moe"), 2),
        (case("tp2 cp2 ep4", "qwen3_moe"), 2),
        (case("dp2 cp2:ulysses ep2 etp2", "mixtral"), 2),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_steps_are_those_of_one_process(ranks: int) -> None:
    assert_as_one_process(trained, CASES[ranks], ranks)
