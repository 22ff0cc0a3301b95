"""The plans that are timed: the committed 95 % plan, and the function that made it.

``python bench/plans.py`` writes bench/plans/sparse95.npz; tests/test_bench.py checks that the file
is what the function makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tsad
from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE
from tsad.config import block_costs, block_names, block_types

SPARSE95 = Path(__file__).parent / "plans" / "sparse95.npz"
# The standard transformer of the published measurements, and of the bundled policy.
STANDARD: dict[str, Any] = {
    "type": "diffusion_policy_transformer", "horizon": 10, "n_obs_steps": 2, "n_action_steps": 8,
    "obs_dim": 20, "action_dim": 2, "n_layer": 8, "n_head": 4, "n_emb": 256,
}  # fmt: skip
STANDARD_STEPS = 100
REUSES = np.array([REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT], np.uint8)


def equal_shares(steps: int, types: list[str], cost: float, seed: int) -> NDArray[np.uint8]:
    """Sources (steps, B) that compute the share `cost` of the cells of every type of block.

    Step 0 is computed, so that every reuse finds something; the rest of the budget is spread at
    random over the later steps, equally for each type. The cells that remain take the three reuse
    sources in equal shares, within each type too. Its first chunk must be dense, or at least
    compute what is reused from the rollout before.

    Args:
        steps: K.
        types: the type of each block.
        cost: share of the cells of each type to compute, and so of the cost; at least 1 / steps.
        seed: fixes where.

    Raises:
        ValueError: the budget does not pay for step 0.
    """
    rng = np.random.default_rng(seed)
    sources = np.full((steps, len(types)), COMPUTE, np.uint8)
    dealt = 0  # goes on from type to type, so that the shares are equal over all of them
    for kind in dict.fromkeys(types):
        columns = np.flatnonzero([other == kind for other in types])
        later = (steps - 1) * len(columns)
        spare = round(cost * steps * len(columns)) - len(columns)
        if cost * steps < 1 - 1e-9:
            raise ValueError(f"cost: expected at least {1 / steps:g}, step 0 alone, got {cost:g}")
        reused = rng.permutation(later)[spare:]
        cells = np.full(later, COMPUTE, np.uint8)
        cells[reused] = REUSES[(dealt + np.arange(len(reused))) % len(REUSES)]
        dealt += len(reused)
        sources[1:, columns] = cells.reshape(steps - 1, len(columns))
    return sources


def is_standard(policy: Any) -> bool:
    """Is the committed plan one for this policy?"""
    same_costs = policy.block_costs.tolist() == list(block_costs(STANDARD))
    return same_costs and policy.num_inference_steps == STANDARD_STEPS


def sparse95(seed: int = 0, *, policy: Any = None) -> tsad.Plan:
    """The 95 % plan of the standard transformer, or of `policy`; other seeds, other cells."""
    if policy is None:
        steps, blocks = STANDARD_STEPS, list(block_names(STANDARD))
        types, costs = list(block_types(STANDARD)), list(block_costs(STANDARD))
    else:
        steps, blocks = policy.num_inference_steps, policy.blocks
        types, costs = policy.block_types, policy.block_costs
    sources = equal_shares(steps, types, 0.05, seed)
    metadata = {"planner": "bench/plans.py: equal_shares", "cost": 0.05, "seed": seed}
    return tsad.Plan(sources, blocks=blocks, types=types, cost=costs, metadata=metadata)


if __name__ == "__main__":
    SPARSE95.parent.mkdir(exist_ok=True)
    plan = sparse95()
    plan.save(SPARSE95)
    print(f"{SPARSE95}: {plan!r}, {plan.counts}")
