"""How long chunks take here, and on which processor."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tsad.precision import made_up_observations
from tsad.statistics import ENOUGH, percentile

if TYPE_CHECKING:
    from tsad import SparsePolicy


STAGES = ("encode", "prune", "plan", "denoise", "total")


def observations(policy: SparsePolicy, n: int) -> NDArray[np.float32]:
    """Made-up observations within the range of the training data, (n, lanes, steps, dim)."""
    made_up = made_up_observations(policy, n * policy.lanes)
    return made_up.reshape(n, policy.lanes, *made_up.shape[1:])


class Clock:
    """The times of one setting, in milliseconds.

    ``load`` gives the policy, for each round, and ``setup`` makes it run the setting: several may
    share a policy.
    """

    def __init__(
        self, name: str, load: Callable[[], SparsePolicy], setup: Callable[[SparsePolicy], None]
    ) -> None:
        self.name, self._load, self._setup = name, load, setup
        self.wall: list[float] = []
        self.first: list[float] = []
        self.medians: list[float] = []  # of each round
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.plan: Any = None

    def round(self, obs: NDArray[np.float32], period: float = 0.0) -> None:
        """One chunk per row of `obs`, after a reset and two chunks that do not count.

        ``period``: seconds from one call to the next; whoever takes longer is called at once.
        """
        policy = self._load()
        policy.reset(seed=0)  # a plan that reads rollouts can't be set on another plan's
        self._setup(policy)
        self.first.append(milliseconds(policy, obs[0]))
        milliseconds(policy, obs[0])
        begin = len(self.wall)
        tick = time.perf_counter() + period
        for row in obs:
            if period:
                time.sleep(max(tick - time.perf_counter(), 0.0))
                tick = max(tick, time.perf_counter()) + period
            self.wall.append(milliseconds(policy, row))
            timings = policy.timings
            for stage in STAGES:
                self.stages[stage].append(float(timings[stage]))
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
            "stages_ms": {stage: percentiles(self.stages[stage]) for stage in STAGES},
            "chunks_per_second": per_second,
            "actions_per_second": per_second * policy.n_action_steps,
        }


def milliseconds(call: Callable[[NDArray[np.float32]], Any], obs: NDArray[np.float32]) -> float:
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
