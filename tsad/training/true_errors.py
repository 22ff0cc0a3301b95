"""What recorded chunks really lose along plans of their own: run by the engine, same noise.

The effects of `tsad.training.sensitivity` are first-order; this is what a pruner is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad import planners
from tsad.plan import Plan
from tsad.sim.recording import Recorded

Floats = NDArray[np.float64]


class TrueErrors:
    """Errors of single chunks, beside dense ones: ``TrueErrors(policy, windows)(i, plan)``.

    Every chunk is the first of an episode, whatever came before it, so plans read no rollouts.

    Args:
        policy: of one lane; its plan and episode are changed.
        windows: recorded chunks. Chunk i is the i-th of all of them.
    """

    def __init__(self, policy: Any, windows: Sequence[tuple[Recorded, slice]]) -> None:
        self.policy = policy
        self._scale = np.asarray(policy.config["normalizer"]["action"]["scale"], np.float64)
        self._windows = list(windows)
        self.obs: NDArray[np.float32] = np.concatenate([e.obs[part] for e, part in windows])
        self._place = [
            (w, c) for w, (e, part) in enumerate(windows) for c in range(len(e.obs[part]))
        ]
        self._noise: tuple[int, NDArray[np.float32]] = (-1, self.obs[:0])
        self._right: dict[int, Floats] = {}

    def __len__(self) -> int:
        return len(self._place)

    def noise(self, i: int) -> NDArray[np.float32]:
        """(K, horizon, action_dim): what chunk i is run with."""
        window, chunk = self._place[i]
        if self._noise[0] != window:
            episode, part = self._windows[window]
            self._noise = (window, episode.noise(self.policy, part))
        noise: NDArray[np.float32] = self._noise[1][chunk]
        return noise

    def actions(self, i: int, plan: Plan) -> Floats:
        """(n_action_steps, action_dim): what is executed of chunk i, normalised."""
        self.policy.reset()
        self.policy.plan = plan
        noise = np.ascontiguousarray(self.noise(i)[:, None])
        found: Floats = np.asarray(self.policy(self.obs[i], noise=noise)) * self._scale
        return found

    def dense(self, i: int) -> Floats:
        """The same of all computed; kept."""
        if i not in self._right:
            self._right[i] = self.actions(i, planners.dense(self.policy))
        return self._right[i]

    def __call__(self, i: int, plan: Plan) -> float:
        """The mean squared error of chunk i."""
        return float(((self.actions(i, plan) - self.dense(i)) ** 2).mean())
