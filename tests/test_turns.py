"""Plans that take turns: what runs in which chunk, what it costs, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from policies import make_policy, noises, observations

from tsad import REUSE_ROLLOUT, Plan, planners
from tsad.planners import Turns


def make(lanes: int = 1, **rule: Any) -> Turns:
    policy = make_policy(lanes=lanes)
    return Turns(policy, planners.uniform(policy, 2), planners.uniform(policy, 4), **rule)


def turns_of(policy: Turns, chunks: int, lane: int = 0) -> list[bool]:
    """Whether each chunk of an episode ran the other plan."""
    found = []
    for chunk in range(chunks):
        policy(observations(policy, chunk))
        plans = policy.policy.plan
        plan = plans if isinstance(plans, Plan) else plans[lane]
        found.append(plan == planners.uniform(policy.policy, 4))
        assert found[-1] or plan == planners.uniform(policy.policy, 2)
    return found


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_th_chunk_of_each_episode(every: int) -> None:
    policy = make(every=every)
    for chunks in (4, 7):
        policy.reset(seed=0)
        found = turns_of(policy, chunks)
        assert found == [chunk % every == 0 for chunk in range(chunks)]
    assert policy.cost == pytest.approx(0.25 + 0.25 / every)  # of 2 and 4 steps of 8
    assert policy.most == 0.5
    assert f"every {every}, cost {policy.cost:.2%}, at most 50.00%" in repr(policy)


def test_chunks_are_those_of_the_plan_that_is_set_by_hand() -> None:
    policy, by_hand = make(every=2), make_policy()
    policy.reset(seed=4)
    by_hand.reset(seed=4)
    for chunk in range(4):
        by_hand.plan = planners.uniform(by_hand, 2 if chunk % 2 else 4)
        obs, noise = observations(by_hand, chunk), noises(by_hand, chunk)
        np.testing.assert_array_equal(policy(obs, noise=noise), by_hand(obs, noise=noise))
    by_hand.plan = planners.uniform(by_hand, 4)
    bare = policy(obs[0], lanes=[0], return_horizon=True)
    np.testing.assert_array_equal(bare, by_hand(obs[0], return_horizon=True))


def test_a_share_is_drawn_from_the_seed_whatever_other_lanes_do() -> None:
    one = make(share=0.3)
    one.reset(seed=[7])
    alone = turns_of(one, 60)
    assert 8 <= sum(alone) <= 30
    three = make(lanes=3, share=0.3)
    three.reset(seed=[5, 7, 7])
    found = [[], [], []]  # type: list[list[bool]]
    for chunk in range(60):
        rows = [0, 1] if chunk % 2 else [1]
        three(observations(three, chunk, len(rows)), lanes=rows)
        found[1].append(three.policy.plan[1] == planners.uniform(three.policy, 4))
    assert found[1] == alone
    three.reset(lanes=[2], seed=[7])
    again = []
    for chunk in range(60):
        three(observations(three, chunk, 1), lanes=[2])
        again.append(three.policy.plan[2] == planners.uniform(three.policy, 4))
    assert again == alone
    three.reset(seed=7)
    assert turns_of(three, 60) != turns_of(three, 60, 1)
    assert three.cost == pytest.approx(0.25 + 0.3 * 0.25)


def test_a_refused_call_takes_no_turn() -> None:
    for rule in ({"every": 2}, {"share": 0.5}):
        policy, other = make(**rule), make(**rule)
        for each in (policy, other):
            each.reset(seed=1)
        for chunk in range(8):
            with pytest.raises(ValueError, match="obs"):
                policy(np.full((1, policy.n_obs_steps, policy.obs_dim), np.nan, np.float32))
            obs = observations(other, chunk)
            np.testing.assert_array_equal(policy(obs), other(obs))


def test_what_is_refused() -> None:
    policy = make_policy()
    plan = planners.uniform(policy, 2)
    for rule, message in (
        ({}, "every, share: expected one of them, got neither"),
        ({"every": 2, "share": 0.5}, "every, share: expected one of them, got both"),
        ({"every": 0}, "every: expected an integer from 1, got 0"),
        ({"every": 1.5}, "every: expected an integer from 1, got 1.5"),
        ({"share": -0.1}, "share: expected a number from 0 to 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Turns(policy, plan, plan, **rule)  # type: ignore[arg-type]
    sources = plan.sources.copy()
    sources[3] = REUSE_ROLLOUT
    with pytest.raises(ValueError, match="other: expected a plan that reads no rollouts"):
        Turns(policy, plan, Plan(sources), every=2)
    with pytest.raises(ValueError, match="plan: expected 8 steps x 6 blocks"):
        Turns(policy, Plan(np.zeros((2, 6), np.uint8)), plan, every=2)


def test_a_copy_takes_turns_too() -> None:
    """A deep copy used to be the policy alone."""
    policy = make(every=2)
    policy(observations(policy, 0))
    for twin in (copy.deepcopy(policy), copy.copy(policy)):
        assert isinstance(twin, Turns) and twin.cost == policy.cost
        twin.reset(seed=0)
        assert turns_of(twin, 4) == [True, False, True, False]
