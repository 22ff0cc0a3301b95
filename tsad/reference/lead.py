"""What is made of the actions that are executed: smoothing and a lead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.reference.layers import Array
from tsad.reference.policy import ReferencePolicy, lane_numbers
from tsad.reference.warm import WarmReference
from tsad.samplers import COLUMNS


def executed_actions(
    chunk: Array, before: Array | None, moved: int, *, lead: float, smoothing: bool, clip: float
) -> Array:
    """What is executed in place of a chunk (T, action_dim), all of its horizon, normalised.

    Smoothing weighs an action with its two neighbours, (1/4, 1/2, 1/4). The first and the last have
    one neighbour alone and stay: of a straight line nothing changes. A lead moves an action further
    away from what ``before``, the chunk of ``moved`` actions earlier, has for the same time, its
    last action repeated: a + lead (a - last), within plus and minus ``clip``. Without a chunk
    before there is no lead.
    """
    actions = chunk.copy()
    if smoothing:
        actions[1:-1] = chunk[:-2] / 4 + chunk[1:-1] / 2 + chunk[2:] / 4
    if before is None or lead == 0:
        return actions
    last = np.concatenate([before, np.repeat(before[-1:], moved, 0)])[moved:]
    led: Array = np.clip(actions + lead * (actions - last), -clip, clip)
    return led


class LeadReference:
    """A policy whose executed actions are moved; what it predicts, and starts from, is not."""

    def __init__(
        self,
        policy: ReferencePolicy | WarmReference,
        *,
        lead: float = 0.0,
        smoothing: bool = False,
    ) -> None:
        self.policy, self.lead, self.smoothing = policy, lead, smoothing
        self._plain = policy.cold if isinstance(policy, WarmReference) else policy
        self._before: list[Array | None] = [None] * self._plain.lanes  # (T, action_dim), normalised

    def reset(self, lanes: ArrayLike | None = None) -> None:
        """Start of an episode for all lanes or the listed ones."""
        self.policy.reset(lanes)
        for lane in lane_numbers(lanes, self._plain.lanes):
            self._before[lane] = None

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
        """Actions (L, n_action_steps, action_dim) in raw units; arguments as of `WarmReference`."""
        plain, rows = self._plain, lane_numbers(lanes, self._plain.lanes)
        if isinstance(self.policy, WarmReference):
            raw = self.policy(obs, noise, executed, plan_sources, lanes, first=first)
        else:
            raw = self.policy(obs, noise, plan_sources, lanes, True, first=first)
        begin = plain.network["n_obs_steps"] - 1
        results = []
        for i, lane in enumerate(rows):
            chunk = plain.normalise("action", raw[i])
            moved = executed_actions(
                chunk,
                self._before[lane],
                executed[i],
                lead=self.lead,
                smoothing=self.smoothing,
                clip=float(plain.sampler.table[-1, COLUMNS.index("r")]),
            )
            self._before[lane] = chunk
            results.append(moved[begin : begin + plain.network["n_action_steps"]])
        return plain.raw_actions(np.stack(results))
