"""Attention on the CPU to codes where they lie, against float64 attention to what the codecs decode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels import coded_pages
from plait.cuda_kernels.code_rows import CodeTable
from plait.cuda_kernels.coded_pages import attend_codes, score_codes
from plait.cuda_kernels.paged_attention import paged_attention_reference
from plait.kvstore.codecs import PageLayout, find_codec
from plait.kvstore.codecs.places import code_table

CODECS = [
    "fp8", "int8", "int4:group=32", "int4:group=16", "int2:group=32", "kivi:bits=2,group=8",
    "kivi:bits=4,group=16", "mxfp8", "mxfp4", "nvfp4",
]  # fmt: skip
RUNS = (3, 1, 2)  # pages coded together


class Coded:
    """Pages in some runs, where they lie, and decoded to float32: what the kernel reads, bit for bit."""

    def __init__(self, codec: str, size: int, heads: int, width: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(RUNS), size, heads, width, generator=g)
        x[0, 1] *= 1e-3
        x[2, 3, -1, :5] *= 50
        self.layout, coder = PageLayout((size, heads, width), torch.float32), find_codec(codec)
        self.runs = [coder.encode(own) for own in x.split(RUNS)]
        pages = [
            coder.decode(data, PageLayout((n, *self.layout.shape), torch.float32))
            for n, data in zip(RUNS, self.runs, strict=True)
        ]
        self.decoded = torch.cat(pages)
        table = code_table(coder, self.layout, self.runs, heads)
        assert table is not None
        self.table = table


def drawn_rows(g: torch.Generator, size: int, list_tokens: int) -> list[torch.Tensor]:
    """Three sequences of 2, 0 and 1 rows; pages in any order, or single tokens of them."""
    tokens = sum(RUNS) * size
    order = torch.randperm(tokens // list_tokens, generator=g).int()
    first = len(order) // 2 + 1
    kv_indptr = torch.tensor([0, first, first, len(order)], dtype=torch.int32)
    most = [first * list_tokens] * 2 + [(len(order) - first) * list_tokens]
    hi = torch.tensor([int(torch.randint(1, n + 1, (1,), generator=g)) for n in most])
    lo = torch.tensor([int(torch.randint(0, int(n), (1,), generator=g)) for n in hi])
    return [torch.tensor([0, 2, 2, 3]), kv_indptr, order, lo, hi]


def check(
    keys: Coded, values: Coded, group: int, list_tokens: int = 0, cap: float = 0.0,
    table: CodeTable | None = None, seed: int = 1, dtype: torch.dtype = torch.float64,
) -> None:  # fmt: skip
    size, heads, width = keys.layout.shape
    g = torch.Generator().manual_seed(seed)
    rows = drawn_rows(g, size, list_tokens or size)
    q = torch.randn(3, heads * group, width, generator=g, dtype=torch.float64)
    asked = q.to(dtype)
    o, lse = attend_codes(
        asked, table or keys.table, values.table, *rows, 0.3, cap, list_tokens=list_tokens
    )
    lists = (
        x.decoded.double().view(-1, list_tokens or size, heads, x.decoded.shape[-1])
        for x in (keys, values)
    )
    want, want_lse = paged_attention_reference(asked.double(), *lists, *rows, 0.3, cap)
    close = 1e-12 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.double(), want_lse, rtol=close, atol=close)
    scale = values.decoded.abs().max().item()
    torch.testing.assert_close(o.double() / scale, want / scale, rtol=close, atol=close)


@settings(max_examples=40, deadline=None)
@given(
    k=st.sampled_from(CODECS), v=st.sampled_from(CODECS), size=st.sampled_from([16, 32]),
    heads=st.integers(1, 3), group=st.sampled_from([1, 3, 4, 6]),
    width=st.sampled_from([(32, 64), (64, 32), (96, 96)]), single=st.booleans(),
    cap=st.sampled_from([0.0, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_codes_are_attended_as_what_they_decode_to(
    k: str, v: str, size: int, heads: int, group: int, width: tuple[int, int], single: bool,
    cap: float, seed: int,
) -> None:  # fmt: skip
    keys, values = (
        Coded(codec, size, heads, w, seed + n)
        for n, (codec, w) in enumerate(zip((k, v), width, strict=True))
    )
    check(keys, values, group, int(single), cap, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_of_queries(dtype: torch.dtype) -> None:
    check(Coded("kivi:bits=4,group=16", 16, 2, 32), Coded("int8", 16, 2, 32, 1), 4, dtype=dtype)


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16_pages_are_what_the_codec_rounds(codec: str) -> None:
    """Scales of such pages are bfloat16; the kernel's numbers round to the codec's."""
    x = torch.randn(2, 16, 1, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    coder, layout = find_codec(codec), PageLayout((16, 1, 32), torch.bfloat16)
    data = coder.encode(x)
    table = code_table(coder, layout, [data])
    assert table is not None
    whole = score_codes(torch.eye(32)[None], table, torch.tensor([0, 1]), 32)[0].T
    want = coder.decode(data, PageLayout(tuple(x.shape), torch.bfloat16)).view(32, 32)
    torch.testing.assert_close(whole.bfloat16(), want, rtol=0, atol=0)


@pytest.mark.parametrize("codec", ["int8", "kivi:bits=2,group=8"])
def test_scores_are_dot_products(codec: str) -> None:
    keys, pages = Coded(codec, 16, 2, 32), torch.tensor([4, 0, 5])
    q = torch.randn(2, 5, 32, dtype=torch.float64)
    got = score_codes(q, keys.table, pages, 43)
    rows = keys.decoded[pages].flatten(0, 1)[:43].double()
    torch.testing.assert_close(got, torch.einsum("hid,uhd->hiu", q, rows), rtol=1e-12, atol=1e-12)


MUTATIONS: dict[str, tuple[str, Callable[[CodeTable], CodeTable]]] = {
    "block": ("int4:group=16", lambda t: t._replace(form=t.form._replace(shift=t.form.shift + 1))),
    "half": ("int4:group=32", lambda t: t._replace(form=t.form._replace(brain=True))),
    "group": ("kivi:bits=4,group=8", lambda t: t._replace(form=t.form._replace(block=16))),
    "low ends": ("int2:group=32", lambda t: t._replace(pages=t.pages[:, [0, 2, 1, 3]])),
    "order": ("int8", lambda t: t._replace(pages=t.pages[[1, 0, 2, 3, 4, 5]])),
    "head": ("nvfp4", lambda t: t._replace(pages=np.roll(t.pages, 3, 0) * [0, 0, 0, 1] + t.pages * [1, 1, 1, 0])),
    "kind": ("mxfp8", lambda t: t._replace(form=t.form._replace(codes=0))),
}  # fmt: skip


@pytest.mark.parametrize("what", list(MUTATIONS))
def test_a_mutated_table_fails(what: str) -> None:
    codec, mutate = MUTATIONS[what]
    keys, values = Coded(codec, 16, 2, 32), Coded("fp8", 16, 2, 32, 1)
    check(keys, values, 4)
    with pytest.raises(AssertionError):
        check(keys, values, 4, table=mutate(keys.table))


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same spans, whoever reads them; and spans change nothing but the last digits."""
    keys, values = Coded("int4:group=32", 32, 2, 32), Coded("int8", 32, 2, 32, 1)
    rows = drawn_rows(torch.Generator().manual_seed(4), 32, 32)
    q = torch.randn(3, 8, 32)
    alone = attend_codes(q, keys.table, values.table, *rows, 0.3)
    monkeypatch.setattr(coded_pages, "SPAN_BYTES", 1 << 10)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(attend_codes(q, keys.table, values.table, *rows, 0.3))
    for o, lse in results:
        assert torch.equal(o, results[0][0])
        assert torch.equal(lse, results[0][1])
        torch.testing.assert_close(o, alone[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0][0], alone[0]), "there was one span"


@pytest.mark.parametrize(
    ("codec", "width", "dtype"),
    [("int4:group=8", 32, torch.float32), ("int8", 24, torch.float32), ("int8+zstd", 32, torch.float32),
     ("kivi:bits=3,group=8", 32, torch.float32), ("mxfp8:form=e5m2", 32, torch.float32)],
)  # fmt: skip
def test_what_is_not_read_in_place_is_said(codec: str, width: int, dtype: torch.dtype) -> None:
    coder, layout = find_codec(codec), PageLayout((16, 1, width), dtype)
    data = coder.encode(torch.randn(2, *layout.shape))
    assert code_table(coder, layout, [data]) is None
