"""tsad.load and tsad convert of LeRobot's multi_task_dit folders, against LeRobot's own chunks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest

import tsad
from tsad.checkpoint import CheckpointError
from tsad.convert import convert
from tsad.convert.lerobot import read_lerobot
from tsad.reference import ReferencePolicy, WarmReference

CASES = lerobot.DIT_CASES
DDPM, FLOW, DDIM, RK4 = (
    f"../lerobot_dit/{name}"
    for name in (
        "ddpm_rope",
        "flow_euler_mha_positions",
        "ddim_sample_both_positions",
        "flow_rk4",
    )
)
NETWORK = "noise_predictor."


def load(source: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tsad.load(source, **options)


def chunk(name: str) -> tuple[Any, Any, Any]:
    """What conditions the recorded chunk, its noise, and LeRobot's actions in float64."""
    e = lerobot.expected(name)
    network = read_lerobot(lerobot.FOLDER / name).policy["network"]
    obs = e["chunk/cond"].reshape(2, network["n_obs_steps"], -1)
    steps = load(lerobot.FOLDER / name).num_inference_steps
    return obs, lerobot.all_noise(e, "chunk", steps), e["chunk/action_f64"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_lerobots_actions(name: str, threads: int) -> None:
    obs, noise, expected = chunk(name)
    got = load(lerobot.FOLDER / name, lanes=2, threads=threads)(obs, noise=noise)
    assert got.shape == expected.shape
    bound = lerobot.TOLERANCE * lerobot.float32_error(name, "chunk/action")
    assert np.abs(got - expected).max() <= bound


@pytest.mark.parametrize("name", CASES)
def test_a_converted_folder_is_the_same_policy(name: str, tmp_path: Path) -> None:
    summary = convert(lerobot.FOLDER / name, tmp_path / "out")
    assert summary["policy"] == "LeRobot multi_task_dit"
    obs, noise, _ = chunk(name)
    a = load(lerobot.FOLDER / name, lanes=2)(obs, noise=noise)
    np.testing.assert_array_equal(load(tmp_path / "out", lanes=2)(obs, noise=noise), a)


@pytest.mark.parametrize("precision", ["int16", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_low_precisions_stay_near(name: str, precision: str) -> None:
    obs, noise, expected = chunk(name)
    got = load(lerobot.FOLDER / name, lanes=2, precision=precision)(obs, noise=noise)
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_what_is_not_tsads_is_listed() -> None:
    with pytest.warns(UserWarning, match="observation_encoder") as said:
        policy = tsad.load(lerobot.FOLDER / DDIM)
    texts = [str(warning.message) for warning in said]
    clip = [name for name in lerobot.tensors(lerobot.FOLDER / DDIM) if NETWORK not in name]
    parts = "text_encoder, vision_encoders"
    assert any(f"{len(clip)} tensors ({parts}) not read" in text for text in texts)
    assert any("n_action_steps: 10 reach beyond the horizon; 8 are executed" in t for t in texts)
    features = policy.config["features"]
    assert [(f["name"], f["type"]) for f in features] == [
        ("observation.state", "STATE"),
        ("observation.images.b", "VISUAL"),
        ("observation.images.a", "VISUAL"),
        ("task", "LANGUAGE"),
    ]
    assert [f["dim"] for f in features] == [2, 8, 8, 16] and policy.obs_dim == 34


def copied(name: str, tmp_path: Path) -> Path:
    return lerobot.copy(name, tmp_path / "folder")


def test_every_tensor_of_the_network_is_needed(tmp_path: Path) -> None:
    folder = copied(FLOW, tmp_path)
    whole = lerobot.tensors(folder)
    names = [name for name in whole if name.startswith(NETWORK)]
    for name in names[::3] + [f"{NETWORK}pos_embedding"]:
        lerobot.save(folder, {k: v for k, v in whole.items() if k != name})
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            tsad.load(folder)
    for name in ("noise_predictor.more.weight", "other.bias", "observation_encoder.new.weight"):
        lerobot.save(folder, whole | {name: np.zeros(3, np.float32)})
        with pytest.raises(CheckpointError, match=name):
            tsad.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (FLOW, {"integration_method": "heun"}, 'expected one of "euler", "rk4", got .heun.'),
        (FLOW, {"objective": "score"}, 'objective: expected one of "diffusion", "flow_matching"'),
        (FLOW, {"num_integration_steps": 0}, "num_integration_steps: expected an integer"),
        (FLOW, {"hidden_dim": 48}, "columns as the condition has numbers, .*got"),
        (FLOW, {"n_obs_steps": 2}, "columns as the condition has numbers, .*got 44"),
        (FLOW, {"use_rope": True}, "attn.qkv_proj"),
        (DDPM, {"use_rope": False}, "multihead_attn.in_proj"),
        (DDPM, {"use_positional_encoding": True}, "pos_embedding"),
        (DDPM, {"num_layers": 3}, r"transformer_blocks\.2"),
        (DDPM, {"num_layers": ...}, "num_layers: expected this key"),
        (DDPM, {"input_features": {}}, "observation.state of type STATE"),
        (DDPM, {"output_features": {}}, "action of type ACTION"),
        (DDPM, {"noise_scheduler_type": "PNDM"}, "noise_scheduler_type: expected one of"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(name, tmp_path)
    lerobot.edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        tsad.load(folder)


def test_the_units_of_actions_are_needed(tmp_path: Path) -> None:
    folder = copied(DDPM, tmp_path)
    (folder / "policy_postprocessor.json").unlink()
    with pytest.raises(CheckpointError, match="policy_postprocessor.json"):
        tsad.load(folder)


def test_overrides_of_flow_matching() -> None:
    policy = load(lerobot.FOLDER / FLOW, num_inference_steps=3)
    np.testing.assert_allclose(policy.timesteps, [0, 1 / 3, 2 / 3], atol=1e-7)
    for change, message in (
        ({"sampler": "ddim"}, "sampler: expected one of"),
        (
            {"timestep_spacing": "trailing"},
            "^timestep_spacing: expected one of .leading., got .trailing.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load(lerobot.FOLDER / FLOW, **change)
    for sampler in ("euler", "rk4"):
        with pytest.raises(ValueError, match="sampler: expected one of"):
            load(lerobot.FOLDER / DDPM, sampler=sampler)


@pytest.mark.parametrize(("name", "sampler"), [(FLOW, "rk4"), (RK4, "euler")])
def test_a_flow_is_sampled_by_euler_or_by_rk4(name: str, sampler: str) -> None:
    described = read_lerobot(lerobot.FOLDER / name)
    options: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 8}
    policy = load(lerobot.FOLDER / name, lanes=5, **options)  # a gang of four, and one
    reference = ReferencePolicy(described.policy, described.tensors, lanes=5, **options)
    np.testing.assert_array_equal(policy.timesteps, reference.timesteps)
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((5, policy.n_obs_steps, policy.obs_dim)).astype(np.float32)
    shape = (8, 5, policy.horizon, policy.action_dim)
    noise = rng.standard_normal(shape).astype(np.float32)
    for _ in range(2):  # what a chunk leaves behind is nothing to the next
        got = policy(obs, noise=noise)
        assert (
            np.abs(got - (expected := reference(obs, noise))).max() <= 1e-5 * np.abs(expected).max()
        )
        reference.reset()
    for change, message in (
        ({"num_inference_steps": 6}, "num_inference_steps: expected a multiple of 4"),
        ({"warm_start": 2}, "warm_start: expected a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            load(lerobot.FOLDER / name, **options | {"sampler": "rk4"} | change)


@pytest.mark.parametrize(("name", "warm_start"), [(DDPM, 3), (FLOW, 3), (RK4, 4)])
def test_warm_start_plans_and_the_dial_work(name: str, warm_start: int) -> None:
    described = read_lerobot(lerobot.FOLDER / name)
    warm = load(lerobot.FOLDER / name, warm_start=warm_start)
    specified = WarmReference(described.policy, described.tensors, warm_start=warm_start)
    rng = np.random.default_rng(0)
    K = warm.model.n_steps
    shape = (1, warm.n_obs_steps, warm.obs_dim)
    for i in range(3):
        obs = rng.standard_normal(shape).astype(np.float32)
        noise = rng.standard_normal((K, 1, warm.horizon, warm.action_dim)).astype(np.float32)
        got = warm(obs, noise=noise, return_horizon=True, executed=2 if i else None)
        expected = specified(obs, noise, [2])
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    policy = load(lerobot.FOLDER / name)
    policy.sparsity = 0.5
    policy.reset(seed=0)
    policy(obs)
    assert 0.4 < policy.plan.sparsity < 0.6
    reference = ReferencePolicy(described.policy, described.tensors)
    got = policy(obs, noise=noise, return_horizon=True)
    first = policy.plan.sources
    expected = reference(obs, noise, first=first, return_horizon=True)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_command_line_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tsad.cli import main

    assert main(["convert", str(lerobot.FOLDER / FLOW), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"]["sampler"]["type"] == "euler"
    assert main(["info", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "euler, 7 steps, predicts velocity" in out and "DiT of 2 layers, 4 heads" in out


def test_the_settings_that_tune_tries_fit_a_flow() -> None:
    from tsad.commands.tune import default_grid

    grid = default_grid(load(lerobot.FOLDER / FLOW, num_inference_steps=100))
    assert {row.get("sampler") for row in grid} == {None, "euler"}
    names = [row["name"] for row in grid]
    assert len(set(names)) == len(names) > 10 and not any("ddim" in name for name in names)
    for row in grid:
        if "sampler" in row:
            given = {"timestep_spacing": row.get("spacing"), "warm_start": row.get("warm_start")}
            policy = load(
                lerobot.FOLDER / FLOW,
                sampler=row["sampler"],
                num_inference_steps=row["steps"],
                **given,
            )
            assert row.get("warm_start") in (None, policy.num_inference_steps)
