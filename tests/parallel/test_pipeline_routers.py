"""Losses of routers under stages: each microbatch's, of all layers, as one process that takes the same microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exactness import Case, Pair, assert_exact, case, far, worst
from models import StayFloat64
from plait import BiasBalance, RouterZLoss
from plait.parallel.pipeline.decoder import PipelinedDecoder
from training import (
    assert_as_one_process,
    backward,
    batch_of,
    gradient_errors,
    labels_of,
    own_loss,
    trained,
)
from world import run_calls, run_world

AUX: dict[str, Any] = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
ROWS = 5


def count_of(model: Any) -> int:
    """Microbatches of the parallel model."""
    pp = model._plait.plan.pp
    return pp.microbatches or pp.size


def balanced(each: Case) -> dict[str, float]:
    """Two steps with the model's balancing loss; one process takes the microbatches one after another."""
    counts: list[int] = []

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        if hasattr(model, "_plait"):
            counts[:] = [count_of(model)]
            with StayFloat64():
                out = model(batch[0], attention_mask=batch[1], labels=labels_of(batch))
            assert out.aux_loss > 0
            return out.loss
        ids, mask = batch
        labels, count = labels_of(batch), int((labels_of(batch)[:, 1:] != -100).sum())
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(len(ids)).tensor_split(MICROBATCHES[each.plan]):
            with StayFloat64():
                out = model(
                    ids[rows], attention_mask=mask[rows], labels=labels[rows], use_cache=False,
                    num_items_in_batch=count,
                )  # fmt: skip
            token_loss = out.loss - 0.5 * out.aux_loss
            total = total + token_loss + 0.5 * out.aux_loss * len(rows) / len(ids)
        return total

    errors = trained(each, 2, loss=loss, batch=ROWS)
    assert counts == [MICROBATCHES[each.plan]]
    return errors


CASES = {
    2: [
        case("pp2", "mixtral", **AUX),  # three rows, then two
        case("pp2:interleaved,microbatches=4", "qwen2_moe", layers=4, mlp_only_layers=[3], **AUX),
        case("pp2:zero-bubble,microbatches=4", "qwen3_moe", **AUX),
    ],
    4: [
        case("pp2:gpipe,microbatches=3 ep2 tp2", "mixtral", **AUX),
        case("pp2 dp2 ep2", "qwen3_moe", **AUX),
        case("pp2 cp2", "mixtral", **AUX),
    ],
}
MICROBATCHES = {c.plan: 2 for cases in CASES.values() for c in cases} | {
    "pp2:interleaved,microbatches=4": 4,
    "pp2:zero-bubble,microbatches=4": 4,
    "pp2:gpipe,microbatches=3 ep2 tp2": 3,
}


@pytest.mark.parametrize("ranks", CASES)
def test_balancing_losses_are_those_of_the_same_microbatches(ranks: int) -> None:
    assert_as_one_process(balanced, CASES[ranks], ranks)


def unweighted(each: Case) -> dict[str, float]:
    """A mutation: every microbatch's balancing loss counts whole."""
    PipelinedDecoder.run_chunk = _wrong_share  # type: ignore[method-assign]
    return balanced(each)


def _wrong_share(self: Any, chunk: int, received: list[Tensor], piece: Any) -> list[Tensor]:
    out = self.run_layers(chunk, received, piece.values)
    return self.leaving(out) if chunk < self.split.chunks - 1 else [out.loss, out.aux_loss.detach()]


def own_routers(each: Case) -> dict[str, float]:
    """A mutation: the last stage balances its own routers only."""
    PipelinedDecoder.put_before = lambda *_: None  # type: ignore[method-assign]
    PipelinedDecoder.links = _no_logits  # type: ignore[method-assign]
    PipelinedDecoder.leaving = lambda self, out: [out.last_hidden_state]  # type: ignore[method-assign]
    return balanced(each)


LINKS = PipelinedDecoder.links


def _no_logits(self: Any, piece: Any) -> Any:
    return [metas[:1] for metas in LINKS(self, piece)]


@pytest.mark.parametrize("mutation", [unweighted, own_routers])
def test_wrong_balance_is_seen(mutation: Callable[[Case], dict[str, float]]) -> None:
    assert worst(run_world(mutation, 2, CASES[2][0]))["gradients"] > 1e-4


# --- the z-loss and the selection bias --------------------------------------------------------


def penalised(plan: str, family: str) -> dict[str, float]:
    """The z-loss of all stages, of the whole batch whatever the microbatches; its value where nothing trains too."""
    pair = Pair.of(case(plan, family, layers=3))
    z = {id(m): RouterZLoss(m, 0.3) for m in (pair.reference, pair.model)}

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        main = own_loss(model, batch)
        with StayFloat64():
            return main + z[id(model)]()

    errors = {"losses": backward(pair, 0, loss, ROWS)}
    errors["gradients"] = max(gradient_errors(pair).values())
    with torch.no_grad():
        values = [loss(m, batch_of(0)) for m in (pair.reference, pair.model)]
    errors["value"] = far(values[1], values[0])
    pair.model.zero_grad()
    main = own_loss(pair.model, batch_of(0))
    with pytest.raises(RuntimeError, match="scaled alike"):
        (main + 0.5 * z[id(pair.model)]()).backward()
    z[id(pair.model)].close()
    own_loss(pair.model, batch_of(0)).backward()  # without it again
    return errors


def half_penalised(plan: str, family: str) -> dict[str, float]:
    """A mutation: every microbatch's z-loss counts whole."""
    RouterZLoss.own = _whole_share(RouterZLoss.own)  # type: ignore[method-assign]
    return penalised(plan, family)


def _whole_share(own: Any) -> Any:
    return lambda self: own(self) * (2 if self.stages is not None else 1)


def biased(plan: str) -> dict[str, float]:
    """Biases move by the loads of all microbatches, and rows that fill up are not counted."""
    pair = Pair.of(case(plan, "deepseek", layers=3))
    both = (pair.reference, pair.model)
    balances = [BiasBalance(model.train(), rate=0.05) for model in both]
    errors = {}
    for step in range(2):
        backward(pair, step, own_loss)
        for balance in balances:
            balance.step()
    right = dict(pair.reference.named_buffers())
    moved = {n: b for n, b in pair.model.named_buffers() if n.endswith("correction_bias")}
    for name, bias in moved.items():
        errors[name] = far(bias, right[name])
    return errors | {"held": 0.0}


def test_z_losses_and_biases() -> None:
    calls: list[Any] = [
        (penalised, "pp2 ep1 etp1", "mixtral"),
        (penalised, "pp2:zero-bubble,microbatches=4", "deepseek"),
        (biased, "pp2:gpipe,microbatches=3"),  # of two rows
    ]
    for answers in zip(*run_calls(calls, 2), strict=True):
        assert_exact(worst(answers))


def test_a_z_loss_of_the_wrong_scale_is_seen() -> None:
    assert worst(run_world(half_penalised, 2, "pp2", "mixtral"))["gradients"] > 1e-4
