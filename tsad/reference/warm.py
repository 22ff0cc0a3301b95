"""Chunks that start from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.fitted import Fitted
from tsad.reference.layers import Array
from tsad.reference.policy import ReferencePolicy, lane_numbers
from tsad.samplers import tail


class WarmReference:
    """Warm start: `ReferencePolicy` whose later chunks start from the one before.

    The first chunk after a reset is dense, K steps from noise. The next ones run the last
    ``warm_start`` steps, N, and begin with the previous chunk moved by the actions executed since,
    its last action repeated, with the noise of that row. ``fitted`` is of these.
    """

    def __init__(
        self, *args: Any, warm_start: int, fitted: Fitted | None = None, **options: Any
    ) -> None:
        """As `ReferencePolicy`."""
        self.cold, self.warm = ReferencePolicy(*args, **options), ReferencePolicy(*args, **options)
        self.warm.sampler = tail(self.cold.sampler, warm_start)
        self.warm.timesteps = self.warm.sampler.timesteps
        self.warm.num_inference_steps = warm_start
        if fitted is not None:
            self.warm.fitted = fitted
            self.warm.sampler = fitted.applied(self.warm.sampler)
        self._previous: list[Array | None] = [None] * self.cold.lanes  # (T, action_dim), normalised

    def reset(self, lanes: ArrayLike | None = None) -> None:
        """Start of an episode for all lanes or the listed ones."""
        for lane in lane_numbers(lanes, self.cold.lanes):
            self._previous[lane] = None
            self.warm.reset([lane])

    def __call__(
        self,
        obs: ArrayLike,
        noise: ArrayLike,
        executed: Sequence[int],
        plan_sources: NDArray[Any] | None = None,
        lanes: ArrayLike | None = None,
        *,
        first: NDArray[Any] | None = None,
    ) -> Array:
        """All actions (L, T, action_dim) in raw units.

        ``obs`` (L, n_obs_steps, obs_dim) raw; ``noise`` (K, L, T, action_dim), of which a warm
        chunk takes the last N rows; ``executed`` (L,) actions of each lane since its previous
        chunk. ``plan_sources`` (N, B) is followed by warm chunks, ``first`` by the first warm one;
        None is dense.
        """
        rows = lane_numbers(lanes, self.cold.lanes)
        N, sampler = self.warm.num_inference_steps, self.warm.sampler
        signal, level = sampler.mixture(0)
        dense = np.zeros((N, len(self.warm.blocks)), np.uint8)
        sources = dense if plan_sources is None else plan_sources
        results = []
        for i, lane in enumerate(rows):
            z, before = np.array(noise, self.cold.dtype)[:, i : i + 1], self._previous[lane]
            own = np.asarray(obs)[i : i + 1]
            if before is None:
                self.cold.reset([lane])
                actions = self.cold(own, z, lanes=[lane], return_horizon=True)
            else:
                moved = np.concatenate([before, np.repeat(before[-1:], executed[i], 0)])
                start, z = moved[executed[i] :], z[-N:]
                z[0] = signal * start + level * z[0]
                actions = self.warm(own, z, sources, [lane], True, first=first, starts=start[None])
            self._previous[lane] = self.cold.normalise("action", actions[0])
            results.append(actions[0])
        return np.reshape(results, (len(rows), *np.shape(noise)[-2:]))
