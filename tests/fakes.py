"""A policy and a simulator that are small enough to reason about, for tests of what uses them.

`FakePolicy` keeps the contract that `tsad.sim` relies on: a stream and a memory per lane, nothing
shared. Its actions depend on the observation, the noise and the lane's own past, so that a lane
that got another's noise, past or observation gives other numbers.
"""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np

from tsad.sim import Step


class FakePolicy:
    n_obs_steps, n_action_steps, horizon = 2, 4, 5
    obs_dim, action_dim = 3, 2
    model = SimpleNamespace(weight_bytes=0)

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self.streams: list[Any] = [None] * lanes
        self.memory = np.zeros(lanes, np.float32)
        self.calls: list[list[int]] = []

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        lanes = list(range(self.lanes)) if lanes is None else list(lanes)
        for row, lane in enumerate(lanes):
            entropy = (
                np.random.SeedSequence(seed, spawn_key=(lane,))
                if isinstance(seed, int)
                else np.random.SeedSequence(seed[row])
            )
            self.streams[lane] = np.random.Generator(np.random.PCG64(entropy))
            self.memory[lane] = 0

    def __call__(self, obs: Any, *, lanes: Any = None) -> Any:
        lanes = list(range(self.lanes)) if lanes is None else list(lanes)
        assert obs.dtype == np.float32 and obs.flags.c_contiguous
        assert obs.shape == (len(lanes), self.n_obs_steps, self.obs_dim)
        self.calls.append(lanes)
        actions = np.empty((len(lanes), self.n_action_steps, self.action_dim), np.float32)
        for row, lane in enumerate(lanes):
            noise = self.streams[lane].standard_normal(actions[row].shape, np.float32)
            self.memory[lane] += obs[row].sum() + noise.sum()
            actions[row] = noise + np.tanh(self.memory[lane]) + obs[row, -1, 0]
        return actions


class FakeWorld:
    """Ends after a number of steps that depends on the seed and on the actions."""

    name, obs_dim, action_dim, max_steps = "fake", 3, 2, 23
    obs_meaning = "three numbers"

    def reset(self, seed: int) -> Any:
        self.position = np.random.default_rng(seed).normal(size=3)
        return self.seen()

    def seen(self) -> Any:
        return self.position.astype(np.float32)

    def step(self, action: Any) -> Step:
        self.position = self.position * 0.9
        self.position[:2] += 0.1 * np.asarray(action, np.float64)
        # Any number in [0, 1), and another one wherever a bit of the past differs.
        score = float(np.abs(self.position).sum() * 1e3 % 1)
        success = score > 0.93
        return Step(self.seen(), score, success, success)

    def rest_action(self) -> Any:
        return self.position[:2]

    def render(self, size: int) -> Any:
        return np.full((size, size, 3), 128, np.uint8)

    def close(self) -> None:
        pass


class CopyableWorld(FakeWorld):
    """A fake world that can be copied."""

    def state(self) -> Any:
        return self.position.astype(np.float32)

    def snapshot(self) -> Any:
        return (self.position.copy(),)

    def restore(self, snapshot: Any) -> Any:
        (self.position,) = snapshot
        return self.seen()


class Table(FakeWorld):
    """Takes a policy of the case "tiny"; as `"fakes:Table"` every process can make it."""

    name, obs_dim = "table", 6

    def reset(self, seed: int) -> Any:
        super().reset(seed)
        return self._seen()

    def step(self, action: Any) -> Step:
        return super().step(action)._replace(obs=self._seen())

    def _seen(self) -> Any:
        return np.resize(self.position, self.obs_dim).astype(np.float32)


class BrokenTable(Table):
    """Falls over in the episode of seed 5."""

    def reset(self, seed: int) -> Any:
        if seed == 5:
            raise LookupError("the table has three legs")
        return super().reset(seed)


class DeadlyTable(Table):
    """Kills its process in the episode of seed 5, unless that is $TABLES_OWNER."""

    def reset(self, seed: int) -> Any:
        if seed == 5 and os.environ["TABLES_OWNER"] != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(seed)


class FakePushT(FakePolicy):
    """Sizes of Push-T, and the dial and facts that the command line reads.

    Its actions lean towards the centre of the table and shift a little with the sparsity.
    """

    obs_dim, n_action_steps, horizon, num_inference_steps = 20, 8, 10, 4
    has_pruner = False
    device, precision, backend, max_sparsity = "cpu", "float32", "ref", 0.75
    block_types = ["self_attn", "cross_attn", "feed_forward"] * 2
    blocks = [f"layers.{b // 3}.{name}" for b, name in enumerate(block_types)]
    block_costs = np.array([6, 1, 9] * 2, np.int64)
    timesteps = np.array([75, 50, 25, 0])
    timings = {"encode": 0.1, "prune": 0.0, "plan": 0.1, "denoise": 0.7, "total": 0.9}
    stats = {"bytes": 4096, "weight_bytes": 1 << 20, "error_bound": 1e-4}
    threads = 1
    warm_start, lead, _plans = None, 0.0, ()
    config = {
        "network": {
            "type": "diffusion_policy_transformer",
            "horizon": 10,
            "n_obs_steps": 2,
            "n_action_steps": 8,
            "obs_dim": 20,
            "action_dim": 2,
            "n_layer": 2,
            "n_head": 2,
            "n_emb": 16,
        },
        "scheduler": {
            "type": "ddim",
            "num_train_timesteps": 100,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "num_inference_steps": 4,
        },
        "normalizer": {"obs": {"scale": [0.004] * 20, "offset": [-1.0] * 20}},
    }

    def __init__(self, lanes: int = 1) -> None:
        super().__init__(lanes)
        self.reset(seed=0)
        self._sparsity, self._planner, self._plan = 0.0, "uniform", None

    @property
    def sparsity(self) -> float:
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        if not 0 <= value <= self.max_sparsity:
            raise ValueError(f"sparsity: got {value}, expected 0 to {self.max_sparsity}")
        self._sparsity, self._plan = value, None

    @property
    def planner(self) -> str:
        return self._planner

    @planner.setter
    def planner(self, value: str) -> None:
        if value not in ("uniform", "dense"):
            raise ValueError(f"planner: got {value!r}, expected 'uniform' or 'dense'")
        self._planner = value

    @property
    def plan(self) -> Any:
        from tsad import Plan

        if self._plan is not None:
            return self._plan
        sources = np.full((4, 6), 2, np.uint8)
        sources[: round(4 * (1 - self._sparsity))] = 0
        return Plan(sources, blocks=self.blocks, types=self.block_types, cost=self.block_costs)

    @plan.setter
    def plan(self, value: Any) -> None:
        if value.sources.shape != (4, 6):
            raise ValueError(f"plan: got shape {value.sources.shape}, expected (4, 6)")
        self._plan = value

    def __call__(self, obs: Any, *, lanes: Any = None) -> Any:
        noise = super().__call__(obs, lanes=lanes)
        return (256 + 60 * np.tanh(noise) + 5 * self._sparsity).astype(np.float32)
