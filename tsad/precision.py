"""What fewer bits cost: measured, on the policy that asks.

No constant holds for every network: the largest difference of random ones of one shape varies by
ten, with their weights and samplers.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tsad.device import through_cublas

if TYPE_CHECKING:
    from tsad.policy import SparsePolicy

FLOAT32_BOUND = 1e-4
"""Of float32 to float64, normalised actions of a dense chunk; what the tests hold it to."""
TF32_MARGIN = 8.0
"""So many times what rounding a network's weights to TF32 costs may a GPU's TF32: it rounds what
meets them as well, and may cut bits off for rounding them."""
MARGIN = 2.0
"""What was not measured may differ more than what was."""
MOST_CHUNKS, MOST_MACS = 32, 6e10
"""Measured are `MOST_CHUNKS`, or fewer of a large network: as many as this many multiplications
allow, seconds of a core; one at least."""


def made_up_observations(policy: SparsePolicy, n: int) -> NDArray[np.float32]:
    """(n, n_obs_steps, obs_dim) within the range of the training data, raw units."""
    normalizer = policy.config["normalizer"]["obs"]
    scale, offset, shift = (
        np.asarray(normalizer.get(key, 0.0), np.float64) for key in ("scale", "offset", "shift")
    )
    inside = np.random.default_rng(0).uniform(-1, 1, (n, policy.n_obs_steps, policy.obs_dim))
    # A constant feature has scale 0 in some checkpoints, and any value then means the same.
    raw = (inside - offset) / np.where(scale == 0, 1, scale) + shift
    return raw.astype(np.float32)


def affordable_chunks(policy: SparsePolicy) -> int:
    """So many dense chunks take seconds of a core: 1 to `MOST_CHUNKS`."""
    macs = float(policy.block_costs.sum()) * policy.model.n_steps
    return int(np.clip(MOST_MACS / macs, 1, MOST_CHUNKS))


def exact_twin(policy: SparsePolicy, load: Any, fitted: Any) -> SparsePolicy | None:
    """The same in float32 as `tsad.load` makes it; None if what it was read from is gone."""
    assert policy._loaded is not None
    source, options = policy._loaded
    scheduler = policy.config["scheduler"]
    sampler = {"sampler": scheduler["type"], "fitted": fitted}
    sampler |= {key: scheduler[key] for key in ("num_inference_steps", "timestep_spacing")}
    machine = {"threads": policy.threads, "weights": options["weights"]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file: they were told
            found: SparsePolicy = load(source, precision="float32", **sampler, **machine)
    except (ValueError, OSError):
        return None
    return found


def rounding(precision: str) -> AbstractContextManager[object]:
    """A policy made within rounds all that this precision may: the rows of one lane may be too few
    for products in TF32, those of more lanes are not."""
    return through_cublas() if precision == "tf32" else nullcontext()


def measured_bound(policy: SparsePolicy, exact: SparsePolicy) -> float:
    """How far a policy's actions may be from float64's, in normalised units, same noise.

    `MARGIN` times the largest difference from ``exact``, the same policy in float32, of dense
    chunks, all their steps, on `made_up_observations`; and what float32 itself may be off.
    """
    n = affordable_chunks(policy)
    shape = (policy.model.n_steps, 1, policy.horizon, policy.action_dim)
    scale = np.array(policy.config["normalizer"]["action"]["scale"], np.float64)
    largest = 0.0
    for i, obs in enumerate(made_up_observations(policy, n)):
        noise = np.random.default_rng((1, i)).standard_normal(shape, np.float32)
        arguments: dict[str, Any] = {"noise": noise, "return_horizon": True}
        difference = (policy(obs, **arguments) - exact(obs, **arguments)) * scale
        largest = max(largest, float(np.abs(difference).max()))
    return MARGIN * largest + FLOAT32_BOUND
