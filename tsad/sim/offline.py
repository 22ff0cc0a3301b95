"""What a setting does to the actions on recorded observations, without a simulator.

A setting runs on some observations with some draws of noise each. Two settings of one sampler are
compared draw by draw (`rms`): the same noise, so all that differs is what they compute. Settings of
different samplers turn the same noise into other actions, and rightly so; they are compared as
distributions (`energy`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.plan import Plan

Floats = NDArray[np.float64]


def needs_past(policy: Any) -> bool:
    """Whether a chunk may depend on the one before: its first chunk after a reset is another."""
    plans = policy.plan if isinstance(policy.plan, list) else [policy.plan]
    return (
        policy.warm_start is not None
        or policy.lead > 0
        or policy._plans is None  # a pruner decides, from one chunk to the next
        or any(
            plan.sources.any()
            and (plan.first is None or not np.array_equal(plan.first.sources, plan.sources))
            for plan in plans
        )
    )


def noise(policy: Any, *key: int) -> NDArray[np.float32]:
    """(K, horizon, action_dim) that the key fixes; the initial sample is the same for every K."""
    shape = (policy.horizon, policy.action_dim)
    steps = policy.config["scheduler"]["num_inference_steps"]  # all, whatever a warm chunk runs
    drawn = np.empty((steps, *shape), np.float32)
    drawn[0] = np.random.default_rng(key).standard_normal(shape, np.float32)
    later = np.random.default_rng((*key, 1))
    drawn[1:] = later.standard_normal(drawn[1:].shape, np.float32)
    return drawn


def actions(
    policy: Any,
    windows: NDArray[np.float32],
    draws: int = 1,
    progress: Callable[[int], None] = lambda chunks: None,
) -> Floats:
    """(W, draws, n_action_steps * action_dim): executed actions, normalised units.

    Args:
        policy: as it is set; its lanes are reset.
        windows: (W, 2, n_obs_steps, obs_dim): two consecutive observations, raw units. The second
            one's actions are returned; the first runs before it where it matters (`needs_past`),
            and need not be there where it does not: (W, 1, n_obs_steps, obs_dim).
        draws: of noise, for each window.
        progress: called with the number of results just added.

    Raises:
        ValueError: the chunk before matters, and its observation is not there.
    """
    policy.reset()  # then `plan` is what will run
    begin = 0 if needs_past(policy) else 1
    if windows.shape[1] < 2 - begin:
        raise ValueError(
            "windows: expected two consecutive observations, as a chunk depends on the one before, "
            f"got {windows.shape[1]}; give successive ones"
        )
    config = policy.config
    scale = np.array(config["normalizer"]["action"]["scale"], np.float64)
    jobs = [(w, m) for w in range(len(windows)) for m in range(draws)]
    found = []
    for at in range(0, len(jobs), policy.lanes):
        batch = jobs[at : at + policy.lanes]
        lanes = list(range(len(batch)))
        policy.reset(lanes=lanes)
        for chunk in range(begin, 2):
            obs = np.stack([windows[w, chunk - 2] for w, _ in batch])
            drawn = np.stack([noise(policy, w, m, chunk) for w, m in batch], axis=1)
            result = policy(obs, noise=drawn, lanes=lanes)
        found.append((result * scale).reshape(len(batch), -1))
        progress(len(batch))
    return np.concatenate(found).reshape(len(windows), draws, -1)


def rms(a: Floats, b: Floats) -> float:
    """Root mean square difference of two results of `actions`, draw by draw."""
    return float(np.sqrt(((a - b) ** 2).mean()))


def energy(a: Floats, b: Floats) -> float:
    """Energy distance between two results of `actions`, relative to the spread of ``b``.

    2 E|A - B| - E|A - A'| - E|B - B'| over different draws, per window, then the mean over windows,
    divided by that of E|B - B'|: 0 if both draw actions alike, whichever noise makes which. Scatter
    lost counts as well as scatter added. Szekely and Rizzo 2013. Shared noise makes it exact where
    ``a`` and ``b`` are equal, and quiet where they are close. nan if ``b`` does not scatter.
    """
    if a.shape[1] < 2:
        raise ValueError(f"a: expected at least 2 draws, got {a.shape[1]}; run more")
    spread = float(_apart(b, b).mean())
    return float(_energies(a, b).mean()) / spread if spread > 0 else float("nan")


def spread(a: Floats, b: Floats) -> float:
    """How far apart the draws of ``a`` are, relative to ``b``: below 1, a mode has been lost.

    The mean over windows of E|A - A'|, over that of E|B - B'|; nan if ``b`` does not scatter.
    """
    own, other = float(_apart(a, a).mean()), float(_apart(b, b).mean())
    return own / other if other > 0 else float("nan")


def _energies(a: Floats, b: Floats) -> Floats:
    """(W,) energy distances, not divided by anything."""
    return np.asarray(2 * _apart(a, b) - _apart(a, a) - _apart(b, b))


def _apart(a: Floats, b: Floats) -> Floats:
    """(W,) mean |A_i - B_j| over i != j."""
    lengths = np.stack([np.linalg.norm(x[:, None] - y, axis=-1) for x, y in zip(a, b, strict=True)])
    draws = a.shape[1]
    diagonal = np.trace(lengths, axis1=1, axis2=2)
    return np.asarray((lengths.sum(axis=(1, 2)) - diagonal) / (draws * (draws - 1)))


class Distance:
    """`energy` of a plan's draws to a reference's, for `tsad.planners.search.Search` to lower.

    In few steps a plan may turn the same noise into other actions than many steps do and still draw
    alike; the error at the same noise counts that as wrong, and misses a small bias of all draws.

    Args:
        policy: a `tsad.SparsePolicy`, whose plan is changed and lanes reset.
        reference: a policy whose draws count as right, as it is set: dense, of more steps.
        windows: (W, n_obs_steps, obs_dim) observations, raw units; W a multiple of `group`.
        draws: of noise for each, at least 2.
        group: so many observations are looked at before a plan may be given up.
        progress: called with the number of the reference's chunks just added.

    Raises:
        ValueError: of `windows`, `draws` or a plan whose chunks depend on those before.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        windows: NDArray[np.float32],
        *,
        draws: int = 16,
        group: int = 8,
        progress: Callable[[int], None] = lambda chunks: None,
    ) -> None:
        if not len(windows) or len(windows) % group:
            raise ValueError(f"windows: expected a multiple of {group}, got {len(windows)}")
        if draws < 2:
            raise ValueError(f"draws: expected at least 2, got {draws}")
        self.policy, self._draws = policy, draws
        alone = windows[:, None].astype(np.float32)  # plans that need the past are refused
        self._groups = [alone[i : i + group] for i in range(0, len(alone), group)]
        self._right = [actions(reference, part, draws, progress) for part in self._groups]
        self._spread = float(np.mean([_apart(right, right).mean() for right in self._right]))
        if not self._spread > 0:
            raise ValueError("reference: its draws are all alike, nothing tells a plan's from them")

    @property
    def groups(self) -> int:
        """How many groups of observations there are."""
        return len(self._groups)

    def chunks(self, plan: Plan | Sequence[Plan], group: int) -> Floats:
        """(group,): the distance of each observation of a group, relative to the mean spread."""
        plans = [plan] if isinstance(plan, Plan) else list(plan)
        self.policy.reset()
        self.policy.plan = plans[0]
        if len(plans) > 1 or needs_past(self.policy):
            raise ValueError(
                "plan: expected one plan whose chunks depend on no chunk before; measure others "
                "with ChunkError"
            )
        found = actions(self.policy, self._groups[group], self._draws)
        return _energies(found, self._right[group]) / self._spread

    def __call__(self, plan: Plan | Sequence[Plan]) -> float:
        """The mean over all observations."""
        return float(np.mean([self.chunks(plan, group) for group in range(self.groups)]))
