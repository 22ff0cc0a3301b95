"""`tsad certify`: parity, times and losses of every family, and the page made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import policies
import pytest
from command_line import run

import tsad
from tsad.commands import certify
from tsad.presets import Preset, model_sha256, save_presets
from tsad.sim import results, simulators

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
UNET, DIT = lerobot.FOLDER / lerobot.CASES[1], lerobot.FOLDER / lerobot.DIT_CASES[0]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "CHUNKS_PER_ROUND", 2)
    monkeypatch.setattr(results, "LEAST_EPISODES", 3)
    monkeypatch.setattr("tsad.lerobot.parity.available", lambda: False)
    monkeypatch.setattr(simulators, "_REGISTRY", dict(simulators._REGISTRY))


def command(source: Any, out: Path, *more: str) -> list[str]:
    return ["certify", str(source), "--out", str(out), "--chunks", "2", "--rounds", "2", *more]


def with_preset(folder: Path, **values: Any) -> None:
    preset = Preset(
        "fast",
        model_sha256(folder),
        sampler="ddim",
        num_inference_steps=2,
        timestep_spacing="leading",
        **values,
    )
    save_presets(folder, [(preset, None)])


def record(source: Any, path: Path) -> str:
    policy = tsad.load(source)
    shape = (5, policy.n_obs_steps, policy.obs_dim)
    np.savez(path, obs=np.random.default_rng(0).uniform(-1, 1, shape), episode_ends=[2, 5])
    return str(path)


def test_in_a_simulator_and_on_recordings(tmp_path: Path, capsys: Any) -> None:
    source, out = policies.save_policy(tmp_path / "policy"), tmp_path / "certificate"
    with_preset(Path(source), n_action_steps=1)
    data = record(source, tmp_path / "seen.npz")
    more = ["--simulator", "fakes:Table", "--seeds", "3", "--data", data, "--draws", "2"]
    code, text, err = run(capsys, *command(source, out, *more, "--json"))
    assert code == 0, err
    found = json.loads(text)
    assert json.loads((out / "certificate.json").read_text()) == found
    assert list(found["rows"]) == ["dense", "int8", "preset-fast"]
    dense, fast = found["rows"]["dense"], found["rows"]["preset-fast"]
    assert dense["distance"] == 0 and fast["distance"] > 0 and fast["n_action_steps"] == 1
    assert "mean_difference" not in dense and len(fast["simultaneous"]) == 2
    assert fast["words"].startswith("ddim, 2 steps leading") and len(dense["round_medians"]) == 2
    assert found["parity"]["recorded"] and found["parity"]["observations"] == 2
    page = (out / "certificate.md").read_text()
    for words in ("| preset-fast | ", "within the bound", "fakes:Table, seeds", "recorded observ"):
        assert words in page
    # again: nothing is played a second time
    before = (out / "dense.json").read_bytes()
    code, text, err = run(capsys, *command(source, out, *more))
    assert code == 0 and text.startswith(page.split("\n")[0]) and "fast: 3 of 3" not in err
    assert (
        json.loads(before)["episodes"] == json.loads((out / "dense.json").read_text())["episodes"]
    )


@pytest.mark.parametrize("case", [UNET, DIT], ids=["unet", "dit"])
def test_lerobots_policies(case: Path, tmp_path: Path, capsys: Any) -> None:
    source = lerobot.copy(str(case), tmp_path / "policy")
    if case is UNET:
        with_preset(source)
    data = record(source, tmp_path / "seen.npz")
    code, text, err = run(
        capsys, *command(source, tmp_path / "out", "--data", data, "--draws", "2", "--json")
    )
    assert code == 0, err
    found = json.loads(text)
    parity = found["parity"]
    assert "NumPy" in parity["reference"] and 0 < parity["worst"] <= parity["bound"] == 1e-4
    assert list(found["rows"]) == ["dense", "int8", *["preset-fast"] * (case is UNET)]
    assert all(row["spread"] > 0 for row in found["rows"].values())
    assert case is UNET or any("no presets yet" in note for note in found["notes"])


def test_actions_that_are_not_the_policys_own(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = policies.save_policy(tmp_path / "policy")
    honest = certify._Reference.chunk

    def other(self: Any, policy: Any, obs: Any, seed: int) -> Any:
        noise, actions = honest(self, policy, obs, seed)
        scale = np.array(policy.config["normalizer"]["action"]["scale"])
        actions[0, 0, 1] += 0.01 / scale[1]
        return noise, actions

    monkeypatch.setattr(certify._Reference, "chunk", other)
    code, text, _ = run(capsys, *command(source, tmp_path / "out"))
    assert code == 1 and "by at most 0.01 of a normalised action" in text
    assert "NOT within the bound of 0.0001" in text
    assert "takes a simulator, or recorded observations" in text
    assert not json.loads((tmp_path / "out" / "certificate.json").read_text())["parity"]["holds"]


def test_lerobot_itself_is_what_it_is_compared_with(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for LeRobot's policy: it takes part in the times, as what was before."""
    from tsad.lerobot import parity

    class Theirs:
        name = "LeRobot 9"

        def __init__(self, folder: Any, features: Any) -> None:
            assert [f["name"] for f in features][0] == "observation.state"
            self.policy = tsad.load(folder)

        def __call__(self, obs: Any) -> Any:
            return self.policy(obs)

        def chunk(self, policy: Any, obs: Any, seed: int) -> Any:
            noise = np.random.default_rng(seed).standard_normal(
                (policy.num_inference_steps, 1, policy.horizon, policy.action_dim), np.float32
            )
            return noise, self.policy(obs, noise=noise)

    monkeypatch.setattr(parity, "available", lambda: True)
    monkeypatch.setattr(parity, "LerobotPolicy", Theirs)
    code, text, err = run(capsys, *command(UNET, tmp_path / "out"))
    assert code == 0, err
    assert "those of LeRobot 9 by at most 0 of" in text and "times as fast as LeRobot" in text
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert len(found["beside"]["LeRobot"]) == 2 and found["parity"]["bound"] == 2e-4


