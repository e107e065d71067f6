"""save_pretrained of a cut model writes a plain checkpoint that anything can load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from models import tiny
from plait.parallel import PlanError, parallelize
from world import run_world


def save(directory: str, plan: str, family: str) -> list[str]:
    """Save under a plan, load in plain transformers, and name the tensors that differ."""
    reference = tiny(family, dtype=torch.float32)
    model = parallelize(copy.deepcopy(reference), plan)
    model.save_pretrained(directory)
    loaded = type(reference).from_pretrained(directory)
    assert loaded.config._attn_implementation == reference.config._attn_implementation
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all(), (
        "the model goes on under its plan"
    )
    expected = reference.state_dict()
    return [
        name
        for name, tensor in loaded.state_dict().items()
        if not torch.equal(tensor, expected[name])
    ]


@pytest.mark.parametrize(
    ("plan", "size", "family"),
    [("kvp2 tp2", 4, "llama"), ("tp2", 2, "phi3"), ("kvp2", 2, "gemma3")],
)
def test_any_tool_loads_it(tmp_path: Path, plan: str, size: int, family: str) -> None:
    assert run_world(save, size, str(tmp_path / "model"), plan, family) == [[]] * size


def save_where_a_file_is(path: str) -> str:
    model = parallelize(tiny("llama", dtype=torch.float32), "tp2")
    try:
        model.save_pretrained(path)
    except Exception as error:
        return str(error)
    return ""


def test_a_failed_write_is_an_error_on_every_rank(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    errors = run_world(save_where_a_file_is, 2, str(blocked / "model"))
    assert all(errors), errors


def cut_on_meta() -> str:
    with torch.device("meta"):
        model = tiny("llama", dtype=torch.float32)
    with pytest.raises(PlanError, match="on meta and no weights") as caught:
        parallelize(model, "tp2")
    return str(caught.value)


def test_meta_without_weights_is_refused() -> None:
    assert len(set(run_world(cut_on_meta, 2))) == 1
