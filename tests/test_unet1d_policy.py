"""A policy with a UNet, from a tsad folder to actions: plans, samplers, precisions, warm start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_unet1d import SHAPES
from torch_unet import predict

import tsad
from tsad.checkpoint import CheckpointError, read_folder, write_folder
from tsad.config import PolicyConfig
from tsad.planners import random as random_plan
from tsad.reference.layers import sinusoid

SHAPE = SHAPES["lerobot"]


def config(**scheduler: Any) -> dict[str, Any]:
    return {
        "format": "tsad",
        "format_version": 1,
        "network": SHAPE.network(8),
        "scheduler": {"type": "ddpm", "clip_sample": False, "prediction_type": "sample"}
        | scheduler,
        "normalizer": {
            "obs": {"scale": [0.5] * SHAPE.obs_dim, "offset": [0.25] * SHAPE.obs_dim},
            "action": {"scale": [2.0] * SHAPE.action_dim, "offset": [0.5] * SHAPE.action_dim},
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet") / "policy"
    write_folder(path, PolicyConfig.from_dict(config()), SHAPE.weights(1))
    return path


def observations(seed: int, lanes: int = 1) -> Any:
    shape = (lanes, SHAPE.n_obs_steps, SHAPE.obs_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_a_folder_loads_and_its_network_is_pytorchs(folder: Path) -> None:
    policy = tsad.load(folder)
    _, weights, _ = read_folder(folder)
    assert policy.blocks[0] == "down_modules.0.0" and policy.n_blocks == 12
    assert policy.block_types[0] == "conv_residual[16x16]"
    obs = observations(1)
    sample = np.random.default_rng(2).standard_normal((1, 16, 2), np.float32)
    for step in (0, 99):
        time = sinusoid(policy.timesteps[[step]], SHAPE.n_emb, np.float32, angles=np.float32)
        expected = predict(SHAPE, weights, sample, time, 0.5 * obs + 0.25).numpy()
        got = policy.predict_noise(sample, step, obs)
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["float32", "int16", "int8"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_samplers_plans_and_precisions(folder: Path, sampler: str, precision: str) -> None:
    settings = dict(sampler=sampler, num_inference_steps=8, precision=precision)
    policy, dense = (tsad.load(folder, lanes=2, **settings) for _ in range(2))
    policy.plan = random_plan(policy, 0.5, seed=1)
    assert 0.5 <= policy.plan[0].sparsity < 0.9
    for p in (policy, dense):
        p.reset(seed=3)
    obs = observations(4, lanes=2)
    np.testing.assert_array_equal(policy(obs), dense(obs))  # an episode begins densely
    sparse, whole = policy(obs), dense(obs)
    assert sparse.shape == whole.shape == (2, 8, 2)
    assert np.isfinite(sparse).all() and not np.array_equal(sparse, whole)
    policy.sparsity = 0.75  # the dial, uniform
    policy.reset(seed=3)
    policy(obs)
    assert np.isfinite(policy(obs)).all()


def test_warm_start_and_lanes(folder: Path) -> None:
    settings = dict(sampler="ddim", num_inference_steps=8, warm_start=3)
    policy = tsad.load(folder, lanes=2, **settings)
    policy.reset(seed=0)
    both = [policy(observations(i, lanes=2)) for i in range(3)]
    assert policy.num_inference_steps == 3
    policy.reset(seed=0)
    for i, chunk in enumerate(both):
        for lane in (1, 0):
            alone = policy(observations(i, lanes=2)[lane : lane + 1], lanes=[lane])
            np.testing.assert_array_equal(alone[0], chunk[lane])


def test_what_is_not_there_for_a_unet_is_said(folder: Path) -> None:
    policy = tsad.load(folder)
    with pytest.raises(ValueError, match="pruner"):
        policy.planner = "pruner"
    wrong = config()
    wrong["pruner"] = {"type": "mlp"}
    with pytest.raises((ValueError, CheckpointError), match="pruner: expected a network of type"):
        tsad.checkpoint.write_folder(
            folder.parent / "pruned", PolicyConfig.from_dict(wrong), SHAPE.weights(1), {}
        )
