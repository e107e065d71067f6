"""Kept tokens in fewer bits, and selectors over kept tokens: what is read is what was written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.kvstore import CompressedStore, KVSpec
from plait.kvstore.codecs import find_codec
from plait.kvstore.compress import CompressionError
from plait.kvstore.compress.coded import CodedLayer, CodedRun
from plait.kvstore.compress.coder import PageCoder
from plait.kvstore.compress.tiers import Tiers

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=8, page_tokens=8)


def drawn(tokens: int, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, tokens, 2, 8, generator=gen).to(dtype) for _ in range(2))
    return k, v, torch.randn(2, tokens, 4, 8, generator=gen).to(dtype)


def fed(store, k, v, q, sizes):
    seq, start, outs = store.open(), 0, []
    for size in sizes:
        rows = slice(start, start + size)
        step = store.reserve([seq], [size])
        for layer in range(2):
            store.append(step, layer, k[layer, rows], v[layer, rows])
            outs.append(store.attend(seq, layer, q[layer, rows], step=step)[0])
        store.commit(step)
        start += size
    return seq, outs


def exact(codec: str, tail: int = 0) -> Tiers:
    return Tiers.parse(codec, tail)


@pytest.mark.parametrize(
    "scorer", ["knorm:budget=1.0", "knorm:budget=0.5", "knorm:budget=0.4,rule=ada"]
)
@pytest.mark.parametrize("codec", ["zstd", "none@0.3|zstd", "zstd@0.4|zstd"])
def test_a_lossless_codec_changes_nothing(scorer, codec) -> None:
    """So pages, places, bounds and merges of tiers are right; windows too."""
    k, v, q = drawn(90)
    sizes = [50, 1, 1, 9, *[1] * 20]
    plain, coded = CompressedStore(SPEC, scorer.replace("budget", "every=0,budget")), None
    coded = CompressedStore(SPEC, scorer, codec=exact(codec, tail=5))
    if "1.0" not in scorer:  # later prompts are kept whole where tokens are coded
        sizes = [50, *[1] * 30]
    (a, want), (b, got) = (fed(store, k, v, q, sizes) for store in (plain, coded))
    assert coded.report()["coded_bytes"] > 0
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert (a.kept == b.kept).all()
    lo, hi = torch.tensor([31]), torch.tensor([70])
    for layer in range(2):
        x, y = (
            s.attend(seq, layer, q[layer, :1], lo=lo, hi=hi) for s, seq in ((plain, a), (coded, b))
        )
        torch.testing.assert_close(x[0], y[0], rtol=1e-5, atol=1e-5)
    coded.check_integrity()


@pytest.mark.parametrize(
    ("codec", "bits", "close"),
    [
        ("int8", 15, 0.02),
        ("fp8", 15, 0.1),
        ("int4:group=8", 12, 0.3),
        ("kivi:bits=4,group=8", 13, 0.4),
    ],
)
def test_fewer_bytes_and_nearly_the_same(codec, bits, close) -> None:
    k, v, q = drawn(400)
    sizes = [380, *[1] * 20]
    plain = CompressedStore(SPEC, "knorm:budget=1.0")
    store = CompressedStore(SPEC, "knorm:budget=1.0", codec=exact(codec, tail=8))
    (_, want), (_, got) = (fed(s, k, v, q, sizes) for s in (plain, store))
    error = max(float((x - y).abs().max()) for x, y in zip(got, want, strict=True))
    assert 1e-6 < error < close
    said = store.report()
    assert said["held_bytes"] < plain.report()["held_bytes"] * bits / 32
    assert said["kept_tokens"] == 400


def decoded_keys(coder: PageCoder, run: CodedRun) -> torch.Tensor:
    at = np.arange(len(run.heads))
    return coder.decode_keys(CodedLayer([run]), np.stack([0 * at, at], 1))


@pytest.mark.parametrize("codec", ["int8", "none@0.2|int8@0.3|int4:group=8", "zstd@0.5|fp8"])
def test_tiles_of_any_size_give_what_one_gives(codec, monkeypatch) -> None:
    k, v, q = drawn(120)
    store = CompressedStore(SPEC, "knorm:budget=0.9", codec=exact(codec, tail=5))
    seq, _ = fed(store, k, v, q, [90, *[1] * 30])
    assert len(seq.coded[1].runs) > 2
    coder = store.keeper.coder
    assert coder is not None
    tiles, page = coder._tiles, SPEC.page_tokens * 8 * 8  # bytes of its keys and values
    bounds = [{}, {"lo": torch.tensor([31]), "hi": torch.tensor([70])}]

    def attended(tile_bytes: int) -> list[torch.Tensor]:
        monkeypatch.setattr("plait.kvstore.compress.coder.TILE_BYTES", tile_bytes)
        held = [store.attend(seq, 1, q[1, :1], **given) for given in bounds]
        return [part for both in held for part in both]

    want, count = attended(1 << 40), len(list(tiles(seq.coded[1])))
    for tile_bytes in (1, 3 * page, 7 * page):
        for x, y in zip(attended(tile_bytes), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert len(list(tiles(seq.coded[1]))) > count
    monkeypatch.setattr(PageCoder, "_tiles", lambda self, layer: list(tiles(layer))[1:])
    assert not torch.allclose(attended(3 * page)[0], want[0], atol=1e-4), "a tile was not missed"


@pytest.mark.parametrize("codec", ["int4:group=8", "kivi:bits=2,group=8"])
def test_streaming_codes_what_one_call_codes(codec) -> None:
    k, v, q = drawn(80)
    runs = []
    for sizes in ([80], [9, *[1] * 71], [40, 40], [33, 1, 1, 20, 25]):
        store = CompressedStore(SPEC, "knorm:budget=1.0", codec=exact(codec, tail=11))
        seq, _ = fed(store, k, v, q, sizes)
        coder = store.keeper.coder
        assert coder is not None
        pages: dict[tuple[int, int], torch.Tensor] = {}
        for run in seq.coded[1].runs:
            keys = decoded_keys(coder, run)
            for head, places, page in zip(run.heads, run.places, keys, strict=True):
                pages[int(head), int(places[0])] = page
        runs.append(pages)
    assert len(runs[0]) == 2 * ((80 - 11) // 8)
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        assert all(torch.equal(other[at], runs[0][at]) for at in other)


def test_layers_have_bits_of_their_own() -> None:
    """As if each layer were in a store of its own codec."""
    k, v, q = drawn(60)
    outs = [
        fed(CompressedStore(SPEC, "knorm:budget=1.0", codec=exact(codec, tail=8)), k, v, q, [50, *[1] * 9])[1]
        for codec in ("adaquant:bits=8-2,group=8/int4:group=8", "int8/int4:group=8", "int2:group=8/int4:group=8")
    ]  # fmt: skip
    for own, first, second in zip(*(out[2:] for out in outs), strict=True):
        assert torch.equal(own, first) or torch.equal(own, second)
    assert torch.equal(outs[0][-2], outs[1][-2])
    assert torch.equal(outs[0][-1], outs[2][-1])
    assert not torch.equal(outs[1][-1], outs[2][-1])
    with pytest.raises(CompressionError, match="are those of 3 layers, and there are 2"):
        CompressedStore(SPEC, "knorm", codec="adaquant:bits=8-2-2,group=8")


def test_tiers_hold_the_best_exactly() -> None:
    scores = torch.arange(100.0).flip(0)
    tiers = Tiers.parse("none@0.1|int8@0.5|int2", tail=4)
    best, good, rest = tiers.assign(100, scores, 8)
    assert (len(good), len(rest)) == (48, 40)
    assert {96, 97, 98, 99} <= set(best.tolist())
    assert best.tolist()[:8] == list(range(8))
    assert good.tolist() == list(range(8, 56))
    assert rest.tolist() == list(range(56, 96))
    assert [len(own) for own in tiers.assign(5, scores[:5], 8)] == [5, 0, 0]
    assert [len(own) for own in Tiers.parse("int4", tail=3).assign(20, None, 8)] == [4, 16]
    assert str(tiers) == "none@0.1|int8@0.5|int2"


def test_a_page_of_a_run_is_the_codecs_own() -> None:
    """The run's bytes are the codec's, page by page: nothing lies between."""
    coder, codec = PageCoder(Tiers.parse("int4:group=8"), SPEC), find_codec("int4:group=8")
    k = torch.randn(24, 8)
    run = coder.encode(
        0, [k[:16], k[16:]], [k[:16], k[16:]], [torch.arange(16).numpy(), torch.arange(8).numpy()]
    )
    assert run is not None
    want = codec.decode(codec.encode(k.view(3, 8, 1, 8)), codec_layout(k.view(3, 8, 1, 8)))
    assert torch.equal(decoded_keys(coder, run), want)
    assert run.heads.tolist() == [0, 0, 1]


def codec_layout(page):
    from plait.kvstore.codecs import PageLayout

    return PageLayout.of(page)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scorer": "tova:budget=8", "codec": "int8"}, "use every=0"),
        ({"scorer": "knorm", "codec": "zstd", "selector": "quest"}, "saves nothing"),
        ({"scorer": "knorm", "codec": "kivi:group=32"}, "cannot hold pages of 8 tokens"),
        ({"scorer": "knorm", "codec": "int4|int2"}, "use rule=waterfill, or give each tier"),
        ({"scorer": "knorm", "codec": "none@0.7|int4@0.7|int2"}, "may sum to 1"),
        ({"scorer": "kvzip", "codec": "int8"}, "use one of the two"),
        ({"scorer": "knorm", "codec": "gzip"}, "there is no codec"),
        ({"scorer": "knorm", "codec": "none@0.5|int4", "layers": {0: None}}, "has no ranks"),
    ],
)  # fmt: skip
def test_what_does_not_compose_says_why(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        CompressedStore(SPEC, **options)
    assert issubclass(CompressionError, ValueError)


# ---- selectors


def test_a_selector_reads_some_of_what_is_kept() -> None:
    k, v, q = drawn(80)
    whole = CompressedStore(SPEC, "knorm:budget=24")
    recent = CompressedStore(SPEC, "knorm:budget=24", selector="recent:tokens=6")
    (a, _), (b, _) = (fed(store, k, v, q, [60, *[1] * 10]) for store in (whole, recent))
    for layer in range(2):
        kept = [whole.pool.read(a.lanes[layer], head)[2] for head in range(2)]
        x, y = (s.attend(seq, layer, q[layer, :1])[0][0] for s, seq in ((whole, a), (recent, b)))
        assert not torch.allclose(x, y)
        for head in range(2):  # the last six that are kept, by a bound on the text
            lo = torch.tensor([int(kept[head][-6])])
            want = whole.attend(a, layer, q[layer, :1], lo=lo)[0][0]
            torch.testing.assert_close(y[2 * head : 2 * head + 2], want[2 * head : 2 * head + 2])


@pytest.mark.parametrize("scorer", ["tova:budget=24,every=4", "snapkv:window=4,budget=24,every=3"])
def test_choosing_again_makes_summaries_anew(scorer) -> None:
    """What a talk remembers of keys that are gone now is dropped: a fork, which remembers nothing, reads the same."""
    k, v, q = drawn(80)
    store = CompressedStore(SPEC, scorer, selector="quest:budget=9,page=3,dense=0")
    seq, _ = fed(store, k, v, q, [60, *[1] * 13])
    twin = store.fork(seq)
    for layer in range(2):
        own, fresh = (store.attend(s, layer, q[layer, 70:71])[0] for s in (seq, twin))
        torch.testing.assert_close(own, fresh)


LOSSLESS = "bf16"  # for numbers that are bfloat16's
SELECTORS = (
    "quest:budget=0.3,page=5,dense=1", "rocket:budget=12,chunk=3,channels=4", "exact:budget=11",
    "top-p:share=0.5,page=5",
)  # fmt: skip


def rounded(tokens: int):
    return tuple(x.bfloat16().float() for x in drawn(tokens))


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_sees_coded_pages_as_it_sees_exact_ones(selector) -> None:
    """A codec that changes no bit: the same tokens are chosen, whatever their pages are, while they are coded."""
    k, v, q = rounded(110)
    sizes = [50, *[1] * 28]
    stores = [
        CompressedStore(SPEC, "knorm:budget=0.8,every=0", selector=s, codec=c)
        for s, c in ((selector, None), (selector, exact(LOSSLESS, tail=5)), (None, None))
    ]
    (_, want), (seq, got), (_, whole) = (fed(store, k, v, q, sizes) for store in stores)
    assert len(seq.coded[1].runs) > 3, "coded again and again"
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[-1], whole[-1], atol=1e-3), "not everything was read"
    lo, hi = torch.tensor([20]), torch.tensor([70])  # a window reads what it may
    x, y = (
        stores[i].attend(s, 1, q[1, :1], lo=lo, hi=hi)[0]
        for i, s in ((1, seq), (1, stores[1].fork(seq)))
    )
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "codec",
    ["none@0.3|int8@0.3|int4:group=8", "nvfp4", "kivi:bits=4,group=8", "hadamard+turbo:bits=4"],
)
def test_summaries_are_of_what_is_decoded_now(codec) -> None:
    """What a long talk remembers is what is made anew from its pages: a fork remembers nothing."""
    k, v, q = drawn(110)
    selector = SELECTORS[len(codec) % 2]
    store = CompressedStore(
        SPEC, "snapkv:window=4,budget=0.8", codec=exact(codec, tail=5), selector=selector
    )
    seq, _ = fed(store, k, v, q, [50, *[1] * 25])
    twin = store.fork(seq)
    for layer in range(2):
        for asked in (q[layer, 60:61], q[layer, 70:71]):
            own, fresh = (store.attend(s, layer, asked)[0] for s in (seq, twin))
            torch.testing.assert_close(own, fresh)
    store.check_integrity()


@pytest.mark.parametrize("codec", ["int8", "none@0.3|int8@0.3|int4:group=8"])
def test_a_selection_of_everything_is_attention_to_everything(codec) -> None:
    k, v, q = drawn(90)
    stores = (
        CompressedStore(SPEC, "snapkv:window=4,budget=0.8", codec=exact(codec, tail=5), selector=s)
        for s in (None, "quest:budget=1.0", "top-p:pages=0.9999999,share=0.9999999")
    )
    runs = [fed(store, k, v, q, [50, *[1] * 30])[1] for store in stores]
    assert all(torch.equal(x, y) for x, y in zip(*runs[:2], strict=True))
    for x, y in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_few_pages_are_decoded(monkeypatch) -> None:
    """Keys once, for their summaries; of a step what is chosen, and what was coded since."""
    k, v, q = drawn(420)
    store = CompressedStore(
        SPEC,
        "knorm:budget=1.0",
        codec=exact("int4:group=8", tail=8),
        selector="quest:budget=24,page=8,dense=0",
    )
    decoded: list[tuple[int, bool]] = []
    some = PageCoder._some

    def counted(self, layer, pages, values):
        decoded.append((len(pages), values))
        return some(self, layer, pages, values)

    monkeypatch.setattr(PageCoder, "_some", counted)
    seq, _ = fed(store, k, v, q, [401, *[1] * 19])
    pages = sum(len(own) for own in seq.coded[0].pages(2))
    values = sum(n for n, of_values in decoded if of_values)
    assert pages > 95
    assert 0 < values <= 19 * 2 * 2 * 3, "three pages a head and step"
    keys = sum(n for n, of_values in decoded if not of_values) - values
    assert keys == 2 * pages, "each page's keys once more, to be summarised"
