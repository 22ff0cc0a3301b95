"""Plans, presets and times of UNets and DiTs, as a user makes them: LeRobot's folders and others.

The policies are small and the searches short; what is looked at is that each command takes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest
from command_line import run
from test_dit_policy import load

from tsad import COMPUTE, REUSE_STEP, planners
from tsad.commands.plan import METHODS
from tsad.convert.lerobot import read_lerobot
from tsad.evaluation import sweep
from tsad.evaluation.sweep import Sweep
from tsad.reference import ReferencePolicy

UNET, DIT = "ddpm_three_levels", "../lerobot_dit/ddpm_rope"
FLOW = "../lerobot_dit/flow_euler_mha_positions"


@pytest.fixture(params=[UNET, FLOW])
def source(request: Any, tmp_path: Path) -> str:
    return str(lerobot.copy(request.param, tmp_path / "policy"))


def record(policy: Any, file: Path) -> str:
    """Two episodes of made-up observations, as a user saves them."""
    shape = (8, policy.n_obs_steps, policy.obs_dim)
    obs = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.savez(file, obs=obs, episode_ends=[4, 8])
    return str(file)


def test_every_command_takes_the_policy(capsys: Any, tmp_path: Path, source: str) -> None:
    pytest.importorskip("torch")
    policy = load(source)
    data, plan, better = (str(tmp_path / f"{name}.npz") for name in ("data", "plan", "better"))
    record(policy, tmp_path / "data.npz")
    effects = str(tmp_path / "effects.npz")

    def tsad_(*words: str) -> str:
        code, out, err = run(capsys, *words, "--threads", "1")
        assert code == 0, err
        assert "Warning" not in err and err.count("CLIP") <= 1  # a note, said once
        return out

    tsad_("plan", "measure", source, "--data", data, "--out", effects, "--chunks", "8")
    for method in METHODS:
        if method == "deepcache" and not policy.blocks[0].startswith("down"):
            continue
        words = ["plan", "make", method, source, "--effects", effects, "--sparsity", "0.25"]
        made = tsad_(*words, "--out", plan, "--overwrite", "--json")
        assert json.loads(made)["sparsity"] >= 0.25
    words = ["plan", "search", source, "--data", data, "--start", plan, "--out", better]
    tsad_(*words, "--minutes", "0.001", "--chunks", "4")
    settings = tmp_path / "settings.json"
    rows = [{"name": "dense"}, {"name": "mine", "plan": better}, {"name": "int8"}]
    rows[2] |= {"precision": "int8", "planner": "uniform", "sparsity": 0.8}
    settings.write_text(json.dumps(rows))
    words = ["tune", "--policy", source, "--observations", data, "--out", str(tmp_path / "tuned")]
    words += ["--settings", str(settings), "--draws", "2", "--rounds", "1", "--within", "100"]
    tuned = json.loads(tsad_(*words, "--save", "--json"))
    assert {*tuned["rows"]} == {"dense", "mine", "int8"} and tuned["presets"]["fast"] is not None
    sampler = "euler" if policy.config["scheduler"]["type"] == "euler" else "ddim"
    words = ["bench", source, "--sampler", sampler, "--steps", "4", "--warm-start", "2"]
    timed = json.loads(tsad_(*words, "--preset", "fast", "--chunks", "5", "--json"))
    assert [row["name"] for row in timed["results"]] == ["dense", "fast"]
    fast = load(source, preset="fast")
    assert np.isfinite(fast(np.load(data)["obs"][0])).all()


def test_tune_holds_few_large_policies(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A UNet of LeRobot's size has a gigabyte of weights, and the grid dozens of settings."""
    source, plain, held = str(lerobot.FOLDER / UNET), Sweep.load, []

    def load_(sweep: Any, name: str) -> Any:
        policy = plain(sweep, name)
        held.append(len(sweep._held))
        return policy

    monkeypatch.setattr(Sweep, "load", load_)
    settings = tmp_path / "settings.json"
    rows = [{"name": f"uniform-{n}", "planner": "uniform", "sparsity": n / 10} for n in range(3)]
    settings.write_text(json.dumps(rows))
    data = record(load(source), tmp_path / "data.npz")
    words = ["tune", "--policy", source, "--observations", data, "--settings", str(settings)]
    words += ["--draws", "2", "--rounds", "1", "--json"]
    for bound, most in ((0, 1), (10**9, 3)):
        monkeypatch.setattr(sweep, "HELD", bound)
        held.clear()
        code, out, err = run(capsys, *words, "--out", str(tmp_path / f"tuned-{most}"))
        assert code == 0, err
        assert len(json.loads(out)["rows"]) == 3 and max(held) == most


