"""Stages of modules that are nobody's model: cut by a rule, exact whatever their forward does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exactness import assert_exact, far, worst
from plait import (
    Attention,
    Plan,
    PlanError,
    Stages,
    clip_grad_norm_,
    parallelize,
    unparallelize,
)
from plait.parallel.api import prepare
from plait.parallel.folding import Folding
from plait.parallel.groups import Groups
from plait.parallel.pipeline.module import PipelinedModule
from plait.parallel.pipeline.run import PipelinedModel
from training import coordinate
from world import run_calls, run_world

HIDDEN, VOCAB, EXPERTS = 12, 23, 4


class SelfAttention(nn.Module):
    """Causal attention with a mask that comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in "qkvo")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(o.transpose(1, 2).reshape(batch, length, -1))


class Stacked(nn.Module):
    """Experts in stacks of their own layout."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.first = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 10) * 0.3)
        self.second = nn.Parameter(torch.randn(EXPERTS, 10, HIDDEN) * 0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, choice = torch.where(index == e)
            inner = torch.tanh(x[token] @ self.first[e]) @ self.second[e]
            out = out.index_add(0, token, inner * weights[token, choice, None])
        return out


class Layer(nn.Module):
    """Attention and experts; gives its balancing loss beside its output."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.attention, self.experts = SelfAttention(), Stacked()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, wide), nn.Linear(wide, HIDDEN)

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(x, mask) * scale
        flat = x.reshape(-1, HIDDEN)
        shares = self.router(flat).softmax(-1)
        weights, index = shares.topk(2)
        balance = EXPERTS * (shares.mean(0) * F.one_hot(index, EXPERTS).sum(1).to(x).mean(0)).sum()
        x = x + self.experts(flat, index, weights).view_as(x)
        return x + self.down(torch.tanh(self.up(x))), balance


