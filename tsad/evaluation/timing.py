"""How long chunks take here, and on which processor."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsad.image_policy import ImagePolicy
from tsad.precision import made_up_observations
from tsad.statistics import ENOUGH, percentile

if TYPE_CHECKING:
    from tsad import SparsePolicy


def observations(policy: SparsePolicy, n: int) -> Any:
    """Made-up observations, n that the policy can be called with.

    They are (n, lanes, steps, dim) within the range of the training data; of a policy that sees
    images, dicts with random ones, so that every image is new.
    """
    made_up = made_up_observations(policy, n * policy.lanes)
    rows = made_up.reshape(n, policy.lanes, *made_up.shape[1:])
    if not isinstance(policy, ImagePolicy):
        return rows
    config, rng = policy.config, np.random.default_rng(0)
    names = [feature["name"] for feature in config["features"]]
    ends = np.cumsum([feature["dim"] for feature in config["features"]])[:-1]
    found = []
    for row in rows:
        parts = map(np.ascontiguousarray, np.split(row, ends, -1))
        obs = dict(zip(names, parts, strict=True))
        for camera in config["vision"]["cameras"]:
            shape = (*row.shape[:2], camera["height"], camera["width"], 3)
            obs[camera["name"]] = rng.integers(0, 256, shape, np.uint8)
        found.append(obs)
    return found


class Clock:
    """The times of one setting, in milliseconds.

    ``load`` gives the policy, for each round, and ``setup`` makes it run the setting: several may
    share a policy. ``executed``: how many actions of a chunk are, if not all.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], SparsePolicy],
        setup: Callable[[SparsePolicy], None],
        executed: int | None = None,
    ) -> None:
        self.name, self._load, self._setup, self._executed = name, load, setup, executed
        self.wall: list[float] = []
        self.first: list[float] = []
        self.medians: list[float] = []  # of each round
        self.stages: dict[str, list[float]] = {}
        self.plan: Any = None

    def round(self, obs: Any, period: float = 0.0) -> None:
        """One chunk per row of `obs`, after a reset and two chunks that do not count.

        ``period``: seconds from one call to the next; whoever takes longer is called at once.
        """
        policy = self._load()
        policy.reset(seed=0)  # a plan that reads rollouts can't be set on another plan's
        self._setup(policy)
        self.first.append(milliseconds(policy, obs[-1]))  # images of obs[0] would be known then
        milliseconds(policy, obs[-1])
        begin = len(self.wall)
        tick = time.perf_counter() + period
        for row in obs:
            if period:
                time.sleep(max(tick - time.perf_counter(), 0.0))
                tick = max(tick, time.perf_counter()) + period
            self.wall.append(milliseconds(policy, row))
            for stage, value in policy.timings.items():
                self.stages.setdefault(stage, []).append(float(value))
        self.medians.append(float(np.median(self.wall[begin:])))
        plan = policy.plan
        self.plan = plan[0] if isinstance(plan, list) else plan

    def facts(self) -> dict[str, Any]:
        """Percentiles and rates."""
        policy = self._load()
        per_second = 1e3 * policy.lanes * len(self.wall) / sum(self.wall)
        return {
            "name": self.name,
            "sampler": sampler_name(policy),
            "precision": policy.precision,
            "sparsity": float(self.plan.sparsity),
            "cell_sparsity": float(self.plan.cell_sparsity),
            "passes": float(self.plan.cost) * policy.num_inference_steps,
            "chunks": len(self.wall) * policy.lanes,
            "call_ms": percentiles(self.wall),
            "first_call_ms": float(np.median(self.first)),
            "stages_ms": {stage: percentiles(values) for stage, values in self.stages.items()},
            "chunks_per_second": per_second,
            "actions_per_second": per_second * (self._executed or policy.n_action_steps),
        }


def milliseconds(call: Callable[[Any], Any], obs: Any) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    call(obs)
    return (time.perf_counter() - begin) * 1e3


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p90 and p99, None where there are too few to tell, and the largest."""
    return {**{f"p{q}": percentile(values, q) for q in ENOUGH}, "max": max(values)}


def cpu_name() -> str:
    """The processor's marketing name, family and model, as well as this system tells them.

    A guest may be told "AMD EPYC", which half a dozen generations are.
    """
    with contextlib.suppress(OSError, KeyError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or platform.machine()


def sampler_name(policy: SparsePolicy) -> str:
    """The sampler in words, e.g. "ddpm, 100 steps"."""
    scheduler = policy.config["scheduler"]
    steps, run = scheduler["num_inference_steps"], policy.num_inference_steps
    return f"{scheduler['type']}, {f'the last {run} of ' if run < steps else ''}{steps} steps"
