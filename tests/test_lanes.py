"""Lanes by name: numbers and masks of any library, nobody at all, and what is refused whole. What a
list or a mask means is asked of NumPy's own indexing.
"""

from __future__ import annotations

import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from policies import make_policy, observations
from test_warm import make as make_warm

from tsad.reference import ReferencePolicy
from tsad.reference.policy import lane_numbers

LANES = 4


def torch(x: Any, dtype: str | None = None) -> Any:
    library = pytest.importorskip("torch")
    return library.tensor(x, dtype=dtype and getattr(library, dtype))


def negated(x: list[int]) -> Any:
    return pytest.importorskip("torch")._neg_view(-torch(x))


def jax(x: Any) -> Any:
    return pytest.importorskip("jax").numpy.asarray(x)


class Number:
    """A number of a library that nobody knows."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class ByArray:
    """An array of a library that only converts, as TensorFlow's do."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values, dtype)


MASK = [False, True, False, True]
# what is passed, and the lanes that it names
GOOD: dict[str, tuple[Callable[[], Any], Any]] = {
    "list of bools": (lambda: MASK, np.array(MASK)),
    "tuple of bools": (lambda: tuple(MASK), np.array(MASK)),
    "NumPy's bools in a list": (lambda: list(np.array(MASK)), np.array(MASK)),
    "NumPy mask": (lambda: np.array(MASK), np.array(MASK)),
    "strided NumPy mask": (lambda: np.repeat(MASK, 2)[::2], np.array(MASK)),
    "object mask": (lambda: np.array(MASK, object), np.array(MASK)),
    "torch mask": (lambda: torch(MASK), np.array(MASK)),
    "torch bools in a list": (lambda: [torch(x) for x in MASK], np.array(MASK)),
    "JAX mask": (lambda: jax(MASK), np.array(MASK)),
    "converting mask": (lambda: ByArray(*MASK), np.array(MASK)),
    "everybody": (lambda: [True] * LANES, np.ones(LANES, bool)),
    "nobody": (lambda: [False] * LANES, np.zeros(LANES, bool)),
    "nobody of torch": (lambda: torch([False] * LANES), np.zeros(LANES, bool)),
    "list": (lambda: [3, 1], [3, 1]),
    "range": (lambda: range(1, 3), [1, 2]),
    "NumPy numbers": (lambda: [np.int8(3), np.uint64(1)], [3, 1]),
    "0-d arrays": (lambda: [np.array(3), torch(1)], [3, 1]),
    "array.array": (lambda: array.array("H", [3, 1]), [3, 1]),
    "of no library": (lambda: [Number(3), 1], [3, 1]),
    "JAX": (lambda: jax([3, 1]), [3, 1]),
    "torch's negative view": (lambda: negated([3, 1]), [3, 1]),
    "converting": (lambda: ByArray(3, 1), [3, 1]),
    "int": (lambda: 2, [2]),
    "NumPy int": (lambda: np.int64(2), [2]),
    "0-d": (lambda: np.array(2, np.uint8), [2]),
    "0-d of torch": (lambda: torch(2), [2]),
    "0-d of JAX": (lambda: jax(2), [2]),
    "empty": (lambda: [], []),
    "empty tuple": (lambda: (), []),
    "flatnonzero of nobody": (lambda: np.flatnonzero(np.zeros(LANES, bool)), []),
    "empty array": (lambda: np.array([]), []),
    "empty of torch": (lambda: torch([]), []),
} | {
    f"{make.__name__} {dtype}": (lambda make=make, dtype=dtype: make([3, 1], dtype), [3, 1])
    for make in (np.array, torch)
    for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "one bool": (TypeError, "lanes: expected a lane number, got bool", lambda: True),
    "one bool of torch": (TypeError, "got bool; a mask has one bool per l", lambda: torch(True)),
    "one bool of NumPy": (TypeError, "lanes: expected a lane number, got bool", lambda: np.True_),
    "short": (ValueError, "a mask of 4 bools, one per lane, got 3", lambda: MASK[:3]),
    "long": (ValueError, "a mask of 4 bools, one per lane, got 5", lambda: np.array([*MASK, True])),
    "empty mask": (ValueError, "a mask of 4 bools, one per lane, got 0", lambda: np.zeros(0, bool)),
    "empty torch mask": (ValueError, "a mask of 4 bools.* got 0", lambda: torch([], "bool")),
    "mixed": (TypeError, r"lanes\[1\]: expected a lane number, got bool", lambda: [0, True, 2, 3]),
    "masked mask": (
        TypeError,
        "a mask has one bool per lane and nothing else",
        lambda: np.ma.array(MASK, mask=MASK),
    ),
    "floats": (TypeError, r"lanes\[0\]: expected a lane number, got float", lambda: [0.0, 1.0]),
    "float array": (TypeError, r"lanes\[0\]: .* got float", lambda: np.array([0.0, 1.0])),
    "float mask": (TypeError, r"lanes\[0\]: .* got float", lambda: torch([0.0, 1.0, 0.0, 1.0])),
    "a float": (TypeError, "lanes: expected a lane number, got float", lambda: 1.0),
    "two dimensions": (TypeError, r"lanes\[0\]: .* got list", lambda: np.array([[0, 1]])),
    "argwhere": (TypeError, r"lanes\[0\]: .* got list", lambda: np.argwhere(MASK)),
    "twice": (ValueError, r"lanes\[2\]: .*got lane 3 twice", lambda: np.array([3, 1, 3])),
    "too many": (ValueError, "at most 4 distinct lanes, got 5", lambda: torch([0, 1, 2, 3, 0])),
    "beyond": (ValueError, r"lanes\[1\]: expected a lane from 0 to 3, got 4", lambda: [0, 4]),
    "negative": (ValueError, r"lanes\[1\]: .* got -1", lambda: np.array([0, -1])),
    "huge": (ValueError, "from 0 to 3", lambda: np.array([2**63], np.uint64)),
    "text": (TypeError, "lanes: expected a lane number, got str", lambda: "01"),
    "texts": (TypeError, r"lanes\[0\]: .* got str", lambda: ["0"]),
    "bytes": (TypeError, "lanes: expected a lane number, got bytes", lambda: b"\0\1"),
    "set": (TypeError, "lanes: expected a sequence, which has an order, got set", lambda: {0, 1}),
    "dict": (TypeError, "lanes: expected a sequence.*got dict", lambda: {0: True, 1: False}),
    "iterator": (TypeError, "lanes: expected a lane number, got list_iterator", lambda: iter([0])),
    "None inside": (TypeError, r"lanes\[1\]: .* got NoneType", lambda: [0, None]),
    "on no device": (
        TypeError,
        "lanes: expected ints, got .*Tensor.*, whose numbers can't be read; pass a list",
        lambda: torch([0, 1]).to("meta"),
    ),
}
MAKERS = {
    "plain": lambda: make_policy(lanes=LANES),
    "warm": lambda: make_warm(lanes=LANES),
}