class Model(nn.Module):
    """A language model with a tied head, a raw parameter, a scale that all layers share, and uneven layers."""

    def __init__(self, layers: int = 5, raw: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = (
            nn.Embedding(VOCAB, HIDDEN),
            nn.Linear(HIDDEN, VOCAB, bias=False),
        )
        self.head.weight = self.embedding.weight
        self.place = nn.Parameter(torch.randn(64, HIDDEN)) if raw else torch.ones(64, HIDDEN)
        self.scale = nn.Linear(1, HIDDEN)
        self.net = nn.ModuleDict({"layers": nn.ModuleList(Layer(9 + 7 * i) for i in range(layers))})
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        x = self.embedding(ids)
        x += self.place[:length]  # written in place
        scale, balances = self.scale(x.new_ones(1)), []
        layers: Any = self.net["layers"]
        for layer in layers:
            x, balance = layer(x, mask, scale)
            balances.append(balance)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = total / (labels != -100).sum()
        balance = 0.3 * torch.stack(balances).mean()
        return {"logits": logits, "loss": loss + balance, "balance": balance}


class Outside(nn.Module):
    """A residual outside of the layers, the first activations handed to all of them, and a summed loss in a tuple."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 5)
        self.blocks = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(layers)))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = first = self.enter(batch["x"])
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * first
        out = self.leave(x)
        return out, (out - batch["y"]).square().sum()


def items(labels: Tensor, **_: Any) -> Tensor:
    return (labels != -100).sum()


ENDS: dict[str, Any] = {"first": ("embedding",), "last": ("norm", "head")}
ATTENTION = Attention(
    heads=4, kv_heads=4, head_dim=3, q="q", k="k", v="v", o="o", counts=(("heads", "heads"),)
)
RULES: dict[str, Any] = {
    "net.layers": Stages(**ENDS),
    "net.layers.*.attention": ATTENTION,
    "net.layers.*.experts": "experts",
    "net.layers.*.up": "colwise",
    "net.layers.*.down": "rowwise",
}
OUTSIDE: dict[str, Any] = {"blocks": Stages(first=("enter",), last=("leave",), loss="sum")}


def batch_of(d: int, step: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    """Ids and labels, none of them left out: a mean over rows is then one over tokens."""
    generator = torch.Generator().manual_seed(10 * step + d)
    ids = torch.randint(0, VOCAB, (rows, 7), generator=generator)
    return ids, ids.roll(-1, 1)


def in_pieces(model: Model, batch: tuple[Tensor, Tensor], count: int) -> Tensor:
    """The loss of one process that takes the same microbatches."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(batch[0])).tensor_split(count):
        if len(rows):
            total = total + model(*(x[rows] for x in batch))["loss"] * len(rows) / len(batch[0])
    return total


def trained(plan: str, steps: int = 2, rows: int = 5) -> dict[str, float]:
    """Losses, first gradients, norms and parameters after some clipped steps of SGD."""
    torch.manual_seed(0)
    reference = Model(raw="shard" not in plan).double()
    model: Any = parallelize(copy.deepcopy(reference), plan, rules=RULES)
    done, right = model._plait, dict(reference.named_parameters(remove_duplicate=False))
    dp, count = done.plan.dp.size, done.plan.pp.microbatches or done.plan.pp.size
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (reference, model)]
    errors = dict.fromkeys(("losses", "norm", "gradients", "parameters"), 0.0)

    def compare(name: str, of: Callable[[Any], Any]) -> None:
        cuts = {e.path: e for e in done.parameters()}
        for path, p in model.named_parameters():
            mine, whole = of(p), of(right[path])
            mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
            mine = torch.zeros_like(p) if mine is None else mine
            big = float(whole.abs().max()) > 1e-9  # of the bias of keys it is zero
            whole = cuts[path].take(whole, done.ranks) if path in cuts else whole
            if whole.numel() and big:
                errors[name] = max(errors[name], far(mine, whole))

    for step in range(steps):
        losses = [in_pieces(reference, batch_of(d, step, rows), count) for d in range(dp)]
        sum(loss / dp for loss in losses).backward()  # type: ignore[union-attr]
        found = model(*batch_of(coordinate(model), step, rows))
        assert found["logits"] is None
        assert found["balance"] > 0
        found["loss"].backward()
        errors["losses"] = max(errors["losses"], far(found["loss"], losses[coordinate(model)]))
        if not step:
            compare("gradients", lambda p: p.grad)
        norms = [
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1),
            clip_grad_norm_(model, 0.1),
        ]
        errors["norm"] = max(errors["norm"], far(norms[1], norms[0]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    compare("parameters", lambda p: p.detach())
    with torch.no_grad():
        ids = batch_of(0, 9)[0]
        errors["logits"] = far(model(ids), reference(ids))
        model(ids[:, :3])
    unparallelize(model)
    pairs = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    return errors | {"undone": max(far(p, q) for p, q in pairs)}


PLANS = {
    2: [
        ("pp2:gpipe,microbatches=3", 2, 5),
        ("pp2", 1, 1),  # fewer rows than microbatches
        ("pp2:interleaved,microbatches=4", 2, 5),
        ("pp2:zero-bubble,microbatches=4", 2, 4),
    ],
    4: [("pp2 tp2 ep2",), ("pp2 dp2 ep2",), ("pp2 dp2:shard",), ("pp4 ep1 etp1",)],
}


@pytest.mark.parametrize("ranks", PLANS)
def test_training_is_that_of_one_process(ranks: int) -> None:
    calls = [(trained, *each) for each in PLANS[ranks]]
    answers = run_calls(calls, ranks)
    for i, each in enumerate(PLANS[ranks]):
        print(each)
        assert_exact(worst([answer[i] for answer in answers]))


def outside(plan: str) -> dict[str, float]:
    """What later layers use of earlier modules comes along; accumulation, and a loss that is scaled."""
    torch.manual_seed(0)
    reference = Outside().double()
    model: Any = parallelize(copy.deepcopy(reference), plan, rules=OUTSIDE)
    errors = {}
    for rows in (3, 4):
        batch = {"x": torch.randn(rows, 5).double(), "y": torch.randn(rows, 5).double()}
        (found, loss), right = model(batch), reference(batch)[1]
        assert found is None
        errors[f"loss {rows}"] = far(loss, right)
        for each in (loss, right):
            (3 * each).backward()
    whole = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        errors[name] = far(p.grad, whole[name].grad)
    with torch.no_grad():
        errors["output"] = far(model(batch)[0], reference(batch)[0])
    return errors


def ignoring(plan: str) -> dict[str, float]:
    """A mean over labels that are not ignored is exact where the rule counts them."""
    torch.manual_seed(0)
    reference = Model(2).double()
    rules = {"net.layers": Stages(**ENDS, items=items)}
    model: Any = parallelize(copy.deepcopy(reference), plan, rules=rules)
    ids, labels = batch_of(0, 0)
    labels[0, 1:], labels[4, :5] = -100, -100
    errors, losses = {}, []
    for m in (model, reference):
        out = m(ids, labels)
        losses.append(out["loss"].detach() - out["balance"].detach())
    errors["loss"] = far(*losses)
    return errors


def around() -> list[dict[str, float]]:
    return [outside("pp2"), outside("pp2:interleaved"), outside("pp2:zero-bubble"), ignoring("pp2")]


def test_what_crosses_is_what_is_used() -> None:
    for answers in zip(*run_world(around, 2), strict=True):
        assert_exact(worst(answers))


# --- negative controls ------------------------------------------------------------------------


def apart() -> dict[str, float]:
    """A mutation: what several stages hold keeps its own gradients."""
    PipelinedModel._sum_tied = lambda *_: None  # type: ignore[method-assign]
    return trained("pp2", 1)


def unshared() -> dict[str, float]:
    """A mutation: the uneven microbatches' losses weigh alike."""
    weighed = PipelinedModule.weighed
    PipelinedModule.weighed = lambda self, pieces: weighed(  # type: ignore[method-assign]
        self, [replace(p, share=1 / len(pieces)) for p in pieces]
    )
    return trained("pp2", 1)


@pytest.mark.parametrize("mutation", [apart, unshared])
def test_wrong_gradients_are_seen(mutation: Callable[[], dict[str, float]]) -> None:
    assert worst(run_world(mutation, 2))["gradients"] > 1e-3


# --- checkpoints ------------------------------------------------------------------------------


def resumed(folder: str) -> dict[str, float]:
    """Two steps, a checkpoint under stages, and the third under another plan: as three of one process."""
    torch.manual_seed(0)
    reference = Model(3).double()
    torch.manual_seed(0)
    models: list[Any] = []
    for plan in ("pp2", "tp2 ep2"):
        model = parallelize(Model(3).double(), plan, rules=RULES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if models:
            state = {"model": model.state_dict()}
            dcp.load(state, checkpoint_id=folder)
            model.load_state_dict(state["model"])
        for step in range(2) if not models else (2,):
            model(*batch_of(0, step, 4))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        if not models:
            dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
        models.append(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        loss = in_pieces(reference, batch_of(0, step, 4), 1 if step == 2 else 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = dict(unparallelize(models[1]).named_parameters())
    return {n: far(right[n], p) for n, p in reference.named_parameters()}


def test_a_checkpoint_goes_on_under_another_plan(tmp_path: Path) -> None:
    assert_exact(worst(run_world(resumed, 2, str(tmp_path))))


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "rules", "words"),
    [
        ("pp2", None, "needs to know its list of layers"),
        ("pp2", {"net.layers.*.up": "colwise"}, "'net.layers'"),
        ("pp2", {"net.layer": Stages()}, "net.layers"),
        ("pp2", {"norm": Stages()}, "is no list of layers but LayerNorm"),
        ("pp2", {"net.layers": Stages(first=("embed",))}, "'embedding'"),
        ("pp2", {"net.layers": Stages(last=("net.layers.4",))}, "would run on two stages"),
        ("pp8", {"net.layers": Stages(**ENDS)}, "use pp <= 5"),
        ("pp2", {"net.layers": Stages(**ENDS), "net.layers.*.upp": "colwise"}, "matches no module"),
    ],
)
def test_what_cannot_be_cut_is_refused(plan: str, rules: Any, words: str) -> None:
    parsed = Plan.parse(plan)
    with pytest.raises(PlanError) as refused:
        prepare(Model(), parsed, Groups.fake(Folding.of(parsed), 0), rules=rules)
    assert words in str(refused.value)


class Twice(Outside):
    """Calls its layers twice."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.blocks(self.enter(batch["x"])))
        return x, x.sum()


def refused() -> list[str]:
    """Every stage hears what only one could see, before it waits for anything."""
    said = []
    model: Any = parallelize(Twice(), "pp2", rules=OUTSIDE)
    with pytest.raises(PlanError) as error:
        model({"x": torch.randn(4, 5)})
    said.append(str(error.value))
    dropping = Outside()
    dropping.blocks.append(nn.Dropout(0.1))
    model = parallelize(dropping, "pp2", rules=OUTSIDE)
    with pytest.raises(PlanError) as error:
        model({"x": torch.randn(4, 5), "y": torch.randn(4, 5)})
    return [*said, str(error.value)]


def test_refusals_are_everywhere() -> None:
    for twice, dropping in run_world(refused, 2):
        assert "called twice" in twice
        assert "dropout p=0.1" in dropping
