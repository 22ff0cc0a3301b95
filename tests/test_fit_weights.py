"""`tsad fit --weights`: the policy that it makes does what was measured, and less is lost by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest
from command_line import run
from fit_cases import fit_stopped, last_error, slow_episodes
from policies import save_policy

import tsad
from tsad.checkpoint import read_folder, write_folder
from tsad.load import weights_sha256

pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")

FEW = ["--sampler", "ddim", "--steps", "4", "--spacing", "trailing", "--against", "4",
       "--threads", "1", "--json", "--weights", "--lr", "1e-3", "--batch", "8"]  # fmt: skip
SAMPLER: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 4}
SAMPLER["timestep_spacing"] = "trailing"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return slow_episodes(tmp_path)


@pytest.mark.parametrize("plan", ["1000", "1010"])
def test_the_engine_loses_what_was_measured_and_less_than_before(
    capsys: Any, tmp_path: Path, data: str, plan: str
) -> None:
    """On the chunks held out, by the old policy and the new one, beside many steps of the old."""
    folder, out = save_policy(tmp_path / "p"), tmp_path / "out"
    words = ["fit", folder, "--data", data, "--out", str(out), *FEW, "--plan", plan]
    code, text, err = run(capsys, *words, "--updates", "60", "--draws", "1")
    assert code == 0, err
    found = json.loads(text)
    before, after = found["mean_rms"]
    assert after < 0.9 * before and found["chunks"] == [20, 5]
    many = tsad.load(folder, **SAMPLER)
    for source, wanted in ((folder, before), (str(out), after)):
        policy = tsad.load(source, **SAMPLER)
        policy.plan = tsad.planners.from_steps(policy, plan)
        assert last_error(policy, many, data) == pytest.approx(wanted, rel=1e-3)


def test_a_warm_start_learns_what_many_steps_make_of_it(
    capsys: Any, tmp_path: Path, data: str
) -> None:
    """Replayed along held-out chunks: each start is the old policy's own, and so are many steps."""
    folder, out = save_policy(tmp_path / "p"), tmp_path / "out"
    words = ["fit", folder, "--data", data, "--out", str(out), *FEW, "--plan", "100"]
    words += ["--warm-start", "3", "--updates", "60", "--draws", "3"]
    code, text, err = run(capsys, *words)
    assert code == 0, err
    found = json.loads(text)
    before, after = found["mean_rms"]
    # of five chunks four have one before, each with three draws
    assert after < 0.9 * before and found["chunks"] == [48, 12]
    targets = dict(np.load(out / "targets.npz"))
    assert targets["counts"].tolist() == [12] * 5
    start = targets["start"].reshape(5, 3, 4, *targets["start"].shape[1:])
    np.testing.assert_array_equal(start[:, 0], start[:, 1])
    noisy = targets["noise"].reshape(5, 3, 4, *targets["noise"].shape[1:])
    assert len(np.unique(noisy[..., 0, 0, 0])) == 60
    # of the first draw, right is a dense chunk of the engine after chunks along the plan
    obs = np.load(data)["obs"][20:]
    policy = tsad.load(folder, **SAMPLER, warm_start=3)
    random = np.random.default_rng(tsad.sim.rollout.noise_seed(4))
    affine = policy.config["normalizer"]["action"]
    right = targets["right"].reshape(5, 3, 4, *targets["right"].shape[1:])[4, 0]
    z = random.standard_normal((5, 1, policy.horizon, policy.action_dim), np.float32)
    for last in range(1, 5):
        policy.reset()
        for chunk in range(last + 1):
            policy.plan = tsad.planners.from_steps(policy, "111" if chunk == last else "100")
            made = policy(obs[chunk], noise=z[chunk], return_horizon=True)
        made = made * np.array(affine["scale"]) + np.array(affine["offset"])
        np.testing.assert_allclose(made, right[last - 1], rtol=0, atol=1e-4)
    row = json.loads((out / "settings.json").read_text())
    assert [r["name"] for r in row] == ["fitted-weights"] and row[0]["plan"] == "100"


def test_what_encodes_stays_and_the_folder_says_what_it_is(
    capsys: Any, tmp_path: Path, data: str
) -> None:
    folder, out = save_policy(tmp_path / "p"), tmp_path / "out"
    words = ["fit", folder, "--data", data, "--out", str(out), *FEW, "--plan", "1000"]
    code, _, err = run(capsys, *words, "--updates", "40", "--val-episodes", "0")
    assert code == 0, err
    (_, old, _), (config, new, _) = read_folder(folder), read_folder(out)
    encodes = ("cond_obs_emb", "cond_pos_emb", "encoder")
    for name, tensor in old.items():
        kept = np.array_equal(tensor.astype(np.float16), new[name].astype(np.float16))
        assert kept == name.startswith(encodes), name
    fitted = config.provenance["fitted"]
    assert fitted["from"] == weights_sha256(folder) and fitted["setting"] == {
        **SAMPLER,
        "warm_start": None,
        "precision": "float32",
    }
    assert fitted["held_out"] is False
    card = (out / "README.md").read_text()
    assert "of those that were fitted on" in card and "held out" not in card
    assert "num_inference_steps=4" in card and weights_sha256(folder) in card
    assert run(capsys, "info", str(out))[0] == 0


