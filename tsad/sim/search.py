"""Successful episodes that a policy would rarely reach: its own samples, selected in the simulator.

A policy plays an episode by itself until it is near the goal. There the world is copied into
several particles, which the policy plays on with different noise; every few chunks the better half
replaces the worse one. The first particle that succeeds is the demonstration. Nothing in it is
foreign to the policy: every action is one of its samples, chosen with hindsight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tsad.sim.rollout import Policy, check, stacked
from tsad.sim.simulators import (
    Environment,
    FloatArray,
    Observations,
    first_observation,
    obs_shapes,
    stepped,
)


class Searchable(Environment, Protocol):
    """A simulated world that can be copied.

    If it has a method `state`, demonstrations record what that returns, float32 (state_dim,), else
    the observation; one with `obs_shapes` has to have it.
    """

    def snapshot(self) -> tuple[Any, ...]:
        """All that the coming steps depend on."""

    def restore(self, snapshot: tuple[Any, ...]) -> Observations:
        """Go to a snapshot of any world of this class; returns the observation."""


@dataclass(frozen=True)
class Search:
    """How demonstrations are searched for.

    `particles` copies from the score `start` on, of which the better half is kept every `interval`
    chunks, for at most `chunks` chunks; `execute` actions of each chunk are executed (None: the
    policy's n_action_steps). `winners` particles at most become demonstrations, and of each the
    `last` steps at most (None: all): what led to success at once, without the detours before.
    """

    particles: int = 8
    start: float = 0.6
    interval: int = 2
    chunks: int = 24
    execute: int | None = None
    winners: int = 3
    last: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "particles": (self.particles >= 2, "at least 2"),
            "start": (0 <= self.start < 1, "a score in [0, 1)"),
            "interval": (self.interval >= 1, "at least 1"),
            "chunks": (self.chunks >= 1, "at least 1"),
            "execute": (self.execute is None or self.execute >= 1, "at least 1"),
            "last": (self.last is None or self.last >= 1, "at least 1"),
            "winners": (1 <= self.winners <= self.particles, "1 to particles"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


class Demonstration(NamedTuple):
    """A successful episode: float32 `states` (n, state_dim), `actions` (n, action_dim)."""

    seed: int
    states: NDArray[np.float32]
    actions: NDArray[np.float32]


@dataclass
class _Particle:
    environment: Searchable
    window: tuple[Observations, ...]
    states: list[NDArray[np.float32]] = field(default_factory=list)
    actions: list[NDArray[np.float32]] = field(default_factory=list)
    score: float = 0.0
    success: bool = False

    def act(self, actions: NDArray[np.float32]) -> None:
        """Execute a chunk (n, action_dim), up to success."""
        state = getattr(self.environment, "state", None)
        for action in actions:
            seen: Any = self.window[-1] if state is None else state()
            self.states.append(seen)
            self.actions.append(action.copy())
            step = stepped(self.environment, action)
            self.window = (*self.window[1:], step.obs)
            self.score, self.success = step.score, step.success
            if step.success or len(self.actions) >= self.environment.max_steps:
                return

    def become(self, other: _Particle) -> None:
        self.environment.restore(other.environment.snapshot())
        self.window, self.score = other.window, other.score
        self.states, self.actions = list(other.states), list(other.actions)


def noise_seeds(seed: int, n: int) -> list[int]:
    """Seeds of the particles' noise in the search of `seed`; others than those of `rollouts`."""
    words = np.random.SeedSequence(seed, spawn_key=(2,)).generate_state(n, np.uint64)
    return [int(word >> np.uint64(1)) for word in words]


class Searcher:
    """Searches one seed after another; what comes of a seed depends on it and the settings alone.

    Args:
        policy: any `Policy` of at least `search.particles` lanes.
        environments: `search.particles` of them.

    Raises:
        ValueError: too few lanes or environments, or the policy does not fit the simulator.
    """

    def __init__(self, policy: Policy, environments: Sequence[Searchable], search: Search) -> None:
        for name, got in (("lanes", policy.lanes), ("environments", len(environments))):
            if got < search.particles:
                raise ValueError(f"{name}: got {got}, expected at least {search.particles}")
        check(policy, environments[0])
        if obs_shapes(environments[0]) and not hasattr(environments[0], "state"):
            raise ValueError(
                f"environments: '{environments[0].name}' has obs_shapes and no method state, whose "
                "numbers demonstrations record; give it one"
            )
        if (search.execute or 0) > policy.n_action_steps:
            raise ValueError(
                f"execute: expected 1 to {policy.n_action_steps}, the policy's n_action_steps, got "
                f"{search.execute}"
            )
        self.policy, self.environments, self.search = policy, environments, search

    def __call__(self, seed: int) -> list[Demonstration]:
        """The demonstrations of a seed: none if the search fails."""
        lanes = range(self.search.particles)
        self.policy.reset(list(lanes), noise_seeds(seed, len(lanes)))
        lead = self._particle(0, seed)
        while lead.score < self.search.start:
            if len(lead.actions) >= lead.environment.max_steps:
                return []
            self._advance([lead], self.policy.n_action_steps)
        if lead.success:
            return [self._demonstration(seed, lead)]
        others = [self._particle(lane, seed) for lane in lanes[1:]]
        for other in others:
            other.become(lead)
        winners = self._select([lead, *others])
        return [self._demonstration(seed, winner) for winner in winners]

    def _particle(self, lane: int, seed: int) -> _Particle:
        environment = self.environments[lane]
        first = first_observation(environment, seed)
        # Before the start nothing was seen: the first observation stands in, as in training.
        return _Particle(environment, (first,) * self.policy.n_obs_steps)

    def _advance(self, particles: Sequence[_Particle], execute: int) -> None:
        windows = [particle.window for particle in particles]
        obs = stacked(self.policy, self.environments[0], windows)
        actions: FloatArray = np.asarray(
            self.policy(obs, lanes=list(range(len(particles)))), np.float32
        )
        if not np.isfinite(actions).all():
            raise RuntimeError("the policy's actions are not finite")
        for particle, chunk in zip(particles, actions, strict=True):
            particle.act(chunk[:execute])

    def _select(self, particles: list[_Particle]) -> list[_Particle]:
        search, longest = self.search, particles[0].environment.max_steps
        winners: list[_Particle] = []
        for chunk in range(1, search.chunks + 1):
            self._advance(particles, search.execute or self.policy.n_action_steps)
            won = [p for p in particles if p.success]
            winners += sorted(won, key=lambda p: len(p.actions))
            particles = [p for p in particles if not p.success]
            over = not particles or len(particles[0].actions) >= longest
            if over or len(winners) >= search.winners:
                break
            if chunk % search.interval == 0:
                particles.sort(key=lambda p: -p.score)
                half = len(particles) // 2
                for worse, better in zip(particles[-half:], particles, strict=False):
                    worse.become(better)
        return winners[: search.winners]

    def _demonstration(self, seed: int, particle: _Particle) -> Demonstration:
        kept = slice(-(self.search.last or len(particle.actions)), None)
        return Demonstration(
            seed, np.stack(particle.states[kept]), np.stack(particle.actions[kept])
        )
