"""Selectors over ranks: what a plan's ranks read, each of its own tokens and heads, is what one process can say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from exactness import EXACT, far
from models import tiny, tokens
from plait.cuda_kernels import Interleave
from plait.kvstore import KVSpec, KVStore
from plait.kvstore.engines.pages import read_pages_in_place
from plait.kvstore.engines.transformers import PlaitCache, make_store
from plait.kvstore.select import KeyView, Selection, Selector, find_selector
from plait.parallel import parallelize
from world import run_world

LAYERS, KV_HEADS, NEW, PROMPT = 2, 4, 6, 41
NAMES = [
    "exact:budget=10",
    "quest:budget=12,page=2,dense=0",
    "sparq:budget=10,channels=3,window=2",
    "rocket:budget=12",
]
FULL = ["quest:budget=500,page=2", "delta:full=0,budget=1", "top-p:pages=1"]


@dataclass(frozen=True)
class AsRanks(Selector):
    """What `shards` ranks choose together, worked out in one process: each sees its own tokens as a whole sequence."""

    inner: Selector | None = None
    shards: int = 1
    run: int = 1
    memories: dict[Any, Any] = field(default_factory=dict, compare=False)
    name: ClassVar[str] = "as-ranks"

    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        assert self.inner is not None
        size = view.keys.shape[1]
        at = torch.arange(view.tokens)
        rows = view.keys.flatten(0, 1)[view.pages.long()[at // size] * size + at % size]
        read = torch.zeros(view.kv_heads, view.tokens, dtype=torch.bool)
        for shard in range(self.shards):
            rule = Interleave(self.run, self.shards, shard)
            own = rule.positions(torch.arange(rule.local_length(view.tokens)))
            part = replace(
                view, keys=rows[own][:, None].contiguous(), pages=torch.arange(len(own)), tokens=len(own),
                shards=self.shards, memory=self.memories.setdefault((id(view.memory), shard), {}),
            )  # fmt: skip
            found = self.inner.plan(q, part)
            if found is None:
                read[:, own] = True
                continue
            for head, units in enumerate(found.lists()):
                chosen = (units.long()[:, None] * found.unit + torch.arange(found.unit)).flatten()
                read[head, own[chosen[chosen < len(own)]]] = True
        return Selection.where(read, 1)


def generated(model: Any, cache: Any) -> Tensor:
    out = model.generate(
        tokens(2, PROMPT), past_key_values=cache, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return torch.stack(out.logits)


def alone(selector: Selector | None) -> Tensor:
    model = tiny("llama", layers=LAYERS)
    read_pages_in_place(model)
    store = make_store(model, 4, weights="test", selector=selector)
    with PlaitCache(store, tokens(2, PROMPT), in_place=True) as cache:
        return generated(model, cache)


def over_ranks(plan: str, tp: int, shards: int, run: int, names: list[str]) -> list[float]:
    """The error of each selector's logits against what one process says of it; last, against one without ranks."""
    errors, without = [], 0.0
    for name in names:
        want = alone(AsRanks(find_selector(name), shards, run))
        model = tiny("llama", layers=LAYERS)
        spec = KVSpec(LAYERS, KV_HEADS // tp, 8, page_tokens=4, dtype=torch.float64)
        store = KVStore(spec, selector=name)
        parallelize(model, plan, store=store)
        with torch.no_grad():
            errors.append(far(generated(model, model.kv_cache()), want))
            if name == names[0]:
                without = far(generated(model, model.kv_cache()), alone(find_selector(name)))
    return [*errors, without]


@pytest.mark.parametrize(
    ("plan", "tp", "shards", "run", "names"),
    [
        ("kvp2:interleave=3", 1, 2, 3, NAMES + FULL),
        pytest.param("tp2", 2, 1, 1, NAMES, marks=pytest.mark.slow),
        pytest.param("kvp2:interleave=2 tp2", 2, 2, 2, NAMES, marks=pytest.mark.slow),
    ],
)
def test_each_rank_chooses_among_its_own(plan, tp, shards, run, names) -> None:
    for *errors, without in run_world(over_ranks, tp * shards, plan, tp, shards, run, names):
        assert max(errors) < EXACT, dict(zip(names, errors, strict=True))
        # Documented: ranks choose for themselves, so with kvp the tokens read are others than without.
        assert (without > 1e-6) == (shards > 1)
