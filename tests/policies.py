"""`SparsePolicy` objects of random weights, without files; for the tests of the Python side.

The network predicts the sample and nothing is clipped: random weights that predict noise would
drive nearly all actions to the ends of their range, where different runs look alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from cases import config, random_pruner, random_tensors

from tsad import SparsePolicy
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig
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
    precision: str = "float32",
) -> SparsePolicy:
    case = config(name, pruner=pruner, prediction_type="sample", clip_sample=False)
    table = make_sampler(case["scheduler"], sampler=sampler, num_inference_steps=steps)
    parsed = PolicyConfig.from_dict(case)
    weights = random_tensors(case["network"], seed)
    pruner_weights = random_pruner(case["pruner"], case["network"], seed) if pruner else None
    model = make_model(parsed, weights, pruner_weights, table, precision=precision)
    return SparsePolicy(
        model,
        config=parsed,
        sampler=table,
        lanes=lanes,
        threads=threads,
        precision=precision,
        warm_start=warm_start,
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
