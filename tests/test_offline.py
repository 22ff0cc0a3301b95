"""Errors on recorded observations: draw by draw, and between distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policies import make_policy, observations

from tsad import REUSE_ROLLOUT, Plan, planners
from tsad.planners.search import Search
from tsad.sim import offline


def windows(policy: Any, count: int, seed: int = 0) -> Any:
    shape = (count, 2, policy.n_obs_steps, policy.obs_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_actions_depend_on_window_and_draw_alone() -> None:
    policy, other = make_policy(lanes=3), make_policy(lanes=1)
    given = windows(policy, 4)
    found = offline.actions(policy, given, 2)
    assert found.shape == (4, 2, policy.n_action_steps * policy.action_dim)
    done: list[int] = []
    np.testing.assert_array_equal(offline.actions(other, given, 2, done.append), found)
    assert sum(done) == 8 and len(done) == 8
    assert offline.rms(found[:, :1], found[:, 1:]) > 0.1
    # the second observation's, with noise of its own
    other.reset()
    scale = np.array(other.config["normalizer"]["action"]["scale"])
    alone = other(given[3, 1][None], noise=offline.noise(other, 3, 1, 1)[:, None])
    np.testing.assert_allclose((alone[0] * scale).ravel(), found[3, 1], rtol=1e-6)


def test_the_initial_sample_is_shared_by_samplers() -> None:
    few, many = make_policy(steps=2), make_policy(steps=8)
    a, b = offline.noise(few, 1, 2), offline.noise(many, 1, 2)
    assert len(a) == 2 and len(b) == 8 and (a[0] == b[0]).all()
    assert (a[0] != offline.noise(few, 1, 3)[0]).all() and (b[0] != b[1]).all()


def test_chunks_before_run_where_they_matter() -> None:
    policy = make_policy(lanes=2)
    given = windows(policy, 2)
    assert not offline.needs_past(policy)  # dense
    policy.plan = planners.uniform(policy, 2)
    assert not offline.needs_past(policy)
    sources = np.zeros((8, 6), np.uint8)
    sources[3:] = REUSE_ROLLOUT
    policy.plan = Plan(sources)
    assert offline.needs_past(policy)
    found = offline.actions(policy, given)
    changed = given.copy()
    changed[:, 0] += 1.0  # only what was seen before
    policy.reset()
    policy.plan = Plan(sources)
    assert offline.rms(offline.actions(policy, changed), found) > 1e-3
    pruned = make_policy(pruner=True)
    assert not offline.needs_past(pruned)  # dense as yet
    pruned.sparsity = 0.5
    assert offline.needs_past(pruned)
    pruned.plan = planners.uniform(policy, 2)
    assert not offline.needs_past(pruned)


def test_single_observations_do_where_nothing_came_before() -> None:
    policy = make_policy(lanes=2)
    given = windows(policy, 3)
    policy.plan = planners.uniform(policy, 2)
    alone = offline.actions(policy, given[:, 1:], 2)
    np.testing.assert_array_equal(alone, offline.actions(policy, given, 2))
    sources = np.zeros((8, 6), np.uint8)
    sources[3:] = REUSE_ROLLOUT
    policy.reset()
    policy.plan = Plan(sources)
    with pytest.raises(ValueError, match="windows: expected two consecutive observations"):
        offline.actions(policy, given[:, 1:], 2)


def test_energy_tells_distributions_apart() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60, 16, 3))
    floor = offline.energy(a, b)
    assert abs(floor) < 0.02  # other draws of the same
    assert offline.energy(a, a) == 0
    found = [offline.energy(a + shift, b) for shift in (0.3, 0.6, 1.2)]
    assert floor + 0.02 < found[0] < found[1] < found[2]
    assert offline.energy(0.5 * a, b) > floor + 0.05 < offline.energy(2 * a, b)  # scatter
    assert offline.energy(a + 1e-3, a) < 1e-4  # shared noise: no floor
    assert offline.energy(10 * a, 10 * b) == pytest.approx(floor)
    assert np.isnan(offline.energy(a, np.zeros_like(a)))
    with pytest.raises(ValueError, match="a: expected at least 2 draws, got 1"):
        offline.energy(a[:, :1], b[:, :1])


def test_spread_is_relative() -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal((3, 16, 4))
    assert offline.spread(b, b) == 1
    assert offline.spread(b / 2 + 5, b) == pytest.approx(0.5)  # where they are doesn't matter
    assert offline.spread(np.zeros_like(b), b) == 0
    assert np.isnan(offline.spread(b, np.zeros_like(b)))


def test_the_distance_of_a_plan_is_that_of_its_draws() -> None:
    policy, reference = make_policy(lanes=3), make_policy(lanes=2)
    given = observations(policy, 3, 4)
    seen: list[int] = []
    distance = offline.Distance(policy, reference, given, draws=5, group=2, progress=seen.append)
    assert distance.groups == 2 and sum(seen) == 4 * 5
    assert distance(planners.dense(policy)) == 0  # the same noise, the same actions
    plan = planners.uniform(policy, 3)
    right = [offline.actions(reference, given[i : i + 2, None], 5) for i in (0, 2)]
    policy.plan = plan
    found = [offline.actions(policy, given[i : i + 2, None], 5) for i in (0, 2)]
    wanted = offline.energy(np.concatenate(found), np.concatenate(right))
    assert distance([plan]) == pytest.approx(wanted) and wanted > 0
    assert distance.chunks(plan, 1).shape == (2,)
    assert distance.chunks(plan, 0).mean() != distance.chunks(plan, 1).mean()
    found_plan = Search(policy, plan, distance, sparsity=0.6, seed=2).run(60, tries=40)
    assert found_plan.error < found_plan.begun == pytest.approx(wanted)
    for wrong in (planners.c3ache(policy, 2, 6), [plan, plan]):
        with pytest.raises(ValueError, match="plan: expected one plan whose chunks depend on no"):
            distance(wrong)


def test_a_distance_refuses_what_it_cannot_compare() -> None:
    policy = make_policy(lanes=2)
    given = observations(policy, 3, 4)
    for options, message in (
        ({"group": 3}, "windows: expected a multiple of 3, got 4"),
        ({"draws": 1, "group": 2}, "draws: expected at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            offline.Distance(policy, policy, given, **options)
