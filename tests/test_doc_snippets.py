"""The Python of the README and of docs/*.md runs as printed, on small models, with what it takes for granted."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import plait
from exactness import far
from models import tiny, tokens
from plait.parallel.cli import app
from world import run_world

ROOT = Path(__file__).parent.parent


def snippets(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return [
        textwrap.dedent(found)
        for found in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    ]


class Names(dict[str, Any]):
    """What a snippet sees: what it makes, and what is given, made when it is asked for."""

    def __init__(self, given: dict[str, Callable[[Names], Any]] | None = None) -> None:
        super().__init__()
        self.given = given or {}

    def __missing__(self, name: str) -> Any:
        if name not in self.given:
            raise KeyError(name)
        self[name] = self.given[name](self)
        return self[name]


@dataclass(frozen=True)
class Snippet:
    """What one snippet takes for granted, and numbers of its text that are too large for a test."""

    given: dict[str, Callable[[Names], Any]] = field(default_factory=dict)
    smaller: tuple[tuple[str, str], ...] = ()
    ranks: int = 1
    check: Callable[[Names], Any] = lambda n: True


def run(page: str, number: int, names: Names) -> None:
    """Run a page's snippet after those before it: their names are there, but what is given is made anew."""
    snippet, code = PAGES[page][number], snippets(page)[number]
    for old, new in snippet.smaller:
        assert old in code, f"{page}, snippet {number} has no {old} any more"
        code = code.replace(old, new)
    names.given = {**ALWAYS, **snippet.given}
    for name in names.given:
        names.pop(name, None)
    exec(compile(code, f"{page}, snippet {number}", "exec"), {}, names)
    assert snippet.check(names)


ALWAYS: dict[str, Callable[[Names], Any]] = {
    "torch": lambda n: torch,
    "plait": lambda n: plait,
    "model": lambda n: tiny("llama", dtype=torch.float32),
    "ids": lambda n: tokens(1, 40),
    "attention_mask": lambda n: torch.ones(1, 40, dtype=torch.long),
    "token_ids": lambda n: list(range(40)),
}


def rows(heads: int) -> Callable[[Names], Tensor]:
    return lambda n: torch.ones(len(n["new"]), heads, 128, dtype=torch.bfloat16)


def small_spec(n: Names) -> Any:
    from plait.kvstore import KVSpec

    return KVSpec(layers=2, kv_heads=4, head_dim=32, page_tokens=32, dtype=torch.float32)


def half_spec(n: Names) -> Any:
    """Of a rank of tp2 of the small Llama."""
    from plait.kvstore import KVSpec

    return KVSpec(layers=2, kv_heads=2, head_dim=8, page_tokens=16, dtype=torch.float32)


def drawn(heads: int) -> Callable[[Names], Tensor]:
    return lambda n: torch.randn(29, heads, 32)


def one_more(n: Names) -> Any:
    step = n["store"].reserve([n["seq"]], [1])
    for layer in range(32):
        n["store"].append(step, layer, n["k"][:1], n["v"][:1])
    return step


def compressed(n: Names) -> Any:
    from plait.kvstore.compress import CompressedStore

    return CompressedStore(small_spec(n), "snapkv:window=4,budget=0.5")


def talk(n: Names) -> Any:
    """A sequence of the snippet's store that was prefilled."""
    from plait.kvstore.engines.compressed import CompressedCache

    cache = CompressedCache(n["store"], n["ids"])
    with torch.no_grad():
        n["model"](n["ids"], past_key_values=cache)
    cache.commit()
    return cache.seqs.pop(0)


def moe() -> Any:
    return tiny("mixtral", dtype=torch.float32, num_local_experts=8, output_router_logits=True)


def placed(n: Names) -> Any:
    """A fresh model, and the file that the snippet's command writes."""
    said = [
        "experts",
        "routing.safetensors",
        "--ranks",
        "4",
        "--spare",
        "1",
        "--out",
        "placement.json",
    ]
    if dist.get_rank() == 0:
        assert CliRunner().invoke(app, said).exit_code == 0
    dist.barrier()
    return moe()


def labelled(n: Names) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 24), "labels": tokens(2, 24)}


class SelfAttention(nn.Module):
    """As docs/plans.md names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = 16, 4
        self.wq, self.wo = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
        self.wk, self.wv = nn.Linear(1024, 256), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, self.n_heads, -1).transpose(1, 2)
        k, v = (w(x).view(b, s, self.n_kv_heads, -1).transpose(1, 2) for w in (self.wk, self.wv))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(o.transpose(1, 2).reshape(b, s, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1024, 64), nn.Linear(64, 1024)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Own(nn.Module):
    """The module that docs/plans.md has rules for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(61, 1024)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(1024), nn.Linear(1024, 61)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def rules(n: Names) -> Any:
    names = Names({"plait": lambda n: plait, "model": lambda n: Own()})
    exec(snippets("docs/plans.md")[1].split("model = ")[0], {}, names)
    return names["rules"]


