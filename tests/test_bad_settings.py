"""Bad resets, plans, dials, planners and models are refused by name and change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policies import make_policy, observations, state

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, Plan, _core
from tsad.planners import random as random_plan

F = np.float32


@pytest.fixture(scope="module")
def policy() -> Any:
    policy = make_policy(lanes=2)
    policy.plan = random_plan(policy, 0.5, 0)
    return policy


@pytest.fixture(scope="module")
def twin() -> Any:
    """Gets only what is right."""
    return make_policy(lanes=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lanes": [0, 0]}, ValueError, r"lanes\[1\]: expected distinct lanes"),
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
        ({"sample": np.zeros((0, 5, 2), F)}, ValueError, r"obs: expected shape \(0, 3, 6\)"),
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
        ("0.5", TypeError, "sparsity: expected a number .*got '0.5'"),
        (True, TypeError, "sparsity: expected a number .*got True"),
        (np.False_, TypeError, "sparsity: expected a number .*got "),
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
        ({"sampler": seen["sampler"][:, :7].copy()}, ValueError, r"sampler: expected shape \(n, 9"),
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
