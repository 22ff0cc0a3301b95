"""Local search for a static plan, with the true error of recorded chunks on the engine.

The tables of `tsad.planners.effects` are first-order and take blocks as independent; the engine is
neither. A sparse chunk takes a few milliseconds, so a plan can be tried on some dozens of chunks,
with the dense chunk's noise, many times a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan, Sources
from tsad.planners.base import budget, make_plan

Floats = NDArray[np.float64]


class ChunkError:
    """The mean squared error of executed actions, normalised units, on recorded chunks.

    Args:
        policy: a `tsad.SparsePolicy` of L lanes; plan, episodes and lanes are changed.
        windows: pairs of raw observations (C, n_obs_steps, obs_dim) and noise (C, K, horizon,
            action_dim): C consecutive chunks of an episode, the same C for all; their number is a
            multiple of L. C is 1 unless plans read rollouts.

    A lane runs a window from its reset on; each chunk is compared with the dense one of the same
    noise. If a plan's first chunk is another plan (dense, say), it isn't counted.
    """

    def __init__(self, policy: Any, windows: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        lengths = {len(obs) for obs, _ in windows}
        if len(lengths) != 1 or len(windows) % policy.lanes:
            raise ValueError(
                f"windows: expected a multiple of {policy.lanes} (the policy's lanes), equally "
                f"long, got {len(windows)} of lengths {sorted(lengths)}"
            )
        self._policy = policy
        self._scale = np.array(policy.config["normalizer"]["action"]["scale"], np.float64)
        self._groups = []
        for begin in range(0, len(windows), policy.lanes):
            rows = windows[begin : begin + policy.lanes]
            obs = np.stack([obs for obs, _ in rows], axis=1).astype(np.float32)
            noise = np.stack([noise for _, noise in rows], axis=2).astype(np.float32)
            self._groups.append((np.ascontiguousarray(obs), np.ascontiguousarray(noise)))
        policy.sparsity = 0.0
        self._dense = [self._run(group) for group in range(len(self._groups))]

    @property
    def groups(self) -> int:
        """How many runs of all lanes the windows take."""
        return len(self._groups)

    def _run(self, group: int) -> Floats:
        """Normalised executed actions (C, L, n_action_steps, action_dim)."""
        obs, noise = self._groups[group]
        self._policy.reset()
        chunks = [
            np.asarray(self._policy(each, noise=z)).reshape(each.shape[0], -1, len(self._scale))
            for each, z in zip(obs, noise, strict=True)
        ]
        return np.stack(chunks) * self._scale

    def chunks(self, plan: Plan, group: int) -> Floats:
        """(C, L): the error of each chunk of a group that counts."""
        self._policy.reset()  # a plan that reads rollouts can't be set on another plan's
        self._policy.plan = plan
        error = ((self._run(group) - self._dense[group]) ** 2).mean(axis=(2, 3))
        repeats = plan.first is not None and np.array_equal(plan.first.sources, plan.sources)
        dense = not plan.sources.any()
        return np.asarray(error if repeats or dense or len(error) == 1 else error[1:])

    def __call__(self, plan: Plan) -> float:
        """The mean over all chunks that count."""
        return float(np.mean([self.chunks(plan, group) for group in range(self.groups)]))


@dataclass
class Found:
    """Where a search is: the plan, its error, and the error it began with."""

    plan: Plan
    error: float
    begun: float
    tried: int
    taken: int
    seconds: float


class Search:
    """A plan that moves downhill: ``Search(policy, start, error, sparsity=0.95).run(60).plan``.

    Moves: a computed cell to another step; a computed cell dropped for one or two of other blocks;
    a band of neighbouring blocks to another step; a reused run to another source (type, skip, own
    value). Each costs at most what is asked, and is taken if the error falls over the first groups
    of chunks, however many of them are looked at, and over all.

    Args:
        policy: whose plan it is; its costs decide.
        start: a plan that reads no rollout. What it computes at step 0 stays.
        error: `ChunkError` of that policy.
        sparsity: of the cost; the plan found is at least as sparse.
        seed: of the moves.
        note: kept in the plan's metadata, e.g. which episodes the error is of.
    """

    def __init__(
        self,
        policy: Any,
        start: Plan,
        error: ChunkError,
        *,
        sparsity: float,
        seed: int = 0,
        note: Mapping[str, Any] | None = None,
    ) -> None:
        self._sources = start.sources.copy()
        if (self._sources == REUSE_ROLLOUT).any():
            raise ValueError(
                "start: expected a plan that reads no rollout, got one that does; begin with "
                "planners.EffectPlanner or planners.uniform"
            )
        self._policy, self._error = policy, error
        self._costs = np.asarray(policy.block_costs, np.int64)
        self._budget = budget(policy, sparsity)
        if self._spent(self._sources) > self._budget:
            raise ValueError(
                f"start: expected a sparsity of at least {sparsity:.4g}, got {start.sparsity:.4g}"
            )
        self._rng = np.random.default_rng(seed)
        facts = {"planner": "search", "sparsity": float(sparsity), "seed": seed}
        self._metadata = {**(note or {}), **facts}

    def _spent(self, sources: Sources) -> int:
        return int((sources == COMPUTE).sum(axis=0) @ self._costs)

    def _plan(self, sources: Sources) -> Plan:
        return make_plan(self._policy, sources, sources, **self._metadata)

    # ---- moves

    def _computed(self) -> tuple[int, int] | None:
        cells = np.argwhere(self._sources[1:] == COMPUTE)
        if not len(cells):
            return None
        step, block = cells[self._rng.integers(len(cells))]
        return int(step) + 1, int(block)

    def _shift(self, sources: Sources) -> bool:
        cell = self._computed()
        if cell is None:
            return False
        step, block = cell
        away = int(self._rng.geometric(0.4)) * int(self._rng.choice((-1, 1)))
        other = step + away
        if not 1 <= other < len(sources) or sources[other, block] == COMPUTE:
            return False
        sources[step, block], sources[other, block] = REUSE_STEP, COMPUTE
        return True

    def _swap(self, sources: Sources) -> bool:
        cell = self._computed()
        if cell is not None and self._rng.random() < 0.9:
            sources[cell] = REUSE_STEP
        added = False
        for _ in range(int(self._rng.integers(1, 3))):
            left = self._budget - self._spent(sources)
            free = np.argwhere((sources[1:] != COMPUTE) & (self._costs <= left))
            if not len(free):
                break
            step, block = free[self._rng.integers(len(free))]
            sources[step + 1, block], added = COMPUTE, True
        return added

    def _band(self, sources: Sources) -> bool:
        """Neighbouring blocks computed together at one step, and others at another step not.

        Errors of neighbours cancel where all of them take values of the same step.
        """
        steps, blocks = sources.shape
        begin, width = int(self._rng.integers(blocks)), int(self._rng.integers(2, blocks + 1))
        band = slice(begin, begin + width)
        if steps < 2 or not (sources[1:, band] == COMPUTE).any():
            return False
        taken = np.flatnonzero((sources[1:, band] == COMPUTE).any(axis=1)) + 1
        dropped = sources[int(self._rng.choice(taken)), band]
        dropped[dropped == COMPUTE] = REUSE_STEP
        sources[int(self._rng.integers(1, steps)), band] = COMPUTE
        return self._spent(sources) <= self._budget

    def _resource(self, sources: Sources) -> bool:
        """Another source for the cells from a reused one up to the next computed one."""
        cells = np.argwhere(sources != COMPUTE)
        if not len(cells):
            return False
        step, block = cells[self._rng.integers(len(cells))]
        later = np.flatnonzero(sources[step:, block] == COMPUTE)
        end = step + int(later[0]) if len(later) else len(sources)
        end = min(end, step + int(self._rng.integers(1, end - step + 1)))
        kinds = [kind for kind in (REUSE_STEP, REUSE_TYPE, SKIP) if kind != sources[step, block]]
        sources[step:end, block] = self._rng.choice(kinds)
        return True

    def _move(self) -> tuple[Sources, Plan]:
        # Moves that the tables of effects call promising were tried first, once: it found less.
        moves = (self._shift, self._swap, self._band, self._resource)
        while True:
            sources = self._sources.copy()
            if not moves[int(self._rng.integers(len(moves)))](sources):
                continue
            try:
                return sources, self._plan(sources)
            except ValueError:  # reads what nothing has written: where a block begins late
                continue

    # ---- descent

    def run(
        self,
        seconds: float,
        *,
        tries: int | None = None,
        on_try: Callable[[Found], None] | None = None,
    ) -> Found:
        """Search for a time, or for a number of tries; `on_try` may raise to end it."""
        begin = time.monotonic()
        groups = range(self._error.groups)
        plan = self._plan(self._sources)
        now = [float(self._error.chunks(plan, group).mean()) for group in groups]
        found = Found(plan, float(np.mean(now)), float(np.mean(now)), 0, 0, 0.0)
        while found.seconds < seconds and (tries is None or found.tried < tries):
            sources, trial = self._move()
            errors: list[float] = []
            for group in groups:
                errors.append(float(self._error.chunks(trial, group).mean()))
                if sum(errors) >= sum(now[: group + 1]):
                    break
            else:
                self._sources, now, found.plan = sources, errors, trial
                found.error = float(np.mean(now))
                found.taken += 1
            found.tried += 1
            found.seconds = time.monotonic() - begin
            if on_try is not None:
                on_try(found)
        return found