@pytest.fixture(params=MAKERS)
def pair(request: pytest.FixtureRequest) -> Any:
    """A policy in mid-episode, and another that is asked by lists of ints only."""
    policies = [MAKERS[request.param]() for _ in range(2)]
    for policy in policies:
        policy.reset(seed=1)
        policy(observations(policy, 0))
        policy(observations(policy, 1))
    return policies


def same_from_here(policy: Any, twin: Any) -> None:
    for chunk in range(2):
        obs = observations(policy, 5 + chunk)
        np.testing.assert_array_equal(policy(obs), twin(obs))


@pytest.mark.parametrize("item", GOOD)
def test_lanes_mean_what_numpy_means(pair: Any, item: str) -> None:
    make, meaning = GOOD[item]
    policy, twin = pair
    rows = np.arange(LANES)[np.array(meaning, None if len(meaning) else int)].tolist()
    seeds = [100 + row for row in range(len(rows))]
    if rows:
        twin.reset(lanes=rows, seed=seeds)
    policy.reset(lanes=make(), seed=seeds)
    obs = observations(policy, 3)[: len(rows)]
    actions = policy(obs, lanes=make())
    assert actions.shape == (len(rows), policy.n_action_steps, policy.action_dim)
    assert actions.dtype == np.float32
    if rows:
        np.testing.assert_array_equal(actions, twin(obs, lanes=rows))
    assert lane_numbers(meaning, LANES) == rows  # the specification agrees
    same_from_here(policy, twin)


