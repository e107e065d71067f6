"""Checks of the held-out split, the token ids, and the shipped checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import bytes_tokenizer  # noqa: E402
import data  # noqa: E402


def test_bytes_survive_a_round_trip() -> None:
    text = "naïve ✓\n"
    ids = bytes_tokenizer.encode(text)
    assert ids[0] == bytes_tokenizer.BOS
    assert bytes_tokenizer.decode([*ids, bytes_tokenizer.EOS]) == text


def test_held_out_text_is_long_enough_to_measure() -> None:
    assert len(data.held_out_text("reference")) >= 32_768
    assert len(data.held_out_text("modules")) >= 300_000


def test_no_training_document_repeats_a_held_out_one() -> None:
    train, held_out = data.split()
    names = {name for name, _ in train}
    assert not names & {name for name, _ in held_out}
    assert not any("test_argparse" in name for name in names)
    seen = {line for _, text in held_out for line in data.long_lines(text)}
    assert all(data.shared(text, seen) <= data.OVERLAP for _, text in train)


def test_unknown_kind_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        data.held_out_text("poems")


def test_training_model_computes_what_transformers_computes() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from export import largest_difference
    from model import Shape, TinyLlama

    model = transformers.LlamaForCausalLM.from_pretrained(HERE / "checkpoint", dtype=torch.float32)
    ours = TinyLlama(Shape())
    ours.load_state_dict(model.state_dict())
    assert largest_difference(ours, model) < 1e-3
