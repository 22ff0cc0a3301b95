"""The C engine against PyTorch's own modules in float64 and the samplers of diffusers.

The bars of the project's promise "right": 1e-5 for one forward pass in six shapes, 1e-4 for a
whole chunk with the same noise, for random and for the bundled weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'tsad-policy[test]'")
diffusers = pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")

from cases import (  # noqa: E402
    CHUNK_TOLERANCE,
    NETWORK_TOLERANCE,
    SHAPES,
    config,
    random_inputs,
    random_tensors,
    relative_error,
)
from engine import make, make_reference  # noqa: E402

import tsad  # noqa: E402
from tsad.checkpoint import read_folder  # noqa: E402
from tsad.load import _ASSETS  # noqa: E402
from tsad.training.network import from_config  # noqa: E402


def twin(network: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """PyTorch's modules in float64 with these weights."""
    model = from_config(network).double().eval()
    model.load_state_dict({k: torch.from_numpy(v).double() for k, v in tensors.items()})
    return model


def normalise(case: dict[str, Any], obs: np.ndarray) -> Any:
    part = case["normalizer"]["obs"]
    return torch.from_numpy(obs.astype(float) * np.array(part["scale"]) + np.array(part["offset"]))


@pytest.mark.parametrize("name", SHAPES)
def test_noise_prediction(name: str) -> None:
    case = config(name)
    model = twin(case["network"], random_tensors(case["network"], 0))
    engine = make(name)
    obs, noise = random_inputs(case, 1, lanes=2, steps=1)
    for step in (0, 49, 99):
        with torch.no_grad():
            sample = torch.from_numpy(noise[0]).double()
            expected = model(sample, torch.tensor(99 - step), normalise(case, obs)).numpy()
        got = engine.predict_noise(noise[0], step, obs)
        assert relative_error(got, expected) < NETWORK_TOLERANCE


def bundled() -> tuple[dict[str, Any], Any]:
    parsed, tensors, _ = read_folder(_ASSETS / "pusht")
    case = parsed.to_dict()
    return case, twin(case["network"], tensors)


def test_noise_prediction_of_the_bundled_weights() -> None:
    case, model = bundled()
    policy = tsad.load("pusht")
    rng = np.random.default_rng(0)
    obs = rng.uniform(50, 450, (2, 2, 20)).astype(np.float32)
    sample = rng.standard_normal((2, 10, 2), dtype=np.float32)
    for step in (0, 10, 50, 99):
        with torch.no_grad():
            t = torch.tensor(99 - step)
            expected = model(torch.from_numpy(sample).double(), t, normalise(case, obs)).numpy()
        assert relative_error(policy.predict_noise(sample, step, obs), expected) < NETWORK_TOLERANCE


def oracle_chunk(
    model: Any, scheduler: Any, case: dict[str, Any], obs: np.ndarray, noise: np.ndarray,
    steps: int, monkeypatch: pytest.MonkeyPatch,
) -> np.ndarray:  # fmt: skip
    """A chunk in raw units: PyTorch's network, diffusers' sampler, our noise."""
    drawn = iter(noise[1:])

    def injected(shape: Any, **_: Any) -> Any:
        return torch.from_numpy(next(drawn)).double().reshape(shape)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", injected)
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(noise[0]).double()
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(sample, t, normalise(case, obs))
            sample = scheduler.step(output, t, sample).prev_sample
    part = case["normalizer"]["action"]
    return (sample.numpy() - np.array(part["offset"])) / np.array(part["scale"])


SHARED = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize("name", ["odd", "bundled"])
@pytest.mark.parametrize(
    ("kind", "steps", "spacing"),
    [
        ("ddpm", 100, "leading"),
        ("ddim", 16, "leading"),
        ("ddim", 16, "trailing"),
        ("ddim", 16, "linspace"),
        ("dpmsolver++", 10, "linspace"),
    ],
)
def test_a_chunk_with_the_same_noise(
    name: str, kind: str, steps: int, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"timestep_spacing": spacing, "clip_sample": kind != "dpmsolver++", "type": kind}
    schedulers = {
        "ddpm": lambda: diffusers.DDPMScheduler(**SHARED, timestep_spacing=spacing),
        "ddim": lambda: diffusers.DDIMScheduler(**SHARED, timestep_spacing=spacing),
        "dpmsolver++": lambda: diffusers.DPMSolverMultistepScheduler(
            **SHARED, timestep_spacing=spacing
        ),
    }
    if name == "bundled":
        case, model = bundled()
        tensors = read_folder(_ASSETS / "pusht")[1]
        case["scheduler"] |= options
        rng = np.random.default_rng(2)
        obs = rng.uniform(50, 450, (2, 2, 20)).astype(np.float32)
        noise = rng.standard_normal((steps, 2, 10, 2), dtype=np.float32)
        from tsad.config import PolicyConfig
        from tsad.load import make_model
        from tsad.reference import ReferencePolicy
        from tsad.samplers import make_sampler

        table = make_sampler(case["scheduler"], num_inference_steps=steps)
        parsed = PolicyConfig.from_dict(case)
        engine = tsad._core.Policy(make_model(parsed, tensors, None, table), lanes=2, threads=1)
        reference = ReferencePolicy(case, tensors, lanes=2, num_inference_steps=steps)
    else:
        case = config(name, **options)
        model = twin(case["network"], random_tensors(case["network"], 0))
        engine = make(name, lanes=2, steps=steps, **options)
        reference = make_reference(name, lanes=2, steps=steps, **options)
        obs, noise = random_inputs(case, 3, lanes=2, steps=steps)
    expected = oracle_chunk(model, schedulers[kind](), case, obs, noise, steps, monkeypatch)
    got = engine(obs, noise=noise, return_horizon=True)
    assert relative_error(got, expected) < CHUNK_TOLERANCE
    assert relative_error(reference(obs, noise, return_horizon=True), expected) < CHUNK_TOLERANCE
