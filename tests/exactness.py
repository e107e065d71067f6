"""Measure how far a parallel model is from the untouched one: the rank's side of the exactness tests.

Every function runs on all ranks of a world and gives relative errors; the tests say how large they may be.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models import tiny, tokens
from plait.collectives import primitive
from plait.parallel import parallelize, unparallelize
from world import run_world

BATCH = 6  # cases in one world: fewer starts, and far from the test timeout on a busy machine
EXACT = 1e-9  # DESIGN section 6: float64
LENGTH = 21
MASK = ((0,) * 5 + (1,) * 16, (1,) * 14 + (0,) * 7, (1,) * 21)  # left padded, right padded, whole
CHUNKS = (7, 1, 5, 1, 1, 4, 2)  # several query tokens, then one, then several again


@dataclass(frozen=True)
class Case:
    """One cell of the table: a plan, a family of models, and what differs from the tiny config."""

    plan: str
    family: str
    changes: tuple[tuple[str, Any], ...] = ()
    parts: tuple[str, ...] = ("train", "steps", "generate", "undo")

    @property
    def name(self) -> str:
        """A test id."""
        said = ",".join(f"{k}={v}" for k, v in self.changes)
        return f"{self.plan}-{self.family}" + (f"-{said}" if said else "")


def case(plan: str, family: str, parts: Sequence[str] | None = None, **changes: Any) -> Case:
    """Write a case shortly."""
    made = Case(plan, family, tuple(changes.items()))
    return made if parts is None else Case(plan, family, tuple(changes.items()), tuple(parts))


@dataclass
class Pair:
    """The untouched model and its parallel copy."""

    reference: Any
    model: Any
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, each: Case, dtype: torch.dtype = torch.float64) -> Pair:
        reference = tiny(each.family, dtype=dtype, **dict(each.changes))
        return cls(reference, parallelize(copy.deepcopy(reference), each.plan))


def far(found: Tensor, expected: Tensor) -> float:
    """Relative error; infinite where the shapes differ, and where something is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    error = (
        found.detach() - expected.detach()
    ).abs().max() / expected.detach().abs().max().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def mask_of(batch: int = 3) -> Tensor:
    """The padding mask of the ragged batch."""
    return torch.tensor(MASK[:batch])


def loss_of(logits: Tensor, mask: Tensor) -> Tensor:
    """A loss that every logit of every real token moves, in its own direction, in the logits' own dtype."""
    weights = torch.randn(
        logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype
    )
    return (
        (weights * logits + 0.05 * logits.square()) * mask[..., None].to(logits.dtype)
    ).sum() / mask.sum()


def train(pair: Pair) -> dict[str, float]:
    """Forward and backward over a ragged batch: logits, and the gradient of every parameter."""
    ids, mask = tokens(3, LENGTH, pair.reference.config.vocab_size), mask_of()
    logits = []
    for model in (pair.reference, pair.model):
        model.train()
        out = model(ids, attention_mask=mask, use_cache=False).logits
        loss_of(out, mask).backward()
        logits.append(out[mask.bool()])
        model.eval()
    worst = max(gradient_errors(pair).items(), key=lambda item: item[1])
    errors = {"logits": far(logits[1], logits[0]), f"gradient of {worst[0]}": worst[1]}
    pair.model.zero_grad()
    pair.reference.zero_grad()
    return errors


def gradient_errors(pair: Pair) -> dict[str, float]:
    """Error of each parameter's gradient; cut ones are joined from all ranks."""
    expected = dict(pair.reference.named_parameters())
    return {
        name: gradient_error(pair, p, expected[name]) for name, p in pair.model.named_parameters()
    }


def gradient_error(pair: Pair, found: Any, expected: Any) -> float:
    cut = next((c for c in pair.model._plait.parameters() if c.local is found), None)
    ranks = pair.model._plait.ranks
    if expected.grad is None:
        return 0.0 if found.grad is None or not found.grad.abs().max() else float("inf")
    grad = torch.zeros_like(found) if found.grad is None else found.grad
    if cut is not None:
        # a run that several ranks hold must have the same gradient on each of them
        whole = cut.join(grad.contiguous(), ranks)
        rejoined = far(cut.take(whole, ranks), grad) if grad.numel() else 0.0
        return max(far(whole, expected.grad), rejoined)
    return far(grad, expected.grad)


