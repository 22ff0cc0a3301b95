"""Where to compute, when a loss is a sum over segments: exact, by dynamic programming.

A block that is computed at some steps cuts the K steps into segments: computed at the first step of
a segment, reused at the others. If what a segment loses depends on its two ends alone, the best m
steps follow by dynamic programming, and the best split of a budget over blocks by a price per cost
(a Lagrange multiplier). BAC (arXiv 2506.13456) does the former with the similarity of features,
`tsad.planners.Effects` both with the effect on actions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Segments:
    """The least loss of every block with every number of computed steps.

    Args:
        loss: (B, K, K + 1): ``loss[b, i, j]`` is lost where block b is computed at step i and
            reused at the steps i + 1 to j - 1; read where j > i. Any sign.

        before: (B, K + 1): what is lost where a block is computed at step j for the first time, the
            steps before it being filled in some other way; j = K is never. Infinite where it can't
            be. Default: every block is computed at step 0.

    ``values`` (K + 1, B): the least loss with m computed steps; infinite where that can't be.
    """

    def __init__(self, loss: ArrayLike, before: ArrayLike | None = None) -> None:
        table = np.array(loss, np.float64)
        if table.ndim != 3 or table.shape[2] != table.shape[1] + 1:
            raise ValueError(
                f"loss: expected shape (blocks, steps, steps + 1), got {table.shape}; see Segments"
            )
        B, K, _ = table.shape
        ends = np.arange(K + 1)
        table[:, ends[None, :] <= np.arange(K)[:, None]] = np.inf  # a segment ends after it begins
        if np.isnan(table).any():
            raise ValueError("loss: expected numbers, got NaN; leave out what was not measured")
        best = np.full((B, K + 1), np.inf)  # of the steps before j, in m segments
        best[:, 0] = 0.0
        if before is not None:
            best = np.array(before, np.float64)
            if best.shape != (B, K + 1) or np.isnan(best).any():
                raise ValueError(
                    f"before: expected numbers of shape ({B}, {K + 1}), got {best.shape}"
                )
        self.values = np.full((K + 1, B), np.inf)
        self.values[0] = best[:, K]
        self._begins = np.zeros((K + 1, B, K + 1), np.int64)  # of the last segment
        for m in range(1, K + 1):
            candidates = best[:, :K, None] + table  # (B, i, j)
            self._begins[m] = candidates.argmin(axis=1)
            best = np.take_along_axis(candidates, self._begins[m][:, None], axis=1)[:, 0]
            self.values[m] = best[:, K]

    def steps(self, block: int, count: int) -> list[int]:
        """The best ``count`` steps (0 to K) at which to compute a block, ascending."""
        K = self.values.shape[0] - 1
        if not 0 <= count <= K or np.isinf(self.values[count, block]):
            least = int(np.isinf(self.values[:, block]).argmin())
            raise ValueError(f"count: expected {least} to {K} computed steps, got {count}")
        end, steps = K, []
        for m in range(count, 0, -1):
            end = int(self._begins[m, block, end])
            steps.append(end)
        return steps[::-1]

    def mask(self, counts: ArrayLike) -> Mask:
        """The computed cells (K, B) with ``counts`` (B,) computed steps."""
        K, B = self.values.shape[0] - 1, self.values.shape[1]
        computed = np.zeros((K, B), bool)
        for block, count in enumerate(np.broadcast_to(np.asarray(counts), B).tolist()):
            computed[self.steps(block, count), block] = True
        return computed

    def allot(self, costs: ArrayLike, budget: float) -> Ints:
        """How often to compute each block, (B,): the least loss within a budget.

        ``costs`` (B,) of one cell. Least but for one price: all blocks pay the same for a cost of
        1, found by bisection; what is left of the budget then goes to `spend`.
        """
        costs = np.asarray(costs, np.float64)
        least = float(np.isinf(self.values).argmin(axis=0) @ costs)
        if least > budget:
            raise ValueError(
                f"budget: expected at least {least:g}, the cells that must be computed, got "
                f"{budget:g}"
            )
        m = np.arange(self.values.shape[0])[:, None] * costs  # cost of m cells

        def counts_at(price: float) -> Ints:
            return np.asarray((self.values + price * m).argmin(axis=0), np.int64)

        low, high = 0.0, 1.0
        if counts_at(low) @ costs <= budget:
            return spend(self, costs, budget, counts_at(low))
        while counts_at(high) @ costs > budget:
            low, high = high, high * 4
        for _ in range(200):
            price = (low + high) / 2
            low, high = (low, price) if counts_at(price) @ costs <= budget else (price, high)
            if high - low <= 1e-13 * high:
                break
        return spend(self, costs, budget, counts_at(high))


def spend(
    segments: Segments,
    costs: ArrayLike,
    budget: float,
    counts: Ints,
    expand: Callable[[Ints], Mask] | None = None,
) -> Ints:
    """Raise ``counts``, the largest gain per cost first, until no further cell fits the budget.

    ``expand(counts)`` is the mask that they lead to (default: `Segments.mask`).
    """
    costs = np.asarray(costs, np.float64)
    most = segments.values.shape[0] - 1
    blocks = np.arange(len(costs))
    # a free cell is always worth it; the least positive cost keeps the order among them
    price = np.maximum(costs, costs[costs > 0].min() * 1e-6)

    def cost(trial: Ints) -> float:
        return float(trial @ costs if expand is None else expand(trial).sum(axis=0) @ costs)

    while True:
        room = counts < most
        now = segments.values[counts, blocks]
        gain = np.where(room, now - segments.values[np.minimum(counts + 1, most), blocks], -np.inf)
        for block in np.argsort(-gain / price, kind="stable")[: int(room.sum())].tolist():
            trial = counts.copy()
            trial[block] += 1
            if cost(trial) <= budget:
                counts = trial
                break
        else:
            return counts
