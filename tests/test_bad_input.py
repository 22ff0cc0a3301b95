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
from policies import make_policy, noises, observations

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, Plan, _core
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
    "zero lanes": (
        ValueError,
        "lanes: expected 1 to 2 distinct lanes, got 0; leave it out to run all",
        lambda obs, noise: {"obs": obs[:0], "lanes": []},
    ),
    "a lane twice": (
        ValueError,
        r"lanes\[1\]: expected distinct lanes, got lane 0 twice",
        lambda obs, noise: {"obs": obs, "lanes": [0, 0]},
    ),
    "too many lanes": (
        ValueError,
        "lanes: expected 1 to 2 distinct lanes, got 3",
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
    "a mask": (
        TypeError,
        r"lanes\[0\]: expected a lane number, got a bool; use np.flatnonzero",
        lambda obs, noise: {"obs": obs[:1], "lanes": [True, False]},
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


def state(policy: Any) -> Any:
    ages = [policy._ages(lane).tolist() for lane in range(policy.lanes)]
    return ages, policy.stats, policy.plan, policy.sparsity, policy.planner


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
        assert any(value is x for x in immortal) or isinstance(value, int) or new == old
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


# ---- torch


def test_torch_tensors_that_do_not_fit() -> None:
    torch = pytest.importorskip("torch")
    policy = make_policy()
    obs = torch.from_numpy(observations(policy, 0))
    for bad, error, message in (
        (obs.double(), TypeError, r"got float64; use obs.to\(torch.float32\)"),
        (obs.bfloat16(), TypeError, "got bfloat16"),
        (obs.half(), TypeError, "got float16"),
        (obs.mT.contiguous().mT, ValueError, r"use obs.contiguous\(\)"),
        (obs.clone().requires_grad_(), ValueError, r"requires grad; use obs.detach\(\)"),
        (obs.to("meta"), TypeError, "obs: "),
        (obs.to_sparse(), TypeError, "obs: "),
    ):
        with pytest.raises(error, match=message):
            policy(bad)
    if torch.cuda.is_available():
        with pytest.raises(TypeError, match=r"got cuda:0; use obs.cpu\(\)"):
            policy(obs.cuda())
    policy(obs)


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


# ---- other calls


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lanes": [0, 0]}, ValueError, r"lanes\[1\]: expected distinct lanes"),
        ({"lanes": []}, ValueError, "lanes: expected 1 to 2 distinct lanes, got 0"),
        ({"lanes": 2}, ValueError, "lanes: expected a lane from 0 to 1, got 2"),
        ({"seed": -1}, ValueError, "seed: expected 0 or more, got -1"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, or one int per lane, got 1.5"),
        ({"seed": "1"}, TypeError, "seed: expected an int"),
        ({"seed": [1]}, ValueError, "seed: expected one seed per lane, 2, got 1"),
        ({"seed": [1, 2], "lanes": 0}, ValueError, "seed: expected one seed per lane, 1, got 2"),
        ({"seed": [1, -2]}, ValueError, r"seed\[1\]: expected 0 or more, got -2"),
        ({"seed": [1, None]}, TypeError, r"seed\[1\]: expected an int"),
    ],
)
def test_bad_resets_change_nothing(
    policy: Any, twin: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    obs = observations(policy, 0)
    twin.plan = policy._plans
    for p in (policy, twin):
        p.reset(seed=3)
        p(obs)
    before = state(policy)
    with pytest.raises(error, match=message):
        policy.reset(**arguments)
    assert state(policy) == before
    assert np.array_equal(policy(obs), twin(obs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 8}, ValueError, "step: expected 0 to 7, got 8"),
        ({"step": -1}, ValueError, "step: expected 0 to 7, got -1"),
        ({"step": 1.0}, TypeError, "float"),
        ({"sample": np.zeros((2, 5), F)}, ValueError, r"sample: expected shape \(n, 5, 2\)"),
        ({"sample": np.zeros((0, 5, 2), F)}, ValueError, r"sample: .*got \(0, 5, 2\)"),
        ({"sample": np.zeros((2, 5, 2))}, TypeError, "sample: expected float32, got float64"),
        ({"sample": np.full((2, 5, 2), np.nan, F)}, ValueError, "sample: expected finite"),
        ({"obs": np.zeros((1, 3, 6), F)}, ValueError, r"obs: expected shape \(2, 3, 6\)"),
        ({"obs": np.full((2, 3, 6), np.inf, F)}, ValueError, "obs: expected finite"),
    ],
)
def test_bad_noise_predictions(
    policy: Any, change: Any, error: type[Exception], message: str
) -> None:
    good = {"sample": np.zeros((2, 5, 2), F), "step": 0, "obs": np.zeros((2, 3, 6), F)}
    with pytest.raises(error, match=message):
        policy.predict_noise(**good | change)