def test_a_lerobot_that_does_not_load_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.4.4 does not know fields of 0.6.1's: the reference takes its place, and a note says so."""
    from tsad.lerobot import parity

    class Theirs:
        def __init__(self, folder: Any, features: Any) -> None:
            raise RuntimeError("The fields `late` are not valid\nfor DiffusionConfig")

    monkeypatch.setattr(parity, "available", lambda: True)
    monkeypatch.setattr(parity, "name", lambda: "LeRobot 9, PyTorch 9")
    monkeypatch.setattr(parity, "LerobotPolicy", Theirs)
    code, text, err = run(capsys, *command(UNET, tmp_path / "out"))
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["parity"]["bound"] == 1e-4 and not found["beside"]
    words = (
        "LeRobot 9, PyTorch 9 does not load it, so parity is with the reference: The fields `late`"
    )
    assert any(note.startswith(words) for note in found["notes"])


def test_refused(tmp_path: Path, capsys: Any) -> None:
    source = policies.save_policy(tmp_path / "policy")
    other = policies.save_policy(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    for more, words in (
        (["--draws", "1"], "argument --draws: got 1, expected 2 or more"),
        (["--simulator", "fakes:Table", "--seeds", "1"], "argument --seeds: got 1, expected 2"),
        (["--data", "nowhere.npz"], "got 'nowhere.npz', where nothing is"),
        (["--simulator", "nowhere"], "argument --simulator: "),
    ):
        code, _, err = run(capsys, *command(source, out, *more))
        assert code == 2 and words in err, err
        assert not (out / "certificate.json").exists()
    code, _, err = run(capsys, *command(tmp_path / "nothing", out))
    assert code == 2 and "where nothing is" in err
    assert run(capsys, *command(source, out))[0] == 0
    kept = (out / "certificate.json").read_bytes()
    code, _, err = run(capsys, *command(other, out))
    assert code == 1 and "--overwrite" in err or code == 2 and "--overwrite" in err
    assert (out / "certificate.json").read_bytes() == kept
    assert run(capsys, *command(other, out, "--overwrite"))[0] == 0