@torch.no_grad()
def steps(pair: Pair) -> dict[str, float]:
    """Prefill in chunks and decode, through the cache, against one forward of the reference."""
    ids = tokens(2, sum(CHUNKS), pair.reference.config.vocab_size, seed=3)
    expected = pair.reference(ids, use_cache=False).logits
    one_shot = pair.model(ids, use_cache=False).logits
    cache, found, at = None, [], 0
    for chunk in CHUNKS:
        out = pair.model(ids[:, at : at + chunk], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + chunk
        found.append(out.logits)
    check_cache(cache)
    return {"one shot": far(one_shot, expected), "steps": far(torch.cat(found, 1), expected)}


def check_cache(cache: Any) -> None:
    """Prove the store's invariants, and that shards differ by at most ``interleave`` tokens a request."""
    if not hasattr(cache, "store"):
        return
    cache.store.check_integrity()
    state = cache.state
    for seq, length in zip(cache.seqs, cache.lengths, strict=True):
        assert seq.length == state.rule.local_length(length)
        held = torch.tensor([seq.length])
        every = primitive.all_gather(held, state.ranks.kvp_group)
        assert int(every.sum()) == length
        assert int(every.max() - every.min()) <= state.rule.run


@torch.no_grad()
def generate(pair: Pair, **options: Any) -> dict[str, float]:
    """Generate from a ragged, left padded batch: 0 if every token is the reference's, else infinite."""
    ids, mask = padded(pair)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    found = [m.generate(ids, attention_mask=mask, **options) for m in (pair.reference, pair.model)]
    return {"tokens": same(found[1], found[0])}


def padded(pair: Pair) -> tuple[Tensor, Tensor]:
    """A left padded batch of two prompts, of 6 and 13 tokens, and its mask."""
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :7] = 0
    return tokens(2, 13, pair.reference.config.vocab_size, seed=2) * mask, mask


def same(found: Tensor, expected: Tensor) -> float:
    """0 if bitwise equal, else infinite."""
    return 0.0 if torch.equal(found, expected) else float("inf")


def undo(pair: Pair) -> dict[str, float]:
    """Unparallelize: bitwise the weights, and bitwise the outputs."""
    unparallelize(pair.model)
    expected = dict(pair.reference.state_dict())
    found = dict(pair.model.state_dict())
    weights = max(
        [same(found[n], expected[n]) for n in expected]
        + [0.0 if found.keys() == expected.keys() else 9.0]
    )
    ids = tokens(2, 9, pair.reference.config.vocab_size)
    with torch.no_grad():
        outputs = same(pair.model(ids).logits, pair.reference(ids).logits)
    return {"weights after undo": weights, "outputs after undo": outputs}


PARTS: dict[str, Callable[[Pair], dict[str, float]]] = {
    "train": train,
    "steps": steps,
    "generate": generate,
    "undo": undo,
}


def measure(
    each: Case, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, float]:
    """All errors of one case on this rank. ``around`` is a mutation that a negative control brings."""
    with around():
        pair = Pair.of(each)
        errors: dict[str, float] = {}
        for part in each.parts:
            errors |= PARTS[part](pair)
    return errors


def measure_all(cases: Sequence[Case]) -> list[dict[str, float] | str]:
    """Measure many cases in one world; an exception is an answer (its text), as long as all ranks have it."""
    answers: list[dict[str, float] | str] = []
    for each in cases:
        try:
            answers.append(measure(each))
        except Exception as error:
            error.add_note(
                f"in {each.name}, rank {dist.get_rank() if dist.is_initialized() else 0}"
            )
            answers.append("".join(traceback.format_exception(error)))
    return answers


class Table:
    """Cases, measured a batch at a time in one world, when the first of the batch is asked for."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self.cases = list(cases)
        self.answers: dict[str, list[dict[str, float] | str]] = {}

    def batch(self, each: Case) -> list[Case]:
        """The cases that are measured together with this one."""
        alike = [c for c in self.cases if world_of(c.plan) == world_of(each.plan)]
        at = alike.index(each) // BATCH * BATCH
        return alike[at : at + BATCH]

    def errors(self, each: Case) -> dict[str, float]:
        """The largest error over the ranks, by what was measured."""
        if each.name not in self.answers:
            batch = self.batch(each)
            ranks = run_world(measure_all, world_of(each.plan), batch)
            for i, c in enumerate(batch):
                self.answers[c.name] = [answers[i] for answers in ranks]
        found = self.answers[each.name]
        crashed = next((answer for answer in found if isinstance(answer, str)), None)
        assert crashed is None, f"{each.name} failed:\n{crashed}"
        return worst(found)  # type: ignore[arg-type]


def worst(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest of each error over the ranks."""
    return {name: max(errors.get(name, 0.0) for errors in ranks) for rank in ranks for name in rank}


def world_of(plan: str) -> int:
    """The ranks of a plan."""
    from plait.parallel import Plan

    return Plan.parse(plan).world_size


def assert_exact(errors: dict[str, float], limit: float = EXACT) -> None:
    """Fail with every error that is too large."""
    print("  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert errors
    large = {name: error for name, error in errors.items() if not error <= limit}
    assert not large, f"not exact (limit {limit:g}): {large}"