def plan_of(policy: Any, *rows: int) -> Any:
    """Sources by row; the last one goes on to the end."""
    sources = np.empty((policy.num_inference_steps, policy.n_blocks), np.uint8)
    for k in range(len(sources)):
        sources[k] = rows[min(k, len(rows) - 1)]
    return sources


def test_bad_plans_change_nothing(policy: Any, twin: Any) -> None:
    obs = observations(policy, 0)
    good = Plan(plan_of(policy, COMPUTE, REUSE_STEP))
    for p in (policy, twin):
        p.reset(seed=3)
        p.plan = good  # right after a reset: no rollouts are kept
        p(obs)
    K, B = policy.num_inference_steps, policy.n_blocks
    rollouts = Plan(plan_of(policy, COMPUTE, REUSE_ROLLOUT))
    before = state(policy)
    other_blocks = Plan(good.sources, blocks=[f"b{b}" for b in range(B)])
    for bad, error, message in (
        (Plan(np.zeros((K + 1, B), int)), ValueError, f"expected {K} steps x {B} .*got {K + 1} x"),
        (Plan(np.zeros((K, 3), int)), ValueError, f"plan: expected {K} steps x {B} blocks"),
        (other_blocks, ValueError, "plan: .*block 0 is 'b0', not 'layers.0.self_attn'"),
        (good.sources, TypeError, r"plan: .*got ndarray; wrap sources in tsad.Plan\(sources\)"),
        ([good], ValueError, "plan: expected one plan per lane, 2, got 1"),
        ([good, None], TypeError, "plan: expected a tsad.Plan"),
        ([good, rollouts], ValueError, r"step 1, block 0 \(.*reuse_roll.*call reset\(\).*lane 1"),
        (rollouts, ValueError, r"plan: step 1, block 0 \(.*reuse_rollout, but this.*lane 0"),
    ):
        with pytest.raises(error, match=message):
            policy.plan = bad
        assert state(policy) == before
    assert np.array_equal(policy(obs), twin(obs))
    policy.reset()
    policy.plan = rollouts  # right after a reset it is fine


def test_a_plan_for_other_types_is_refused(policy: Any) -> None:
    B = policy.n_blocks
    sources = np.zeros((policy.num_inference_steps, B), np.uint8)
    sources[0, 2] = 1  # a feed-forward block that takes what attention computed
    plan = Plan(sources, types=["same"] * B)
    with pytest.raises(ValueError, match=r"plan: sources: step 0, block 2 \(layers.0.feed_forward"):
        policy.plan = plan


def test_bad_raw_plans(policy: Any) -> None:
    dense = plan_of(policy, COMPUTE)
    bad = plan_of(policy, REUSE_STEP)
    for arguments, error, message in (
        ((0, bad, dense), ValueError, r"plan: step 0, block 0 \(layers.0.self_attn\): reuse_step"),
        ((0, dense, bad), ValueError, r"first: step 0, block 0 \(.*\): reuse_step.*\(lane 0\)"),
        ((0, dense, plan_of(policy, COMPUTE, REUSE_ROLLOUT)), ValueError, "right after a reset"),
        ((2, dense, dense), ValueError, "lane: expected a lane from 0 to 1"),
        ((0, dense[:, 1:].copy(), dense), ValueError, "plan: expected shape"),
        ((0, dense.astype(int), dense), TypeError, "plan: expected uint8, got int64"),
    ):
        with pytest.raises(error, match=message):
            policy._set_plan(*arguments)
    before = state(policy)
    with pytest.raises(ValueError, match="first: step 0"):
        policy._set_plans([(dense, dense), (dense, bad)])
    with pytest.raises(TypeError, match="plans: expected"):
        policy._set_plans([(dense, dense), dense])
    assert state(policy) == before


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.5, ValueError, r"sparsity: expected a number from 0 \(dense\) to 0.875, got 1.5"),
        (-0.1, ValueError, "sparsity: .*got -0.1"),
        (float("nan"), ValueError, "sparsity: .*got nan"),
        (float("inf"), ValueError, "sparsity: .*got inf"),
        (0.9, ValueError, "sparsity: expected at most policy.max_sparsity, 0.875 .*got 0.9"),
        (1.0, ValueError, "sparsity: expected at most policy.max_sparsity"),
        ("much", TypeError, "sparsity: expected a number .*got 'much'"),
        (None, ValueError, "sparsity: None is the pruner's own choice"),
    ],
)
def test_bad_sparsities(policy: Any, value: Any, error: type[Exception], message: str) -> None:
    before = policy.sparsity, policy.plan
    with pytest.raises(error, match=message):
        policy.sparsity = value
    assert (policy.sparsity, policy.plan) == before


