"""`stats["error_bound"]`: measured on the policy, and held on observations it was not measured on.

The right actions are those of the specification, in float64.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import config, random_tensors
from policies import make_policy

import tsad
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig
from tsad.load import read_policy
from tsad.precision import FLOAT32_BOUND
from tsad.reference import ReferencePolicy


def folder(path: Path, name: str, *, attention: float = 1.0, **scheduler: Any) -> Path:
    case = config(name, **scheduler)
    tensors = random_tensors(case["network"], 5)
    for key in tensors:
        if "attn" in key and key.endswith("weight"):
            tensors[key] = tensors[key] * np.float32(attention)
    write_folder(path, PolicyConfig.from_dict(case), tensors)
    return path


def largest(policy: Any, chunks: int, seed: int) -> float:
    """The largest difference from float64 on other observations and noise, normalised units."""
    case = policy.config
    tensors = read_policy(policy._source)[1]
    right = ReferencePolicy(case, tensors)
    rng, obs_map = np.random.default_rng(seed), case["normalizer"]["obs"]
    scale = np.array(case["normalizer"]["action"]["scale"])
    worst = 0.0
    for _ in range(chunks):
        inside = rng.uniform(-1, 1, (1, policy.n_obs_steps, policy.obs_dim))
        obs = ((inside - obs_map["offset"]) / obs_map["scale"]).astype(np.float32)
        shape = (len(policy.timesteps), 1, policy.horizon, policy.action_dim)
        noise = rng.standard_normal(shape, np.float32)
        right.reset()
        policy.reset()
        expected = right(obs, noise, return_horizon=True)
        got = policy(obs, noise=noise, return_horizon=True)
        worst = max(worst, float(np.abs((got - expected) * scale).max()))
    return worst


WIDE = {"type": "dpmsolver++", "num_inference_steps": 10, "clip_sample": False}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int16", "int8"])
@pytest.mark.parametrize(
    ("name", "attention", "scheduler"),
    [
        ("pusht", 3.0, {"type": "ddim", "num_inference_steps": 16}),
        ("kitchen", 1.0, WIDE),
        ("tiny", 1.0, {"type": "ddim", "num_inference_steps": 4}),
    ],
)
def test_the_bound_holds(
    tmp_path: Path, precision: str, name: str, attention: float, scheduler: dict[str, Any]
) -> None:
    path = folder(tmp_path / "x", name, attention=attention, **scheduler)
    policy = tsad.load(path, precision=precision)
    bound, seen = policy.stats["error_bound"], largest(policy, 6, 77)
    assert FLOAT32_BOUND < bound and seen < bound
    assert bound < 20 * seen + FLOAT32_BOUND  # it says something


def test_it_is_the_policy_s_own(tmp_path: Path) -> None:
    steps = {"type": "ddim", "num_inference_steps": 4}
    calm = tsad.load(folder(tmp_path / "calm", "tiny", **steps), precision="int16")
    wild = tsad.load(folder(tmp_path / "wild", "tiny", attention=8.0, **steps), precision="int16")
    assert calm.stats["error_bound"] < wild.stats["error_bound"]
    exact = tsad.load(tmp_path / "calm", precision="float32")
    assert exact.stats["error_bound"] == FLOAT32_BOUND < calm.stats["error_bound"]
    assert tsad.load(tmp_path / "calm", precision="int16").stats == calm.stats  # the same each time


def test_reading_it_changes_nothing(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", "tiny", type="ddpm", num_inference_steps=4)
    policies = [tsad.load(path, precision="int16") for _ in range(2)]
    obs = np.zeros((5, policies[0].n_obs_steps, policies[0].obs_dim), np.float32)
    results = []
    for policy, looks in zip(policies, (False, True), strict=True):
        policy.reset(seed=1)
        for window in obs:
            results.append(policy(window))
            if looks:
                assert policy.stats["chunks"] > 0
    np.testing.assert_array_equal(results[:5], results[5:])


def test_what_cannot_be_measured_is_not_said(tmp_path: Path) -> None:
    assert make_policy(precision="int16").stats["error_bound"] is None
    path = folder(tmp_path / "x", "tiny")
    policy = tsad.load(path, precision="int16", sampler="ddim", num_inference_steps=2)
    shutil.rmtree(path)
    assert policy.stats["error_bound"] is None
