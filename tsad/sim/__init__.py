"""Closed-loop evaluation in simulators: Push-T, and yours.

A simulator is a class that meets `Environment`; everything that comes from it is checked:

>>> class PointMass:
...     name, obs_meaning = "point", "x, y"
...     obs_dim, action_dim, max_steps = 2, 2, 50
...
...     def reset(self, seed):
...         self.at = np.random.default_rng(seed).uniform(-1, 1, 2)
...         return self.at.astype(np.float32)
...
...     def step(self, action):
...         self.at = self.at + 0.1 * action
...         far = np.linalg.norm(self.at)
...         there = far < 0.05
...         return tsad.sim.Step(self.at.astype(np.float32), max(0, 1 - far), there, there)
...
...     def close(self):
...         pass

``tsad eval --simulator point:PointMass --policy FOLDER`` plays it if it is in ``point.py``, and so
do the other commands that play. In Python, `register` gives one a name and `make` builds it, and
`rollouts` steps one environment per lane of a policy.
"""

from __future__ import annotations

from tsad.sim.disturbance import Disturbance
from tsad.sim.rollout import (
    Chunk,
    Episode,
    Policy,
    check,
    check_executed,
    noise_seed,
    rollouts,
)
from tsad.sim.simulators import (
    Environment,
    Facts,
    FloatArray,
    Observation,
    Observations,
    SimulatorError,
    Step,
    facts,
    make,
    names,
    register,
)

__all__ = [
    "Chunk",
    "Disturbance",
    "Environment",
    "Episode",
    "Facts",
    "FloatArray",
    "Observation",
    "Observations",
    "Policy",
    "SimulatorError",
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
