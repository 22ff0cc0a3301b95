"""What is timed: a network with its weights, a sampler, lanes, threads; and our engine on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# The tree's own tsad where it is built in place, else the installed one; and tests/cases.py, which
# is shared with the benchmarks.
if str(ROOT) not in sys.path:
    sys.path.insert(0 if any(ROOT.glob("tsad/_core*.so")) else len(sys.path), str(ROOT))
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

import cases  # noqa: E402

import tsad  # noqa: E402
from tsad.checkpoint import read_folder  # noqa: E402
from tsad.config import PolicyConfig  # noqa: E402
from tsad.load import _ASSETS, PRECISIONS, make_model  # noqa: E402
from tsad.samplers import Sampler, make_sampler  # noqa: E402
from tsad.sim.pusht import observation  # noqa: E402

# "pusht" is the bundled policy, the standard transformer: d 256, 8 layers, horizon 10. The others
# have random weights: the published horizon for Push-T, and the size of a manipulation task.
SHAPES = {"pusht": None, "t16": "pusht", "can": "can", "tiny": "tiny"}


@dataclass(frozen=True)
class Task:
    """A policy to run: `tensors` by name in float32, everything else as `tsad.load` has it."""

    shape: str  # a key of SHAPES
    config: PolicyConfig
    tensors: Mapping[str, np.ndarray]
    sampler: Sampler
    lanes: int = 1
    threads: int = 2
    dtype: Any = np.float32  # the peers'


def make_task(
    shape: str = "pusht",
    *,
    sampler: str | None = None,
    steps: int | None = None,
    lanes: int = 1,
    threads: int = 2,
    dtype: Any = np.float32,
) -> Task:
    """The task of a name in `SHAPES`; `sampler` and `steps` replace the policy's own."""
    case = SHAPES[shape]
    if case is None:
        config, tensors, _ = read_folder(_ASSETS / shape)
    else:
        # Random weights that predict noise would drive all actions to the ends of their range,
        # where everybody agrees.
        document = cases.config(case, prediction_type="sample", clip_sample=False)
        config = PolicyConfig.from_dict(document)
        tensors = cases.random_tensors(document["network"], 0)
    table = make_sampler(config.scheduler.to_dict(), sampler=sampler, num_inference_steps=steps)
    return Task(shape, config, tensors, table, lanes, threads, dtype)


def engine(task: Task, precision: str = "float32") -> tsad.SparsePolicy:
    """Our engine on the task."""
    keywords: Any = {} if precision == "float32" else {"precision": precision}
    model = make_model(task.config, task.tensors, None, task.sampler, **keywords)
    return tsad.SparsePolicy(
        model, config=task.config, sampler=task.sampler, lanes=task.lanes, threads=task.threads,
        precision=precision,
    )  # fmt: skip


def precisions() -> list[str]:
    """Those that this tsad knows on a CPU; "auto" is one of them by another name."""
    return [name for name in PRECISIONS["cpu"] if name != "auto"]


def normalise(actions: np.ndarray, task: Task) -> np.ndarray:
    """Raw actions in the network's units, float64."""
    affine = task.config.normalizer.action
    return np.asarray(actions, np.float64) * np.array(affine.scale) + np.array(affine.offset)


def observations(task: Task, n: int, seed: int = 0) -> np.ndarray:
    """Made-up observations, raw units: (n, lanes, n_obs_steps, obs_dim).

    Of Push-T they are scenes: on others the policy would drive its actions to the ends of their
    range, where everybody agrees. Random weights take anything.
    """
    net, rng = task.config.network, np.random.default_rng(seed)
    shape = (n, task.lanes, net.n_obs_steps)
    if task.shape == "pusht":
        low, high = (60, 60, 120, 120, -np.pi), (450, 450, 400, 400, np.pi)
        scenes = rng.uniform(low, high, (n * task.lanes, 1, 5))
        moves = rng.normal(0, 5, (n * task.lanes, net.n_obs_steps, 2))  # of the agent
        rows = []
        for scene, move in zip(scenes, moves, strict=True):
            states = np.repeat(scene, net.n_obs_steps, 0)
            states[:, :2] += move
            rows.append([observation(state) for state in states])
        return np.array(rows, np.float32).reshape(*shape, net.obs_dim)
    affine = task.config.normalizer.obs
    inside = rng.uniform(-1, 1, (*shape, net.obs_dim))
    return ((inside - np.array(affine.offset)) / np.array(affine.scale)).astype(np.float32)
