"""Elastic-Cache: refreshing at every step is the model itself; drift refreshes the layers above it and no others."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from plait.kvstore.compress import Elastic, StepCache

EXAMPLE = Path(__file__).parents[3] / "examples" / "diffusion.py"


def made():
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLE))["Denoiser"]().double()


@torch.no_grad()
def steps(model, policy: Elastic, count: int = 12):
    """The inputs and outputs of some steps of one course, in which tokens are unmasked as said, and the cache."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.randint(0, 50, (8,), generator=gen), torch.full((56,), 50)])
    cache, seen, outs, versions = StepCache(policy, len(model.blocks)), [], [], []
    for at in range(count):
        seen.append(model.embed(ids) + model.place.weight)
        outs.append(cache.step(list(model.blocks), seen[-1], ids == 50).clone())
        versions.append(list(cache.versions))
        ids[8 + 2 * at : 10 + 2 * at] = torch.randint(0, 50, (2,), generator=gen)
    return seen, outs, cache, versions


@torch.no_grad()
def test_a_refresh_at_every_step_is_the_model_without_a_cache() -> None:
    model = made()
    seen, outs, cache, _ = steps(model, Elastic(gamma=2.0))
    for x, out in zip(seen, outs, strict=True):
        for block in model.blocks:
            q, k, v = block.project(x, torch.arange(64))
            weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
            x = block.finish(x, weights @ v)
        torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)
    assert cache.versions == [0] + [11] * 5, "keys of the first layer follow their tokens"
    _, stale, _, _ = steps(model, Elastic(gamma=0.0))
    assert not torch.allclose(stale[-1], outs[-1], atol=1e-3), "what is old must show"


def test_drift_refreshes_what_is_deeper_and_less_of_it_at_a_lower_gamma() -> None:
    model, computed = made(), []
    for gamma in (0.0, 0.9, 0.97, 0.99, 2.0):
        _, _, cache, versions = steps(model, Elastic(gamma=gamma))
        for own in versions:
            assert own == sorted(own), "a layer is at least as fresh as those below it"
        computed.append(sum(cache.computed))
    assert computed == sorted(computed)
    assert computed[0] < computed[2] < computed[-1]
    _, _, never, _ = steps(model, Elastic(gamma=-1.0))
    assert never.versions == [0] * 6


def test_a_drift_in_one_layer_leaves_the_layers_below() -> None:
    asked = []

    class Third(Elastic):
        def drifted(self, now, before):
            asked.append(len(asked))
            return len(asked) == 3

    _, _, cache, versions = steps(made(), Third(), count=2)
    assert versions[1] == [0, 0, 0, 1, 1, 1]
    rows = 16 + 2  # the window, and the tokens that were unmasked
    assert cache.computed == [64 + rows, 64 + rows, 64 + rows + 64, 128, 128, 128]


def test_the_window_and_what_changed_are_computed() -> None:
    masked = torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.bool)
    changed = torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.bool)
    assert Elastic(window=3).rows(masked, changed).tolist() == [0, 1, 2, 4]
    assert str(Elastic(gamma=0.8)) == "elastic:gamma=0.8"
    for wrong in ({"window": 0}, {"gamma": float("nan")}):
        with pytest.raises(ValueError, match="window must be at least 1"):
            Elastic(**wrong)


def test_the_example_says_what_it_saves(capsys) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gamma 2.000: 64 of 64")
    assert len(lines) == 5
