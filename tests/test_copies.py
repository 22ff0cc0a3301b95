"""Copies of a policy, in this process and another; attributes that it does not have; what `help`
and `inspect` say of it.
"""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import pydoc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from policies import make_policy, noises, observations
from test_warm import make as make_warm

import tsad
from tsad import Plan, _core, planners
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig

STEPS = 8
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda policy: pickle.loads(pickle.dumps(policy)),
    "the oldest pickle": lambda policy: pickle.loads(pickle.dumps(policy, protocol=0)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": {"sampler": "ddim", "threads": 1},
    "lanes": {"lanes": 3},
    "int16": {"precision": "int16"},
    "warm": {"warm_start": 3, "lanes": 2},
    "lead": {"lead": 0.3, "smoothing": True, "lanes": 2},
    "warm and lead": {"warm_start": 3, "lead": 0.3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    case = cases.config("tiny", pruner=True, prediction_type="sample", clip_sample=False)
    tensors = cases.random_tensors(case["network"], 0)
    pruner = cases.random_pruner(case["pruner"], case["network"], 0)
    write_folder(path, PolicyConfig.from_dict(case), tensors, pruner)
    return path


def load(folder: Path, name: str = "ddpm") -> Any:
    return tsad.load(folder, num_inference_steps=STEPS, **OPTIONS[name])


def episode(policy: Any) -> Any:
    """Three chunks with given noise, and what ran."""
    policy.reset()
    chunks = [policy(observations(policy, i), noise=noises(policy, i)) for i in range(3)]
    return np.stack(chunks)


def own_planner(policy: Any, sparsity: float) -> Plan:
    """Draws anew whenever it is asked."""
    seed = np.random.SeedSequence().generate_state(1)[0]
    return planners.random(policy, sparsity, int(seed))


def a_plan(policy: Any, seed: int = 3) -> Plan:
    return planners.random(policy, 0.4, seed)


SETTINGS: dict[str, Callable[[Any], None]] = {
    "dense": lambda policy: None,
    "dial": lambda policy: setattr(policy, "sparsity", 0.5),
    "fixed plan": lambda policy: setattr(policy, "plan", a_plan(policy)),
    "plan of each lane": lambda policy: setattr(
        policy, "plan", [a_plan(policy, lane) for lane in range(policy.lanes)]
    ),
    "planner": lambda policy: setattr(policy, "planner", "dense"),
    "planner of one's own": lambda policy: (
        setattr(policy, "planner", own_planner),
        setattr(policy, "sparsity", 0.4),
    ),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_copy_runs_along_the_same_plan(folder: Path, setting: str, how: str) -> None:
    for name in OPTIONS:
        policy = load(folder, name)
        SETTINGS[setting](policy)
        expected = episode(policy)
        twin = COPIES[how](policy)
        assert type(twin) is type(policy) and repr(twin) == repr(policy)
        assert (twin.lanes, twin.threads) == (policy.lanes, policy.threads)
        assert twin.planner == policy.planner and twin.sparsity == policy.sparsity
        np.testing.assert_array_equal(episode(twin), expected)
        assert twin.stats == policy.stats
        # what an episode left behind stays with the one it happened to
        policy.reset(seed=5)
        obs = observations(policy, 7)
        policy(obs)
        third = COPIES[how](policy)
        assert third.stats["chunks"] == 0
        # the dial of one is not the other's
        before = twin.sparsity
        policy.reset()
        policy.plan = a_plan(policy, 99)
        assert twin.sparsity == before
        np.testing.assert_array_equal(episode(twin), expected)


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_copies_share_the_model_and_nothing_else(folder: Path, how: str) -> None:
    for policy in (load(folder), load(folder, "warm"), make_policy(lanes=2), make_warm(lanes=2)):
        twin = COPIES[how](policy)
        assert twin.model is policy.model
        if policy.num_inference_steps < STEPS:
            cold = Plan(np.repeat(np.uint8([[0], [2]]), [1, STEPS - 1], 0).repeat(6, 1))
            policy.cold_plan = cold
            assert twin.cold_plan is None
            assert COPIES[how](policy).cold_plan == policy.cold_plan == [cold, cold]
            policy.cold_plan = None
        weak = weakref.ref(twin)
        assert len(in_threads_of_their_own(policy, twin)) == 1
        del twin
        assert weak() is None


def in_threads_of_their_own(*policies: Any) -> set[bytes]:
    """The different actions of chunks that run at the same time."""
    found: list[bytes] = []

    def run(policy: Any) -> None:
        policy.reset(seed=3)
        found.append(policy(observations(policy, 0)).tobytes())

    threads = [threading.Thread(target=run, args=[policy]) for policy in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(policies)
    return set(found)


def test_a_pruner_goes_along(folder: Path) -> None:
    policy = load(folder)
    assert policy.planner == "pruner"
    policy.sparsity = None
    twin = pickle.loads(pickle.dumps(policy))
    assert twin.planner == "pruner" and twin.sparsity is None
    np.testing.assert_array_equal(episode(twin), episode(policy))


def test_in_a_fresh_process(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As multiprocessing's "spawn" hands it over, from wherever it was loaded."""
    monkeypatch.chdir(folder.parent)
    policies = [
        tsad.load(f"./{folder.name}", num_inference_steps=STEPS, lanes=2),
        tsad.load(folder.name, num_inference_steps=STEPS, warm_start=3),
    ]
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for policy in policies:
            policy.plan = a_plan(policy)
            obs = observations(policy, 0)
            noise = noises(policy, 0)
            policy.reset()
            np.testing.assert_array_equal(
                pool.apply(policy, (obs,), {"noise": noise}), policy(obs, noise=noise)
            )


def test_presets_are_loaded_again() -> None:
    for name in ("fast", "lossless"):
        policy = tsad.load("pusht", preset=name)
        twin = pickle.loads(pickle.dumps(policy))
        assert repr(twin) == repr(policy) and twin.plan == policy.plan
        assert twin.n_action_steps == policy.n_action_steps


def test_what_cannot_be_pickled_says_why(folder: Path, tmp_path: Path) -> None:
    message = "policy: expected one that tsad.load made.*write_folder.*copy.deepcopy"
    for policy in (make_policy(), make_warm()):
        with pytest.raises(TypeError, match=message):
            pickle.dumps(policy)
    policy = load(folder)
    policy.planner = lambda policy, sparsity: planners.dense(policy)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(policy)
    for raw in (_core.Policy(policy.model), policy.model):
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(raw)
    gone = tmp_path / "gone"
    case = cases.config("tiny")
    write_folder(gone, PolicyConfig.from_dict(case), cases.random_tensors(case["network"], 0))
    content = pickle.dumps(tsad.load(gone))
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises((ValueError, FileNotFoundError), match=f"source: expected .*{gone}"):
        pickle.loads(content)


class Mine(tsad.SparsePolicy):
    """A subclass with attributes of its own, and another constructor."""

    def __init__(self, policy: Any, camera: Any) -> None:
        super().__init__(policy.model, config=policy._config, sampler=policy._sampler)
        self.camera = camera


def test_subclasses_keep_their_own_attributes(folder: Path) -> None:
    policy = Mine(load(folder), [1])
    policy.gripper = "open"
    policy.sparsity = 0.5
    shallow, deep = copy.copy(policy), copy.deepcopy(policy)
    for twin in (shallow, deep):
        assert type(twin) is Mine and twin.gripper == "open" and twin.sparsity == 0.5
        assert twin.camera == [1]
    assert shallow.camera is policy.camera and deep.camera is not policy.camera
    holder = [policy, policy]
    assert copy.deepcopy(holder)[0] is not policy
    first, second = copy.deepcopy(holder)
    assert first is second  # as deepcopy does with everything


def test_plans_are_copied_and_pickled(folder: Path) -> None:
    plan = Plan([[0] * 6, [2] * 6], first=[[0] * 6, [0, 0, 0, 2, 2, 2]], metadata={"a": 1})
    for make in COPIES.values():
        twin = make(plan)
        assert twin == plan and twin.first == plan.first and twin.metadata == plan.metadata


# ---- attributes that it does not have


@pytest.mark.parametrize("kind", ["plain", "warm"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparsty", "expected one of cold_plan, plan, planner, sparsity, got 'sparsty'; did"),
        ("sparsty", "did you mean 'sparsity'?"),
        ("plans", "did you mean 'plan'?"),
        ("Planner", "did you mean 'planner'?"),
        ("warm_strat", "did you mean 'warm_start'?"),
        ("lanes", r"policy.lanes: expected as an argument; use tsad.load\(..., lanes=0.9\)"),
        ("preset", r"use tsad.load\(..., preset=0.9\)"),
        ("num_inference_steps", r"use tsad.load\(..., num_inference_steps=0.9\)"),
        ("horizon", "policy.horizon: expected to be read, not set"),
        ("stats", "policy.stats: expected to be read, not set"),
        ("reset", "policy.reset: expected to be read, not set"),
        ("seed", "expected one of cold_plan, plan, planner, sparsity, got 'seed'; set one"),
    ],
)
def test_attributes_that_are_not_there(kind: str, name: str, message: str) -> None:
    policy = make_policy() if kind == "plain" else make_warm()
    with pytest.raises(AttributeError, match=message):
        setattr(policy, name, 0.9)
    assert policy.sparsity == 0
    with pytest.raises(AttributeError):
        del policy.sparsity


def test_an_error_inside_a_planner_is_its_own() -> None:
    def broken(policy: Any, sparsity: float) -> Plan:
        return policy.no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        make_policy().planner = broken


def test_a_plan_has_no_attributes_to_set() -> None:
    plan = Plan([[0, 0, 0]])
    for name in ("sparsity", "sources", "sparsty"):
        with pytest.raises(AttributeError, match=name):
            setattr(plan, name, 1)


# ---- what help and inspect say


def test_signatures_show_the_call(folder: Path) -> None:
    call = "(obs, *, out=None, noise=None, lanes=None, return_horizon=False, executed=None)"
    for policy in (load(folder), _core.Policy(load(folder).model)):
        assert str(inspect.signature(policy)) == call
        assert str(inspect.signature(policy.reset)) == "(lanes=None, seed=None)"
        assert str(inspect.signature(policy.predict_noise)) == "(sample, step, obs)"
    warm = list(inspect.signature(load(folder, "warm")).parameters)
    assert warm == ["obs", "out", "noise", "lanes", "return_horizon", "executed"]
    text = pydoc.plain(pydoc.render_doc(load(folder)))
    for line in (f"__call__(self, /, {call[1:]}", "reset(self, /, lanes=None, seed=None)"):
        assert line in text, line
    assert "actions in raw units" in inspect.getdoc(type(load(folder)).__call__)


def test_every_function_of_the_core_has_a_signature(folder: Path) -> None:
    found = 0
    for owner in (_core, _core.Policy, _core.Model):
        for name, member in vars(owner).items():
            if callable(member) and (not name.startswith("__") or name == "__call__"):
                assert inspect.signature(member) is not None, name
                assert inspect.getdoc(member), name
                found += 1
    assert found >= 20


def test_a_call_by_its_name_is_the_call(folder: Path) -> None:
    policy = load(folder)
    obs, noise = observations(policy, 0), noises(policy, 0)
    policy.reset()
    expected = policy(obs, noise=noise)
    policy.reset()
    np.testing.assert_array_equal(policy.__call__(obs, noise=noise), expected)
    with pytest.raises(TypeError, match="nois"):
        policy.__call__(obs, nois=noise)


def test_what_an_episode_remembers_is_not_of_earlier_plans() -> None:
    """A plan set in the middle of one episode makes no difference to the next."""
    policy = make_policy(pruner=True)
    dense = Plan(np.zeros((policy.num_inference_steps, policy.n_blocks), np.uint8))
    policy.sparsity = 0.8  # the pruner's chunks keep rollouts,
    policy(observations(policy, 0))
    policy.plan = dense  # which this one does not read
    policy.reset(seed=1)
    twin = copy.copy(policy)
    twin.reset(seed=1)
    for one in (policy, twin):
        one(observations(policy, 1))
        assert not one._ages(0).any()
        one.planner, one.sparsity = "pruner", 0.8
    obs = observations(policy, 2)
    np.testing.assert_array_equal(policy(obs), twin(obs))
    assert policy.stats == twin.stats | {"bytes": policy.stats["bytes"]}
