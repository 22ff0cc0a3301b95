"""Presets: written, applied, refused, listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from test_load import a_folder, actions

import tsad
from tsad import REUSE_STEP
from tsad.checkpoint import CheckpointError
from tsad.presets import (
    PRESETS_FILE,
    Preset,
    model_sha256,
    pruner_sha256,
    read_presets,
    save_presets,
    stale,
)

DDIM = {"sampler": "ddim", "num_inference_steps": 5}


def a_preset(folder: Path, name: str, **fields: Any) -> Preset:
    defaults = {**DDIM, "timestep_spacing": "trailing"}
    return Preset(name, model_sha256(folder), **{**defaults, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a_folder(tmp_path / "policy")


def test_a_preset_is_the_setting_it_names(folder: Path) -> None:
    measured = {"loss": 0.01, "interval": [-0.02, 0.0], "milliseconds": 1.5}
    chosen = tsad.planners.uniform(tsad.load(folder, **DDIM), 2)
    preset = a_preset(folder, "fast", measured=measured, n_action_steps=2)
    save_presets(folder, [(preset, chosen), (a_preset(folder, "half", sparsity=0.5), None)])
    policy = tsad.load(folder, preset="fast", lanes=2)
    assert policy.config["scheduler"]["type"] == "ddim" and policy.num_inference_steps == 5
    assert policy.config["scheduler"]["timestep_spacing"] == "trailing"
    assert policy.n_action_steps == 2 and policy.lanes == 2
    assert policy.plan == [chosen, chosen]  # before the first call
    wanted = tsad.load(folder, **DDIM, timestep_spacing="trailing", lanes=2)
    wanted.plan = chosen
    np.testing.assert_array_equal(actions(policy), actions(wanted)[:, :2])
    assert policy.plan == [chosen, chosen]
    policy.sparsity = 0.0  # the dial is the user's
    actions(policy)
    assert not policy.plan[0].sources.any()
    assert tsad.load(folder, preset="half").plan == tsad.planners.uniform(policy, 2)
    found = read_presets(folder)["fast"]
    assert found.measured == measured and found.load_plan() == chosen
    assert found.words() == (
        "ddim, 5 steps trailing, plan preset-fast.npz, 2 actions of a chunk, float32"
    )


def test_a_preset_may_start_warm(folder: Path) -> None:
    plan = tsad.planners.uniform(tsad.load(folder, **DDIM, warm_start=3), 1)
    rows: list[tuple[Preset, Any]] = [
        (a_preset(folder, "warm", warm_start=3, n_action_steps=2), None),
        (a_preset(folder, "lean", warm_start=3), plan),  # a plan of the three steps
    ]
    save_presets(folder, rows)
    words = read_presets(folder)["warm"].words()
    assert words == (
        "ddim, 5 steps trailing, warm start of 3, dense, 2 actions of a chunk, float32"
    )
    options: dict[str, Any] = {**DDIM, "timestep_spacing": "trailing", "warm_start": 3}
    for name in ("warm", "lean"):
        policy, wanted = tsad.load(folder, preset=name), tsad.load(folder, **options)
        assert policy.warm_start == policy.num_inference_steps == 3
        if name == "lean":
            wanted.plan = plan
            assert policy.plan == plan and policy.cold_plan is None
        obs = np.zeros((policy.n_obs_steps, policy.obs_dim), np.float32)
        for either in (policy, wanted):
            either.reset(seed=3)
        for _ in range(3):
            got, full = policy(obs), wanted(obs, executed=policy.n_action_steps)
            np.testing.assert_array_equal(got, full[: policy.n_action_steps])
    with pytest.raises(ValueError, match="warm_start: got 2, but the preset 'warm' has 3"):
        tsad.load(folder, preset="warm", warm_start=2)
    with pytest.raises(ValueError, match="warm_start: expected an integer from 1 to 5 "):
        save_presets(folder, [(a_preset(folder, "long", warm_start=9), None)])
        tsad.load(folder, preset="long")


def test_planners_and_precision(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, pruner=True)
    rows = [
        a_preset(folder, "own", planner="pruner"),
        a_preset(folder, "some", planner="pruner", sparsity=0.4, precision="int16"),
        a_preset(folder, "even", planner="uniform", sparsity=0.4),
    ]
    save_presets(folder, [(row, None) for row in rows])
    policies = {name: tsad.load(folder, preset=name) for name in ("own", "some", "even")}
    assert [p.planner for p in policies.values()] == ["pruner", "pruner", "uniform"]
    assert [p.sparsity for p in policies.values()] == [None, 0.4, 0.4]
    assert [p.precision for p in policies.values()] == ["float32", "int16", "float32"]


def test_an_argument_that_says_otherwise_is_refused(folder: Path) -> None:
    save_presets(folder, [(a_preset(folder, "fast"), None)])
    for wrong in (
        {"sampler": "ddpm"},
        {"num_inference_steps": 4},
        {"timestep_spacing": "leading"},
        {"precision": "int16"},
        {"planner": "uniform"},
        {"sparsity": 0.5},
    ):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"^{name}: got {value!r}, but the preset 'fast' "):
            tsad.load(folder, preset="fast", **wrong)
    same = tsad.load(folder, preset="fast", threads=1, precision="float32", **DDIM)
    assert same.num_inference_steps == 5  # saying the same is no clash


def test_what_cannot_be_applied_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="preset: got 'fast', but .* has no presets; tsad tune --save"
    ):
        tsad.load(folder, preset="fast")
    policy = tsad.load(folder, **DDIM)
    rows = [(a_preset(folder, "fast"), tsad.planners.uniform(policy, 2))]
    rows += [(a_preset(folder, "many", n_action_steps=99), None)]
    rows += [(a_preset(folder, "magic", planner="pruner"), None)]
    save_presets(folder, rows)
    with pytest.raises(ValueError, match="has the presets 'fast', 'many', 'magic'"):
        tsad.load(folder, preset="slow")
    with pytest.raises(TypeError, match="preset: expected a name, got 3"):
        tsad.load(folder, preset=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset: expected at most . n_action_steps"):
        tsad.load(folder, preset="many")
    with pytest.raises(ValueError, match="preset: 'magic' does not fit this policy: planner"):
        tsad.load(folder, preset="magic")
    file = folder / "preset-fast.npz"
    tsad.planners.uniform(policy, 3).save(file)  # another plan under its name
    with pytest.raises(CheckpointError, match=r"preset-fast.npz: expected the plan of .* sha256"):
        tsad.load(folder, preset="fast")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"preset-fast.npz: .* can't be read"):
        tsad.load(folder, preset="fast")


def test_presets_of_other_weights(folder: Path, tmp_path: Path, capsys: Any) -> None:
    mine = a_preset(folder, "mine")
    other = replace(mine, name="other", model_sha256="ab" * 32)
    save_presets(folder, [(mine, None), (other, None)])
    assert stale(folder) == ["other"]
    with pytest.raises(ValueError, match="'other' was made for other weights.*abab.*this"):
        tsad.load(folder, preset="other")
    assert tsad.load(folder, preset="mine").num_inference_steps == 5
    code, out, _ = run(capsys, "info", str(folder))
    assert code == 0 and "presets" in out
    assert "mine   ddim, 5 steps trailing, dense, float32" in out
    assert "refused: made for other weights, abababab" in out
    code, out, _ = run(capsys, "info", str(folder), "--json")
    rows = json.loads(out)["policy"]["presets"]
    assert [(row["name"], row["usable"]) for row in rows] == [("mine", True), ("other", False)]
    # those that are saved later do not displace others
    save_presets(folder, [(replace(mine, sampler="ddpm"), None)])
    found = read_presets(folder)
    assert list(found) == ["mine", "other"] and found["mine"].sampler == "ddpm"


def test_conversion_keeps_presets_and_says_so(tmp_path: Path, capsys: Any) -> None:
    checkpoints = pytest.importorskip("checkpoints")
    source, out = tmp_path / "latest.ckpt", tmp_path / "policy"
    checkpoints.save(source, checkpoints.payload())
    command = ["convert", str(source), str(out)]
    assert run(capsys, *command)[0] == 0
    with pytest.raises(ValueError, match="is a checkpoint, and only folders hold presets"):
        tsad.load(source, preset="fast")
    save_presets(out, [(a_preset(out, "fast"), None)])
    code, text, _ = run(capsys, *command, "--overwrite")  # the same weights
    assert code == 0 and "presets.json" not in text
    assert tsad.load(out, preset="fast").num_inference_steps == 5
    code, text, _ = run(capsys, *command, "--overwrite", "--dtype", "float16")
    assert code == 0 and "presets.json stays, but its fast were made for other weights" in text
    assert list(read_presets(out)) == ["fast"] and stale(out) == ["fast"]
    (out / PRESETS_FILE).write_text("{")
    before = model_sha256(out)
    code, _, err = run(capsys, *command, "--overwrite")
    assert code == 2 and "presets.json" in err and model_sha256(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format: expected one of"),
        ({"format_version": 2}, "format_version: expected 1, got 2; update tsad"),
        ({"presets": {}}, "presets: expected a list of objects"),
        ({"more": 1}, "unknown key 'more'"),
        ({"presets": [3]}, r"presets\[0\]: expected a JSON object"),
        ({"name": "../up"}, "name: expected letters"),
        ({"name": None}, "name: expected this key"),
        ({"model_sha256": "2ba0801a"}, "model_sha256: expected 64 hexadecimal digits"),
        ({"sampler": "heun"}, "sampler: expected one of"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected an integer"),
        ({"precision": "int4"}, "precision: expected one of"),
        ({"n_action_steps": "2"}, "n_action_steps: expected an integer"),
        ({"planner": "magic"}, "planner: expected one of"),
        ({"sparsity": 1.5}, "sparsity: expected a number"),
        ({"sparsity": -0.5}, "sparsity: expected a number from 0"),
        ({"plan": "/etc/passwd"}, "plan: expected the name of a file beside"),
        ({"plan": "a.npz", "sparsity": 0.5}, "plan: expected no planner or sparsity"),
        ({"plan": "a.npz"}, "plan: expected plan and plan_sha256"),
        ({"measured": [1]}, "measured: expected a JSON object"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_wrong_files(folder: Path, change: dict[str, Any], message: str) -> None:
    save_presets(folder, [(a_preset(folder, "fast"), None)])
    content = json.loads((folder / PRESETS_FILE).read_text())
    own = {"format", "format_version", "presets", "more"}
    for key, value in change.items():
        target = content if key in own else content["presets"][0]
        target[key] = value
        if value is None:
            del target[key]
    (folder / PRESETS_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        tsad.load(folder, preset="fast")
    assert PRESETS_FILE in str(caught.value)
    assert tsad.load(folder).num_inference_steps == 20  # needs no presets


def test_a_name_twice(folder: Path) -> None:
    save_presets(folder, [(a_preset(folder, "fast"), None)])
    content = json.loads((folder / PRESETS_FILE).read_text())
    content["presets"] *= 2
    (folder / PRESETS_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="name: expected each name once, got 'fast'"):
        read_presets(folder)


# ---- the commands


@pytest.fixture
def bundled(tmp_path: Path) -> str:
    """A copy of the bundled policy with a preset."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(Path(tsad.__file__).parent / "assets" / "pusht", copy)
    (copy / PRESETS_FILE).unlink(missing_ok=True)
    policy = tsad.load(copy, sampler="ddim", num_inference_steps=4)
    sources = np.full((4, 24), REUSE_STEP, np.uint8)
    sources[0] = sources[2] = 0
    preset = a_preset(copy, "fast", num_inference_steps=4, timestep_spacing="leading")
    save_presets(copy, [(preset, tsad.Plan(sources, sources, cost=policy.block_costs))])
    return str(copy)


