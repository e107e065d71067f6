"""The seam between stores and selectors: what is chosen is read, where it lies, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from plait.cuda_kernels import attention_reference
from plait.kvstore import KVSpec, KVStore
from plait.kvstore.select import KeyView, Selection, Selector, find_selector

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=8, page_tokens=4, dtype=torch.float64)


@dataclass(frozen=True)
class EveryOther(Selector):
    """Ragged: the first KV head reads odd pages, the second all of them."""

    name: ClassVar[str] = "every-other"

    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        pages = torch.arange(len(view.pages))
        odd = pages[1::2]
        view.own["asked"] = view.own.get("asked", 0) + 1
        indptr = torch.tensor([0, len(odd), len(odd) + len(pages)])
        return Selection(indptr, torch.cat([odd, pages]).int(), view.keys.shape[1])


def filled(selector, lengths=(23, 9)):
    store = KVStore(SPEC, selector=selector)
    seqs = store.open_batch(len(lengths))
    gen = torch.Generator().manual_seed(0)
    kv = torch.randn(2, SPEC.layers, sum(lengths), 2, 8, dtype=torch.float64, generator=gen)
    step = store.reserve(seqs, list(lengths))
    for layer in range(SPEC.layers):
        store.append(step, layer, kv[0, layer], kv[1, layer])
    store.commit(step)
    q = torch.randn(len(lengths), 4, 8, dtype=torch.float64, generator=gen)
    return store, seqs, kv, q


def masked(q, k, v, seen):
    """Dense attention of one row; seen `[kv_heads, tokens]`."""
    outs = []
    for head in range(4):
        mine = seen[head // 2]
        lo, hi = torch.zeros(1, dtype=torch.int64), torch.tensor([int(mine.sum())])
        args = (q[None, head : head + 1], k[mine, head // 2, None], v[mine, head // 2, None])
        outs.append(attention_reference(*args, lo, hi, 8**-0.5, 0.0)[0][0, 0])
    return torch.stack(outs)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_step_reads_what_was_chosen(windowed) -> None:
    store, seqs, kv, q = filled(EveryOther())
    # A row that may not see everything is not asked about.
    o, _ = store.attend(seqs, 1, q, lo=torch.tensor([0, 6]) if windowed else None)
    start = 0
    for at, seq in enumerate(seqs):
        tokens = torch.arange(seq.length)
        seen = torch.stack([tokens // 4 % 2 == 1, tokens >= 0])
        if windowed and at == 1:
            seen = (tokens >= 6).expand(2, -1)
        k, v = (x[1, start : start + seq.length] for x in kv)
        torch.testing.assert_close(o[at], masked(q[at], k, v, seen), rtol=1e-12, atol=1e-12)
        start += seq.length
    whole, others, *_ = filled(None)
    assert not torch.allclose(o, whole.attend(others, 1, q)[0]), "and not everything"


def test_recent_reads_the_end_and_everything_when_it_may() -> None:
    store, seqs, _, q = filled("recent:tokens=10")
    whole, others, *_ = filled(None)
    lo = torch.tensor([13, 0])
    got = store.attend(seqs, 0, q)
    want = whole.attend(others, 0, q, lo=lo)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    store, seqs, *_ = filled("recent:tokens=23")
    assert torch.equal(store.attend(seqs, 0, q)[0], whole.attend(others, 0, q)[0])


def test_prompts_read_everything_and_memory_is_the_sequences_own() -> None:
    store, seqs, _, q = filled(EveryOther())
    whole, others, *_ = filled(None)
    rows = torch.cat([q, q, q])[:4]
    indptr = [0, 2, 4]
    assert torch.equal(
        store.attend(seqs, 0, rows, q_indptr=indptr)[0],
        whole.attend(others, 0, rows, q_indptr=indptr)[0],
    )
    store.attend(seqs, 0, q)
    store.attend(seqs[0], 0, q[:1])
    assert [seq.memory[0]["asked"] for seq in seqs] == [2, 1]
    twin = store.fork(seqs[0])
    store.truncate(seqs[0], 5)
    assert (seqs[0].memory, twin.memory) == ({}, {})
    step = store.reserve([twin], 1)
    store.append(
        step, 0, torch.ones(1, 2, 8, dtype=torch.float64), torch.ones(1, 2, 8, dtype=torch.float64)
    )
    store.attend(twin, 0, q[:1], step=step)
    store.abort(step)
    assert twin.memory == {}, "what it saw is taken back"


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no selector 'quests'"):
        KVStore(SPEC, selector="quests")
    with pytest.raises(ValueError, match="at least one token"):
        find_selector("recent:tokens=0")
    store, seqs, _, q = filled(EveryOther())
    with pytest.raises(ValueError, match="ALiBi"):
        store.attend(seqs, 0, q, alibi_slopes=torch.ones(4), q_pos=torch.tensor([22, 8]))
