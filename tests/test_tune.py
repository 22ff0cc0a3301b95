"""tsad tune: the frontier, what is chosen, and the command."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

import tsad
from tsad.commands import tune
from tsad.evaluation import judging, sweep
from tsad.evaluation.play import Trial
from tsad.evaluation.sweep import Sweep
from tsad.presets import PRESETS_FILE, Preset, model_sha256, read_presets, save_presets
from tsad.sim import frontier, results
from tsad.statistics import LEAST_EPISODES

# ---- what settings are worth


def test_the_frontier_is_what_nothing_beats() -> None:
    ms = {"slow": 9.0, "mid": 5.0, "bad": 6.0, "fast": 1.0, "tie": 5.0, "none": 0.5}
    loss = {"slow": 0.0, "mid": 0.1, "bad": 0.1, "fast": 0.4, "tie": 0.1, "none": math.nan}
    assert frontier.frontier(ms, loss) == ["fast", "mid", "slow"]
    loss["fast"] = -0.1
    assert frontier.frontier(ms, loss) == ["fast"]
    assert frontier.fastest(ms, ["slow", "mid"]) == "mid"
    assert frontier.fastest(ms, []) is None


def test_as_many_seeds_as_said_show_that_nothing_is_lost() -> None:
    rng = np.random.default_rng(0)
    pilot = rng.normal(0, 0.2, 400)
    n, margin = frontier.seeds_needed(pilot, 0.03), 0.03
    assert 400 < n < 560  # (3.24 * 0.2 / 0.03)^2 = 467
    draws = rng.normal(0, 0.2, (4000, n))
    half = 1.96 * draws.std(axis=1, ddof=1) / math.sqrt(n)
    assert 0.87 < (draws.mean(axis=1) - half > -margin).mean() < 0.93
    assert frontier.seeds_needed([0.0, 0.0, 0.0], 0.01) == LEAST_EPISODES
    for wrong in ([1.0], np.zeros((3, 2))):
        with pytest.raises(ValueError, match="differences: expected two or more"):
            frontier.seeds_needed(wrong, 0.01)
    with pytest.raises(ValueError, match="margin: expected a number above 0"):
        frontier.seeds_needed(pilot, 0.0)


def test_rank_correlation() -> None:
    assert frontier.rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert frontier.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert frontier.rank_correlation([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert math.isnan(frontier.rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(frontier.rank_correlation([1, 2], [1, 2]))
    with pytest.raises(ValueError, match="b: expected 3 numbers"):
        frontier.rank_correlation([1, 2, 3], [1, 2])


def test_the_default_grid_fits_the_policy() -> None:
    names = [row["name"] for row in tune.default_grid(tsad.load("pusht"))]
    assert names[0] == "dense" and len(set(names)) == len(names)
    assert {"uniform-95", "ddim-2-trailing", "dpm-5", "ddim-16-uniform-87.5"} <= set(names)
    assert names[-2:] == ["ddim-8-warm-4-4-actions", "ddim-8-trailing-warm-4-rows-0-2-4-actions"]
    assert {"pruner-80", "pruner-own", "ddim-16-fbcache-0.2", "ddim-16-teacache-1"} <= set(names)
    assert {"ddim-16-trailing-warm-8-rows-0", "ddim-16-trailing-warm-8-rows-0-4"} <= set(names)
    other = [row["name"] for row in tune.default_grid(tsad.load("pusht_corners"))]  # a UNet
    assert not any("pruner" in name or "cache" in name for name in other)
    few = tune.default_grid(tsad.load("pusht", sampler="ddim", num_inference_steps=5))
    assert all(row.get("steps", 0) < 5 for row in few)
    assert not any(row["name"] == "uniform-95" for row in few)  # less than two steps


# ---- the command

ROWS = [
    {"name": "eight", "sampler": "ddim", "steps": 8},
    {"name": "four", "sampler": "ddim", "steps": 4},
    {"name": "one", "sampler": "ddim", "steps": 1},
    {"name": "half", "sampler": "ddim", "steps": 4, "planner": "uniform", "sparsity": 0.5},
    {"name": "other", "sampler": "ddim", "steps": 1, "noise": 1},
    {"name": "warm", "sampler": "ddim", "steps": 4, "warm_start": 1, "n_action_steps": 4},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A policy of our own, recorded observations, settings."""
    pytest.importorskip("gym_pusht")
    root = Path(tmp_path_factory.mktemp("tune"))
    shutil.copytree(Path(tsad.__file__).parent / "assets" / "pusht", root / "policy")
    (root / "policy" / PRESETS_FILE).unlink()  # what comes with the policy is not ours to replace
    (root / "grid.json").write_text(json.dumps(ROWS))
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: Any) -> None:
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 24)
    monkeypatch.setattr(tune, "CHUNKS_PER_ROUND", 2)
    monkeypatch.setattr(tune, "LEAST_SEEDS", 3)
    monkeypatch.setattr(results, "LEAST_EPISODES", 3)