def test_eval_plays_a_preset(bundled: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 16)
    command = ["eval", "pusht", "--policy", bundled, "--seeds", "2"]
    out = ["--json", "--out", str(tmp_path / "a.json")]
    code, text, err = run(capsys, *command, "--preset", "fast", *out)
    assert code == 0, err
    chosen = json.loads(text)
    plan = ["--plan", f"{bundled}/preset-fast.npz", "--sampler", "ddim", "--steps", "4"]
    code, text, err = run(capsys, *command, *plan, *out, "--resume")
    assert code == 0, err  # the same settings: it goes on with that file
    assert json.loads(text)["episodes"] == chosen["episodes"]
    for extra, message in (
        (["--sampler", "ddpm"], "argument --sampler: got 'ddpm', but the preset 'fast' has 'ddim'"),
        (["--steps", "5"], "argument --steps: got 5"),
        (["--sparsity", "0.5"], "argument --sparsity: got 0.5, but the preset 'fast' decides"),
        (["--n-action-steps", "2"], "argument --n-action-steps: got 2"),
        (["--preset", "slow"], "argument --preset: got 'slow', but"),
    ):
        code, _, err = run(capsys, *command, "--preset", "fast", *extra)
        assert code == 2 and message in err, err
    rows = [
        {"name": "dense", "sampler": "ddim", "steps": 4},
        {"name": "preset", "preset": "fast"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sweep = ["--settings", str(tmp_path / "rows.json"), "--out", str(tmp_path / "sweep"), "--json"]
    code, text, err = run(capsys, *command, *sweep)
    assert code == 0, err
    row = json.loads(text)["rows"]["preset"]
    assert row["passes"] == pytest.approx(2) and row["settings"]["planner"] == "file"


def test_bench_times_a_preset(bundled: str, capsys: Any) -> None:
    command = ["bench", bundled, "--chunks", "5", "--threads", "1", "--sampler", "ddim"]
    command += ["--steps", "4", "--preset", "fast", "--json"]
    code, text, err = run(capsys, *command)
    assert code == 0, err
    results = json.loads(text)["results"]
    assert [row["name"] for row in results] == ["dense", "fast"]
    assert [row["passes"] for row in results] == pytest.approx([4, 2])


def test_a_preset_may_run_a_rule(folder: Path) -> None:
    rule = tsad.planners.RowRule("fbcache", 0.05, most=3)
    save_presets(folder, [(a_preset(folder, "rule", rule=rule), None)])
    found = read_presets(folder)["rule"]
    assert found.rule == rule and found.words().endswith("fbcache 0.05, at most 3 steps, float32")
    policy = tsad.load(folder, preset="rule")
    wanted = tsad.load(folder, **DDIM, timestep_spacing="trailing")
    wanted.planner = rule
    np.testing.assert_array_equal(actions(policy), actions(wanted))
    assert policy.planner == rule and policy.plan == wanted.plan
    with pytest.raises(ValueError, match="sparsity: got 0.5, but the preset 'rule' decides"):
        tsad.load(folder, preset="rule", sparsity=0.5)
    file = folder / PRESETS_FILE
    for wrong, message in (
        ('{"fbcache": -1.0}', "threshold: expected a number from 0"),
        ('{"every": 2, "plan": "10000", "other": "11000"}', "decides within a chunk"),
    ):
        text = json.loads(file.read_text())
        text["presets"][0]["rule"] = json.loads(wrong)
        (folder / "presets.json").write_text(json.dumps(text))
        with pytest.raises(ValueError, match=message):
            read_presets(folder)
    text["presets"][0] |= {"rule": {"fbcache": 1.0}, "planner": "uniform"}
    file.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="no plan, planner, sparsity or fitted beside it"):
        read_presets(folder)


def test_a_preset_of_another_pruner_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "pruned", pruner=True)
    own = pruner_sha256(folder)
    rows = [a_preset(folder, "own", planner="pruner", pruner_sha256=own)]
    rows += [a_preset(folder, "old", planner="pruner", pruner_sha256="0" * 64)]
    save_presets(folder, [(row, None) for row in rows])
    assert tsad.load(folder, preset="own").planner == "pruner"
    with pytest.raises(ValueError, match="'old' was measured with the pruner of sha256 000"):
        tsad.load(folder, preset="old")


def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(ValueError, match="has the presets .*; did you mean 'one_pass'\\?"):
        tsad.load("pusht", preset="onepass")
    with pytest.raises(ValueError, match="did you mean 'fast'\\?"):
        tsad.load("pusht", preset="Fast")
