"""One order of cells for the whole dial: which to compute next, by measured effects.

The best plans of two budgets are not parts of each other, but a pruner's scores are one order, cut
where the budget ends. So the order is made around the best plan of one sparsity: outwards, the cell
that gains most per cost is added first; inwards, the one that loses least leaves first. Plans that
were searched may take its place, and lead the way to other budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.plan import COMPUTE, Plan
from tsad.planners.base import PolicyFacts, own_values
from tsad.planners.effects import EffectPlanner, Effects

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_APART = 1e-3  # of neighbours in the order
_LEAST = 1e-30  # a gain that is none


@dataclass(frozen=True)
class NestedOrder:
    """The order, and where each cell stood when its turn came; all (K, B).

    ``scores`` are natural logarithms of what computing a cell gains per multiply-add (the squared
    error of executed actions), made strictly monotonic along the order; step 0 comes first.
    ``begin`` and ``end``: the cell divides the segment from ``begin`` to before ``end``, computed
    at ``begin`` alone. Until it is computed it repeats its own value.
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

    def within(self, policy: PolicyFacts, budget: float) -> Plan:
        """The plan of the first cells that cost at most ``budget`` together."""
        cells, spent = self._spent(policy.block_costs)
        computed = np.zeros(self.scores.size, bool)
        computed[cells[: int(np.searchsorted(spent, budget * (1 + 1e-12), side="right"))]] = True
        shaped = computed.reshape(self.scores.shape)
        return own_values(policy, shaped, planner="nested order", budget=float(budget))

    def _spent(self, costs: ArrayLike) -> tuple[Ints, Floats]:
        """The cells from the first on, flat, and what they cost up to each."""
        cells = np.argsort(-self.scores, axis=None, kind="stable")
        each = np.broadcast_to(np.asarray(costs, np.float64), self.scores.shape).ravel()
        return cells, np.cumsum(each[cells])

    def calibrated(self, costs: ArrayLike, spent: ArrayLike, errors: ArrayLike) -> NestedOrder:
        """The same order, whose scores say what the error really falls by.

        ``errors`` (L,) are those of the first cells that cost ``spent`` (L,), ascending. A score is
        the logarithm of the fall per cost where the cell's turn comes, interpolated between these.
        """
        upto, error = np.asarray(spent, np.float64), np.asarray(errors, np.float64)
        fall = -np.diff(error) / np.diff(upto)
        slopes = np.log(np.minimum.accumulate(np.maximum(fall, _LEAST)))
        cells, total = self._spent(costs)
        place, at = np.log(total), np.log(np.sqrt(upto[:-1] * upto[1:]))
        scores = np.interp(place, at, slopes)
        if len(at) > 1:
            for end, beyond in ((0, place < at[0]), (-1, place > at[-1])):
                one, other = (0, 1) if end == 0 else (-2, -1)
                tilt = (slopes[other] - slopes[one]) / (at[other] - at[one])
                scores[beyond] = slopes[end] + tilt * (place[beyond] - at[end])
        first = self.scores.shape[1]  # step 0, which is always computed
        scores[:first] = scores[first]
        apart = _APART * np.arange(len(scores))
        placed = np.empty(self.scores.size)
        placed[cells] = np.minimum.accumulate(scores + apart) - apart
        return replace(self, scores=placed.reshape(self.scores.shape))


def nested_order(
    effects: Effects, policy: PolicyFacts, sparsity: float, plans: Sequence[Plan] = ()
) -> NestedOrder:
    """The order around the best static plan of a sparsity (`EffectPlanner`); errors as there.

    Of ``plans`` of this policy, if there are any, the one of the nearest sparsity is in the middle
    instead. What a denser one computes comes before everything that it does not, and what a sparser
    one computes leaves after it; where they contradict each other, the nearer one counts. Their
    other sources are left out: of the plan searched for the bundled policy at 95 % they gain
    little (32 chunks: 0.031 to 0.0335), and keeping them at 90 % is far worse (0.073 to 0.014).
    """
    costs = np.maximum(np.asarray(policy.block_costs, np.float64), 1.0)
    shape = (policy.num_inference_steps, len(policy.blocks))
    for plan in plans:
        if plan.sources.shape != shape:
            raise ValueError(
                f"plans: expected {shape[0]} steps x {shape[1]} blocks, as this policy has, got "
                f"{plan.sources.shape[0]} x {plan.sources.shape[1]}; make them for this policy"
            )
    plans = list(plans) or [EffectPlanner(effects)(policy, sparsity)]
    spent = [float(((plan.sources == COMPUTE) * costs).sum()) for plan in plans]
    masks = [plans[i].sources == COMPUTE for i in np.argsort(spent)[::-1]]
    for mask in masks:
        mask[0] = True
    wanted = (1 - sparsity) * shape[0] * costs.sum()
    near = int(np.argmin(np.abs(np.sort(spent)[::-1] - wanted)))
    middle, denser, sparser = masks[near], masks[:near][::-1], masks[near + 1 :]
    # the turn of a cell: with the first denser plan that computes it, before the last sparser one
    comes = np.full(shape, len(denser))
    for turn in reversed(range(len(denser))):
        comes[denser[turn]] = turn
    leaves = np.zeros(shape, np.int64)
    for turn, mask in enumerate(sparser):
        leaves[mask] = turn + 1
    loss = effects.losses()
    added = _walk(loss, costs, middle, comes, outwards=True)
    left = _walk(loss, costs, middle, leaves, outwards=False)
    first = added.prices[:1] + left.prices[:1]
    border = float(np.mean(first)) if first else 0.0
    scores = np.full(shape, np.inf)
    begin, end = np.zeros(shape, np.int64), np.ones(shape, np.int64)
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


def _walk(loss: Floats, costs: Floats, middle: Mask, turns: Ints, *, outwards: bool) -> _Walk:
    """Add cell by cell to the plan until all are computed, or remove until step 0 alone is left.

    Cells of a lower number in ``turns`` (K, B) are done with before others.
    """
    computed, walk = middle.copy(), _Walk([], [])
    K, B = computed.shape
    k = np.arange(K)
    begin, end = np.zeros((K, B), np.int64), np.zeros((K, B), np.int64)
    density = np.empty((K, B))
    never = -np.inf if outwards else np.inf

    def look(b: int) -> None:
        on = computed[:, b]
        upto = np.maximum.accumulate(np.where(on, k, 0))
        begin[:, b] = np.concatenate([[0], upto[:-1]])  # the computed step before
        after = np.minimum.accumulate(np.where(on, k, K)[::-1])[::-1]
        end[:, b] = np.concatenate([after[1:], [K]])
        i, j = begin[:, b], end[:, b]
        density[:, b] = (loss[b, i, j] - loss[b, i, k] - loss[b, k, j]) / costs[b]
        density[on == outwards, b] = never
        density[0, b] = never

    for b in range(B):
        look(b)
    open_ = computed != outwards
    open_[0] = False
    for _ in range(int(open_.sum())):
        now = np.where(turns == turns[open_].min(), density, never)
        turn = int(now.argmax() if outwards else now.argmin())
        step, b = divmod(turn, B)
        walk.cells.append((step, b, int(begin[step, b]), int(end[step, b])))
        walk.prices.append(float(np.log(max(density[step, b], _LEAST))))
        computed[step, b] = outwards
        open_[step, b] = False
        look(b)
    return walk