def command(folder: Path, *more: str) -> list[str]:
    policy, grid = str(folder / "policy"), str(folder / "grid.json")
    out = str(folder / "tuned")
    return ["tune", "--policy", policy, "--settings", grid, "--out", out, "--rounds", "2", *more]


def test_tune_in_a_simulator(capsys: Any, folder: Path) -> None:
    options = ["--seeds", "3", "--lanes", "3", "--int16", "--save", "--within", "9", "--json"]
    code, out, err = run(capsys, *command(folder, "pusht", *options))
    assert code == 0, err
    found = json.loads(out)
    assert json.loads((folder / "tuned" / "tune.json").read_text()) == found
    rows = found["rows"]
    assert list(rows)[: len(ROWS)] == [row["name"] for row in ROWS]
    small = [name for name in rows if name.endswith("-int16")]
    assert small and "other-int16" not in rows
    assert rows["half"]["passes"] == 2 and rows["half"]["cell_sparsity"] == 0.5
    assert "mean_difference" not in rows["eight"] and rows["half"]["seeds_needed"] >= 2
    assert all(row["milliseconds"] == min(row["round_medians"]) > 0 for row in rows.values())
    assert rows["warm"]["n_action_steps"] == 4 and rows["eight"]["n_action_steps"] == 8
    # with so much allowed the fastest row of all is both, but never one with other noise
    times = {name: frontier.busy(rows, name) for name in rows if name != "other"}
    assert times["warm"] == 2 * rows["warm"]["milliseconds"]  # two chunks for as many actions
    fastest = min(times, key=lambda name: times[name])
    assert found["presets"] == {"fast": fastest, "lossless": fastest}
    assert found["frontier"][0] == fastest and "other" not in found["frontier"]
    measured = read_presets(folder / "policy")["fast"].measured
    assert measured["setting"] == fastest and measured["seeds"] == [10_000, 10_002]
    policy = tsad.load(folder / "policy", preset="fast")
    assert policy.num_inference_steps == found["settings"][fastest]["steps"]
    assert policy.precision == found["settings"][fastest].get("precision", "float32")

    # too few seeds prove nothing, and nothing is chosen by them
    code, out, err = run(capsys, *command(folder, "pusht", "--seeds", "2"))
    assert code == 0 and "no preset is chosen: 2 seeds, it takes 3" in out, err
    known = json.loads((folder / "tuned" / "tune.json").read_text())
    assert known["presets"] == {} and known["rows"]["half"]["simultaneous"] is None
    before = (folder / "policy" / "presets.json").read_bytes()
    code, out, err = run(capsys, *command(folder, "pusht", "--seeds", "2", "--save"))
    assert code == 2 and "argument --save: got 2 seeds, it takes 3" in err
    assert (folder / "policy" / "presets.json").read_bytes() == before

    # again: nothing is played, times are taken anew; text and picture
    code, out, err = run(capsys, *command(folder, "pusht", "--seeds", "3", "--lanes", "3"))
    assert code == 0 and "episodes" not in err, err
    assert "95 % together" in out and "fast: " in out and "lossless: " in out
    assert (folder / "tuned" / "tune.png").stat().st_size > 10_000


