"""LeRobot itself, accelerated: 0.6.1 or 0.4.4, which `.ci/lerobot` installs."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lerobot")

import lerobot_cases as cases  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from tsad.lerobot import accelerate, is_accelerated, patch, plugin, restore  # noqa: E402
from tsad.samplers import advance, make_sampler  # noqa: E402

torch.set_num_threads(1)


def make(name: str) -> Any:
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    return DiffusionPolicy.from_pretrained(cases.FOLDER / name).eval()


def make_dit(name: str) -> Any:
    """A multi_task_dit with the small CLIP that it was recorded with."""
    pytest.importorskip("transformers")
    folder = str(cases.FOLDER)
    sys.path.insert(0, folder)
    try:
        from make_dit import small_clip
    finally:
        sys.path.remove(folder)
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    with small_clip():
        return MultiTaskDiTPolicy.from_pretrained(cases.FOLDER / name).eval()


def episode(policy: Any, seed: int = 0, calls: int = 12, lanes: int = 2) -> torch.Tensor:
    """`select_action` once a tick, as lerobot-eval does."""
    torch.manual_seed(seed)
    policy.reset()
    numbers = torch.Generator().manual_seed(5)
    features = policy.config.input_features
    made = []
    for _ in range(calls):
        batch = {
            key: torch.rand((lanes, *feature.shape), generator=numbers) * 2 - 1
            for key, feature in features.items()
        }
        if policy.name == "multi_task_dit":
            tokens = torch.randint(0, 16, (lanes, 5), generator=numbers)
            batch["observation.language.tokens"] = tokens
            batch["observation.language.attention_mask"] = torch.ones_like(tokens)
        with torch.inference_mode():
            made.append(policy.select_action(batch))
    return torch.stack(made)


@pytest.fixture(autouse=True)
def clean() -> Any:
    yield
    patch.uninstall()
    patch.on_first_chunk = None


MADE = [(make, name) for name in cases.CASES] + [(make_dit, name) for name in cases.DIT_CASES]


@pytest.mark.parametrize(("made", "name"), MADE)
def test_the_same_actions_and_random_numbers(made: Any, name: str) -> None:
    policy = made(name)
    expected = episode(policy)
    state = torch.get_rng_state()
    accelerate(policy)
    got = episode(policy)
    error = cases.float32_error(name, "sample/after_step")  # LeRobot's own, from float64
    bound = max(2e-5, cases.TOLERANCE * error)
    assert is_accelerated(policy) and (got - expected).abs().max() < bound
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(got, expected)  # by another road
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert is_accelerated(twin) and torch.equal(episode(twin), got)
    assert torch.equal(episode(restore(policy)), expected)


@pytest.mark.parametrize("name", cases.DIT_CASES)
def test_an_observation_of_tsad_load_is_what_lerobots_encoder_makes(name: str) -> None:
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import (
        policy_action_to_transition,
        transition_to_policy_action,
    )

    import tsad

    policy, e = make_dit(name), cases.expected(name)
    with pytest.warns(UserWarning, match="observation_encoder"):
        ours = tsad.load(cases.FOLDER / name, lanes=2)
    given = {key[6:]: value for key, value in e.items() if key.startswith("chunk/observation")}
    batch = {key: torch.from_numpy(value) for key, value in given.items()}
    if policy.config.image_features:  # which are not recorded
        n = len(policy.config.image_features)
        batch["observation.images"] = torch.zeros(2, policy.config.n_obs_steps, n, 3, 32, 32)
    post = PolicyProcessorPipeline.from_pretrained(
        cases.FOLDER / name,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    with torch.inference_mode():
        cond = policy.observation_encoder.encode(batch)
        torch.manual_seed(1)
        theirs = post(policy._generate_actions(batch))
    torch.manual_seed(1)
    size = (2, ours.horizon, ours.action_dim)
    noise = np.stack([torch.randn(size).numpy() for _ in range(ours.num_inference_steps)])
    obs = cond.reshape(2, ours.n_obs_steps, ours.obs_dim).numpy()
    if not policy.config.image_features:
        assert np.abs(cond.numpy() - e["chunk/cond"]).max() < 1e-6
    error = np.abs(ours(obs, noise=noise) - theirs.numpy()).max()
    assert error <= 2 * cases.TOLERANCE * cases.float32_error(name, "chunk/action")


def test_recorded_chunks_with_given_noise() -> None:
    name = next(n for n in cases.CASES if n.startswith("ddim"))
    policy, e = accelerate(make(name)), cases.expected(name)
    with torch.inference_mode():
        got = policy.diffusion.conditional_sample(
            2,
            global_cond=torch.from_numpy(e["sample/cond"]),
            noise=torch.from_numpy(e["sample/noise"]),
        )
    error = np.abs(got.numpy() - e["sample/after_step_f64"][-1]).max()
    assert error <= cases.TOLERANCE * cases.float32_error(name, "sample/after_step")


def test_training_still_trains() -> None:
    policy = accelerate(make(cases.CASES[0])).train()
    c = policy.config
    batch = {
        key: torch.randn(2, c.n_obs_steps, *feature.shape)
        for key, feature in c.input_features.items()
    }
    batch["action"] = torch.randn(2, c.horizon, *c.action_feature.shape)
    batch["action_is_pad"] = torch.zeros(2, c.horizon, dtype=torch.bool)
    loss, _ = policy.forward(batch)
    loss.backward()
    assert all(p.grad is not None for p in policy.diffusion.unet.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in policy.parameters():
            p -= 0.01 * p.grad
    policy.eval()
    plain = restore(copy.deepcopy(policy))
    assert (episode(policy) - episode(plain)).abs().max() < 1e-4


def test_a_sidecar_accelerates_without_code(tmp_path: Path) -> None:
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    plugin.activate()
    folder = cases.copy(cases.CASES[0], tmp_path / "policy")
    (folder / plugin.SIDECAR).write_text("{}")
    policy = DiffusionPolicy.from_pretrained(folder).eval()
    policy.config.pretrained_path = folder  # as LeRobot's factory sets it
    expected = episode(make(cases.CASES[0]))
    assert (episode(policy) - expected).abs().max() < 1e-4 and is_accelerated(policy)


def test_lerobot_finds_the_plugin() -> None:
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    if not any(name.lower().replace("-", "_") == "lerobot_policy_tsad" for name in names if name):
        pytest.skip("the plugin is not installed")
    assert "lerobot_policy_tsad" in names  # underscores and all, or LeRobot passes it by
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    assert patch.on_first_chunk is not None


def test_the_bundled_policy_acts_as_in_lerobot(tmp_path: Path) -> None:
    from tsad.cli import main

    out = tmp_path / "certificate"
    more = ["--chunks", "4", "--rounds", "1", "--threads", "2"]
    assert main(["certify", "pusht_corners", "--out", str(out), *more]) == 0
    parity = json.loads((out / "certificate.json").read_text())["parity"]
    assert parity["reference"].startswith("LeRobot") and parity["holds"]
    assert 0 < parity["worst"] < 1e-5


@pytest.mark.parametrize("group_norm", [True, False])
def test_a_policy_with_cameras_loads_whole(tmp_path: Path, group_norm: bool) -> None:
    """Raw images and states to raw actions: LeRobot's own encoders and processors say what."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    import tsad

    cameras = ["observation.images.wrist", "observation.images.front"]
    shapes = {name: (3, 100, 120) for name in cameras} | {"observation.state": (3,)}
    kinds = {name: FeatureType.VISUAL for name in cameras} | {
        "observation.state": FeatureType.STATE
    }
    config = DiffusionConfig(
        input_features={k: PolicyFeature(type=kinds[k], shape=v) for k, v in shapes.items()},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        device="cpu", crop_shape=(83, 97), use_group_norm=group_norm, down_dims=(16, 32),
        use_separate_rgb_encoder_per_camera=True, pretrained_backbone_weights=None, horizon=8,
        n_action_steps=4, spatial_softmax_num_keypoints=8, noise_scheduler_type="DDIM",
        num_inference_steps=3,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = DiffusionPolicy(config).eval()
    for name, tensor in policy.state_dict().items():  # as if trained: not 0 and 1
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    stats = {
        name: {
            "min": torch.full(shape, -2.0), "max": torch.full(shape, 3.0),
            "mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.3),
        }
        for name, shape in [*shapes.items(), ("action", (2,))]
    }  # fmt: skip
    before, after = make_pre_post_processors(config, dataset_stats=stats)
    for part in (policy, before, after):
        part.save_pretrained(tmp_path)

    rng = np.random.default_rng(0)
    raw: dict[str, Any] = {
        name: rng.integers(0, 256, (2, 2, 100, 120, 3), np.uint8) for name in cameras
    }
    raw["observation.state"] = rng.uniform(-2, 3, (2, 2, 3)).astype(np.float32)
    batch = {k: torch.from_numpy(v) for k, v in raw.items()}
    batch |= {k: batch[k].movedim(-1, -3) / 255 for k in cameras}
    noise = torch.from_numpy(rng.standard_normal((2, 8, 2), np.float32))
    with torch.inference_mode():
        ready = before(batch)
        ready["observation.images"] = torch.stack([ready[k] for k in cameras], -4)
        cond = policy.diffusion._prepare_global_conditioning(ready)
        sample = policy.diffusion.conditional_sample(2, global_cond=cond, noise=noise)
        theirs = after(sample[:, 1:5].reshape(-1, 2)).reshape(2, 4, 2)
    ours = tsad.load(tmp_path, lanes=2)
    assert isinstance(ours, tsad.ImagePolicy)
    given = np.concatenate([noise.numpy()[None], np.zeros((2, 2, 8, 2), np.float32)])
    np.testing.assert_allclose(ours(raw, noise=given), theirs.numpy(), rtol=0, atol=1e-4)
    assert float(theirs.std()) > 0.1


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_steps_are_those_of_lerobots_loop(steps: int) -> None:
    """Of the loop that its flow policies share (0.6.1), whose time runs from 1, noise, to 0."""
    flow = pytest.importorskip("lerobot.policies.common.flow_matching")
    torch.manual_seed(steps)
    weights, noise = torch.randn(4, 4) * 0.5, torch.randn(2, 6, 4)

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x @ weights + t[:, None, None]

    expected = flow.euler_integrate(lambda x, t: -field(x, 1 - t), noise, steps)
    sampler = make_sampler({"type": "euler", "num_inference_steps": steps})
    x, before = noise, (0.0, 0.0)
    for row, t in zip(sampler.table.tolist(), sampler.timesteps, strict=True):
        x, before = advance(row, x, field(x, torch.full((2,), float(t))), before)
    assert (x - expected).abs().max() < 1e-5 * expected.abs().max()
