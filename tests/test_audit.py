"""The audit: what computed cells differ by from the values they replace, beside the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import PLAN_TOLERANCE, config, random_inputs
from engine import make, make_reference
from policies import make_policy, noises, observations
from test_dit import make as make_dit
from torch_dit import Shape

import tsad
from tsad import REUSE_STEP, REUSE_TYPE, SKIP, _core
from tsad.reference.audit import Audit

K, LANES = 5, 5
OPEN = {"sampler": "ddim", "prediction_type": "sample", "clip_sample_range": 2.0}


def plan(name: str, n_blocks: int) -> Any:
    """(K, B) by name, and what a first chunk runs."""
    sources = np.full((K, n_blocks), REUSE_STEP, np.uint8)
    if name == "one row":
        sources[0] = 0
    elif name == "two rows":
        sources[[0, 3]] = 0
    elif name == "dense":
        sources[:] = 0
    else:  # cells of all kinds, no block twice in the same rows
        random = np.random.default_rng(3)
        sources = random.choice(np.uint8([0, 0, REUSE_TYPE, REUSE_STEP, SKIP]), sources.shape)
        sources[0] = 0
        sources[0, 1] = SKIP
        sources[1, 1] = 0
    return sources


def numbers(engine: Any, lane: int) -> Any:
    apart_step, size_step, apart_rollout, size_rollout = engine._audit(lane)
    return np.array([[apart_step, apart_rollout], [size_step, size_rollout]])


@pytest.mark.parametrize("backend", [*_core.backends(), "guarded"])
@pytest.mark.parametrize("name", ["one row", "two rows", "dense", "all kinds"])
@pytest.mark.parametrize("case", ["tiny", "tiny_encoder", "odd"])
def test_the_engine_compares_as_the_reference(case: str, name: str, backend: str) -> None:
    engine = make(case, lanes=LANES, threads=2, backend=backend, steps=K, **OPEN)
    reference = make_reference(case, lanes=LANES, steps=K, **OPEN)
    sources = plan(name, engine.n_blocks)
    engine._set_audit(True)
    engine._set_plans([(sources, sources, None)] * LANES)
    compared = np.zeros(2, bool)
    for chunk in range(3):
        obs, noise = random_inputs(config(case), chunk, lanes=LANES, steps=K)
        if chunk == 2:  # an episode begins for one lane
            engine.reset(lanes=[1])
            reference.reset([1])
        reference(obs, noise, sources, first=sources)
        engine(obs, noise=noise)
        for lane in range(LANES):
            audit, got = reference.audits[lane], numbers(engine, lane)
            wanted = np.array([audit.apart, audit.size])
            compared |= wanted[1] > 0
            np.testing.assert_allclose(got, wanted, rtol=50 * PLAN_TOLERANCE, atol=1e-4)
            if chunk == 0 or (chunk == 2 and lane == 1):
                assert not wanted[:, 1].any()  # there was no chunk before
    assert (
        compared.tolist()
        == {
            "one row": [False, True],
            "two rows": [True, False],
            "dense": [True, False],
            "all kinds": [True, True],
        }[name]
    )


@pytest.mark.parametrize("case", ["tiny", "odd"])
def test_bits_do_not_depend_on_threads_or_company(case: str) -> None:
    found = []
    for threads, together in ((1, True), (1, False), (2, True), (3, False), (4, False)):
        policy = make(case, lanes=LANES, threads=threads, steps=K, **OPEN)
        sources = plan("all kinds", policy.n_blocks)
        policy._set_audit(True)
        policy._set_plans([(sources, sources, None)] * LANES)
        for chunk in range(3):
            obs, noise = random_inputs(config(case), chunk, lanes=LANES, steps=K)
            if together:
                policy(obs, noise=noise)
            else:
                for i in range(LANES):
                    own = np.ascontiguousarray(noise[:, i : i + 1])
                    policy(obs[i : i + 1], noise=own, lanes=[i])
        found.append([policy._audit(lane) for lane in range(LANES)])
    assert all(each == found[0] for each in found)


def test_it_changes_nothing_and_is_off_unless_asked() -> None:
    plain, audited = make_policy(), make_policy()
    audited._set_audit(True)
    for policy in (plain, audited):
        policy.plan = tsad.planners.uniform(policy, 3)
    for chunk in range(3):
        obs, noise = observations(plain, chunk), noises(plain, chunk)
        np.testing.assert_array_equal(plain(obs, noise=noise), audited(obs, noise=noise))
    assert plain._audit(0) == (0, 0, 0, 0) and audited._audit(0)[1] > 0
    audited._set_audit(False)
    assert audited._audit(0) == (0, 0, 0, 0)
    audited(obs, noise=noise)
    assert audited._audit(0) == (0, 0, 0, 0)


def test_a_warm_start_is_compared_from_its_second_chunk_on() -> None:
    """The cold chunk leaves values of its last step, which are no warm cell's to take."""
    policy = make_policy(warm_start=3)
    policy.plan = tsad.planners.from_steps(policy, "100")
    policy._set_audit(True)
    seen = []
    for chunk in range(4):
        policy(observations(policy, chunk), noise=noises(policy, chunk))
        seen.append(policy._audit(0)[3] > 0)
    assert seen == [False, False, True, True]


def test_lanes_that_remember_rollouts_are_left_out() -> None:
    policy = make_policy(pruner=True)
    policy._set_audit(True)
    policy.planner, policy.sparsity = "pruner", 0.5
    for chunk in range(3):
        policy(observations(policy, chunk), noise=noises(policy, chunk))
    assert policy._audit(0) == (0, 0, 0, 0)


def test_where_there_is_no_audit_it_is_refused() -> None:
    shape = Shape()
    for policy in (tsad.load("pusht_corners"), make_dit(shape, shape.weights(0))):
        with pytest.raises(ValueError, match="audit: expected a CPU and the transformer of"):
            policy._set_audit(True)
    with pytest.raises(ValueError, match="lane: expected a lane from 0 to 0"):
        make_policy()._audit(1)


def test_the_statistic_by_hand() -> None:
    audit = Audit()
    assert audit.statistic == (None, None)
    audit.begin()
    audit.computed(0, 0, np.array([3.0, 4.0]))
    audit.computed(1, 0, np.array([3.0, 0.0]))
    assert audit.statistic == (pytest.approx(4 / 3), None)
    audit.begin()
    audit.computed(0, 0, np.array([1.0, 0.0]))  # of step 1 then: no cell's to take
    assert audit.statistic == (None, None)
    audit.begin()
    audit.computed(0, 0, np.array([2.0, 0.0]))
    assert audit.statistic == (None, pytest.approx(0.5))
