"""One order of cells for the whole dial: which to compute next, by measured effects.

The best plans of two budgets are not parts of each other, but a pruner's scores are one order, cut
where the budget ends. So the order is made around the best plan of one sparsity: outwards, the cell
that gains most per cost is added first; inwards, the one that loses least leaves first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tsad.plan import Plan
from tsad.planners.base import PolicyFacts, own_values
from tsad.planners.effects import EffectPlanner, Effects

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_APART = 1e-3  # of neighbours in the order
_LEAST = 1e-30  # a gain that is none


@dataclass(frozen=True)
class NestedOrder:
    """The order, and where each cell stood when its turn came; all (K, B).

    ``scores`` are natural logarithms of what computing a cell gains per multiply-add (the squared
    error of executed actions), made strictly monotonic along the order; step 0 comes first.
    ``begin`` and ``end``: the cell divides the segment from ``begin`` to before ``end``, computed
    at ``begin`` alone.
    """

    scores: Floats
    begin: Ints
    end: Ints

    def gains(self, segment: NDArray[np.floating]) -> Floats:
        """What computing each cell gains, (..., K, B), by `Effects.segment` (..., B, K, K + 1)."""
        K, B = self.scores.shape
        k, b = np.arange(K)[:, None], np.arange(B)
        whole = segment[..., b, self.begin, self.end]
        gains: Floats = (
            whole - segment[..., b, self.begin, k] - segment[..., b, k, self.end]
        ).astype(np.float64)
        gains[..., 0, :] = 0.0
        return gains

    def plan(self, policy: PolicyFacts, score: float) -> Plan:
        """The plan of the cells whose score is at least ``score``."""
        computed = self.scores >= score
        computed[0] = True
        return own_values(policy, computed, planner="nested order", score=float(score))


def nested_order(effects: Effects, policy: PolicyFacts, sparsity: float) -> NestedOrder:
    """The order around the best static plan of a sparsity (`EffectPlanner`); errors as there."""
    middle = EffectPlanner(effects)(policy, sparsity).sources == 0
    loss = effects.losses()
    costs = np.maximum(np.asarray(policy.block_costs, np.float64), 1.0)
    added = _walk(loss, costs, middle, outwards=True)
    left = _walk(loss, costs, middle, outwards=False)
    first = added.prices[:1] + left.prices[:1]
    border = float(np.mean(first)) if first else 0.0
    scores = np.full(middle.shape, np.inf)
    begin, end = np.zeros(middle.shape, np.int64), np.ones(middle.shape, np.int64)
    for walk, sign in ((added, -1.0), (left, 1.0)):
        now = border
        for (k, b, i, j), price in zip(walk.cells, walk.prices, strict=True):
            now = min(now - _APART, price) if sign < 0 else max(now + _APART, price)
            scores[k, b], begin[k, b], end[k, b] = now, i, j
    scores[0] = scores[1:].max(initial=border) + _APART
    return NestedOrder(scores, begin, end)


@dataclass
class _Walk:
    """Cells (k, b, begin, end) in the order of their turns, and the logarithms of their prices."""

    cells: list[tuple[int, int, int, int]]
    prices: list[float]


def _walk(loss: Floats, costs: Floats, middle: NDArray[np.bool_], *, outwards: bool) -> _Walk:
    """Add cell by cell to the plan until all are computed, or remove until step 0 alone is left."""
    computed, walk = middle.copy(), _Walk([], [])
    K, B = computed.shape
    k = np.arange(K)
    begin, end = np.zeros((K, B), np.int64), np.zeros((K, B), np.int64)
    density = np.empty((K, B))

    def look(b: int) -> None:
        on = computed[:, b]
        upto = np.maximum.accumulate(np.where(on, k, 0))
        begin[:, b] = np.concatenate([[0], upto[:-1]])  # the computed step before
        after = np.minimum.accumulate(np.where(on, k, K)[::-1])[::-1]
        end[:, b] = np.concatenate([after[1:], [K]])
        i, j = begin[:, b], end[:, b]
        density[:, b] = (loss[b, i, j] - loss[b, i, k] - loss[b, k, j]) / costs[b]
        density[on == outwards, b] = -np.inf if outwards else np.inf
        density[0, b] = -np.inf if outwards else np.inf

    for b in range(B):
        look(b)
    for _ in range(int((~computed[1:]).sum() if outwards else computed[1:].sum())):
        turn = int(density.argmax() if outwards else density.argmin())
        step, b = divmod(turn, B)
        walk.cells.append((step, b, int(begin[step, b]), int(end[step, b])))
        walk.prices.append(float(np.log(max(density[step, b], _LEAST))))
        computed[step, b] = outwards
        look(b)
    return walk
