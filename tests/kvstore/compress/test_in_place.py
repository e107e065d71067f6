"""Coded pages read where they lie give what decoding them first gives: attention, logits, and what selectors choose."""

from __future__ import annotations

import pytest
import torch

from plait.kvstore import CompressedStore, KVSpec
from plait.kvstore.compress import chosen, coder, in_place
from plait.kvstore.compress.tiers import Tiers

SPEC = KVSpec(layers=1, kv_heads=2, head_dim=32, page_tokens=16)
CODECS = ["int8", "int4", "kivi:bits=2,group=16", "nvfp4", "none@0.2|int8@0.3|int4", "int4:group=8"]


def drawn(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(tokens, 2, 32, generator=gen) for _ in range(2))
    return k, v, torch.randn(tokens, 4, 32, generator=gen)


def talk(codec: str, selector: str | None = None) -> list[torch.Tensor]:
    """A prompt, decoded tokens, a short turn, a fork; rows that see all, a window, an end."""
    k, v, q = drawn(130)
    store = CompressedStore(
        SPEC, "knorm:budget=0.9", codec=Tiers.parse(codec, 5), selector=selector
    )
    seq, start, outs = store.open(), 0, []
    for size in [90, *[1] * 20, 3, *[1] * 17]:
        rows = slice(start, start + size)
        step = store.reserve([seq], [size])
        store.append(step, 0, k[rows], v[rows])
        outs += store.attend(seq, 0, q[rows], step=step)
        store.commit(step)
        start += size
        if start == 113:
            seq = store.fork(seq)
    bounds = [{}, {"lo": torch.tensor([61])}, {"lo": torch.tensor([13]), "hi": torch.tensor([70])}]
    for given in bounds:
        outs += store.attend(seq, 0, q[:1], softcap=3.0, **given)
    return outs


@pytest.fixture
def decoding_first(monkeypatch: pytest.MonkeyPatch):
    def tell() -> None:
        for module in (coder, chosen):
            monkeypatch.setattr(module, "held_codes", lambda *_: None)

    return tell


@pytest.mark.parametrize("codec", CODECS)
def test_a_talk_is_the_same_read_in_place(codec: str, decoding_first, monkeypatch) -> None:
    read, attend = [], in_place.attend_codes
    monkeypatch.setattr(in_place, "attend_codes", lambda *a: read.append(1) or attend(*a))
    got = talk(codec)
    assert bool(read) == (codec != "int4:group=8"), "blocks of 8 alone are decoded first"
    decoding_first()
    for mine, want in zip(got, talk(codec), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "selector",
    [
        "exact:budget=24",
        "sparq:budget=24,channels=16,window=4",
        "quest:budget=24,dense=0",
        "rocket:budget=24",
    ],
)
@pytest.mark.parametrize("codec", ["int8", "kivi:bits=4,group=16"])
def test_selectors_choose_the_same(codec: str, selector: str, decoding_first, monkeypatch) -> None:
    read, attend = [], chosen.attend_chosen
    monkeypatch.setattr(chosen, "attend_chosen", lambda *a: read.append(1) or attend(*a))
    got = talk(codec, selector)
    assert read
    decoding_first()
    want = talk(codec, selector)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    whole = talk(codec)
    assert not torch.allclose(got[-6], whole[-6], atol=1e-3), "the selector chose everything"


def test_a_page_out_of_place_is_another_answer(monkeypatch) -> None:
    want, held_codes = talk("int8"), in_place.held_codes

    def turned(*args):
        held = held_codes(*args)
        return held and held._replace(keys=held.keys._replace(pages=held.keys.pages[::-1].copy()))

    monkeypatch.setattr(coder, "held_codes", turned)
    assert not torch.allclose(talk("int8")[-2], want[-2], atol=1e-3)
