"""Observations as a dict of arrays by LeRobot's names: the same as these arrays side by side."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest
import torch
from dlpack_maker import Producer

import tsad
from tsad import _core
from tsad.convert import convert
from tsad.sim import recording

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

STATE, ENV = "observation.state", "observation.environment_state"
SOURCE = (
    lerobot.FOLDER
    / next(  # with both, and several observations
        name
        for name in lerobot.CASES
        if lerobot.expected(name).get(f"offline/raw/{ENV}", np.zeros(3)).shape[-2:] > (1, 2)
    )
)


def load(lanes: int = 1, source: Any = SOURCE) -> tsad.SparsePolicy:
    policy = tsad.load(source, lanes=lanes, sampler="ddim", num_inference_steps=2)
    policy.reset(seed=3)
    return policy


def raw(policy: tsad.SparsePolicy, *lead: int) -> dict[str, Any]:
    """Random observations (*lead, n_obs_steps, dim), the last feature first."""
    rng = np.random.default_rng(5)
    return {
        f["name"]: rng.uniform(-1, 1, (*lead, policy.n_obs_steps, f["dim"])).astype(np.float32)
        for f in reversed(policy.config["features"])
    }


def beside(obs: dict[str, Any]) -> Any:
    return np.concatenate([obs[STATE], obs[ENV]], -1)


@pytest.mark.parametrize("lanes", [1, 3])
def test_it_is_the_array_side_by_side(lanes: int, tmp_path: Path) -> None:
    convert(SOURCE, tmp_path / "tsad")
    for source in (SOURCE, tmp_path / "tsad"):
        one, two = load(lanes, source), load(lanes, source)
        obs = raw(one, lanes)
        assert list(obs) == [ENV, STATE]
        for given in (obs, OrderedDict(obs)):
            np.testing.assert_array_equal(one(given), two(beside(obs)))
        assert one(obs).shape == (lanes, one.n_action_steps, one.action_dim)
        rows = {name: value[-1:] for name, value in obs.items()}
        got = one(rows, lanes=[lanes - 1], return_horizon=True)
        two(beside(obs))
        np.testing.assert_array_equal(
            got, two(beside(rows), lanes=[lanes - 1], return_horizon=True)
        )


def test_without_the_axis_of_lanes() -> None:
    one, two = load(), load()
    obs = raw(one)
    got = one(obs)
    assert got.shape == (one.n_action_steps, one.action_dim)
    np.testing.assert_array_equal(got, two(beside(obs)))
    out = np.empty_like(got)
    assert one(obs, out=out) is out
    np.testing.assert_array_equal(out, two(beside(obs)))
    with pytest.raises(ValueError, match=r"obs\['observation.state'\]: expected shape \(3, "):
        load(3)(obs)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_arrays_of_other_libraries(lead: tuple[int, ...]) -> None:
    lanes = lead[0] if lead else 1
    one, two = load(lanes), load(lanes)
    obs = raw(one, *lead)
    expected = two(beside(obs))
    got = one({name: torch.from_numpy(value) for name, value in obs.items()})
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), expected)
    made = {name: Producer(value) for name, value in obs.items()}
    got = one(made)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, two(beside(obs)))
    assert [(p.exports, p.deleted) for p in made.values()] == [(1, 1), (1, 1)]
    # of the first feature's library, whatever the order of the dict
    assert isinstance(one(obs | {STATE: torch.from_numpy(obs[STATE])}), torch.Tensor)
    assert isinstance(one(obs | {ENV: torch.from_numpy(obs[ENV])}), np.ndarray)


def test_the_network_alone() -> None:
    policy = load()
    obs = raw(policy, 4)
    sample = np.random.default_rng(0).standard_normal((4, policy.horizon, policy.action_dim))
    sample = sample.astype(np.float32)
    expected = policy.predict_noise(sample, 1, beside(obs))
    np.testing.assert_array_equal(policy.predict_noise(sample, 1, obs), expected)
    tensors = {name: torch.from_numpy(value) for name, value in obs.items()}
    assert isinstance(policy.predict_noise(sample, 1, tensors), torch.Tensor)
    with pytest.raises(ValueError, match=r"obs\['observation.state'\]: expected shape \(4, "):
        policy.predict_noise(sample, 1, raw(policy))


def _nan(obs: dict[str, Any]) -> dict[str, Any]:
    value = obs[ENV].copy()
    value[0, 1, 2] = np.nan
    return obs | {ENV: value}


Change = Callable[[dict[str, Any]], Any]
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "missing": (lambda o: {STATE: o[STATE]}, ValueError, f"got no '{ENV}'; add it"),
    "empty": (lambda o: {}, ValueError, f"got no '{STATE}'"),
    "mistyped": (
        lambda o: {"observation.sate": o[STATE], ENV: o[ENV]},
        ValueError,
        f"got an unknown one, 'observation.sate'; did you mean '{STATE}'",
    ),
    "short": (
        lambda o: {"state": o[STATE], "environment_state": o[ENV]},
        ValueError,
        f"'state'; did you mean '{STATE}'",
    ),
    "unknown": (lambda o: o | {"action": o[STATE]}, ValueError, "'action'; leave it out"),
    "no text": (lambda o: o | {7: o[STATE]}, ValueError, "unknown one, 7; leave it out"),
    "steps": (
        lambda o: o | {ENV: o[ENV][:, 1:].copy()},
        ValueError,
        r"obs\['{}'\]: expected shape \(2, ",
    ),
    "numbers": (lambda o: o | {ENV: o[STATE]}, ValueError, r"obs\['{}'\]: expected shape \(2, "),
    "lanes": (lambda o: o | {ENV: o[ENV][:1]}, ValueError, r"obs\['{}'\]: expected shape \(2, "),
    "dtype": (
        lambda o: o | {ENV: o[ENV].astype(np.float64)},
        TypeError,
        r"obs\['{0}'\]: expected float32, got float64; use obs\['{0}'\].astype",
    ),
    "torch dtype": (
        lambda o: o | {ENV: torch.from_numpy(o[ENV]).double()},
        TypeError,
        r"obs\['{0}'\]: expected float32, got float64; use obs\['{0}'\].to",
    ),
    "strides": (
        lambda o: o | {ENV: np.asfortranarray(o[ENV])},
        ValueError,
        r"obs\['{}'\]: expected a C-contiguous array",
    ),
    "a list": (lambda o: o | {ENV: o[ENV].tolist()}, TypeError, r"obs\['{}'\]: expected a float32"),
    "nothing": (lambda o: o | {ENV: None}, TypeError, r"obs\['{}'\]: expected a float32"),
    "nan": (_nan, ValueError, r"got nan at obs\['{}'\]\[0, 1, 2\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_call_names_the_key_and_changes_nothing(what: str) -> None:
    change, kind, match = REFUSED[what]
    one, two = load(2), load(2)
    obs = raw(one, 2)
    with pytest.raises(kind, match=match.replace("{0}", ENV).replace("{}", ENV)):
        one(change(dict(obs)))
    assert one.stats["chunks"] == 0
    np.testing.assert_array_equal(one(obs), two(beside(obs)))  # no noise was drawn


def test_a_value_that_changes_the_dict_while_it_is_lent() -> None:
    policy = load()
    obs = raw(policy)

    class Thief(Producer):
        def __dlpack_device__(self) -> Any:
            obs.pop(ENV, None)
            return super().__dlpack_device__()

    obs[STATE] = Thief(obs[STATE])
    with pytest.raises(ValueError, match=f"got no '{ENV}'"):
        policy(obs)


def test_policies_whose_numbers_have_no_names() -> None:
    policy = tsad.load("pusht")
    with pytest.raises(TypeError, match="obs: expected an array, as the numbers of this policy's"):
        policy({"observation.state": np.zeros((2, 20), np.float32)})
    # a condition that LeRobot's encoder made is no raw observation
    dit = tsad.load(lerobot.FOLDER / lerobot.DIT_CASES[0])
    with pytest.raises(TypeError, match="obs: expected an array"):
        dit({f["name"]: np.zeros((2, f["dim"]), np.float32) for f in dit.config["features"]})
    for given in ((), (("a", 1),), (("a", 0), ("b", policy.obs_dim)), [("a", policy.obs_dim)], 3):
        with pytest.raises(ValueError, match="features: expected a tuple of"):
            _core.Policy(policy.model, features=given)  # type: ignore[arg-type]


def test_copies_and_pickles_know_the_names() -> None:
    policy = load()
    obs = raw(policy)
    expected = policy(obs)
    for twin in (copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        twin.reset(seed=3)
        np.testing.assert_array_equal(twin(obs), expected)


def test_a_recorder_keeps_them_side_by_side(tmp_path: Path) -> None:
    obs = raw(load())
    with tsad.Recorder(load(), tmp_path / "recorded") as policy:
        actions = policy({name: torch.from_numpy(value) for name, value in obs.items()})
    assert isinstance(actions, torch.Tensor)
    with np.load(recording.episode_path(tmp_path / "recorded", 0)) as episode:
        np.testing.assert_array_equal(episode["obs"], beside(obs)[None])
        np.testing.assert_array_equal(episode["actions"], actions.numpy()[None])


@pytest.mark.parametrize(
    "features, match",
    [
        ({}, "features: expected a list of name, type and dim"),
        ([3], r"features\[0\]: expected a JSON object"),
        ([{"name": "", "type": "ENV", "dim": 1}], r"features\[0\].name: expected 1 to 200"),
        ([{"name": "a\n", "type": "ENV", "dim": 1}], r"features\[0\].name: expected 1 to 200"),
        ([{"name": "a", "type": "ACTION", "dim": 1}], r"features\[0\].type: expected one of"),
        ([{"name": "a", "type": "ENV", "dim": 0}], r"features\[0\].dim: expected an integer"),
        ([{"name": "a", "type": "ENV", "dim": 1, "x": 1}], r"unknown key 'x' in features\[0\]"),
        ([{"name": "a", "type": "ENV", "dim": 1}] * 2, r"features\[1\].name: expected every name"),
        ([{"name": "a", "type": "ENV", "dim": 1}], "features: expected dims that add up to obs_d"),
    ],
)
def test_names_that_a_folder_cannot_have(features: Any, match: str, tmp_path: Path) -> None:
    convert(SOURCE, tmp_path / "tsad")
    file = tmp_path / "tsad" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"features": features}))
    with pytest.raises(ValueError, match=match):
        tsad.load(tmp_path / "tsad")