def test_bad_planners(policy: Any) -> None:
    before = policy.planner, policy.sparsity
    for bad, message in (
        ("unifrom", "planner: expected one of 'dense', 'uniform', 'pruner', or a callable"),
        ("pruner", "planner: got 'pruner', but this policy has none"),
        (3, "planner: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.planner = bad
    with pytest.raises(TypeError, match="plan: expected a tsad.Plan"):
        policy.planner = lambda policy, sparsity: None
    assert (policy.planner, policy.sparsity) == before
    with pytest.raises(ValueError, match="no pruner"):
        policy._pruner_scores(np.zeros((3, 6), F))
    with pytest.raises(ValueError, match="no pruner"):
        policy._set_pruner(0.5)


def test_bad_models() -> None:
    from cases import config, random_tensors

    from tsad.config import PolicyConfig
    from tsad.load import make_model
    from tsad.samplers import make_sampler

    case = config("tiny")
    seen: dict[str, Any] = {}
    sampler = make_sampler(case["scheduler"], num_inference_steps=4)
    real = _core.Model

    class Spy:
        def __new__(cls, **keywords: Any) -> Any:
            seen.update(keywords)
            return real(**keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, "Model", Spy)
        tensors = random_tensors(case["network"], 0)
        make_model(PolicyConfig.from_dict(case), tensors, None, sampler)
    real(**seen)
    name = "ln_f.weight"
    for change, error, message in (
        ({"horizn": 3}, TypeError, "Model: unknown key 'horizn'"),
        ({"horizon": None}, TypeError, "Model: expected the keyword horizon"),
        ({"horizon": "5"}, TypeError, "horizon: expected an integer, got '5'"),
        ({"horizon": -5}, ValueError, "horizon: expected 0 to"),
        ({"horizon": 2**40}, ValueError, "horizon: expected 0 to"),
        ({"family": 3}, TypeError, "family: expected a string"),
        ({"family": "mlp"}, ValueError, "family: expected"),
        ({"backend": "vax"}, ValueError, "backend 'vax'"),
        ({"sampler": seen["sampler"][:, :7].copy()}, ValueError, r"sampler: expected shape \(n, 8"),
        ({"sampler": seen["sampler"][:0]}, ValueError, "sampler: .*one row per denoising step"),
        ({"time_emb": None}, TypeError, "Model: expected the keyword time_emb"),
        ({"time_emb": seen["time_emb"][1:]}, ValueError, "time_emb: expected shape"),
        ({"obs_scale": seen["obs_scale"][1:]}, ValueError, "obs_scale: expected shape"),
        ({"action_scale": np.zeros(2, F)}, ValueError, r"action_scale\[0\]: expected"),
        ({"block_cost": seen["block_cost"][1:]}, ValueError, "block_cost: expected 6"),
        ({"block_cost": seen["block_cost"].astype(F)}, TypeError, "block_cost: expected int64"),
        ({"tensors": None}, TypeError, "tensors: expected a dict"),
        ({"tensors": {}}, ValueError, "tensor"),
        ({"tensors": tensors | {name: np.zeros(16)}}, TypeError, "ln_f.*float64"),
        ({"tensors": tensors | {name: tensors[name][1:]}}, ValueError, "ln_f.weight"),
        ({"tensors": tensors | {3: tensors[name]}}, TypeError, "tensors: expected names"),
        ({"pruner": 3}, TypeError, "pruner: expected a dict or None"),
        ({"pruner": {"hiden": 3}}, TypeError, "pruner: unknown key 'hiden'"),
    ):
        with pytest.raises(error, match=message):
            real(**seen | change)
    with pytest.raises(TypeError, match="keyword arguments only"):
        real(5)  # type: ignore[misc]
