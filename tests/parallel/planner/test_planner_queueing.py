"""The event simulation: against cases that can be computed by hand, and a known queue."""

from __future__ import annotations

import numpy as np
import pytest

from plait.parallel import PlanError
from plait.parallel.planner.queueing import Load, served, simulate


def test_a_lone_request_waits_for_nobody() -> None:
    said = simulate(Load(1e-6, 100, 11, requests=5), 8, lambda n, p: 0.02 * (n > 0) + p * 1e-3)
    assert said.first_token == pytest.approx(0.1)
    assert said.per_token == pytest.approx(0.02)


def test_chunks_spread_a_prompt_over_steps() -> None:
    """100 tokens in chunks of 30: four pieces, nobody decodes beside them; then ten steps."""
    said = simulate(
        Load(1e-6, 100, 11, requests=3), 8, lambda n, p: 0.02 * (n > 0) + p * 1e-3, piece=30
    )
    assert said.first_token == pytest.approx(0.1)
    assert said.per_token == pytest.approx(0.02)


def test_two_at_once_by_hand() -> None:
    """Two arrive together; whole prompts stop decoding: the second prompt delays the first one's tokens."""
    said = simulate(Load(1e9, 10, 3, requests=2), 2, lambda n, p: 1.0 * (n > 0) + 5.0 * (p > 0))
    assert said.first_token == pytest.approx([5.0, 10.0], abs=1e-6)
    assert said.per_token == pytest.approx([(12 - 5) / 2, (12 - 10) / 2], abs=1e-6)
    assert said.busy == pytest.approx(1.0, abs=1e-6)


def test_with_one_slot_it_is_an_m_d_1_queue() -> None:
    """One slot, fixed service: mean wait rho s / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    service, load = 1.0, 0.5
    said = simulate(Load(load, 10, 1, requests=30_000, seed=3), 1, lambda n, p: service * (p > 0))
    wait = float(np.mean(said.first_token)) - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)
    assert said.busy == pytest.approx(load, rel=0.03)


def test_more_load_means_longer_waits_and_overload_grows_without_bound() -> None:
    waits = []
    for rate in (0.5, 2.0, 8.0, 32.0):
        said = simulate(
            Load(rate, 1024, 64, requests=300, seed=1),
            16,
            lambda n, p: (n > 0) * (0.01 + n * 1e-4) + p * 1e-4,
        )
        waits.append(said.percentile(0.5)[0])
    assert waits == sorted(waits)
    assert waits[-1] > 10 * waits[0]


def test_chunking_protects_tokens_and_delays_firsts() -> None:
    load = Load(3.0, 4096, 128, requests=200, seed=2)
    whole, cut = (
        simulate(load, 32, lambda n, p: 0.01 * (n > 0) + p * 5e-5, piece=piece)
        for piece in (None, 512)
    )
    assert cut.first_token.mean() >= whole.first_token.mean()
    assert cut.per_token.max() < whole.per_token.max()


def test_servers_serve_first_come_first_served() -> None:
    """Two servers of three seconds, by hand; and one server waits as an M/D/1 queue does."""
    begins = served(np.array([0.0, 1.0, 2.0, 2.5, 20.0]), 2, 3.0)
    assert begins.tolist() == [0.0, 1.0, 3.0, 4.0, 20.0]
    arrivals = Load(0.5, 10, 1, requests=30_000, seed=3).arrivals()
    assert float(np.mean(served(arrivals, 1, 1.0) - arrivals)) == pytest.approx(0.5, rel=0.06)


def test_arrivals_may_be_given() -> None:
    load = Load(1.0, 10, 3, requests=2)
    said = simulate(
        load, 2, lambda n, p: 1.0 * (n > 0) + 5.0 * (p > 0), None, np.array([0.0, 100.0])
    )
    assert said.first_token == pytest.approx([5.0, 5.0])


def test_every_request_leaves_and_the_same_seed_says_the_same() -> None:
    load = Load(5.0, 100, 7, requests=150, seed=9)
    runs = [simulate(load, 4, lambda n, p: 0.01 * n + 0.01 * (p > 0)) for _ in range(2)]
    assert np.array_equal(runs[0].first_token, runs[1].first_token)
    assert np.all(runs[0].first_token > 0)
    assert np.all(runs[0].per_token > 0)


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="needs a rate"):
        Load(0.0, 1, 1)
