"""Closed-loop evaluation in real simulators.

A simulator is a class that meets `Environment`; `register` gives it a name, `make` builds one.
`rollouts` steps one environment per lane of a policy. Another simulator needs one module and one
line in `_REGISTRY`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tsad.sim.rollout import (
    Chunk,
    Episode,
    Policy,
    check,
    check_executed,
    noise_seed,
    rollouts,
)

FloatArray = NDArray[np.floating[Any]]


class Step(NamedTuple):
    """What one environment step gives.

    `obs` is float32 (obs_dim,), the observation of the policy in its own raw units. `score` is in
    [0, 1]; the score of an episode is the largest of its steps. `done` ends the episode early.
    """

    obs: NDArray[np.float32]
    score: float
    success: bool
    done: bool


class Environment(Protocol):
    """One simulated world, stepped by one lane. A seed fixes it completely."""

    name: str
    obs_dim: int
    action_dim: int
    max_steps: int
    obs_meaning: str

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Start the episode of `seed`; returns the first observation, float32 (obs_dim,)."""

    def step(self, action: FloatArray) -> Step:
        """Execute one action (action_dim,), raw units."""

    def rest_action(self) -> FloatArray:
        """The action (action_dim,), raw units, that keeps the robot where it is now."""

    def render(self, size: int) -> NDArray[np.uint8]:
        """The scene as it is now, uint8 (size, size, 3)."""

    def close(self) -> None:
        """Free what the simulator holds."""


class Facts(NamedTuple):
    """What is known of a simulator without importing it."""

    location: str
    first_seed: int
    packages: tuple[str, ...]


# The modules are imported when an environment is made: their packages are an optional extra.
_REGISTRY: dict[str, Facts] = {
    # Seeds from 100000 are Diffusion Policy's test seeds for this task.
    "pusht": Facts("tsad.sim.pusht:PushT", 100_000, ("gym-pusht", "pymunk")),
}


def names() -> list[str]:
    """The simulators that `make` knows, sorted."""
    return sorted(_REGISTRY)


def facts(name: str) -> Facts:
    """First test seed and package names of the simulator `name`; ValueError if it is unknown."""
    if name not in _REGISTRY:
        raise ValueError(
            f"name: unknown simulator {name!r}; expected one of {', '.join(names())}; "
            "tsad.sim.register adds one"
        )
    return _REGISTRY[name]


def register(
    name: str, location: str, *, first_seed: int = 0, packages: tuple[str, ...] = ()
) -> None:
    """Add a simulator: `location` is "module:Class", a class that meets `Environment`.

    `packages` are the distributions whose versions decide its results; they are kept with them.
    """
    _REGISTRY[name] = Facts(location, first_seed, packages)


def make(name: str) -> Environment:
    """Build the simulator `name`; ValueError if unknown, ImportError naming the missing extra."""
    module, _, attribute = facts(name).location.partition(":")
    environment: Environment = getattr(importlib.import_module(module), attribute)()
    return environment


__all__ = [
    "Chunk",
    "Environment",
    "Episode",
    "Facts",
    "Policy",
    "Step",
    "check",
    "check_executed",
    "facts",
    "make",
    "names",
    "noise_seed",
    "register",
    "rollouts",
]
