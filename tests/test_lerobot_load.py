"""`tsad.load` and `tsad convert` on folders that LeRobot saved: raw observations to raw actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest
from command_line import run

import tsad
from tsad.convert import convert
from tsad.load import files_sha256, read_policy
from tsad.reference import ReferencePolicy


def observation(policy: tsad.SparsePolicy, raw: dict[str, Any]) -> Any:
    """LeRobot's features side by side, as the policy says."""
    features = policy.config["features"]
    return np.concatenate([raw[feature["name"]] for feature in features], -1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", lerobot.CASES)
def test_actions_equal_lerobots(name: str) -> None:
    policy, e = tsad.load(lerobot.FOLDER / name, lanes=2), lerobot.expected(name)
    raw = {k.removeprefix("offline/raw/"): v for k, v in e.items() if k.startswith("offline/raw/")}
    noise = lerobot.all_noise(e, "offline", policy.num_inference_steps)
    got = policy(observation(policy, raw), noise=noise)
    assert got.shape == e["offline/action_f64"].shape
    error = np.abs(got - e["offline/action_f64"]).max()
    assert error <= lerobot.TOLERANCE * lerobot.float32_error(name, "offline/action")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_converted_folder_gives_the_same_actions(tmp_path: Path) -> None:
    name = lerobot.CASES[0]
    facts = convert(lerobot.FOLDER / name, tmp_path / "policy")
    assert facts["policy"] == "LeRobot diffusion" and facts["network"].startswith("UNet")
    one, two = tsad.load(lerobot.FOLDER / name), tsad.load(tmp_path / "policy")
    obs = np.random.default_rng(0).uniform(-1, 1, (one.n_obs_steps, one.obs_dim))
    for policy in (one, two):
        policy.reset(seed=1)
    np.testing.assert_array_equal(one(obs.astype(np.float32)), two(obs.astype(np.float32)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plans_and_settings_work_on_it() -> None:
    policy = tsad.load(
        lerobot.FOLDER / lerobot.CASES[0], sampler="ddim", num_inference_steps=4, precision="int8"
    )
    policy.sparsity = 0.5
    policy.reset(seed=0)
    obs = np.zeros((policy.n_obs_steps, policy.obs_dim), np.float32)
    assert all(np.isfinite(policy(obs)).all() for _ in range(3))
    assert policy.stats["sparsity"] >= 0.5


def test_the_bundled_policy_of_lerobot() -> None:
    """A chunk of it, against the reference in float64."""
    few = {"sampler": "ddim", "num_inference_steps": 4}
    policy = tsad.load("pusht_corners", **few)
    reference = ReferencePolicy(policy.config, read_policy("pusht_corners")[1], **few)
    rng = np.random.default_rng(0)
    obs = rng.uniform(100, 400, (1, 2, 18)).astype(np.float32)
    noise = rng.standard_normal((4, 1, 16, 2)).astype(np.float32)
    expected = reference(obs, noise, np.zeros((4, policy.n_blocks), np.uint8))
    np.testing.assert_allclose(policy(obs[0], noise=noise), expected[0], atol=5e-4)  # pixels


def test_a_camera_whose_encoder_is_missing(tmp_path: Path) -> None:
    folder = lerobot.copy(lerobot.CASES[0], tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    config["input_features"]["observation.image"] = {"type": "VISUAL", "shape": [3, 96, 96]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cond_encoder|rgb_encoder"):
        tsad.load(folder)


def test_another_kind_of_lerobot_policy_is_named(tmp_path: Path) -> None:
    folder = lerobot.copy(lerobot.CASES[0], tmp_path / "policy")
    lerobot.edit_json(folder / "config.json", type="act")
    with pytest.raises(ValueError, match="type: expected a LeRobot policy of type .diffusion."):
        tsad.load(folder)


def test_the_command_converts_it(tmp_path: Path, capsys: Any) -> None:
    folder = str(tmp_path / "policy")
    code, out, _ = run(capsys, "convert", str(lerobot.FOLDER / lerobot.CASES[0]), folder)
    assert code == 0 and "UNet" in out and (tmp_path / "policy" / "config.json").is_file()
    code, out, _ = run(capsys, "info", folder)
    assert code == 0 and "conv_residual" in out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trainings_checkpoint_is_the_policy_in_it(tmp_path: Path) -> None:
    """Training of LeRobot writes ``checkpoints/000100/pretrained_model``."""
    checkpoint = tmp_path / "000100"
    inner = lerobot.copy(lerobot.CASES[0], checkpoint / "pretrained_model")
    one, two = tsad.load(checkpoint), tsad.load(inner)
    obs = np.random.default_rng(0).uniform(-1, 1, (one.n_obs_steps, one.obs_dim))
    for policy in (one, two):
        policy.reset(seed=1)
    np.testing.assert_array_equal(one(obs.astype(np.float32)), two(obs.astype(np.float32)))
    assert convert(checkpoint, tmp_path / "policy")["policy"] == "LeRobot diffusion"


def test_the_files_of_a_policy_are_all_that_it_is_read_from(tmp_path: Path) -> None:
    """Results of other statistics, or of another way to use them, are another policy's."""
    folder = lerobot.copy(lerobot.CASES[0], tmp_path / "policy")
    read = {path.name for path in folder.iterdir()} - {"case.json", "expected.npz"}
    before = files_sha256(folder)
    assert set(before) == read and len(read) == 6
    for name in read:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert {n for n, digest in files_sha256(folder).items() if digest != before[n]} == {name}
        (folder / name).write_bytes(content)
