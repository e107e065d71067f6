"""MoETuner's two integer programs: experts to clusters by load, clusters to ranks by where tokens go next.

Source: MoETuner (arXiv 2502.06643), solved with scipy's HiGHS. The second program is solved one layer after another:
with links of one speed the cost between two layers depends on their relative order alone, so that this is its optimum;
with links of several speeds it is a good start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from ..errors import PlanError
from .packing import balanced
from .placement import Placement
from .routing import Routing

Array = NDArray[np.float64]
GAP = 0.01


def tuned(
    routing: Routing, ranks: int, *, seconds: float = 5.0, bandwidth: Array | None = None
) -> dict[str, Placement]:
    """Place the experts of every layer.

    Args:
        seconds: for each program; the best that was found by then is taken.
        bandwidth: [ranks, ranks], relative speed of the link between two ranks; default the same for all.
    Raises:
        PlanError: the ranks do not divide the experts.
    """
    speed = np.ones((ranks, ranks)) if bandwidth is None else np.asarray(bandwidth, dtype=float)
    placed: dict[str, Placement] = {}
    before: tuple[str, Placement] | None = None
    for layer, experts in routing.experts.items():
        if experts % ranks:
            because = f"does not divide the {experts} experts of {layer}"
            raise PlanError(f"ranks={ranks}", because, "use a divisor")
        clusters = clustered(routing.loads(layer).numpy().astype(float), ranks, seconds)
        if before is not None:
            passages = routing.passages(before[0], layer).numpy().astype(float)
            rows = np.stack([passages[list(own)].sum(0) for own in before[1].ranks])
            traffic = np.stack([rows[:, list(c)].sum(1) for c in clusters], 1)
            clusters = [clusters[c] for c in assigned(traffic, speed, seconds)]
        placed[layer] = Placement(experts, tuple(tuple(sorted(c)) for c in clusters))
        before = layer, placed[layer]
    return placed


def clustered(loads: Array, ranks: int, seconds: float) -> list[tuple[int, ...]]:
    """Cut experts into clusters of one size: minimise the sum of |rows of a cluster - their mean|.

    HiGHS takes no first guess: the greedy packing's clusters are kept if nothing better is found in time.

    Variables: x[cluster, expert] in {0, 1}, then the distance of each cluster from the mean.
    """
    greedy = list(balanced(loads.tolist(), ranks).ranks)
    experts, mean = len(loads), loads.sum() / ranks
    count = ranks * experts
    rows = experts + 3 * ranks
    rules = lil_matrix((rows, count + ranks))
    low, high = np.full(rows, -np.inf), np.full(rows, np.inf)
    for e in range(experts):
        rules[e, e:count:experts] = 1
    low[:experts] = high[:experts] = 1
    for c in range(ranks):
        own = slice(c * experts, (c + 1) * experts)
        rules[experts + c, own] = 1
        low[experts + c] = high[experts + c] = experts // ranks
        for side, row in ((1, experts + ranks + c), (-1, experts + 2 * ranks + c)):
            rules[row, own] = side * loads
            rules[row, count + c] = -1
            high[row] = side * mean
    costs = np.r_[np.zeros(count), np.ones(ranks)]
    upper = np.r_[np.ones(count), np.full(ranks, loads.sum())]
    lower = np.zeros(count + ranks)
    lower[int(np.argmax(loads))] = 1  # clusters have no order: the heaviest expert is in the first
    found = _solved(costs, rules, low, high, (lower, upper), count, seconds)
    if found is None:
        return greedy
    table = found[:count].reshape(ranks, experts) > 0.5
    own = [tuple(int(e) for e in np.flatnonzero(row)) for row in table]

    def distance(clusters: Sequence[tuple[int, ...]]) -> float:
        return sum(abs(float(loads[list(c)].sum()) - mean) for c in clusters)

    return min(own, greedy, key=distance)


def assigned(traffic: Array, speed: Array, seconds: float) -> Sequence[int]:
    """Give each rank a cluster: minimise the largest traffic / speed between two ranks, then the sum of it.

    Variables: y[cluster, rank] in {0, 1}, then the largest.

    Args:
        traffic: [rank of the layer before, cluster]
    Returns:
        The cluster of each rank.
    """
    ranks = len(traffic)
    count = ranks * ranks
    rows = 2 * ranks + count
    rules = lil_matrix((rows, count + 1))
    low, high = np.full(rows, -np.inf), np.zeros(rows)
    for i in range(ranks):
        rules[i, i * ranks : (i + 1) * ranks] = 1
        rules[ranks + i, i:count:ranks] = 1
    low[: 2 * ranks] = high[: 2 * ranks] = 1
    costs = np.zeros(count + 1)
    for source in range(ranks):
        for target in range(ranks):
            if source == target:
                continue
            row = 2 * ranks + source * ranks + target
            cost = traffic[source] / speed[source, target]
            rules[row, target:count:ranks] = cost
            rules[row, count] = -1
            costs[target:count:ranks] += cost
    # only where the largest leaves a choice
    costs /= max(costs.sum(), 1.0) / max(float(traffic.max()), 1.0) * ranks
    costs[count] = 1.0
    bounds = np.zeros(count + 1), np.r_[np.ones(count), np.inf]
    found = _solved(costs, rules, low, high, bounds, count, seconds)
    if found is None:
        return range(ranks)
    return [int(c) for c in found[:count].reshape(ranks, ranks).argmax(0)]


def _solved(
    costs: Array, rules: lil_matrix, low: Array, high: Array, bounds: tuple[Array, Array], whole: int, seconds: float
) -> Array | None:  # fmt: skip
    """Solve a program whose first ``whole`` variables are whole numbers; None if nothing was found in time."""
    kinds = np.r_[np.ones(whole), np.zeros(len(costs) - whole)]
    constraints = LinearConstraint(rules.tocsr(), low, high)  # type: ignore[arg-type]
    options = {"time_limit": seconds, "mip_rel_gap": GAP}
    low_and_high: Any = bounds
    found = milp(
        costs,
        integrality=kinds,
        bounds=Bounds(*low_and_high),
        constraints=constraints,
        options=options,
    )
    return found.x