def generated(n: Names) -> bool:
    """What one process generates."""
    one = tiny("llama", dtype=torch.float32)
    return torch.equal(n["ids"], one.generate(tokens(1, 40), max_new_tokens=64))


def goes_on(n: Names) -> bool:
    return n["model"].generate(n["ids"], max_new_tokens=2).shape == (1, 42)


def saved(n: Names) -> str:
    """A checkpoint, written by rank 0."""
    world = plait.init()
    if world.rank == 0:
        with torch.device("cpu"):  # asked for where the snippet makes its model, on meta
            tiny("llama", dtype=torch.float32).save_pretrained("checkpoint")
    dist.barrier()
    return "checkpoint"


PAGES: dict[str, list[Snippet]] = {
    "README.md": [
        Snippet({"path": saved}, ranks=4, check=generated),
    ],
    "docs/plans.md": [
        Snippet(),
        Snippet({"model": lambda n: Own()}, ranks=4, check=lambda n: far(n["model"](n["ids"]), Own()(n["ids"])) < 1e-5),
        Snippet(
            {"rules": rules, "model": lambda n: Own(), "labels": lambda n: tokens(1, 40)},
            (("pp2 tp2 dp2", "pp2 tp2"),),
            ranks=4,
        ),
        Snippet(
            {"model": lambda n: moe(), "fresh": placed, "batch": labelled},
            (("dp8 ep8", "dp4 ep4"), ("8GiB", "8MiB")),
            ranks=4,
        ),
        Snippet({"input_ids": lambda n: tokens(2, 24), "labels": lambda n: tokens(2, 24)}, ranks=4),
        Snippet({"rules": rules}),
        Snippet(
            {"batches_of": lambda n: lambda dp: [labelled(n)] * 2, "dp_coordinate": lambda n: 0},
            (("pp2 dp2 tp2", "pp2 dp2"),),
            ranks=4,
        ),
    ],
    "docs/helix.md": [
        Snippet(ranks=2, check=lambda n: Path("step.png").exists()),
        Snippet(ranks=4, check=generated),
    ],
    "docs/kvstore.md": [
        Snippet(
            {"digest": lambda n: "0" * 64, "k": rows(8), "v": rows(8), "q": rows(32), "next_step": one_more,
             "token": lambda n: 7},
            (("4GiB", "64MiB"),),
        ),
        Snippet(smaller=(("4GiB", "64MiB"), ("16GiB", "16MiB"), ("200GiB", "64MiB"))),
        Snippet(smaller=(("4GiB", "64MiB"), ("50GiB", "64MiB"))),
    ],
    "docs/compression.md": [
        Snippet(),
        Snippet(
            {"store": compressed, "seqs": lambda n: n["store"].open_batch(2), "counts": lambda n: [20, 9],
             "layers": lambda n: 2, "k": drawn(4), "v": drawn(4), "q": drawn(8)}
        ),
        Snippet(),
        Snippet({"spec": half_spec}, ranks=4, check=goes_on),
        Snippet({"seq": talk}, check=lambda n: n["seq"] is not None, smaller=(("2GiB", "16MiB"), ("50GiB", "64MiB"))),
        Snippet({"spec": small_spec, "k": lambda n: torch.randn(64, 4, 32)}, (("16GiB", "16MiB"),)),
        Snippet(),
    ],
}  # fmt: skip


def test_every_page_with_python_is_here() -> None:
    elsewhere = "docs/collectives.md"
    found = {
        path.relative_to(ROOT).as_posix(): len(snippets(path.relative_to(ROOT).as_posix()))
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    }
    assert {page: count for page, count in found.items() if count and page != elsewhere} == {
        page: len(rows) for page, rows in PAGES.items()
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_of_one_process(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = Names()
    for number, snippet in enumerate(PAGES[page]):
        if snippet.ranks == 1:
            run(page, number, names)


def on_ranks(page: str, number: int, folder: str) -> None:
    os.chdir(folder)
    run(page, number, Names())


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, i) for page in PAGES for i, snippet in enumerate(PAGES[page]) if snippet.ranks > 1],
)
def test_a_snippet_of_many_ranks(page: str, number: int, tmp_path: Path) -> None:
    run_world(on_ranks, PAGES[page][number].ranks, page, number, str(tmp_path))
