"""Rules that decide within a chunk: the engine and the reference come to the same rows."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import PLAN_TOLERANCE, config, random_inputs, relative_error
from engine import make, make_reference
from policies import make_policy

import tsad
from tsad import COMPUTE, REUSE_STEP, _core
from tsad.planners import RowRule, fbcache_rows, teacache_rows
from tsad.reference.rule import Rule

OPEN = {"sampler": "ddim", "prediction_type": "sample", "clip_sample_range": 2.0}
K, LANES = 10, 5
# blocks, threshold, most, polynomial: the first-block cache, and TeaCache with 0 blocks
RULES = {
    "fbcache": (3, 0.16, K, (0.0, 1.0, 0.0, 0.0, 0.0)),
    "fbcache, at most 3": (3, 0.02, 3, (0.0, 1.0, 0.0, 0.0, 0.0)),
    "teacache": (0, 0.3, K, (0.01, 0.9, 0.2, 0.0, 0.1)),
    "teacache, at most 3": (0, 0.05, 3, (0.0, 1.0, 0.0, 0.0, 0.0)),
    "all": (3, 0.0, K, (0.0, 1.0, 0.0, 0.0, 0.0)),
}


def inputs(name: str, seed: int) -> tuple[Any, Any]:
    return random_inputs(config(name), seed, lanes=LANES, steps=K)


@pytest.mark.parametrize("backend", [*_core.backends(), "guarded"])
@pytest.mark.parametrize("rule", RULES)
def test_the_engine_decides_as_the_reference(rule: str, backend: str) -> None:
    counts = set()
    wide = ("odd",) if backend == _core.backends()[0] and rule[-1] == "e" else ()
    for name in ("tiny", "tiny_encoder", *wide):
        engine = make(name, lanes=LANES, threads=2, backend=backend, steps=K, **OPEN)
        reference = make_reference(name, lanes=LANES, steps=K, **OPEN)
        blocks, threshold, most, polynomial = RULES[rule]
        engine._set_rule(blocks, threshold, most, polynomial)
        for seed in range(2):
            obs, noise = inputs(name, seed)
            rules = [Rule(blocks, threshold, most, K, polynomial) for _ in range(LANES)]
            wanted = reference(obs, noise, return_horizon=True, rules=rules)
            got = engine(obs, noise=noise, return_horizon=True)
            for lane in range(LANES):
                sources = reference.ruled[lane]
                np.testing.assert_array_equal(engine._get_plan(lane), sources)
                assert set(np.unique(sources)) <= {COMPUTE, REUSE_STEP}
                counts.add(whole := int((sources == COMPUTE).all(1).sum()))
                assert 1 <= whole <= most
                assert engine._stats(lane)["cells"][COMPUTE] == (sources == COMPUTE).sum()
            assert relative_error(got, wanted) < PLAN_TOLERANCE
    assert counts == {K} if rule == "all" else len(counts) > 1 or max(counts) == 3


@pytest.mark.parametrize("rule", ["fbcache", "teacache"])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_bits_do_not_depend_on_threads_or_company(rule: str, name: str) -> None:
    blocks, _, most, polynomial = RULES[rule]
    threshold = 0.16 if blocks else 0.12

    def run(threads: int, together: bool) -> Any:
        policy = make(name, lanes=LANES, threads=threads, steps=K, **OPEN)
        policy._set_rule(blocks, threshold, most, polynomial)
        found = []
        for seed in range(2):
            obs, noise = inputs(name, seed)
            if together:
                found.append(policy(obs, noise=noise))
                continue
            alone = [np.ascontiguousarray(noise[:, i : i + 1]) for i in range(LANES)]
            rows = [policy(obs[i : i + 1], noise=alone[i], lanes=[i]) for i in range(LANES)]
            found.append(np.concatenate(rows))
        return np.stack(found), [policy._get_plan(lane) for lane in range(LANES)]

    actions, plans = run(1, True)
    assert len({plan.tobytes() for plan in plans}) > 1  # each lane decides for itself
    for threads, together in ((1, False), (2, True), (4, False)):
        again, others = run(threads, together)
        np.testing.assert_array_equal(again, actions)
        np.testing.assert_array_equal(others, plans)


def test_nothing_left_out_is_dense_and_plans_come_back() -> None:
    policy, dense = (make_policy(steps=6, lanes=2) for _ in range(2))
    obs, noise = random_inputs(config("tiny"), 0, lanes=2, steps=6)
    policy.planner = RowRule("fbcache", 0)
    np.testing.assert_array_equal(policy(obs, noise=noise), dense(obs, noise=noise))
    assert policy.stats["sparsity"] == policy.stats["mean_sparsity"] == 0
    policy.planner = RowRule("fbcache", 1e9)  # the first step alone
    policy.reset()
    policy(obs, noise=noise)
    wanted = np.full((6, 6), REUSE_STEP)
    wanted[0] = wanted[:, :3] = COMPUTE
    np.testing.assert_array_equal(policy.plan[1].sources, wanted)
    policy.planner = "uniform"  # its own plan again, and its own answer
    assert policy.sparsity == 0
    np.testing.assert_array_equal(policy(obs, noise=noise), dense(obs, noise=noise))
    left = policy.stats["lanes"][0]["mean_sparsity"]  # of both chunks since the reset
    cost = policy.block_costs
    assert left == pytest.approx((5 * cost[3:].sum()) / (12 * cost.sum()))


def test_the_rules_on_recorded_distances_are_these() -> None:
    """`fbcache_rows` and `teacache_rows` on what a chunk saw, where nothing it saw was reused."""
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((K, 4, 3)).cumsum(0)
    size = np.abs(seen).sum((1, 2))
    apart = np.abs(seen[None] - seen[:, None]).sum((2, 3)) / size[:, None]
    steps = np.append(0, [apart[k - 1, k] for k in range(1, K)])
    for threshold in (0.0, 0.4, 0.8, 2.0):
        one, other = Rule(3, threshold, K, K), Rule(0, threshold, K, K)
        rows = [[rule.computes(k, seen[k]) for k in range(K)] for rule in (one, other)]
        np.testing.assert_array_equal(rows[0], fbcache_rows(apart, threshold))
        np.testing.assert_array_equal(rows[1], teacache_rows(steps, threshold))


def test_a_rule_goes_along_and_says_what_it_is() -> None:
    policy = make_policy(steps=6)
    policy.planner = rule = RowRule("teacache", 0.5, most=4)
    assert policy.sparsity is None and "RowRule" in repr(policy)
    assert pickle.loads(pickle.dumps(rule)) == rule
    twin = copy.copy(policy)
    assert twin.planner == rule
    obs, noise = random_inputs(config("tiny"), 1, steps=6)
    np.testing.assert_array_equal(twin(obs, noise=noise), policy(obs, noise=noise))
    assert twin.plan == policy.plan


def test_what_no_rule_can_do_is_refused() -> None:
    for wrong, error, message in (
        ({"rule": "deepcache"}, ValueError, "rule: expected 'fbcache' or 'teacache'"),
        ({"threshold": -1}, ValueError, "threshold: expected a number from 0"),
        ({"threshold": "0.1"}, TypeError, "threshold: expected a number"),
        ({"most": 0}, ValueError, "most: expected an integer from 1"),
        ({"most": True}, TypeError, "most: expected an integer"),
        ({"rule": "teacache", "most": 1}, ValueError, "most: expected an integer from 2"),
        ({"polynomial": (0, 2)}, ValueError, "polynomial: is TeaCache's"),
        ({"rule": "teacache", "polynomial": [1] * 6}, ValueError, "polynomial: expected 1 to 5"),
    ):
        with pytest.raises(error, match=message):
            RowRule(**{"rule": "fbcache", "threshold": 0.1} | wrong)  # type: ignore[arg-type]
    rule = RowRule("fbcache", 0.1)
    for policy in (make_policy(warm_start=2), tsad.load("pusht_corners")):
        before = policy.planner, policy.sparsity
        with pytest.raises(ValueError, match="planner: RowRule.* expects"):
            policy.planner = rule
        assert (policy.planner, policy.sparsity) == before
    gpu = SimpleNamespace(device="cuda", config=tsad.load("pusht").config, warm_start=None)
    with pytest.raises(ValueError, match="a device .* 'cpu', got 'cuda'; .*planners.fbcache"):
        rule.set(gpu)
    with pytest.raises(ValueError, match="planner: RowRule.* decides within a chunk"):
        rule(policy, 0.5)  # type: ignore[arg-type]
    policy = make_policy(pruner=True)
    policy.planner = rule
    with pytest.raises(ValueError, match="sparsity: expected None, as RowRule"):
        policy.sparsity = 0.5
    assert policy.planner == rule and policy.sparsity is None
