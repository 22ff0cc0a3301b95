"""Local search for a static plan, with the true error of recorded chunks on the engine.

The tables of `tsad.planners.effects` are first-order and take blocks as independent; the engine is
neither. A sparse chunk takes a few milliseconds, so a plan can be tried on some dozens of chunks,
with the dense chunk's noise, many times a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
        counts_first: False leaves the first chunk of every window out, whatever plan it is of.
        reference: another policy of L lanes, whose dense chunks count as right instead of the
            policy's own: of the same weights and more steps of DDIM, say. It begins with the same
            samples.
        power: of the mean squared errors, before their mean over chunks. In few steps a handful of
            chunks goes another way than the reference and outweighs all others; 0.5 counts them
            by their root.

    A lane runs a window from its reset on; each chunk is compared with the dense one of the same
    noise. If a plan's first chunk is another plan (dense, say), it isn't counted. Several plans are
    a cycle: they take turns in the chunks after the first, each group of windows beginning where
    the one before it ended.
    """

    def __init__(
        self,
        policy: Any,
        windows: Sequence[tuple[NDArray[Any], NDArray[Any]]],
        *,
        counts_first: bool = True,
        reference: Any = None,
        power: float = 1.0,
    ) -> None:
        lengths = {len(obs) for obs, _ in windows}
        if len(lengths) != 1 or len(windows) % policy.lanes:
            raise ValueError(
                f"windows: expected a multiple of {policy.lanes} (the policy's lanes), equally "
                f"long, got {len(windows)} of lengths {sorted(lengths)}"
            )
        self.policy, self._counts_first, self.power = policy, counts_first, power
        self._scale = np.array(policy.config["normalizer"]["action"]["scale"], np.float64)
        self._groups = []
        for begin in range(0, len(windows), policy.lanes):
            rows = windows[begin : begin + policy.lanes]
            obs = np.stack([obs for obs, _ in rows], axis=1).astype(np.float32)
            noise = np.stack([noise for _, noise in rows], axis=2).astype(np.float32)
            self._groups.append((np.ascontiguousarray(obs), np.ascontiguousarray(noise)))
        policy.reset()
        right = policy if reference is None else reference
        if right.lanes != policy.lanes:
            raise ValueError(f"reference: expected {policy.lanes} lanes, got {right.lanes}")
        right.sparsity = 0.0
        self._dense = [self._run(group, right) for group in range(len(self._groups))]

    @property
    def groups(self) -> int:
        """How many runs of all lanes the windows take."""
        return len(self._groups)

    def _run(self, group: int, policy: Any, cycle: Sequence[Plan] = ()) -> Floats:
        """Normalised executed actions (C, L, n_action_steps, action_dim)."""
        obs, noise = self._groups[group]
        steps = policy.num_inference_steps
        if noise.shape[1] != steps:  # of a sampler that reads the initial sample alone
            first = noise[:, :1]
            noise = np.concatenate([first, np.repeat(0 * first, steps - 1, axis=1)], axis=1)
        policy.reset()
        turn = group * (len(obs) - 1)
        chunks = []
        for c, (each, z) in enumerate(zip(obs, noise, strict=True)):
            if c and len(cycle) > 1:
                policy.plan = cycle[(turn + c - 1) % len(cycle)]
            actions = np.asarray(policy(each, noise=z))
            chunks.append(actions.reshape(each.shape[0], -1, len(self._scale)))
        return np.stack(chunks) * self._scale

    def chunks(self, plan: Plan | Sequence[Plan], group: int) -> Floats:
        """(C, L): the error of each chunk of a group that counts."""
        cycle = [plan] if isinstance(plan, Plan) else list(plan)
        # one that reads rollouts begins, if there is one, so that they are kept from the start
        begin = max(cycle, key=lambda each: bool((each.sources == REUSE_ROLLOUT).any()))
        self.policy.reset()  # a plan that reads rollouts can't be set on another plan's
        self.policy.plan = begin
        found = self._run(group, self.policy, cycle)
        error = ((found - self._dense[group]) ** 2).mean(axis=(2, 3)) ** self.power
        repeats = begin.first is not None and np.array_equal(begin.first.sources, begin.sources)
        dense = not begin.sources.any()
        alike = len(cycle) == 1 and (repeats or dense or len(error) == 1)
        return np.asarray(error if alike and self._counts_first else error[1:])

    def __call__(self, plan: Plan | Sequence[Plan]) -> float:
        """The mean over all chunks that count, of their errors to the power."""
        return float(np.mean([self.chunks(plan, group) for group in range(self.groups)]))


