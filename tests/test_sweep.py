"""tsad eval --settings, and what it stands on: actions executed, other noise, joint intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from fakes import FakePolicy, FakeWorld

import tsad
from tsad import sim
from tsad.sim import offline
from tsad.sim.results import ResultsError, compare, compare_all
from tsad.sim.rollout import Episode

# ---- rollouts


def test_fewer_actions_are_executed_of_each_chunk() -> None:
    for executed in (1, 2, 4, None):
        seen: list[Any] = []
        stepped: list[Any] = []

        class World(FakeWorld):
            def step(self, action: Any, stepped: Any = stepped) -> sim.Step:
                stepped.append(action)
                return super().step(action)

        (episode,) = sim.rollouts(
            FakePolicy(), [World()], [3], on_chunk=seen.append, n_action_steps=executed
        )
        n = executed or 4
        assert episode.chunks == -(-episode.steps // n) == len(seen)
        wanted = np.concatenate([chunk.actions[0][:n] for chunk in seen])
        np.testing.assert_array_equal(stepped, wanted[: len(stepped)])
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="n_action_steps: expected 1 to 4"):
            list(sim.rollouts(FakePolicy(), [FakeWorld()], [3], n_action_steps=wrong))


def test_other_noise_in_the_same_scene() -> None:
    starts: list[Any] = []

    def play(stream: int) -> Any:
        seen: list[Any] = []
        list(
            sim.rollouts(
                FakePolicy(), [FakeWorld()], [3], on_chunk=seen.append, noise_stream=stream
            )
        )
        starts.append(seen[0].obs)
        return seen[0].actions

    assert (play(0) != play(1)).all() and (play(1) == play(1)).all()
    assert all((start == starts[0]).all() for start in starts)
    assert sim.noise_seed(7) == sim.noise_seed(7, 0) != sim.noise_seed(7, 1)


# ---- intervals


def episodes(scores: Any) -> list[Episode]:
    return [Episode(i, float(s), False, 1, 1, 0.0, 0.0) for i, s in enumerate(scores)]


def test_joint_intervals() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200)
    rows = {"base": episodes(base), "same": episodes(base)}
    rows |= {f"row{i}": episodes(base + rng.normal(0.02, 0.1, 200)) for i in range(8)}
    found = compare_all(rows, "base")
    assert found["pairs"] == 200 and set(found["rows"]) == set(rows) - {"base"}
    low, high = found["rows"]["same"]["simultaneous"]  # equal in all seeds: others may differ
    assert -0.03 < low < -0.005 and high == pytest.approx(-low)
    alone = compare_all({"base": rows["base"], "row0": rows["row0"]}, "base")["rows"]["row0"]
    single = compare(rows["row0"], rows["base"])["score"]
    low, high = single["interval95"]
    assert alone["mean_difference"] == pytest.approx(single["mean_difference"])
    # one row: as wide as the plain interval; eight: wider, as Bonferroni's 2.73 / 1.96 at most
    assert np.diff(alone["simultaneous"]) == pytest.approx(high - low, rel=0.08)
    together = found["rows"]["row0"]["simultaneous"]
    assert 1.2 < np.diff(together) / np.diff(alone["simultaneous"]) < 1.45
    few = compare_all({name: rows[name][:19] for name in ("base", "row0")}, "base")["rows"]["row0"]
    assert few["simultaneous"] is None and few["standard_error"] > 0
    assert compare(rows["row0"][:19], rows["base"])["score"]["interval95"] is None
    won = {name: [replace(e, success=e.score > 0.5) for e in own] for name, own in rows.items()}
    as_scores = {name: episodes([e.success for e in own]) for name, own in won.items()}
    assert compare_all(won, "base", of="success") == compare_all(as_scores, "base")
    assert compare_all(won, "base") == found
    with pytest.raises(ResultsError, match="fewer than two seeds in common"):
        compare_all({"a": rows["base"][:3], "b": rows["base"][2:]}, "a")


@pytest.mark.slow
def test_joint_intervals_hold_together_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        base = rng.random(60)
        shared = rng.normal(0, 0.05, 60)  # rows are alike, as those of one policy are
        rows = {str(i): episodes(base + shared + rng.normal(0, 0.1, 60)) for i in range(5)}
        found = compare_all({"base": episodes(base), **rows}, "base")["rows"].values()
        held += all(low <= 0 <= high for low, high in (row["simultaneous"] for row in found))
    assert 88 <= held <= 100


# ---- the command


def write(path: Path, rows: Any) -> list[str]:
    path.write_text(json.dumps(rows))
    folder = str(path.parent / "sweep")
    return ["eval", "pusht", "--seeds", "3", "--settings", str(path), "--out", folder]


def test_a_sweep(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 24)
    short = {"sampler": "ddim", "steps": 4}
    policy = tsad.load("pusht", sampler="ddim", num_inference_steps=4)
    tsad.planners.uniform(policy, 2).save(tmp_path / "two.npz")
    rows = [
        {"name": "dense", **short},
        {"name": "other-noise", **short, "noise": 1},
        {"name": "again", **short, "sparsity": 0},
        {"name": "half", **short, "sparsity": 0.5},
        {"name": "file", **short, "plan": "two.npz"},
        {"name": "mask", **short, "plan": "1010"},
        {"name": "short", **short, "n_action_steps": 4},
        {"name": "trailing", **short, "spacing": "trailing"},
        {"name": "int16", **short, "precision": "int16"},
    ]
    command = write(tmp_path / "sweep.json", rows)
    recorded = str(tmp_path / "recorded")
    collect = ["collect", "pusht", "--out", recorded, "--episodes", "2", "--sampler", "ddim"]
    assert run(capsys, *collect, "--steps", "4")[0] == 0
    code, out, err = run(capsys, *command, "--observations", recorded, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert json.loads((tmp_path / "sweep" / "summary.json").read_text()) == summary
    found, compared = summary["rows"], summary["compared"]["rows"]
    assert list(found) == [row["name"] for row in rows] and "dense" not in compared
    assert compared["again"]["mean_difference"] == 0
    assert all(row["simultaneous"] is None for row in compared.values())
    for name in ("file", "mask"):  # the same plan
        assert found[name]["score"] == found["half"]["score"]
    assert found["file"]["passes"] == found["half"]["passes"] == 2
    assert found["dense"]["action_rms"] == found["again"]["action_rms"] == 0
    assert 1e-3 < found["half"]["action_rms"] < 2
    assert 0 < found["int16"]["action_rms"] < 1e-3  # to float32, not to itself
    assert found["trailing"]["action_rms"] == 0  # to its own sampler, dense
    assert found["half"]["action_rms"] == pytest.approx(found["file"]["action_rms"])
    for name in ("other-noise", "half", "short", "trailing"):
        assert compared[name]["standard_error"] > 0, name
    assert found["trailing"]["settings"]["timestep_spacing"] == "trailing"

    # several draws compare distributions with the first row's
    code, out, err = run(capsys, *command, "--observations", recorded, "--draws", "2", "--json")
    assert code == 0, err
    drawn = json.loads(out)["rows"]
    assert drawn["dense"]["distance"] == 0 and drawn["dense"]["spread"] == 1
    assert drawn["int16"]["distance"] < 1e-3 < drawn["half"]["distance"]
    assert drawn["half"]["score"] == found["half"]["score"]

    # more seeds play only those; a row more plays that row
    played: list[int] = []
    rollouts = sim.rollouts

    def watched(policy: Any, worlds: Any, seeds: Any, **options: Any) -> Any:
        played.extend(seeds)
        return rollouts(policy, worlds, seeds, **options)

    monkeypatch.setattr(sim, "rollouts", watched)
    command[3] = "4"

    def unasked(*args: Any) -> Any:
        raise AssertionError("errors are kept")

    with monkeypatch.context() as patch:
        patch.setattr(offline, "actions", unasked)
        code, out, _ = run(capsys, *command, "--observations", recorded)
    assert code == 0 and f"{found['half']['action_rms']:.4f}" in out and len(played) == len(rows)
    played.clear()
    command[3] = "5"
    code, out, _ = run(capsys, *command)
    assert code == 0 and played == [100004] * len(rows)
    looks = json.loads((tmp_path / "sweep" / "half.json").read_text())["looks"]
    assert [look["last_seed"] for look in looks] == [100002, 100002, 100003, 100004]
    assert "no 95 % interval: 5 seeds, it takes 20" in out
    assert "95 % together" in out and out.count("\n") >= len(rows) + 4
    played.clear()
    rows[3]["sparsity"] = 0.25
    write(tmp_path / "sweep.json", rows)
    code, _, err = run(capsys, *command)
    assert code == 2 and "sparsity: the file has 0.5, this run 0.25" in err


def test_ctrl_c_names_the_setting(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gym_pusht")
    short = {"sampler": "ddim", "steps": 1}
    command = write(tmp_path / "sweep.json", [{"name": "a", **short}, {"name": "b", **short}])

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sim, "rollouts", interrupted)
    code, _, err = run(capsys, *command)
    assert code == 130 and "interrupted; setting a: no episode was finished" in err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "expected a list of objects"),
        ([], "expected a list of objects"),
        ([{"steps": 4}], 'setting 0: expected an object with a "name"'),
        ([{"name": "a"}, {"name": "a"}], "setting 1: name: expected"),
        ([{"name": "a/b"}], "setting 0: name: expected"),
        ([{"name": "a", "stepps": 4}], "unknown key 'stepps'; known are name, sampler"),
        ([{"name": "a", "steps": "4"}], "steps: expected int, got '4'"),
        ([{"name": "a", "sparsity": True}], "sparsity: expected float, got True"),
        ([{"name": "a", "sampler": "heun"}], "sampler: expected one of"),
        ([{"name": "a", "plan": "x.npz", "sparsity": 0.5}], "a plan leaves nothing"),
        ([{"name": "a", "plan": "lost.npz"}], "lost.npz"),
        ([{"name": "a", "n_action_steps": 9}], "expected 1 to 8"),
        ([{"name": "a", "planner": "magic"}], "expected one of 'dense'"),
    ],
)
def test_wrong_settings(capsys: Any, tmp_path: Path, rows: Any, message: str) -> None:
    pytest.importorskip("gym_pusht")
    code, _, err = run(capsys, *write(tmp_path / "sweep.json", rows))
    assert code == 2 and message in err, err
    assert not (tmp_path / "sweep").exists()


def test_wrong_options(capsys: Any, tmp_path: Path) -> None:
    command = write(tmp_path / "sweep.json", [{"name": "a"}])
    for extra, message in (
        (["--sparsity", "0.5"], "--sparsity: not together with --settings"),
        (["--seeds", "1"], "--seeds: expected 2 or more"),
        (["--observations", "lost"], "--observations"),
        (["--out", str(tmp_path / "sweep.json")], "expected a folder"),
    ):
        code, _, err = run(capsys, *command, *extra)
        assert code == 2 and message in err, err
    code, _, err = run(capsys, *command[:-2])
    assert code == 2 and "needs --out DIR" in err
    code, _, err = run(capsys, "eval", "pusht", "--observations", "x")
    assert code == 2 and "--observations: needs --settings" in err