def _parsed(command: list[str]) -> Any:
    from tsad.cli import build_parser

    return build_parser().parse_args(command)


def test_a_preset_with_fewer_actions_and_a_warm_start(capsys: Any, folder: Path) -> None:
    grid, out = folder / "warm.json", str(folder / "warm")
    names = ("one", "warm")
    grid.write_text(json.dumps([row for row in ROWS if row["name"] in names]))
    command = ["tune", "pusht", "--policy", str(folder / "policy"), "--settings", str(grid)]
    command += ["--out", out, "--seeds", "3", "--within", "9", "--save", "--rounds", "2"]
    code, text, err = run(capsys, *command, "--overwrite", "--fewer-actions", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert list(found["rows"]) == ["one", "warm", "one-4-actions"]
    # by hand: what would be kept if the warm start were chosen is the setting it was
    args = _parsed(command)
    experiment = tune.experiment_of(args, resume=True)
    sweep = tune.Sweep(experiment, [ROWS[-1]], folder, Path(out), words=vars(args))
    rows = {"warm": found["rows"]["warm"]}
    tune._save(sweep, rows, {"fast": "warm"}, args)
    policy = tsad.load(folder / "policy", preset="fast")
    assert policy.num_inference_steps == 1 and policy.n_action_steps == 4
    assert policy.config["scheduler"]["num_inference_steps"] == 4
    rows = found["rows"]
    rows["warm"]["milliseconds"] = rows["one"]["milliseconds"] / 3
    assert frontier.busy(rows, "warm") == pytest.approx(frontier.busy(rows, "one") * 2 / 3)
    code, text, err = run(capsys, "info", str(folder / "policy"))
    assert code == 0 and "to dense" in text, err


def test_leads_are_judged_by_dense_with_a_lead(capsys: Any, folder: Path) -> None:
    grid, out = folder / "leads.json", folder / "leads"
    grid.write_text(json.dumps([row for row in ROWS if row["name"] in ("eight", "one")]))
    words = ["tune", "pusht", "--policy", str(folder / "policy"), "--settings", str(grid)]
    words += ["--out", str(out), "--seeds", "3", "--lanes", "3", "--rounds", "2", "--leads"]
    code, text, err = run(capsys, *words, "--within", "9", "--json")
    assert code == 0, err
    found = json.loads(text)
    rows, led = found["rows"], found["dense_with_lead"]
    endings = ["smooth-lead-0.1", "smooth-lead-0.2", "smooth-lead-0.3", "lead-0.2"]
    assert list(rows)[2:] == [f"{n}-{end}" for end in endings for n in ("eight", "one")]
    means = {name: row["score"]["mean"] for name, row in rows.items()}
    assert led == max((f"eight-{end}" for end in endings), key=lambda name: means[name])
    assert "to_dense_with_lead" not in rows[led]
    for name, row in rows.items():
        if name != led:
            difference = row["to_dense_with_lead"]["mean_difference"]
            assert difference == pytest.approx(means[name] - means[led])
    code, text, err = run(capsys, *words)
    assert code == 0 and f"dense with its own best lead: {led}" in text, err
    assert "to dense with lead" in text

    # what is chosen, by scores and times that are known
    args = _parsed([*words, "--within", "0.03"])
    names = ("eight", "eight-lead-0.2", "one", "one-lead-0.2", "one-smooth-lead-0.1")
    sweep = tune.Sweep(
        tune.experiment_of(args, resume=True),
        [found["settings"][name] for name in names],
        folder,
        out,
        words=vars(args),
    )

    def chosen(scores: tuple[float, ...]) -> Any:
        for name, score in zip(names, scores, strict=True):
            sure = {"simultaneous": [score - scores[0]] * 2}
            sweep.rows[name] = {
                "score": {"mean": score},
                "milliseconds": 1.0 if name.startswith("one") else 9.0,
                "n_action_steps": 8,
                **sure,
                "to_dense_with_lead": {"simultaneous": [score - scores[1]] * 2},
            }
        best, presets = judging.choose(sweep, sweep.rows, args.within, enough=True)
        assert presets["fast"] == presets["lossless"]
        return presets["fast"], best

    # a lead that takes it as far as dense without one does not make it lossless
    assert chosen((0.90, 0.95, 0.80, 0.91, 0.90)) == (None, [
        "one-lead-0.2", "eight"])  # fmt: skip
    assert chosen((0.90, 0.95, 0.80, 0.93, 0.94))[0] == "one-smooth-lead-0.1"
    assert chosen((0.90, 0.95, 0.88, 0.91, 0.90))[0] == "one"
    # dense with a lead is no preset: nothing is faster
    assert chosen((0.90, 0.95, 0.10, 0.10, 0.10))[0] is None
    code, _, err = run(
        capsys, "tune", "--policy", "p", "--observations", "x", "--out", "y", "--leads"
    )
    assert code == 2 and "argument --leads: a lead is chosen by score" in err


DECIDED = [
    {"name": "eight", "sampler": "ddim", "steps": 8},
    {"name": "pruner", "planner": "pruner"},
    {"name": "cache", "sampler": "ddim", "steps": 8, "rule": {"fbcache": 0.4, "most": 4}},
    {"name": "one", "sampler": "ddim", "steps": 4, "plan": "1000"},
    {"name": "two", "sampler": "ddim", "steps": 4, "warm_start": 2},
]


def short_fits(monkeypatch: Any, **settings: int) -> None:
    """Fits take these settings for the usual ones."""
    from tsad.training import fit

    monkeypatch.setattr(fit, "FitSettings", partial(fit.FitSettings, **settings))


def test_pruners_rules_and_fitted_samplers(capsys: Any, folder: Path, monkeypatch: Any) -> None:
    """They are played, told by what they cost, chosen, kept, and loaded as what they are."""
    pytest.importorskip("torch")
    short_fits(monkeypatch, steps=2, chunks=4, draws=2, batch=2)
    policy, recorded = str(folder / "policy"), str(folder / "recorded2")
    collect = ["collect", "pusht", "--policy", policy, "--out", recorded, "--episodes", "2"]
    assert run(capsys, *collect, "--sampler", "ddim", "--steps", "2")[0] == 0
    (folder / "decided.json").write_text(json.dumps(DECIDED))
    words = ["tune", "pusht", "--policy", policy, "--settings", str(folder / "decided.json")]
    words += ["--out", str(folder / "decided"), "--seeds", "3", "--lanes", "3", "--rounds", "2"]
    words += ["--within", "9", "--save", "--overwrite", "--data", recorded]
    code, text, err = run(capsys, *words, "--json")
    assert code == 0, err
    found = json.loads(text)
    rows = found["rows"]
    assert list(rows) == [*(row["name"] for row in DECIDED), "one-fitted", "two-fitted"]
    assert found["unfitted"] == {}
    for name in ("pruner", "cache"):
        assert 0 < rows[name]["passes"] <= rows[name]["most_passes"] < 100
    assert rows["cache"]["most_passes"] <= 4 + 4 / 8 and "most_passes" not in rows["one"]
    success = {name: row["success"]["mean"] for name, row in rows.items()}
    for name in list(rows)[1:]:
        difference = rows[name]["success_difference"]["mean_difference"]
        assert difference == pytest.approx(success[name] - success["eight"])
    code, text, err = run(capsys, *words)  # again: nothing is played or fitted
    assert code == 0 and "episodes" not in err and "train" not in err, err
    assert "success, difference" in text and "most" in text

    args = _parsed(words)
    sweep = tune.Sweep(
        tune.experiment_of(args, resume=True),
        [found["settings"][name] for name in rows],
        folder,
        folder / "decided",
        words=vars(args),
    )
    for name in ("pruner", "cache", "one-fitted"):
        tune._save(sweep, rows, {"fast": name}, args)
        preset, loaded = read_presets(folder / "policy")["fast"], tsad.load(policy, preset="fast")
        wanted = sweep.load(name)
        assert (loaded.planner, loaded.sparsity) == (wanted.planner, wanted.sparsity)
        assert (loaded.fitted is None) == (name != "one-fitted")
        obs = np.full((loaded.n_obs_steps, loaded.obs_dim), 256, np.float32)
        for each in (loaded, wanted):
            each.reset(seed=0)
            each(obs)
        np.testing.assert_array_equal(loaded(obs), wanted(obs))
        assert (preset.pruner_sha256 is None) == (name != "pruner")
        words_of = {"pruner": "pruner, its own", "cache": "fbcache 0.4, at most 4 steps"}
        code, text, err = run(capsys, "info", policy)
        assert code == 0 and words_of.get(name, "fitted") in text and "success " in text, err
        assert "waits to be asked: planner='pruner'" in text


@pytest.mark.parametrize("argument", ["--data", "--observations"])
def test_recordings_are_read_before_many_policies_are_loaded(
    capsys: Any, monkeypatch: Any, tmp_path: Path, argument: str
) -> None:
    monkeypatch.delattr(tune, "Sweep")
    out = tmp_path / "out"
    words = ["tune", "pusht", "--policy", "pusht", "--out", str(out)]
    code, _, err = run(capsys, *words, argument, str(tmp_path / "nowhere"))
    assert code == 2 and f"argument {argument}: " in err and "nothing is" in err
    assert not out.exists()


def test_what_can_not_be_fitted_is_said(capsys: Any, folder: Path, monkeypatch: Any) -> None:
    pytest.importorskip("torch")
    short_fits(monkeypatch, steps=2, chunks=4, draws=2)
    grid, data = folder / "few.json", folder / "single.npz"
    grid.write_text(json.dumps([DECIDED[0], DECIDED[4]]))
    np.savez(data, obs=np.full((4, 2, 20), 256, np.float32))  # single chunks: nothing before them
    words = ["tune", "pusht", "--policy", str(folder / "policy"), "--settings", str(grid), "--out"]
    words += [str(folder / "few"), "--seeds", "2", "--rounds", "1", "--data", str(data)]
    code, text, err = run(capsys, *words)
    assert code == 0 and "not fitted: two: argument --data: " in text, err
    turns = {"name": "t", **DECIDED[0], "rule": "every=2,plan=10000000,other=11000000"} | {
        "name": "t"}  # fmt: skip
    grid.write_text(json.dumps([DECIDED[0], turns]))
    words = ["tune", "--policy", str(folder / "policy"), "--settings", str(grid), "--out"]
    words += [str(folder / "turns"), "--observations", str(data), "--draws", "2"]
    code, _, err = run(capsys, *words)
    assert code == 2 and "t: what plans that take turns do takes episodes to see" in err


def test_what_needs_a_past_is_known_without_loading_again(
    capsys: Any, folder: Path, monkeypatch: Any
) -> None:
    """A large policy takes seconds to load, and there may be thirty settings."""
    grid, data, loaded, during = folder / "past.json", folder / "one.npz", [], []
    grid.write_text(json.dumps([DECIDED[0], DECIDED[3]]))
    np.savez(data, obs=np.full((4, 2, 20), 256, np.float32))
    load, unmeasured = Trial.load, Sweep.unmeasured

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        loaded.append(self)
        return load(self, *args, **options)

    def watched(self: Any) -> list[str]:
        before = len(loaded)
        found = unmeasured(self)
        during.append((found, len(loaded) - before))
        return found

    monkeypatch.setattr(sweep, "HELD", -1)  # as of policies so large that none is kept
    monkeypatch.setattr(Trial, "load", counted)
    monkeypatch.setattr(Sweep, "unmeasured", watched)
    words = ["tune", "--policy", str(folder / "policy"), "--settings", str(grid), "--rounds", "1"]
    words += ["--observations", str(data), "--draws", "2", "--out", str(folder / "past")]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert loaded and set(map(str, during)) == {"([], 0)"}


def test_nothing_is_chosen_that_loses_more(capsys: Any, folder: Path) -> None:
    options = ["pusht", "--seeds", "3", "--lanes", "3", "--within", "1e-9", "--json"]
    code, out, err = run(capsys, *command(folder, *options))
    assert code == 0, err
    found = json.loads(out)
    rows = found["rows"]
    # a preset of an earlier run stays, and that is said
    policy = folder / "policy"
    for name in ("fast", "lossless"):
        preset = {"sampler": "ddim", "num_inference_steps": 4, "timestep_spacing": "leading"}
        save_presets(policy, [(Preset(name, model_sha256(policy), **preset), None)])
    code, text, err = run(capsys, *command(folder, *options[:-1], "--save", "--overwrite"))
    assert code == 0, err
    for name, chosen in json.loads((folder / "tuned" / "tune.json").read_text())["presets"].items():
        assert (f"the preset {name} in" in text) == (chosen is None)
        assert (f'preset="{name}"' in text) == (chosen is not None)
    base = rows["eight"]["score"]["mean"]
    for name in (found["presets"]["fast"], found["presets"]["lossless"]):
        assert name is None or rows[name]["score"]["mean"] >= base - 1e-9


def test_tune_without_a_simulator(capsys: Any, folder: Path) -> None:
    recorded, policy = str(folder / "recorded"), str(folder / "policy")
    collect = ["collect", "pusht", "--policy", policy, "--out", recorded, "--episodes", "1"]
    assert run(capsys, *collect, "--sampler", "ddim", "--steps", "4")[0] == 0
    options = ["--observations", recorded, "--draws", "3"]
    code, _, err = run(capsys, *command(folder, *options))  # of another test, with a simulator
    assert code == 2 and "tune.json exists, and is of another kind or run (simulator)" in err
    options += ["--out", str(folder / "offline")]
    code, out, err = run(capsys, *command(folder, *options, "--json"))
    assert code == 0, err
    found = json.loads(out)
    rows = found["rows"]
    assert found["simulator"] is None and found["seeds"] is None and "score" not in rows["one"]
    assert rows["eight"]["distance"] == 0 < rows["four"]["distance"] < rows["one"]["distance"]
    assert set(found["presets"]) == {"fast"} and found["rank_correlation"] == {}
    code, out, _ = run(capsys, *command(folder, *options))
    assert code == 0 and "recorded observations" in out and "spread" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "SIMULATOR: expected a simulator, or --observations"),
        (["--observations", "x", "--out", "x"], "--policy: without a simulator"),
        (["chess", "--out", "x"], "unknown simulator 'chess'"),
        (["pusht", "--out", "x", "--seeds", "1"], "--seeds: got 1, expected 2 or more"),
        (["pusht", "--out", "x", "--within", "0"], "--within: got '0', expected a number above 0"),
        (["pusht", "--out", "x", "--within", "nan"], "--within: got 'nan'"),
        (["pusht", "--out", __file__], "is a file, expected a folder"),
        (["--policy", "p", "--observations", "x", "--out", "y", "--draws", "1"], "--draws: expec"),
        (["pusht", "--out", "x", "--settings", "/no/such"], "--settings: "),
        (["pusht", "--out", "x", "--observations", "/no/such"], "--observations: "),
    ],
)
def test_bad_use(capsys: Any, arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, "tune", *arguments)
    assert code == 2 and message in err, err
