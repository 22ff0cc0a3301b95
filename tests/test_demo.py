"""tsad demo: what it plays is what is evaluated, its film keeps the robot's time, it adapts."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from fakes import FakePushT

import tsad
from tsad.commands import demo
from tsad.sim import film

pytest.importorskip("gym_pusht")
image = pytest.importorskip("PIL.Image")

DIAL = ("--sampler", "ddim", "--steps", "4", "--sparsity", "0.5")
STEPS = 20


@pytest.fixture(autouse=True)
def short_world(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", STEPS)


def show(capsys: Any, out: Path, *argv: str) -> dict[str, Any]:
    """The document of a demo, after a look at its files and what it says of them."""
    code, text, err = run(capsys, "demo", "--out", str(out), *argv)
    assert code == 0, err
    assert sorted(os.listdir(out)) == ["demo.gif", "plan.npz", "plan.png", "results.json"]
    assert all(str(out / name) in text for name in ("demo.gif", "plan.png", "results.json"))
    document: dict[str, Any] = json.loads((out / "results.json").read_text())
    for name, arm in document["arms"].items():
        (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{name} ")]
        assert row[-3:] == [
            str(round(arm["success"]["mean"] * arm["episodes"])),
            "of",
            str(arm["episodes"]),
        ]
    return document


def scores(arm: dict[str, Any]) -> dict[int, float]:
    return {episode["seed"]: episode["score"] for episode in arm["per_seed"]}


def evaluated(capsys: Any, *argv: str) -> dict[int, float]:
    code, text, err = run(
        capsys, "eval", "pusht", "--seeds", "2", "--first-seed", "100001", "--json", *argv
    )
    assert code == 0, err
    return {episode["seed"]: episode["score"] for episode in json.loads(text)["episodes"]}


def test_the_default_is_dense_and_lossless_as_evaluated(capsys: Any, tmp_path: Path) -> None:
    document = show(capsys, tmp_path / "d", "--seeds", "2")
    dense, lossless = document["arms"].values()
    assert list(document["arms"]) == ["dense", "lossless"]
    assert dense["n_action_steps"] == 8 and dense["sparsity"] == 0
    assert (lossless["n_action_steps"], lossless["precision"]) == (4, "int16")
    assert lossless["preset"].startswith("ddim, 8 steps trailing, warm start of 4")
    assert lossless["chunks"] > dense["chunks"]
    assert scores(lossless) == evaluated(capsys, "--preset", "lossless")
    assert scores(dense) == evaluated(capsys)
    assert document["paired"]["pairs"] == 2
    per_action = [arm["chunk_ms"]["p50"] / arm["n_action_steps"] for arm in (dense, lossless)]
    assert document["speed_up"] == pytest.approx(per_action[0] / per_action[1])
    assert tsad.Plan.load(tmp_path / "d" / "plan.npz").sources.shape == (4, 24)


def test_a_preset_by_name_and_the_dial(capsys: Any, tmp_path: Path) -> None:
    fast = show(capsys, tmp_path / "fast", "--seeds", "1", "--preset", "fast")["arms"]["fast"]
    assert fast["n_action_steps"] == 8 and fast["sampler"] == "dpmsolver++, 8 steps"
    found = show(capsys, tmp_path / "dial", "--seeds", "2", *DIAL)["arms"]
    assert list(found) == ["dense", "sparsity 0.5"]
    assert found["sparsity 0.5"]["sparsity"] == 0.5 and found["dense"]["sparsity"] == 0
    assert scores(found["sparsity 0.5"]) == evaluated(capsys, *DIAL)
    # again into its own folder, and the same numbers
    again = show(capsys, tmp_path / "dial", "--seeds", "2", *DIAL)["arms"]
    assert [scores(arm) for arm in again.values()] == [scores(arm) for arm in found.values()]


@pytest.mark.parametrize(("steps", "left_out"), [("2", 0.5), ("3", 2 / 3), ("16", 0.75)])
def test_the_default_of_the_dial_fits_the_steps(
    capsys: Any, tmp_path: Path, steps: str, left_out: float
) -> None:
    found = show(capsys, tmp_path / "d", "--seeds", "1", "--sampler", "ddim", "--steps", steps)
    dense, sparse = found["arms"].values()
    assert dense["sampler"] == sparse["sampler"] == f"ddim, {steps} steps"
    assert sparse["sparsity"] == pytest.approx(left_out, abs=1e-3)


def test_a_policy_without_presets_shows_the_dial(capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(Path(tsad.__file__).parent / "assets" / "pusht", folder)
    found = show(capsys, tmp_path / "a", "--seeds", "1", "--policy", str(folder))
    assert list(found["arms"]) == ["dense", "lossless"]
    (folder / "presets.json").unlink()
    found = show(capsys, tmp_path / "b", "--seeds", "1", "--policy", str(folder))
    assert list(found["arms"]) == ["dense", "sparsity 0.75"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--preset", "quick"], ["--preset", "'quick'", "'fast', 'lossless'"]),
        (["--preset", "fast", "--sparsity", "0.5"], ["--preset", "leave out one", "--sparsity"]),
        (["--preset", "fast", "--planner", "uniform"], ["--preset", "--planner"]),
        (["--preset", "fast", "--steps", "4"], ["--steps", "4", "8"]),
        (["--preset", "fast", "--sampler", "ddim"], ["--sampler", "'ddim'", "'dpmsolver++'"]),
        (["--sampler", "ddim", "--steps", "1"], ["--steps", "1 step", "2 or more"]),
        (["--sampler", "ddim", "--steps", "4", "--sparsity", "0.9"], ["--sparsity", "0.75"]),
        (["--planner", "best"], ["--planner", "'best'"]),
        (["--out", "{file}"], ["--out", "folder"]),
    ],
)
def test_errors_name_the_argument(
    capsys: Any, tmp_path: Path, argv: list[str], parts: list[str]
) -> None:
    file = tmp_path / "x"
    file.write_text("")
    argv = ["--out", str(tmp_path / "d"), *(word.format(file=file) for word in argv)]
    code, out, err = run(capsys, "demo", *argv)
    assert code == 2 and out == "" and not (tmp_path / "d").exists()
    line = err.splitlines()[-1]
    assert all(part in line for part in parts), line


def test_the_faster_one_plays_more(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a minute both get about half, and the seeds of the slower are the faster's first."""

    class Slow(FakePushT):
        def __call__(self, obs: Any, **options: Any) -> Any:
            time.sleep(0.0 if self.sparsity else 0.3)
            return super().__call__(obs, **options)

    monkeypatch.setattr(tsad, "load", lambda source, **options: Slow(options["lanes"]))
    monkeypatch.setattr(demo, "SECONDS", 4)
    document = show(capsys, tmp_path / "d", "--sparsity", "0.5")
    dense, sparse = document["arms"].values()
    assert 1 < 2 * dense["episodes"] < sparse["episodes"]
    assert list(scores(sparse))[: dense["episodes"]] == list(scores(dense))
    assert document["paired"]["pairs"] == dense["episodes"]
    monkeypatch.setattr(demo, "SECONDS", 0)
    arms = show(capsys, tmp_path / "d", "--sparsity", "0.5")["arms"]
    assert [arm["episodes"] for arm in arms.values()] == [1, 1]