class Error(Protocol):
    """What a search makes smaller: `ChunkError`, or `tsad.sim.offline.Distance`."""

    @property
    def groups(self) -> int:
        """In how many parts it is measured."""

    def chunks(self, plan: Plan | Sequence[Plan], group: int, /) -> Floats:
        """Of one part, any shape; the parts' means count equally."""


@dataclass
class Found:
    """Where a search is: the plans (several: a cycle), their error, and the error it began with."""

    plans: list[Plan]
    error: float
    begun: float
    tried: int
    taken: int
    seconds: float

    @property
    def plan(self) -> Plan:
        """The plan, of a cycle the first."""
        return self.plans[0]


class Search:
    """A plan that moves downhill: ``Search(policy, start, error, sparsity=0.95).run(60).plan``.

    Moves: a computed cell to another step; a computed cell dropped for one or two of other blocks;
    a band of neighbouring blocks to another step; a reused run to another source (type, skip, own
    value). Each costs at most what is asked, and is taken if the error falls over the first groups
    of chunks, however many of them are looked at, and over all.

    Args:
        policy: whose plan it is; its costs decide.
        start: a plan. What it computes at step 0 stays. Several plans are a cycle, see
            `ChunkError`: each costs at most what is asked; cells also change places in all of them.
        error: `ChunkError` of that policy, or another `Error`.
        sparsity: of the cost; the plan found is at least as sparse.
        seed: of the moves.
        note: kept in the plan's metadata, e.g. which episodes the error is of.
        allowed: where a cell that isn't computed may take its value from; a cell that is dropped
            takes the first of them. ``REUSE_ROLLOUT``: in a cycle, what is read is also computed,
            so values are younger than the cycle is long; of a single plan they are as old as the
            episode.
    """

    def __init__(
        self,
        policy: Any,
        start: Plan | Sequence[Plan],
        error: Error,
        *,
        sparsity: float,
        seed: int = 0,
        note: Mapping[str, Any] | None = None,
        allowed: Sequence[int] = (REUSE_STEP, REUSE_TYPE, SKIP),
    ) -> None:
        cycle = [start] if isinstance(start, Plan) else list(start)
        self._sources = np.stack([plan.sources for plan in cycle])
        self._policy, self._error, self._allowed = policy, error, tuple(allowed)
        self._now: list[float] = []  # of each group, once measured
        self._check_sources()
        self._costs = np.asarray(policy.block_costs, np.int64)
        self._budget = budget(policy, sparsity)
        if any(self._spent(sources) > self._budget for sources in self._sources):
            got = min(plan.sparsity for plan in cycle)
            raise ValueError(
                f"start: expected a sparsity of at least {sparsity:.4g}, got {got:.4g}"
            )
        self._rng = np.random.default_rng(seed)
        facts = {"planner": "search", "sparsity": float(sparsity), "seed": seed}
        self._metadata = {**(note or {}), **facts}

    def _check_sources(self) -> None:
        reads_rollouts = bool((self._sources == REUSE_ROLLOUT).any())
        if reads_rollouts and REUSE_ROLLOUT not in self._allowed:
            raise ValueError(
                "start: expected a plan that reads no rollout, got one that does; begin with "
                "planners.EffectPlanner or planners.uniform"
            )
        if not np.isin(self._sources, (COMPUTE, *self._allowed)).all():
            raise ValueError(
                f"start: expected no sources but {COMPUTE} and `allowed`, {self._allowed}, got "
                f"{np.unique(self._sources).tolist()}; allow them, or begin with another plan"
            )
        if _unrefreshed(self._sources):
            raise ValueError(
                "start: expected every cell that reads a rollout to be computed by some plan of "
                "the cycle, got one that never is; its value would be as old as the episode"
            )

    def _spent(self, sources: Sources) -> int:
        return int((sources == COMPUTE).sum(axis=0) @ self._costs)

    def _plans(self, cycle: Sources) -> list[Plan]:
        dense_first = len(cycle) > 1 or REUSE_ROLLOUT in cycle
        return [
            make_plan(self._policy, sources, None if dense_first else sources, **self._metadata)
            for sources in cycle
        ]

    # ---- moves of one plan

    def _computed(self, sources: Sources) -> tuple[int, int] | None:
        cells = np.argwhere(sources[1:] == COMPUTE)
        if not len(cells):
            return None
        step, block = cells[self._rng.integers(len(cells))]
        return int(step) + 1, int(block)

    def _drop(self) -> int:
        """Where a cell takes its value from that is no longer computed."""
        if len(self._sources) > 1 and REUSE_ROLLOUT in self._allowed:
            return int(self._rng.choice((self._allowed[0], REUSE_ROLLOUT)))
        return self._allowed[0]

    def _shift(self, sources: Sources) -> bool:
        cell = self._computed(sources)
        if cell is None:
            return False
        step, block = cell
        away = int(self._rng.geometric(0.4)) * int(self._rng.choice((-1, 1)))
        other = step + away
        if not 1 <= other < len(sources) or sources[other, block] == COMPUTE:
            return False
        sources[step, block], sources[other, block] = self._drop(), COMPUTE
        return True

    def _swap(self, sources: Sources) -> bool:
        cell = self._computed(sources)
        if cell is not None and self._rng.random() < 0.9:
            sources[cell] = self._drop()
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
        dropped[dropped == COMPUTE] = self._drop()
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
        kinds = [kind for kind in self._allowed if kind != sources[step, block]]
        if not kinds:
            return False
        sources[step:end, block] = self._rng.choice(kinds)
        return True

    # ---- of a cycle

    def _exchange(self, cycle: Sources) -> bool:
        """Two steps change places in a band of blocks, or two cells of two blocks, in all plans."""
        _, steps, blocks = cycle.shape
        one, other = self._rng.integers(steps, size=2)
        if self._rng.random() < 0.5:
            begin = int(self._rng.integers(blocks))
            here = there = slice(begin, begin + int(self._rng.integers(1, blocks + 1)))
        else:
            a, b = (int(block) for block in self._rng.integers(blocks, size=2))
            here, there = slice(a, a + 1), slice(b, b + 1)
        kept = cycle[:, one, here].copy()
        cycle[:, one, here], cycle[:, other, there] = cycle[:, other, there], kept
        fits = all(self._spent(sources) <= self._budget for sources in cycle)
        return fits and not np.array_equal(cycle, self._sources)

    def _move(self) -> tuple[Sources, list[Plan]]:
        # Moves that the tables of effects call promising were tried first, once: it found less.
        moves = (self._shift, self._swap, self._band, self._resource)
        while True:
            cycle = self._sources.copy()
            if len(cycle) == 1:
                moved = moves[int(self._rng.integers(len(moves)))](cycle[0])
            elif self._rng.random() < 0.5:
                moved = self._exchange(cycle)
            else:
                sources = cycle[int(self._rng.integers(len(cycle)))]
                moved = moves[int(self._rng.integers(len(moves)))](sources)
            if not moved or _unrefreshed(cycle):
                continue
            try:
                return cycle, self._plans(cycle)
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
        """Search for a time, or for a number of tries; `on_try` may raise to end it.

        Called again it goes on.
        """
        begin = time.monotonic()
        groups = range(self._error.groups)
        plans = self._plans(self._sources)
        if not self._now:
            self._now = [float(self._error.chunks(plans, group).mean()) for group in groups]
        now = self._now
        found = Found(plans, float(np.mean(now)), float(np.mean(now)), 0, 0, 0.0)
        while found.seconds < seconds and (tries is None or found.tried < tries):
            cycle, trial = self._move()
            errors: list[float] = []
            for group in groups:
                errors.append(float(self._error.chunks(trial, group).mean()))
                if sum(errors) >= sum(now[: group + 1]):
                    break
            else:
                self._sources, self._now, found.plans = cycle, errors, trial
                now = errors
                found.error = float(np.mean(now))
                found.taken += 1
            found.tried += 1
            found.seconds = time.monotonic() - begin
            if on_try is not None:
                on_try(found)
        return found


def _unrefreshed(cycle: Sources) -> bool:
    """Whether a plan of a cycle reads a rollout of a cell that none of them computes."""
    if len(cycle) == 1:
        return False
    read, computed = (cycle == REUSE_ROLLOUT).any(axis=0), (cycle == COMPUTE).any(axis=0)
    return bool((read & ~computed).any())
