"""Layers with a sliding window: what no later row sees is let go of, and answers stay what they were."""

from __future__ import annotations

import pytest
import torch

from plait.kvstore import CompressedStore, KVSpec
from plait.kvstore.compress.tiers import Tiers
from plait.kvstore.errors import StepError

SPEC, WINDOW = KVSpec(layers=2, kv_heads=2, head_dim=16, page_tokens=8), 24
K, V, Q = torch.randn(3, 2, 200, 4, 16, generator=torch.Generator().manual_seed(0)).double().float()


def fed(store, seq, start: int, sizes: list[int]) -> list[torch.Tensor]:
    """Layer 0 sees all, layer 1 its window."""
    outs = []
    for size in sizes:
        rows, step = slice(start, start + size), store.reserve([seq], [size])
        lo = torch.arange(start, start + size) - WINDOW + 1
        for layer in range(2):
            store.append(step, layer, K[layer, rows, :2], V[layer, rows, :2])
            given = {"lo": lo} if layer else {}
            outs += store.attend(seq, layer, Q[layer, rows], step=step, **given)
        store.commit(step)
        store.check_integrity()
        start += size
    return outs


def both(codec: str | None, windows: dict[int, int]) -> list[CompressedStore]:
    tiers = None if codec is None else Tiers.parse(codec, 5)
    return [
        CompressedStore(SPEC, "knorm:budget=1.0", codec=tiers, windows=own) for own in (windows, {})
    ]


def same(got: list[torch.Tensor], want: list[torch.Tensor], close: float = 1e-5) -> bool:
    return all(torch.allclose(a, b, rtol=close, atol=close) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("codec", [None, "int8", "none@0.2|zstd@0.5|zstd", "zstd"])
def test_answers_stay_and_bytes_go(codec: str | None) -> None:
    sliding, whole = both(codec, {1: WINDOW})
    a, b = sliding.open(), whole.open()
    sizes = [70, *[1] * 20, 7, *[1] * 60]
    close = 0.02 if codec == "int8" else 1e-5  # other tokens are the exact ones
    assert same(fed(sliding, a, 0, sizes), fed(whole, b, 0, sizes), close)
    assert (whole.report()["kept_tokens"], int(a.kept[0].max())) == (157, 157)
    most = WINDOW + 2 * SPEC.page_tokens if codec is None else 2 * WINDOW + 2 * SPEC.page_tokens
    assert WINDOW <= int(a.kept[1].max()) <= most
    if (
        codec is None
    ):  # 157 tokens in one layer, at most 40 in the other, and no page for what is gone
        held = sliding.report()["held_bytes"] / sliding.pool.bytes_per_page
        assert held == 2 * (20 + -(-int(a.kept[1].max()) // 8))
        assert held < whole.report()["held_bytes"] / whole.pool.bytes_per_page * 0.65
    with pytest.raises(StepError, match="do not come back"):
        sliding.truncate(a, 100)
    sliding.close(a)
    assert sliding.report()["held_bytes"] == 0


def test_a_window_that_is_too_short_is_another_answer() -> None:
    short, whole = both(None, {1: WINDOW - 1})
    sizes = [70, *[1] * 20]
    assert not same(fed(short, short.open(), 0, sizes), fed(whole, whole.open(), 0, sizes))


def test_forks_and_prefixes_hold_what_they_need() -> None:
    """A prompt's text is remembered; who begins with it later finds its window, though the first one went on."""
    store = CompressedStore(SPEC, "knorm:budget=1.0", windows={1: WINDOW})
    whole = CompressedStore(SPEC, "knorm:budget=1.0")
    ids = torch.arange(100)
    first = store.open(ids[:70])
    fed(store, first, 0, [70, *[1] * 10])
    twin = store.fork(first)
    fed(store, first, 80, [1] * 50)
    again, plain = store.open(ids), whole.open()
    assert again.cached_tokens == 70
    want = fed(whole, plain, 0, [70, *[1] * 30])
    assert same(fed(store, again, 70, [1] * 30), want[4:])
    assert same(fed(store, twin, 80, [1] * 20), want[4 + 40 :])
    store.close([first, twin, again])
    store.evict()
    assert store.report()["held_bytes"] == 0


def test_windows_that_cannot_be_are_refused() -> None:
    for windows in ({2: 8}, {0: 0}):
        with pytest.raises(ValueError, match="see at least 1 token"):
            CompressedStore(SPEC, "knorm:budget=1.0", windows=windows)
