"""What users bring by mistake, and threads that evict, code and read at once."""

from __future__ import annotations

import threading

import pytest
import torch
from conversation import fed, id_table

from plait.kvstore import CompressedStore, KVSpec

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=7, page_tokens=8)  # an odd width


@pytest.mark.parametrize("budget", [1, 0.0001, 1.0, 10**9])
@pytest.mark.parametrize("codec", [None, "int8", "int4:group=8"])
def test_odd_widths_and_extreme_budgets(budget, codec) -> None:
    store = CompressedStore(SPEC, f"snapkv:window=4,budget={budget}", codec=codec)
    seq = store.open()
    outs = fed(store, seq, torch.arange(60), [50, 1, 1])
    assert all(bool(out.isfinite().all()) for out in outs)
    want = 50 if str(budget) in ("1.0", "1000000000") else 1
    assert (seq.kept == want + 2).all()
    store.check_integrity()


@pytest.mark.parametrize(
    "scorer", ["snapkv:window=4", "keydiff", "knorm", "h2o", "lagkv:lag=8", "streaming"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_no_numbers_are_refused_and_nothing_stays(scorer, bad) -> None:
    store = CompressedStore(SPEC, f"{scorer}{',' if ':' in scorer else ':'}budget=8")
    seq = store.open()
    k, v, q = (x[:, :40].clone() for x in id_table(SPEC))
    k[0, 9] = bad
    step = store.reserve([seq], [40])
    store.append(step, 0, k[0, :, :2], v[0, :, :2])
    with pytest.raises(ValueError, match="NaN"):
        store.attend(seq, 0, q[0], step=step)
    store.close(seq)
    assert store.report()["held_bytes"] == 0
    store.check_integrity()


def test_threads_see_whole_pages_only() -> None:
    """Prompts that share texts, coded and evicted by another thread meanwhile, give what they give alone."""
    options = {"scorer": "keydiff:budget=0.4", "codec": "int8", "host_bytes": "4MiB"}
    texts = [
        torch.randint(0, 64, (70,), generator=torch.Generator().manual_seed(i % 2))
        for i in range(4)
    ]
    want = []
    for ids in texts:
        alone = CompressedStore(SPEC, **options)
        seq = alone.open(ids[:60])
        want.append(fed(alone, seq, ids, [60, *[1] * 10]))
    store, wrong, over = CompressedStore(SPEC, **options), [], threading.Event()

    def read(at: int) -> None:
        try:
            for _ in range(6):
                seq = store.open(texts[at][:60])
                left = 60 - seq.tokens
                outs = fed(store, seq, texts[at], [*([left] if left else []), *[1] * 10])
                last = zip(outs[-20:], want[at][-20:], strict=True)
                assert all(torch.allclose(x, y, atol=1e-5) for x, y in last)
                store.close(seq)
        except Exception as error:
            wrong.append(error)

    def evict() -> None:
        while not over.is_set():
            store.evict()
            store.check_integrity()

    readers = [threading.Thread(target=read, args=(at,)) for at in range(4)]
    evictor = threading.Thread(target=evict)
    for thread in (*readers, evictor):
        thread.start()
    for thread in readers:
        thread.join()
    over.set()
    evictor.join()
    assert not wrong, wrong
    store.evict()
    assert store.report()["held_bytes"] == 0
