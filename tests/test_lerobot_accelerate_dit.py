"""`tsad.lerobot.accelerate` of a multi_task_dit: the same random numbers, the same actions.

Runs on a stand-in with LeRobot's interface; tests/test_lerobot_real.py runs LeRobot itself.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import lerobot_standin as standin
import pytest
import torch
from torch_dit import Shape

from tsad import lerobot
from tsad.lerobot import patch, plugin

SHAPE = Shape(horizon=8)
BOUND = 2e-5  # relative to the largest action: float32 against the stand-in's float64 network
CONFIGS: list[dict[str, Any]] = [
    dict(num_inference_steps=20),
    dict(noise_scheduler_type="DDIM", num_inference_steps=10, prediction_type="sample"),
    dict(objective="flow_matching", num_integration_steps=10),
    dict(objective="flow_matching", num_integration_steps=3, integration_method="rk4"),
]
FLOW = CONFIGS[2]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    standin.install(monkeypatch)
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    yield
    patch.uninstall()
    patch.on_first_chunk = None


def make(seed: int = 0, shape: Shape = SHAPE, **config: Any) -> standin.MultiTaskDiTPolicy:
    return standin.MultiTaskDiTPolicy(standin.dit_config(shape, **config), shape, seed).eval()


def episode(policy: Any, batch: int = 2, chunks: int = 3) -> torch.Tensor:
    """Chunks after a reset, LeRobot's global generator seeded."""
    size = (chunks, batch, SHAPE.n_obs_steps * SHAPE.obs_dim)
    conds = torch.randn(size, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(0)
    policy.reset()
    return torch.stack([policy.predict_action_chunk(cond) for cond in conds])


def near(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() < BOUND * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("shape", [SHAPE, Shape(horizon=8, use_rope=False, positions=True)])
@pytest.mark.parametrize("config", CONFIGS)
def test_actions_are_lerobots_own(config: dict[str, Any], shape: Shape) -> None:
    policy = make(shape=shape, **config)
    expected = episode(policy)
    state = torch.get_rng_state()
    assert lerobot.accelerate(policy) is policy and lerobot.is_accelerated(policy)
    got = episode(policy)
    assert near(got, expected) and not torch.equal(got, expected)  # by another road
    assert torch.equal(torch.get_rng_state(), state)  # as many numbers were drawn
    assert lerobot.restore(policy) is policy and not lerobot.is_accelerated(policy)
    assert torch.equal(episode(policy), expected)


def test_batches_copies_and_changed_weights() -> None:
    policy, other = lerobot.accelerate(make(**FLOW)), make(seed=1, **FLOW)
    for batch in (1, 3, 2):
        assert near(episode(policy, batch), episode(make(**FLOW), batch))
    first = episode(policy)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert lerobot.is_accelerated(twin) and torch.equal(episode(twin), first)
    policy.load_state_dict(other.state_dict())
    assert near(episode(policy), episode(other))
    for p in policy.parameters():  # as an EMA swaps: unseen until the next reset
        p.data.mul_(1.1)
    plain = lerobot.restore(copy.deepcopy(policy))
    assert near(episode(policy), episode(plain))
    assert not any("tsad" in name for name in policy.state_dict())


def test_training_and_gradients_are_lerobots() -> None:
    policy = lerobot.accelerate(make(**FLOW))
    cond = torch.randn(2, SHAPE.n_obs_steps * SHAPE.obs_dim)
    engine = policy.objective.__dict__["_tsad"]
    policy.objective.conditional_sample(policy.noise_predictor, 2, cond)  # gradients are on
    policy.train()
    policy.predict_action_chunk(cond)
    assert engine._policy is None  # neither ran here
    policy.eval()
    policy.predict_action_chunk(cond)
    assert engine._policy is not None


def test_settings() -> None:
    policy, dense = make(**FLOW), episode(make(**FLOW))
    lerobot.accelerate(policy, num_inference_steps=4, precision="int8", sparsity=0.4)
    assert not near(episode(policy), dense)
    inner = policy.objective.__dict__["_tsad"]._policy
    assert (inner.num_inference_steps, inner.precision, inner.sparsity) == (4, "int8", 0.4)
    for change, message in (
        (dict(sampler="ddim"), "sampler: expected one of"),
        (dict(timestep_spacing="trailing"), "^timestep_spacing: expected one of 'leading', got"),
        (dict(num_inference_steps=0), "num_inference_steps"),
    ):
        refused = make(**FLOW)
        with pytest.raises(ValueError, match=message):
            lerobot.accelerate(refused, **change)
        assert not lerobot.is_accelerated(refused)
    with pytest.raises(ValueError, match=r"expected one of euler, rk4, got .heun."):
        lerobot.accelerate(make(objective="flow_matching", integration_method="heun"))


def test_the_sidecar_asks(tmp_path: Path) -> None:
    plugin.activate()
    expected = episode(make(**FLOW))
    (tmp_path / "tsad.json").write_text(json.dumps({"num_inference_steps": 10}))
    policy = make(pretrained_path=tmp_path, **FLOW)
    assert near(episode(policy), expected) and lerobot.is_accelerated(policy)
