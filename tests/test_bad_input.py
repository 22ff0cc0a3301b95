"""Bad input: each item gets an exception that names the argument, what came, what was expected and
the fix; afterwards the policy is as it was, no reference is lost and no random number is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dlpack_maker import Producer, forbidden
from policies import make_policy, noises, observations, state

from tsad.planners import random as random_plan

F = np.float32


def with_value(x: Any, index: tuple[int, ...], value: float) -> Any:
    x = x.copy()
    x[index] = value
    return x


def frozen(x: Any) -> Any:
    x = x.copy()
    x.setflags(write=False)
    return x


def misaligned(x: Any) -> Any:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    return memory[1:].view(F).reshape(x.shape)


class Boom:
    """A producer whose own code fails."""

    def __dlpack_device__(self) -> Any:
        return (1, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("no export today")


class Odd(Boom):
    def __dlpack_device__(self) -> Any:
        return "cpu"


def overlapping(obs: Any) -> dict[str, Any]:
    """obs and out over common memory: the last number of one is the first of the other."""
    memory = np.zeros(1000, F)
    size = obs.size
    out = np.lib.stride_tricks.as_strided(memory[size - 1 :], (2, 3, 2), (24, 8, 4))
    return {"obs": memory[:size].reshape(obs.shape), "out": out}


def out_before_obs(obs: Any, shared: int) -> dict[str, Any]:
    """The last `shared` numbers of out are the first of obs."""
    memory = np.zeros(1000, F)
    return {
        "obs": memory[12 - shared : 12 - shared + obs.size].reshape(obs.shape),
        "out": memory[:12].reshape(2, 3, 2),
    }


def over_noise(noise: Any) -> dict[str, Any]:
    memory = np.zeros(noise.size, F)
    return {"noise": memory.reshape(noise.shape), "out": memory[-12:].reshape(2, 3, 2)}


# tiny: lanes 2, n_obs_steps 3, obs_dim 6, horizon 5, n_action_steps 3, action_dim 2; K = 8
Make = Callable[[Any, Any], dict[str, Any]]
CALLS: dict[str, tuple[type[Exception], str, Make]] = {
    "float64": (
        TypeError,
        r"obs: expected float32, got float64; use obs.astype\(np.float32\)",
        lambda obs, noise: {"obs": obs.astype(float)},
    ),
    "byte order": (
        TypeError,
        r"obs: expected float32, got >f4",
        lambda obs, noise: {"obs": obs.astype(">f4")},
    ),
    "ints": (
        TypeError,
        "obs: expected float32, got int64",
        lambda obs, noise: {"obs": obs.astype(np.int64)},
    ),
    "float64 by DLPack": (
        TypeError,
        "obs: expected float32, got float64",
        lambda obs, noise: {"obs": Producer(obs.astype(float))},
    ),
    "list": (
        TypeError,
        r"obs: expected a float32 array .*got list; use np.asarray\(obs, dtype=np.f",
        lambda obs, noise: {"obs": obs.tolist()},
    ),
    "None": (TypeError, "obs: .*got NoneType", lambda obs, noise: {"obs": None}),
    "a type": (TypeError, "obs: .*got type", lambda obs, noise: {"obs": np.ndarray}),
    "rank 2": (
        ValueError,
        r"obs: expected shape \(2, 3, 6\), got \(3, 6\); .*lanes=",
        lambda obs, noise: {"obs": obs[0]},
    ),
    "rank 4": (ValueError, r"got \(1, 2, 3, 6\)", lambda obs, noise: {"obs": obs[None]}),
    "rank 9": (
        ValueError,
        "obs: expected at most 8 dimensions, got 9",
        lambda obs, noise: {"obs": obs.reshape((1,) * 6 + obs.shape)},
    ),
    "rank 9 by DLPack": (
        ValueError,
        "obs: expected at most 8 dimensions, got 9",
        lambda obs, noise: {"obs": Producer(obs.reshape((1,) * 6 + obs.shape))},
    ),
    "obs_dim": (
        ValueError,
        r"obs: expected shape \(2, 3, 6\), got \(2, 3, 5\)",
        lambda obs, noise: {"obs": obs[..., :5].copy()},
    ),
    "no lanes in obs": (
        ValueError,
        r"obs: expected shape \(2, 3, 6\), got \(0, 3, 6\)",
        lambda obs, noise: {"obs": obs[:0]},
    ),
    "obs of all lanes for a subset": (
        ValueError,
        r"obs: expected shape \(1, 3, 6\), got \(2, 3, 6\)",
        lambda obs, noise: {"obs": obs, "lanes": [1]},
    ),
    "not contiguous": (
        ValueError,
        r"obs: expected a C-contiguous array, got strides .*np.ascontiguousarray\(o",
        lambda obs, noise: {"obs": np.repeat(obs, 2, axis=-1)[..., ::2]},
    ),
    "Fortran order": (
        ValueError,
        "obs: expected a C-contiguous array",
        lambda obs, noise: {"obs": np.asfortranarray(obs)},
    ),
    "negative strides": (
        ValueError,
        "obs: expected a C-contiguous array, got strides .*-24",
        lambda obs, noise: {"obs": obs[:, ::-1]},
    ),
    "not contiguous by DLPack": (
        ValueError,
        "obs: expected a C-contiguous array, got strides .*elements",
        lambda obs, noise: {"obs": Producer(np.asfortranarray(obs))},
    ),
    "misaligned": (
        ValueError,
        r"obs: expected aligned memory.*obs.copy\(\)",
        lambda obs, noise: {"obs": misaligned(obs)},
    ),
    "misaligned by DLPack": (
        ValueError,
        "obs: expected aligned memory",
        lambda obs, noise: {"obs": Producer(misaligned(obs))},
    ),
    "NaN": (
        ValueError,
        r"obs: expected finite numbers, got nan at obs\[1, 2, 3\]",
        lambda obs, noise: {"obs": with_value(obs, (1, 2, 3), np.nan)},
    ),
    "-Inf": (
        ValueError,
        r"got -inf at obs\[0, 0, 5\]",
        lambda obs, noise: {"obs": with_value(obs, (0, 0, 5), -np.inf)},
    ),
    "cuda": (
        TypeError,
        r"obs: expected memory of the CPU.*got cuda:0; use obs.cpu\(\)",
        lambda obs, noise: {"obs": forbidden((2, 0))},
    ),
    "a failing producer": (
        TypeError,
        r"obs: .*__dlpack__ failed: BufferError\('no export today'\)",
        lambda obs, noise: {"obs": Boom()},
    ),
    "an odd producer": (
        TypeError,
        "obs: expected __dlpack_device__ to return",
        lambda obs, noise: {"obs": Odd()},
    ),
    "noise float64": (
        TypeError,
        "noise: expected float32, got float64",
        lambda obs, noise: {"obs": obs, "noise": noise.astype(float)},
    ),
    "noise of other steps": (
        ValueError,
        r"noise: expected shape \(8, 2, 5, 2\), got \(7, 2, 5, 2\)",
        lambda obs, noise: {"obs": obs, "noise": noise[:7]},
    ),
    "initial of other lanes": (
        ValueError,
        r"noise: .*got \(1, 5, 2\)",
        lambda obs, noise: {"obs": obs, "noise": noise[0, :1]},
    ),
    "noise Inf": (
        ValueError,
        r"noise: expected finite numbers, got inf at noise\[7, 0, 4, 1\]",
        lambda obs, noise: {"obs": obs, "noise": with_value(noise, (7, 0, 4, 1), np.inf)},
    ),
    "noise on another device": (
        TypeError,
        "noise: expected memory of the CPU",
        lambda obs, noise: {"obs": obs, "noise": forbidden((2, 3))},
    ),
    "out float64": (
        TypeError,
        r"out: expected float32, got float64; allocate it with np.empty",
        lambda obs, noise: {"obs": obs, "out": np.empty((2, 3, 2))},
    ),
    "out of the horizon": (
        ValueError,
        r"out: expected shape \(2, 3, 2\), got \(2, 5, 2\)",
        lambda obs, noise: {"obs": obs, "out": np.empty((2, 5, 2), F)},
    ),
    "out for the horizon": (
        ValueError,
        r"out: expected shape \(2, 5, 2\), got \(2, 3, 2\)",
        lambda obs, noise: {"obs": obs, "out": np.empty((2, 3, 2), F), "return_horizon": True},
    ),
    "out read-only": (
        ValueError,
        "out: expected a writable array, got a read-only one; allocate it",
        lambda obs, noise: {"obs": obs, "out": frozen(np.empty((2, 3, 2), F))},
    ),
    "out read-only by DLPack": (
        ValueError,
        "out: expected a writable array",
        lambda obs, noise: {
            "obs": obs,
            "out": Producer(np.empty((2, 3, 2), F), versioned=True, read_only=True),
        },
    ),
    "out not contiguous": (
        ValueError,
        "out: expected a C-contiguous array.*allocate it with np.empty",
        lambda obs, noise: {"obs": obs, "out": np.empty((2, 3, 4), F)[..., ::2]},
    ),
    "out over obs": (
        ValueError,
        "out: expected memory of its own, got an array that overlaps `obs`",
        lambda obs, noise: overlapping(obs),
    ),
    "out over the beginning of obs": (
        ValueError,
        "out: .*overlaps `obs`",
        lambda obs, noise: out_before_obs(obs, 1),
    ),
    "out over noise": (
        ValueError,
        "out: expected memory of its own, got an array that overlaps `noise`",
        lambda obs, noise: {"obs": obs} | over_noise(noise),
    ),
    "out on another device": (
        TypeError,
        "out: expected memory of the CPU",
        lambda obs, noise: {"obs": obs, "out": forbidden((2, 0))},
    ),
    "a lane twice": (
        ValueError,
        r"lanes\[1\]: expected distinct lanes, got lane 0 twice",
        lambda obs, noise: {"obs": obs, "lanes": [0, 0]},
    ),
    "too many lanes": (
        ValueError,
        "lanes: expected at most 2 distinct lanes, got 3; list each once",
        lambda obs, noise: {"obs": obs, "lanes": [0, 1, 0]},
    ),
    "lane out of range": (
        ValueError,
        r"lanes\[0\]: expected a lane from 0 to 1, got 2",
        lambda obs, noise: {"obs": obs[:1], "lanes": [2]},
    ),
    "negative lane": (
        ValueError,
        "lanes: expected a lane from 0 to 1, got -1",
        lambda obs, noise: {"obs": obs[:1], "lanes": -1},
    ),
    "huge lane": (
        ValueError,
        "lanes: expected a lane from 0 to 1",
        lambda obs, noise: {"obs": obs[:1], "lanes": 2**70},
    ),
    "a mask of one lane too many": (
        ValueError,
        "lanes: expected a mask of 2 bools, one per lane, got 3",
        lambda obs, noise: {"obs": obs, "lanes": [True, False, True]},
    ),
    "numbers and bools": (
        TypeError,
        r"lanes\[1\]: expected a lane number, got bool; a mask has one bool per lane",
        lambda obs, noise: {"obs": obs, "lanes": [0, True]},
    ),
    "lane names": (
        TypeError,
        "lanes: expected a lane number, got str",
        lambda obs, noise: {"obs": obs[:1], "lanes": "0"},
    ),
    "float lanes": (
        TypeError,
        r"lanes\[0\]: expected a lane number, got float",
        lambda obs, noise: {"obs": obs[:1], "lanes": [0.0]},
    ),
    "unknown keyword": (TypeError, "nois", lambda obs, noise: {"obs": obs, "nois": noise}),
}


@pytest.fixture(scope="module")
def policy() -> Any:
    policy = make_policy(lanes=2)
    policy.plan = random_plan(policy, 0.5, 0)
    return policy


@pytest.fixture(scope="module")
def twin() -> Any:
    """Gets only what is right."""
    return make_policy(lanes=2)


@pytest.mark.parametrize("item", CALLS)
def test_a_bad_call_is_refused_and_changes_nothing(policy: Any, twin: Any, item: str) -> None:
    error, message, make = CALLS[item]
    obs = observations(policy, 0)
    arguments = make(obs, noises(policy, 1))
    twin.plan = policy._plans
    for p in (policy, twin):
        p.reset(seed=3)
        p(obs)
    before = state(policy)
    counts = {name: sys.getrefcount(value) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        policy(arguments.pop("obs"), **arguments)
    # in the loop every reference is the caller's own again
    assert {name: sys.getrefcount(value) for name, value in arguments.items()} == {
        name: count for name, count in counts.items() if name in arguments
    }
    assert state(policy) == before
    assert np.array_equal(policy(obs), twin(obs))  # the streams, too


@pytest.mark.parametrize("item", CALLS)
def test_references_survive_bad_calls(policy: Any, item: str) -> None:
    error, _, make = CALLS[item]
    arguments = make(observations(policy, 0), noises(policy, 1))
    values = list(arguments.values())
    obs = arguments.pop("obs")

    def counts() -> list[int]:
        return [sys.getrefcount(value) for value in values]

    def attempt() -> None:
        with pytest.raises(error):
            policy(obs, **arguments)

    attempt()
    before = counts()
    for _ in range(50):
        attempt()
    immortal = (None, True, False, np.ndarray)  # shared with everybody
    for value, old, new in zip(values, before, counts(), strict=True):
        shared = any(value is x for x in immortal) or isinstance(value, int | str)
        assert shared or new == old
    for value in values:
        if isinstance(value, Producer):
            assert value.deleted == value.exports


def test_neighbours_do_not_overlap(policy: Any) -> None:
    near = out_before_obs(observations(policy, 0), 0)
    assert policy(near["obs"], out=near["out"]) is near["out"]
    memory = np.zeros(36 + 12, F)
    policy(memory[:36].reshape(2, 3, 6), out=memory[36:].reshape(2, 3, 2))


def test_references_survive_good_calls(policy: Any) -> None:
    obs, noise, out = observations(policy, 0), noises(policy, 1), np.empty((2, 3, 2), F)

    def counts() -> list[int]:
        return [sys.getrefcount(x) for x in (obs, noise, out, policy)]

    before = counts()
    for _ in range(50):
        policy(obs, noise=noise, out=out, lanes=[1, 0])
        policy.predict_noise(noise[0], 0, obs)
        policy.reset(lanes=[1], seed=[5])
    assert counts() == before


def test_a_producers_error_is_kept_as_the_cause() -> None:
    policy = make_policy()
    with pytest.raises(TypeError) as caught:
        policy(Boom())
    assert isinstance(caught.value.__cause__, BufferError)

    class Stopped(Boom):
        def __dlpack__(self, **_: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy(Stopped())
    policy(observations(policy, 0))
