"""Plans from one number per cell that training left behind, whatever the observation.

Learning-to-Cache (arXiv 2406.01733) trains a router's logits, DiP-GO (arXiv 2410.16942) a score per
step and block and throws its pruner away. Both leave a table; here it becomes a plan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.plan import Plan
from tsad.planners.base import PolicyFacts, budget, check_sparsity, of_policy, own_values


@of_policy
def l2c(
    policy: PolicyFacts, logits: ArrayLike, threshold: float = 0.1, *, interval: int = 2
) -> Plan:
    """Learning-to-Cache: every ``interval``-th step in full; between, where the router says so.

    ``logits`` (C, B), a row for each of the C steps between, in their order: computed where
    sigmoid(logit) > ``threshold``. (The published router is run with a period of 2, and keeps
    values before the gate; networks without gates have no such difference.)
    """
    steps = policy.num_inference_steps
    between = np.flatnonzero(np.arange(steps) % interval)
    table = np.asarray(logits, np.float64)
    if table.shape != (len(between), len(policy.blocks)):
        raise ValueError(
            f"logits: expected shape ({len(between)}, {len(policy.blocks)}), cached steps x "
            f"blocks, got {table.shape}; train the router with this sampler and interval"
        )
    computed = np.ones((steps, len(policy.blocks)), bool)
    with np.errstate(over="ignore"):
        computed[between] = 1 / (1 + np.exp(-table)) > threshold
    return own_values(policy, computed, planner="l2c", threshold=float(threshold))


class Scores:
    """Static scores as a planner (DiP-GO): the cells with the highest scores are computed.

    Args:
        scores: (K, B), importance of each cell; step 0 is always computed, its row is not read.
        name: for the plan's metadata.

    ``Scores(table)(policy, sparsity)`` goes down the list and takes every cell that still fits the
    budget; equal scores in the order of execution.
    """

    def __init__(self, scores: ArrayLike, *, name: str = "dipgo") -> None:
        self._scores = np.array(scores, np.float64)
        if self._scores.ndim != 2 or np.isnan(self._scores).any():
            raise ValueError(
                f"scores: expected numbers of shape (steps, blocks), got {self._scores.shape}"
            )
        self.name = name

    def __repr__(self) -> str:
        return f"Scores({self.name!r})"

    def __call__(self, policy: PolicyFacts, sparsity: float) -> Plan:
        shape = (policy.num_inference_steps, len(policy.blocks))
        if self._scores.shape != shape:
            raise ValueError(
                f"policy: expected {self._scores.shape[0]} steps and {self._scores.shape[1]} "
                f"blocks, as the scores have, got {shape[0]} and {shape[1]}; use scores of this "
                "policy and sampler"
            )
        check_sparsity(policy, sparsity)
        costs = np.asarray(policy.block_costs)
        computed = best_cells(self._scores, costs, budget(policy, sparsity))
        return own_values(policy, computed, planner=self.name, sparsity=float(sparsity))


def best_cells(
    scores: NDArray[np.float64], costs: NDArray[np.int64], limit: int
) -> NDArray[np.bool_]:
    """Step 0, then the highest scores as long as they fit; (K, B) bool."""
    computed = np.zeros(scores.shape, bool)
    computed[0] = True
    left = limit - int(costs.sum())
    for cell in np.argsort(-scores, axis=None, kind="stable").tolist():
        step, block = divmod(cell, len(costs))
        if step and costs[block] <= left:
            left -= int(costs[block])
            computed[step, block] = True
    return computed
