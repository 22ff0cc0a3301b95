"""Plans that do not look at the observation."""

from __future__ import annotations

import os

import numpy as np

from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan
from tsad.planners.base import (
    PolicyFacts,
    budget,
    check_sparsity,
    full,
    integer,
    make_plan,
    of_policy,
)


@of_policy
def dense(policy: PolicyFacts) -> Plan:
    """All computed: the policy as it was trained."""
    return make_plan(policy, full(policy, COMPUTE), None, planner="dense")


@of_policy
def uniform(policy: PolicyFacts, n: int) -> Plan:
    """n evenly spaced steps computed, the noisiest among them; the rest reuse the step before.

    The first chunk after a reset runs the same plan: it needs no earlier rollout. (Known as
    FORA, or threshold caching; n is 1 to num_inference_steps.)
    """
    steps = policy.num_inference_steps
    n = integer("n", n, 1, steps, "it is the number of computed steps (num_inference_steps)")
    sources = full(policy, REUSE_STEP)
    sources[np.arange(n) * steps // n] = COMPUTE
    return make_plan(policy, sources, sources, planner="uniform", n=n)


@of_policy
def uniform_sparse(policy: PolicyFacts, sparsity: float) -> Plan:
    """`uniform` with as many computed steps as the sparsity leaves: ``floor((1 - s) K)``."""
    check_sparsity(policy, sparsity)
    n = int((1 - sparsity) * policy.num_inference_steps + 1e-9)
    return uniform(policy, max(n, 1))


@of_policy
def random(policy: PolicyFacts, sparsity: float, seed: int) -> Plan:
    """A random valid plan that uses every source; its sparsity is at least the one asked for.

    Step 0 is computed, so that all reuse is valid; further cells are computed in random order as
    long as they fit the budget. For tests and as a baseline that knows nothing.
    """
    check_sparsity(policy, sparsity)
    seed = integer("seed", seed, 0, None, "it alone decides which plan")
    rng = np.random.default_rng(seed)
    kinds = np.array([REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT, SKIP], np.uint8)
    sources = rng.choice(kinds, (policy.num_inference_steps, len(policy.blocks)))
    sources[0] = COMPUTE
    costs = np.asarray(policy.block_costs)
    left = budget(policy, sparsity) - int(costs.sum())
    for cell in rng.permutation(np.arange(len(costs), sources.size)).tolist():
        step, block = divmod(cell, len(costs))
        if costs[block] <= left:
            left -= int(costs[block])
            sources[step, block] = COMPUTE
    return make_plan(policy, sources, None, planner="random", sparsity=float(sparsity), seed=seed)


def from_file(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file of `Plan.save`."""
    return Plan.load(path)