@pytest.mark.parametrize("item", BAD)
def test_what_names_no_lanes_is_refused_whole(pair: Any, item: str) -> None:
    error, message, make = BAD[item]
    policy, twin = pair
    lanes = make()
    with pytest.raises(error, match=message):
        policy.reset(lanes=lanes)
    with pytest.raises(error, match=message):
        policy.reset(lanes=lanes, seed=0)
    rows = len(lanes) if hasattr(lanes, "__len__") and np.ndim(lanes) else 1
    obs = np.resize(observations(policy, 0), (rows, policy.n_obs_steps, policy.obs_dim))
    with pytest.raises(error, match=message):
        policy(obs, lanes=lanes)
    same_from_here(policy, twin)


@pytest.mark.parametrize(
    ("lanes", "seed", "error", "message"),
    [
        ([0, 1], [1], ValueError, "seed: expected one seed per lane, 2, got 1"),
        (MASK, [1, 2, 3, 4], ValueError, "seed: expected one seed per lane, 2, got 4"),
        ([], [1], ValueError, "seed: expected one seed per lane, 0, got 1"),
        ([], -1, ValueError, "seed: expected 0 or more, got -1"),
        ([0, 1], [1, -1], ValueError, r"seed\[1\]: expected 0 or more, got -1"),
        ([0, 1], [1, 1.5], TypeError, r"seed\[1\]: expected an int, .* got 1.5"),
        ([0, 1], np.array([1.0, 2.0]), TypeError, r"seed\[0\]: expected an int, .* got 1.0"),
        (None, MASK, TypeError, r"seed\[0\]: expected an int, or one int per lane, got False"),
        (None, True, TypeError, "seed: expected an int, or one int per lane, got True"),
        (None, np.True_, TypeError, "seed: expected an int.* got True"),
        ([0, 1], {5, 6}, TypeError, "seed: expected a sequence, which has an order, got set"),
        ([0, 1], "56", TypeError, "seed: expected an int.* got '56'"),
    ],
)
def test_seeds_are_refused_whole(
    pair: Any, lanes: Any, seed: Any, error: type[Exception], message: str
) -> None:
    policy, twin = pair
    with pytest.raises(error, match=message):
        policy.reset(lanes=lanes, seed=seed)
    same_from_here(policy, twin)


def test_seeds_of_any_library(pair: Any) -> None:
    policy, twin = pair
    twin.reset(lanes=[3, 1], seed=[7, 2**70])
    policy.reset(lanes=[3, 1], seed=[Number(7), np.array(2**70)])
    same_from_here(policy, twin)
    twin.reset(lanes=[0, 2], seed=[8, 9])
    policy.reset(lanes=torch([True, False, True, False]), seed=torch([8, 9], "uint8"))
    same_from_here(policy, twin)
    twin.reset(seed=4)
    policy.reset(seed=torch(4))
    same_from_here(policy, twin)


def test_a_mask_of_one_lane() -> None:
    """The only lane: `[False]` used to reset it."""
    for policy, twin in ((make_policy(), make_policy()), (make_warm(), make_warm())):
        obs = observations(policy, 0)
        for one in (policy, twin):
            one.reset(seed=1)
            one(obs)
        for nobody in ([False], np.array([False]), torch([False]), []):
            policy.reset(lanes=nobody, seed=9)
            assert policy(obs[:0], lanes=nobody).shape == (0, 3, 2)
        same_from_here(policy, twin)
        with pytest.raises(ValueError, match=r"obs: expected .*\(0, 3, 6\).*, got \(3, 6\)"):
            policy(obs[0], lanes=[])
        for marked in ([True], np.array([True]), torch([True])):
            policy.reset(lanes=marked, seed=9)
            twin.reset(seed=[9])
            policy.reset(lanes=[0], seed=[9])
            same_from_here(policy, twin)


