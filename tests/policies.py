"""`SparsePolicy` objects of random weights, without files; for the tests of the Python side.

The network predicts the sample and nothing is clipped: random weights that predict noise would
drive nearly all actions to the ends of their range, where different runs look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cases import config, random_pruner, random_tensors

from tsad import SparsePolicy
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig
from tsad.fitted import Fitted
from tsad.load import make_model
from tsad.samplers import make_sampler


def make_policy(
    name: str = "tiny",
    *,
    seed: int = 0,
    lanes: int = 1,
    threads: int = 1,
    sampler: str | None = None,
    steps: int | None = 8,
    pruner: bool = False,
    warm_start: int | None = None,
    lead: float = 0.0,
    smoothing: bool = False,
    clip: bool = False,
    fitted: Fitted | None = None,
    precision: str = "float32",
    backend: str | None = None,
) -> SparsePolicy:
    case = config(name, pruner=pruner, prediction_type="sample", clip_sample=clip)
    table = make_sampler(case["scheduler"], sampler=sampler, num_inference_steps=steps)
    if fitted is not None and warm_start is None:
        table = fitted.applied(table)
    parsed = PolicyConfig.from_dict(case)
    weights = random_tensors(case["network"], seed)
    pruner_weights = random_pruner(case["pruner"], case["network"], seed) if pruner else None
    model = make_model(parsed, weights, pruner_weights, table, backend=backend, precision=precision)
    return SparsePolicy(
        model,
        config=parsed,
        sampler=table,
        lanes=lanes,
        threads=threads,
        precision=precision,
        warm_start=warm_start,
        lead=lead,
        smoothing=smoothing,
        fitted=fitted,
    )


def save_policy(folder: Path, *, seed: int = 0) -> str:
    """Such a policy of the case "tiny" as a tsad folder; its name."""
    case = config("tiny", prediction_type="sample", clip_sample=False)
    write_folder(folder, PolicyConfig.from_dict(case), random_tensors(case["network"], seed))
    return str(folder)


def observations(policy: Any, seed: int, rows: int | None = None) -> Any:
    """float32 (rows or lanes, n_obs_steps, obs_dim)."""
    shape = (rows or policy.lanes, policy.n_obs_steps, policy.obs_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def noises(policy: Any, seed: int, rows: int | None = None) -> Any:
    """float32 (K, rows or lanes, horizon, action_dim), K of the model, also with a warm start."""
    shape = (policy.model.n_steps, rows or policy.lanes, policy.horizon, policy.action_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def state(policy: Any) -> Any:
    """Everything that a refused call must leave as it was."""
    ages = [policy._ages(lane).tolist() for lane in range(policy.lanes)]
    return ages, policy.stats, policy.plan, policy.sparsity, policy.planner


def check_bits(make: Callable[[int], Any], calls: Any, first: Any, later: Any) -> None:
    """Threads and lanes together or apart make no difference to a plan per lane.

    `make` makes the policy with that many threads; each call is (obs, noise) of all lanes.
    """
    lanes = len(later)

    def run(threads: int, together: bool) -> Any:
        policy = make(threads)
        for lane in range(lanes):
            policy._set_plan(lane, later[lane], first[lane])
        chunks = []
        for obs, z in calls:
            rows = [slice(None)] if together else [slice(i, i + 1) for i in range(lanes)]
            chunks += [
                policy(obs[row], noise=np.ascontiguousarray(z[:, row]),
                       lanes=list(range(lanes))[row], return_horizon=True)
                for row in rows
            ]  # fmt: skip
        return np.concatenate(chunks)

    expected = run(1, True)
    assert np.isfinite(expected).all()
    for threads in (1, 2, 4):
        for together in (True, False):
            np.testing.assert_array_equal(run(threads, together), expected)