# ---- the film


def scene(shade: int) -> Any:
    return np.full((film.SIZE, film.SIZE, 3), shade, np.uint8)


def episode(wait: float, chunks: int, end: str = "success") -> film.Reel:
    reel = film.Reel("name", "remark", step_seconds=0.1)
    reel.step(0, scene(0), "start")
    for chunk in range(chunks):
        reel.wait(wait)
        for step in range(4 * chunk + 1, 4 * chunk + 5):
            reel.step(step, scene(step), f"step {step}")
    reel.end(end)
    return reel


def test_the_robot_waits_as_long_as_a_chunk_takes() -> None:
    reel = episode(0.25, 3)
    assert reel.seconds == pytest.approx(12 * 0.1 + 3 * 0.25)
    for seconds, state, note, waited in [
        (0.0, "waits", "start", 0.0),
        (0.2, "waits", "start", 0.2),
        (0.36, "moves", "step 1", 0.25),
        (0.66, "waits", "step 4", 0.26),
        (0.9 + 1e-9, "waits", "step 4", 0.5),
        (1.01, "moves", "step 5", 0.5),
        (1.96, "is done", "success", 0.75),
        (99.0, "is done", "success", 0.75),
    ]:
        seen = reel.at(seconds)
        assert (seen.state, seen.note) == (state, note), seconds
        assert seen.waited == pytest.approx(waited, abs=1e-6)


def test_the_film_runs_as_fast_as_it_says(tmp_path: Path) -> None:
    slow, fast = episode(0.5, 6), episode(0.01, 6)
    film.save_gif([slow, fast], tmp_path / "x.gif")
    gif = image.open(tmp_path / "x.gif")
    shown = 0
    for number in range(gif.n_frames - 1):
        gif.seek(number)
        shown += gif.info["duration"]
    # frames that are alike may be one of a longer duration
    assert shown / 1e3 * film.SPEED == pytest.approx(slow.seconds, abs=0.1)
    gif.seek(gif.n_frames - 1)
    assert gif.info["duration"] == film.HOLD_MS
    last = np.asarray(gif.convert("RGB"))
    assert last.shape == (film.CAPTION + film.SIZE + film.CLOCK, 2 * film.SIZE + film.GAP, 3)
    middle = film.CAPTION + film.SIZE // 2
    assert np.abs(last[middle, [100, film.SIZE + film.GAP + 100]].astype(int) - 24).max() <= 2