def test_a_call_of_nobody_takes_and_gives_empty_arrays() -> None:
    for policy in (make_policy(lanes=2), make_warm(lanes=2)):
        policy.reset(seed=1)
        obs = np.empty((0, policy.n_obs_steps, policy.obs_dim), np.float32)
        noise = np.empty((policy.model.n_steps, 0, policy.horizon, policy.action_dim), np.float32)
        before = policy.stats
        assert policy(obs, noise=noise, lanes=[]).shape == (0, 3, 2)
        assert policy(obs, noise=noise[0], lanes=[], return_horizon=True).shape == (0, 5, 2)
        out = np.empty((0, 3, 2), np.float32)
        assert policy(obs, lanes=[], out=out) is out
        assert policy.stats == before
        with pytest.raises(ValueError, match="obs: expected"):
            policy(observations(policy, 0), lanes=[])
        with pytest.raises(ValueError, match="obs: expected"):
            policy(obs)  # all lanes, and no observations
    sample = np.empty((0, policy.horizon, policy.action_dim), np.float32)
    assert policy.predict_noise(sample, 0, obs).shape == sample.shape


@pytest.mark.parametrize("executed", [[2, 1], (2, 1), np.array([2, 1], np.uint8), "torch", "neg"])
def test_executed_of_any_library(executed: Any) -> None:
    policy, twin = make_warm(lanes=LANES), make_warm(lanes=LANES)
    if isinstance(executed, str):
        executed = torch([2, 1]) if executed == "torch" else negated([2, 1])
    obs = observations(policy, 0)
    for one, moved in ((policy, executed), (twin, [2, 1])):
        one.reset(seed=1)
        one(obs)
        one(obs[:2], lanes=MASK if one is policy else [1, 3], executed=moved)
        if one is policy:
            one(obs[:0], lanes=[], executed=[])
    same_from_here(policy, twin)
    for wrong in (True, [True, False], [1, 2, 3], [1.0, 2.0], [-1, 0], [0, 6], "12", {1, 2}):
        with pytest.raises((TypeError, ValueError), match="executed: expected"):
            policy(obs[:2], lanes=[0, 1], executed=wrong)
    same_from_here(policy, twin)


def test_the_lane_of_a_private_question() -> None:
    """These take one lane."""
    policy = make_policy(lanes=2)
    policy(observations(policy, 0))
    plan = np.zeros((policy.num_inference_steps, policy.n_blocks), np.uint8)
    for lane in (1, np.int64(1), np.array(1), torch(1)):
        policy._set_plan(lane, plan, plan)
        assert policy._stats(lane)["chunks"] == 1
    for lane in (True, [1], torch(True), 2, 1.0):
        for ask in (policy._stats, policy._ages, policy._get_plan):
            with pytest.raises((TypeError, ValueError), match="lane: expected"):
                ask(lane)


def test_the_specification_names_lanes_alike() -> None:
    import cases

    case = cases.config("tiny", prediction_type="sample", clip_sample=False)
    tensors = cases.random_tensors(case["network"], 0)
    twin = ReferencePolicy(case, tensors, lanes=LANES, num_inference_steps=8)
    policy = make_policy(lanes=LANES)
    obs = observations(policy, 0)[:2]
    noise = np.random.default_rng(0).standard_normal((8, 2, 5, 2), np.float32)
    wanted = twin(obs, noise, lanes=np.array(MASK))
    np.testing.assert_allclose(policy(obs, noise=noise, lanes=MASK), wanted, atol=1e-4)
    assert twin(obs[:0], noise[:, :0], lanes=[]).shape == (0, 3, 2)
    twin.reset(lanes=[])
    assert twin._first == [True, False, True, False]
    for wrong in ([0, 0], [-1], [True, False], [4]):
        with pytest.raises((ValueError, IndexError)):
            twin.reset(lanes=wrong)
    assert twin._first == [True, False, True, False]