@pytest.mark.parametrize("name", [lerobot.CASES[1], lerobot.DIT_CASES[0]], ids=["unet", "dit"])
@pytest.mark.filterwarnings("ignore")  # of parts of LeRobot's policy that are not tsad's
def test_lerobots_families_learn_too(capsys: Any, tmp_path: Path, name: str) -> None:
    folder, out = str(lerobot.FOLDER / name), tmp_path / "out"
    policy = tsad.load(folder)
    steps = np.random.default_rng(0).normal(size=(3, 4, policy.n_obs_steps, policy.obs_dim))
    obs = (steps.cumsum(1) / 3).reshape(12, *steps.shape[2:]).astype(np.float32)
    np.savez(tmp_path / "data.npz", obs=obs, episode_ends=[4, 8, 12])
    words = ["fit", folder, "--data", str(tmp_path / "data.npz"), "--out", str(out), *FEW]
    code, text, err = run(capsys, *words, "--plan", "1000", "--updates", "30")
    assert code == 0, err
    before, after = json.loads(text)["mean_rms"]
    assert after < 0.95 * before
    assert run(capsys, "info", str(out))[0] == 0


def test_it_goes_on_where_it_stopped(
    capsys: Any, tmp_path: Path, data: str, monkeypatch: Any
) -> None:
    folder, hashes = save_policy(tmp_path / "p"), []
    for name in ("apart", "at once"):
        words = ["fit", folder, "--data", data, "--out", str(tmp_path / name), *FEW]
        words += ["--plan", "1010", "--updates", "4"]
        if name == "apart":
            fit_stopped(capsys, monkeypatch, words, 1)
        code, _, err = run(capsys, *words)
        assert code == 0, err
        hashes.append(weights_sha256(tmp_path / name))
    assert hashes[0] == hashes[1]
    words.remove("--weights")  # the same folder, for coefficients
    code, _, err = run(capsys, *words)
    assert code == 2 and "argument --out" in err and "holds another fit" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--updates", "0"], "argument --updates: expected at least 1 to fit weights, got 0"),
        (["--terms", "gain"], "argument --terms: got 'gain', expected none"),
        (["--draws", "0"], "argument --draws: "),
        (["--guard"], "argument --weights: got it beside --guard"),
        (["--audit", "--plan", "1000"], "argument --audit: expected --guard beside it"),
        (["--against", "3"], "argument --against: got 3, expected at least the setting's own 4"),
        ([], "argument --weights: got a setting that computes all of its 4 steps"),
        (["--warm-start", "3"], "argument --weights: got a setting that computes all"),
        (["--planner", "pruner"], "argument "),
    ],
)
def test_what_is_wrong_is_named(
    capsys: Any, tmp_path: Path, data: str, more: list[str], says: str
) -> None:
    folder, out = save_policy(tmp_path / "p"), tmp_path / "out"
    words = ["fit", folder, "--data", data, "--out", str(out), *FEW, *more]
    code, _, err = run(capsys, *words)
    assert code == 2 and says in err, err
    assert not out.exists()


def test_numbers_are_kept_as_the_policys_are_and_nothing_learned_is_said(
    capsys: Any, tmp_path: Path, data: str
) -> None:
    """A policy in float16 is written in float16, another in float32."""
    folder = save_policy(tmp_path / "half")
    config, tensors, _ = read_folder(folder)
    full = tmp_path / "full"
    write_folder(
        full, config, {k: v * np.float32(1.0001) for k, v in tensors.items()}, None, "float32"
    )
    words = ["fit", "", "--data", data, *FEW, "--plan", "1000", "--updates", "1", "--lr", "1e-30"]
    words.remove("--json")
    for source in (folder, str(full)):
        words[1] = source
        code, text, err = run(capsys, *words, "--out", f"{source}-out")
        assert code == 0 and "nothing was learned: no report was better" in text, err
        assert weights_sha256(f"{source}-out") == weights_sha256(source)
    (tmp_path / "other").mkdir()
    from tsad.training.running import STATE_VERSION, save_state

    save_state(tmp_path / "other" / "training.pt", {"version": STATE_VERSION})
    code, _, err = run(capsys, *words, "--out", str(tmp_path / "other"))
    assert code == 2 and "holds another training, no fit" in err
