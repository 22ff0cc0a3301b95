"""The core runs LeRobot's policies: beside what LeRobot recorded, and beside the reference."""

from __future__ import annotations

from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, _core
from tsad.config import PolicyConfig
from tsad.convert.lerobot import Description, read_lerobot
from tsad.families import block_types
from tsad.load import make_model
from tsad.reference import ReferencePolicy

TOLERANCE = 1e-5  # float32 engine beside the reference, of the largest number


def unnormalised(described: Description) -> dict[str, Any]:
    """The policy for observations and actions in the network's units."""
    net = described.policy["network"]
    maps = {
        key: {"scale": [1.0] * net[f"{key}_dim"], "offset": [0.0] * net[f"{key}_dim"]}
        for key in ("obs", "action")
    }
    return described.policy | {"normalizer": maps, "format": "tsad", "format_version": 1}


def core(described: Description, reference: ReferencePolicy, lanes: int = 1) -> _core.Policy:
    config = PolicyConfig.from_dict(unnormalised(described))
    tensors = {k: np.ascontiguousarray(v, np.float32) for k, v in described.tensors.items()}
    return _core.Policy(make_model(config, tensors, None, reference.sampler), lanes=lanes)


@pytest.mark.parametrize("name", lerobot.CASES)
def test_chunks_equal_lerobot(name):
    described, e = read_lerobot(lerobot.FOLDER / name), lerobot.expected(name)
    reference = ReferencePolicy(described.policy, described.tensors)
    policy = core(described, reference, lanes=2)
    noise = lerobot.all_noise(e, "sample", reference.num_inference_steps)
    n_obs = described.policy["network"]["n_obs_steps"]
    got = policy(e["sample/cond"].reshape(2, n_obs, -1), noise=noise, return_horizon=True)
    error = np.abs(got - e["sample/after_step_f64"][-1]).max()
    assert error <= lerobot.TOLERANCE * lerobot.float32_error(name, "sample/after_step")


def random_plan(rng: Any, types: list[str], steps: int, filled: Any) -> Any:
    """Any source that exists, for every cell."""
    plan = np.zeros((steps, len(types)), np.uint8)
    of_type, of_block = set(), set()
    for k in range(steps):
        for b, kind in enumerate(types):
            can = [COMPUTE, COMPUTE, SKIP] + [REUSE_TYPE] * (kind in of_type)
            can += [REUSE_STEP] * (b in of_block)
            can += [REUSE_ROLLOUT] * bool(filled is not None and filled[k, b])
            plan[k, b] = rng.choice(can)
            if plan[k, b] == COMPUTE:
                of_type.add(kind)
                of_block.add(b)
    return plan


@pytest.mark.parametrize("name", lerobot.CASES)
def test_random_plans_equal_the_reference(name):
    """Two chunks with one plan each, ten times: every kind of reuse, of this chunk and the last."""
    described, rng = read_lerobot(lerobot.FOLDER / name), np.random.default_rng(3)
    net, types = described.policy["network"], block_types(described.policy["network"])
    settings = unnormalised(described)
    reference = ReferencePolicy(settings, described.tensors, num_inference_steps=5)
    policy = core(described, reference)
    for _ in range(10):
        first = random_plan(rng, types, 5, None)
        later = random_plan(rng, types, 5, first == COMPUTE)
        reference.reset()
        policy.reset()
        policy._set_plan(0, later, first)
        for _ in range(2):
            obs = rng.standard_normal((1, net["n_obs_steps"], net["obs_dim"]), np.float32)
            noise = rng.standard_normal((5, 1, net["horizon"], net["action_dim"]), np.float32)
            expected = reference(obs, noise, later, first=first, return_horizon=True)
            got = policy(obs, noise=noise, return_horizon=True)
            assert np.abs(got - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
