"""Where stages are cut: balanced, complete, and by the models' own tables. One process."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import FAMILIES, tiny
from plait.parallel import Pipeline, Plan, PlanError
from plait.parallel.labels import item_count
from plait.parallel.pipeline.edits import gives_hidden_states
from plait.parallel.pipeline.microbatches import microbatches
from plait.parallel.pipeline.passage import Crossing, Passage
from plait.parallel.pipeline.split import balanced, split_of


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_no_other_cut_is_lighter(counts: list[int], chunks: int, before: int, after: int) -> None:
    if chunks > len(counts):
        return

    def heaviest(bounds: tuple[int, ...]) -> int:
        runs = [sum(counts[a:b]) for a, b in pairwise(bounds)]
        runs[0] += before
        runs[-1] += after
        return max(runs)

    found = balanced(counts, chunks, before, after)
    assert len(found) == chunks + 1
    every = [(0, *cut, len(counts)) for cut in combinations(range(1, len(counts)), chunks - 1)]
    assert found in every
    assert heaviest(found) == min(map(heaviest, every))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_every_parameter_has_its_stage(family: str, schedule: str) -> None:
    model = tiny(
        family, layers=4, **({"layer_types": None} if family in {"gemma3", "gpt_oss"} else {})
    )
    split = split_of(model, Pipeline(2, schedule=schedule))
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    owners = {n: split.owner(n) for n in names}
    assert set(owners.values()) == {0, 1}
    assert sorted(n for group in split.names for n in group) == sorted(names)
    assert owners[next(n for n in names if "embed" in n)] == 0
    assert owners[next(n for n in names if n.startswith(("lm_head", "embed_out")))] == 1
    assert split.owner("model.rotary_emb.inv_freq") is None
    assert [split.owner(f"{split.layers}.{i}.x") for i in range(4)] == (
        [0, 1, 0, 1] if schedule == "interleaved" else [0, 0, 1, 1]
    )
    assert bool(split.tied()) == model.config.tie_word_embeddings


def test_too_few_layers() -> None:
    with pytest.raises(PlanError, match="pp <= 1"):
        split_of(tiny("llama", layers=3), Pipeline(2, schedule="interleaved"))


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
def test_rounds_of_uneven_size_are_refused(schedule: str) -> None:
    Plan.parse(f"pp2:{schedule},microbatches=6").validate()
    with pytest.raises(PlanError, match=r"use microbatches=4"):
        Plan.parse(f"pp2:{schedule},microbatches=5").validate()


def test_microbatches_differ_by_a_row_and_what_fills_up_does_not_count() -> None:
    ids = torch.arange(20).reshape(5, 4)
    values = {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.arange(4)[None],
        "use_cache": False,
    }
    pieces = microbatches(values, 5, 3)
    assert [p.values["input_ids"].tolist() for p in pieces] == [
        ids[:2].tolist(), ids[2:4].tolist(), ids[4:].tolist(),
    ]  # fmt: skip
    assert [(p.rows, p.share) for p in pieces] == [(2, 0.4), (2, 0.4), (1, 0.2)]
    pieces = microbatches(values, 5, 7, ignored=-100)
    assert [(p.rows, p.share) for p in pieces] == [(1, 0.2)] * 5 + [(1, 0.0)] * 2
    assert pieces[6].values["input_ids"].tolist() == ids[:1].tolist()
    assert pieces[6].values["labels"].tolist() == [[-100] * 4]
    assert all(p.values["position_ids"].shape == (1, 4) for p in pieces)
    assert values["labels"].min() == 0
    assert item_count(values) == 15
    assert sum(item_count(p.values) for p in pieces) == 15


def test_nothing_may_come_of_embeddings_that_a_later_stage_has_not() -> None:
    hidden, table = torch.randn(2, 3, 4), torch.randn(3, 4)
    crossing = Crossing(arrived=hidden)
    embeddings = crossing.embeddings()
    assert embeddings is not None
    assert embeddings.shape == hidden.shape
    assert crossing.comes((table, {"position_embeddings": (table, table)})) is hidden
    with pytest.raises(PlanError, match="gives its embeddings to every layer"):
        Crossing(arrived=hidden).comes(((), {"first": (table, embeddings * 2)}))
    assert Crossing().embeddings() is None, "the first stage has its own"


def test_what_leaves_is_what_the_last_own_layer_gave() -> None:
    crossing, hidden = Crossing(), torch.randn(2, 3, 4)
    after = [Passage(torch.nn.Identity(), n, crossing) for n in (1, 2)]
    assert after[1](after[0](hidden) * 2) is not hidden
    assert crossing.left is hidden


def test_layers_that_give_tuples_are_told_from_those_of_today() -> None:
    from transformers.models.bloom.modeling_bloom import BloomBlock
    from transformers.models.ctrl.modeling_ctrl import EncoderLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.trocr.modeling_trocr import TrOCRDecoderLayer

    kinds = [LlamaDecoderLayer, BloomBlock, EncoderLayer, TrOCRDecoderLayer]
    assert [gives_hidden_states(kind) for kind in kinds] == [True, False, False, False]
