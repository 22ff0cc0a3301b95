"""tsad/setting.py: one form of how a policy runs, whoever says it."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_load import a_folder

import tsad
from tsad.commands.common import UsageError, configure, setting_of
from tsad.presets import Preset, find_preset, model_sha256, save_presets
from tsad.setting import Setting

LEFT = ("sampler", "num_inference_steps", "timestep_spacing", "warm_start", "lead", "smoothing",
        "fitted", "reuse_images", "vision_precision")  # fmt: skip
TYPED = {"sampler": "ddim", "steps": 5, "spacing": "trailing", "precision": "int16"}
LOADED = {
    "sampler": "ddim",
    "num_inference_steps": 5,
    "timestep_spacing": "trailing",
    "precision": "int16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a_folder(tmp_path / "policy")


def actions(policy: Any) -> Any:
    """Two chunks, (2, n_action_steps, action_dim)."""
    policy.reset(seed=3)
    obs = np.random.default_rng(0).random((2, 1, policy.n_obs_steps, policy.obs_dim), np.float32)
    return np.concatenate([policy(obs[0]), policy(obs[1])])


def made(folder: Path, setting: Setting) -> Any:
    policy = tsad.load(folder, **setting.options())
    setting.apply(policy)
    return policy


def test_words_of_the_command_line_and_of_files() -> None:
    words = {**TYPED, "sparsity": 0.5, "planner": "uniform", "noise": 3, "name": "half"}
    wanted = Setting(**LOADED, sparsity=0.5, planner="uniform")
    assert Setting.of(words) == wanted == Setting.of(vars(argparse.Namespace(**words)))
    assert wanted.to_dict() == {**LOADED, "planner": "uniform", "sparsity": 0.5}
    assert Setting.of({"precision": "auto"}) == Setting() and Setting().to_dict() == {}
    nothing = dict.fromkeys(LEFT)
    assert Setting().options() == {**nothing, "precision": "auto"}


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"sparsity": 0.4},
        {"planner": "uniform", "sparsity": 0.8},
        {"plan": "10100"},
        {"warm_start": 2, "n_action_steps": 2},
        {"lead": 0.2, "smoothing": True},
        {"warm_start": 2, "lead": 0.5},
    ],
)
def test_every_form_is_the_policy_made_by_hand(folder: Path, chosen: dict[str, Any]) -> None:
    """`tsad.load` and attributes of the policy: what users write without any of the forms."""
    loaded = {k: v for k, v in chosen.items() if k in ("warm_start", "lead", "smoothing")}
    by_hand = tsad.load(folder, **LOADED, **loaded)
    if "plan" in chosen:
        by_hand.plan = tsad.planners.from_steps(by_hand, chosen["plan"])
    else:
        by_hand.planner = chosen.get("planner", by_hand.planner)
        by_hand.sparsity = chosen.get("sparsity", 0.0)
    wanted = actions(by_hand)

    setting = Setting(**LOADED, **chosen)
    np.testing.assert_array_equal(actions(made(folder, setting)), wanted)
    sent = pickle.loads(pickle.dumps(setting.alone(by_hand)))  # to a worker
    np.testing.assert_array_equal(actions(made(folder, sent)), wanted)
    typed = setting_of({**TYPED, **chosen}, str(folder))
    assert typed == setting
    np.testing.assert_array_equal(actions(made(folder, typed)), wanted)

    own = {k: v for k, v in chosen.items() if k != "plan"}
    preset = Preset("one", model_sha256(folder), **LOADED, **own)
    save_presets(folder, [(preset, setting.load_plan(by_hand))])
    named = tsad.load(folder, preset="one")
    n = chosen.get("n_action_steps")  # a warm start knows more where fewer were executed
    np.testing.assert_array_equal(actions(named)[:1, :n], wanted[:1, :n])
    assert named.n_action_steps == (n or by_hand.n_action_steps)
    assert named.num_inference_steps == chosen.get("warm_start", 5)
    found = setting_of({"preset": "one"}, str(folder))
    np.testing.assert_array_equal(actions(made(folder, found)), wanted)
    file = {"plan": "preset-one.npz", "plan_sha256": getattr(found, "plan_sha256", None)}
    # a run with a preset goes on with one that says the same by hand
    assert found.key(by_hand) == setting.key(by_hand)
    assert json.loads(json.dumps(find_preset(folder, "one", "").to_dict())) == {
        "name": "one",
        "model_sha256": model_sha256(folder),
        **LOADED,
        **own,
        **(file if "plan" in chosen else {}),
        "measured": {},
    }


def test_what_decides_a_result_and_what_does_not(folder: Path) -> None:
    policy = tsad.load(folder, sampler="ddim", num_inference_steps=5)
    plain = {
        "sampler": "ddim",
        "num_inference_steps": 5,
        "device": "cpu",
        "precision": "float32",
        "backend": policy.backend,
        "planner": "dense",
        "sparsity": 0.0,
        "plan_sha256": None,
    }
    steps = {"sampler": "ddim", "num_inference_steps": 5}
    assert Setting(**steps).key(policy) == Setting(planner="uniform").key(policy) == plain
    assert Setting(n_action_steps=policy.n_action_steps).key(policy) == plain
    assert Setting(n_action_steps=1).key(policy) == {**plain, "n_action_steps": 1}
    sparse = Setting(planner="uniform", sparsity=0.6)
    sparse.apply(policy)
    assert sparse.key(policy) == {**plain, "planner": "uniform", "sparsity": 0.6}
    masks = [Setting(plan=mask).key(policy) for mask in ("10100", "10010")]
    assert [key["planner"] for key in masks] == ["file", "file"]
    assert masks[0]["plan_sha256"] != masks[1]["plan_sha256"]


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    policy = tsad.load(folder, sampler="ddim", num_inference_steps=4)
    before = policy.plan
    for setting, says in (
        (Setting(planner="magic"), "argument --planner: expected one of"),
        (Setting(sparsity=0.9), "argument --sparsity: got 0.9, but the planner 'uniform' reaches"),
        (Setting(plan=str(tmp_path / "no.npz")), "argument --plan: got .*not a file"),
        (Setting(plan="101"), "argument --plan: "),
    ):
        with pytest.raises(UsageError, match=says):
            configure(policy, setting)
        assert policy.plan == before