# blocks: down_modules.0.0 to mid_modules.1, up_modules.0.0 to 1.1; # is computed
BY_HAND = {
    (3, 1): ["############", "##........##", "##........##", "############", "##........##"],
    (2, 2): ["############", "####....####", "############", "####....####", "############"],
    (1, 1): ["############"] * 5,
}


def test_deepcache_by_hand() -> None:
    policy = load(lerobot.FOLDER / UNET, num_inference_steps=5)
    assert policy.blocks[4:8] == [
        "down_modules.2.0",
        "down_modules.2.1",
        "mid_modules.0",
        "mid_modules.1",
    ]
    for (interval, levels), rows in BY_HAND.items():
        plan = planners.deepcache(policy, interval, levels)
        wanted = [[COMPUTE if cell == "#" else REUSE_STEP for cell in row] for row in rows]
        np.testing.assert_array_equal(plan.sources, wanted)
        np.testing.assert_array_equal((plan.first or plan).sources, wanted)
    for words, message in (
        ({"interval": 0}, "interval: expected an integer from 1"),
        ({"interval": 2, "levels": 3}, "levels: expected an integer from 1 to 2"),
        ({"interval": 2, "levels": 0}, "levels: expected an integer from 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            planners.deepcache(policy, **words)
    with pytest.raises(ValueError, match="policy: expected a UNet"):
        planners.deepcache(load(lerobot.FOLDER / DIT), 2)


@pytest.mark.parametrize("levels", [1, 2])
def test_deepcache_on_the_engine_equals_the_reference(levels: int) -> None:
    found = read_lerobot(lerobot.FOLDER / UNET)
    policy = load(lerobot.FOLDER / UNET, lanes=2)
    reference = ReferencePolicy(found.policy, found.tensors, lanes=2)
    plan = planners.deepcache(policy, 3, levels)
    policy.plan = plan
    rng = np.random.default_rng(0)
    shape = (policy.num_inference_steps, 2, policy.horizon, policy.action_dim)
    for _ in range(2):
        obs = rng.standard_normal((2, policy.n_obs_steps, policy.obs_dim), np.float32)
        noise = rng.standard_normal(shape, np.float32)
        wanted = reference(obs, noise, plan.sources, first=plan.sources)
        got = policy(obs, noise=noise)
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
        dense = load(lerobot.FOLDER / UNET, lanes=2)(obs, noise=noise)
        assert np.abs(dense - wanted).max() > 1e-2 * np.abs(wanted).max()  # it is another chunk


def test_deepcache_at_the_dial() -> None:
    policy = load(lerobot.FOLDER / UNET)
    policy.planner = planners.deepcache_sparse
    cost = policy.block_costs / policy.block_costs.sum()
    most = 0.9 * cost[2:-2].sum()  # 10 steps, the first computed
    for asked in (0.0, 0.3, 0.6 * most, most):
        policy.sparsity = asked
        plan = policy.plan
        assert plan.sparsity >= asked - 1e-9
        computed = (plan.sources == COMPUTE).all(axis=1)
        interval = int(np.flatnonzero(np.append(computed[1:], True))[0]) + 1
        assert interval == 1 or planners.deepcache(policy, interval - 1).sparsity < asked
    with pytest.raises(ValueError, match="sparsity: expected at most .* what deepcache reaches"):
        policy.sparsity = float(most + 0.01)
