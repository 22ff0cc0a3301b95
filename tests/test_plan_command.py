"""tsad plan, end to end on the bundled policy with a short sampler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

import tsad
from tsad import cli
from tsad.commands.plan import METHODS
from tsad.planners.search import Search
from tsad.sim.recording import Recorded, pick

SAMPLER = ["--sampler", "ddim", "--steps", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: Any) -> Path:
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    folder: Path = tmp_path_factory.mktemp("plans") / "recorded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PushT, "max_steps", 32)
        command = ["collect", "pusht", "--out", str(folder), "--episodes", "3", *SAMPLER]
        assert cli.main(command) == 0
    return folder


@pytest.fixture(scope="module")
def effects(recorded: Path) -> str:
    pytest.importorskip("torch")
    path = str(recorded.parent / "effects.npz")
    command = ["plan", "measure", "pusht", "--data", str(recorded), "--out", path]
    assert cli.main([*command, "--chunks", "12", *SAMPLER]) == 0
    return path


def test_every_method_makes_a_plan_that_runs(capsys: Any, tmp_path: Path, effects: str) -> None:
    out = str(tmp_path / "plan.npz")
    policy = tsad.load("pusht", sampler="ddim", num_inference_steps=4)
    deep = ["plan", "make", "deepcache", "pusht", "--sparsity", "0.6", "--out", out, *SAMPLER]
    code, _, err = run(capsys, *deep)
    assert code == 2 and "argument METHOD: deepcache: expected a UNet" in err
    for method in set(METHODS) - {"deepcache"}:
        asked = "0.4" if method == "teacache" else "0.6"
        command = ["plan", "make", method, "pusht", "--sparsity", asked, "--out", out]
        command += ["--overwrite"]  # the one before
        code, text, err = run(capsys, *command, "--effects", effects, "--json", *SAMPLER)
        assert code == 0, err
        summary = json.loads(text)
        plan = tsad.Plan.load(out)
        assert summary["sparsity"] == pytest.approx(plan.sparsity) and plan.sparsity >= 0.4
        assert summary["passes"] == pytest.approx(4 * (1 - plan.sparsity))
        policy.plan = plan
        policy.reset(seed=0)
        assert np.isfinite(policy(np.full((2, 20), 256, np.float32))).all()
    late = ["plan", "make", "effects", "pusht", "--effects", effects, "--late", "--out", out]
    code, text, _ = run(capsys, *late, "--overwrite", "--sparsity", "0.8", *SAMPLER)
    assert code == 0 and tsad.Plan.load(out).sparsity >= 0.8  # beyond the dial
    code, text, _ = run(
        capsys, "plan", "make", "uniform", "pusht", "--sparsity", "0.5", "--out", out,
        "--overwrite", *SAMPLER,
    )  # fmt: skip
    assert code == 0 and "2.00 dense passes a chunk" in text


def test_search_improves_and_survives_ctrl_c(
    capsys: Any, tmp_path: Path, monkeypatch: Any, recorded: Path
) -> None:
    start, out = str(tmp_path / "start.npz"), str(tmp_path / "found.npz")
    run(capsys, "plan", "make", "random", "pusht", "--sparsity", "0.5", "--out", start, *SAMPLER)
    command = ["plan", "search", "pusht", "--data", str(recorded), "--start", start, "--out", out]
    command += ["--chunks", "8", "--lanes", "4", "--seed", "1", *SAMPLER]
    worse = str(tmp_path / "worse.npz")  # the better of two is taken
    tsad.planners.uniform(tsad.load("pusht", sampler="ddim", num_inference_steps=4), 1).save(worse)
    command.insert(command.index(start), worse)
    plain = Search.run

    def limited(self: Search, seconds: float, **options: Any) -> Any:
        return plain(self, seconds, tries=40, **options)

    monkeypatch.setattr(Search, "run", limited)
    code, text, err = run(capsys, *command, "--json")
    assert code == 0, err
    summary = json.loads(text)
    assert summary["rms"] < summary["rms_begun"] and summary["tried"] == 40
    assert tsad.Plan.load(out).sparsity >= tsad.Plan.load(start).sparsity - 1e-9

    command += ["--overwrite"]
    code, text, err = run(capsys, *command, "--draws", "3", "--against", "6", "--json")
    assert code == 0, err
    summary = json.loads(text)
    assert summary["distance"] < summary["distance_begun"] and summary["tried"] == 40
    assert tsad.Plan.load(out).metadata["draws"] == 3

    def interrupted(self: Search, seconds: float, *, on_try: Any) -> Any:
        plain(self, seconds, tries=2, on_try=on_try)
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", interrupted)
    code, _, err = run(capsys, *command)
    assert code == 130 and "goes on from it" in err
    assert tsad.Plan.load(out).sources.shape == (4, 24)


def test_import(capsys: Any, tmp_path: Path) -> None:
    mask, out = tmp_path / "mask.txt", str(tmp_path / "plan.npz")
    mask.write_text("1010")
    code, text, _ = run(capsys, "plan", "import", str(mask), "pusht", "--out", out, *SAMPLER)
    assert code == 0 and "sparsity 50.00% of the cost" in text
    assert tsad.Plan.load(out).sparsity == 0.5


def test_what_does_not_belong_together_is_refused(
    capsys: Any, tmp_path: Path, recorded: Path, effects: str
) -> None:
    out = ["--out", str(tmp_path / "plan.npz")]
    plan = str(tmp_path / "start.npz")
    run(capsys, "plan", "make", "uniform", "pusht", "--sparsity", "0.5", "--out", plan, *SAMPLER)
    other = ["--sampler", "ddim", "--steps", "5"]
    make = ["plan", "make", "effects", "pusht", "--sparsity", "0.5", *out]
    search = ["plan", "search", "pusht", "--data", str(recorded), *out]
    measure = ["plan", "measure", "pusht", "--data", str(recorded), *out]
    lost = ["--data", str(tmp_path / "lost")]
    for argv, message in (
        (
            [*make, "--effects", effects, *other],
            "--effects: .* num_inference_steps: the file",
        ),
        ([*make, *SAMPLER], "--effects: the method 'effects' needs"),
        ([*make, "--effects", str(recorded / "lost"), *SAMPLER], "--effects"),
        ([*make, "--effects", effects, *SAMPLER, "--sparsity", "0.9"], "--sparsity: expected 0 to"),
        ([*measure, *SAMPLER, *lost], "--data: got .*lost', where nothing is"),
        ([*search, "--start", plan, *other], "--start: expected 5 steps"),
        ([*search, "--start", plan, *SAMPLER, "--sparsity", "0.7"], "--start: expected a sparsity"),
        (
            [*search, "--start", plan, *SAMPLER, "--draws", "1"],
            "--draws: got 1, expected 2",
        ),
        (["plan", "make", "uniform", "pusht", "--sparsity", "0.5", "--out", "no/plan"], "--out"),
        (["plan", "import", "lost.txt", "pusht", *out], "FILE: got 'lost.txt'"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert re.search(message, err), err


def test_windows_are_spread_and_none_comes_twice() -> None:
    def episode(seed: int, chunks: int) -> Recorded:
        obs = np.arange(chunks)[:, None, None]
        return Recorded(seed, obs)

    episodes = [episode(0, 10), episode(1, 7), episode(2, 2)]
    found = pick(episodes, 13, 3, 0)
    assert sorted(e.number for e, _ in found[:3]) == [0, 1, 2]  # each once before any twice
    every = pick(episodes, 99, 3, 1)
    cells = [(e.number, int(c)) for e, part in every for c in e.obs[part].ravel()]
    assert len(cells) == len(set(cells)) == 9 + 6 + 2
    assert pick(episodes, 13, 3, 0) == found
    assert len(pick(episodes, 4, 1, 0)) == 4
