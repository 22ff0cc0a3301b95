"""Additions that are not made twice: sums of rollout slots that a fixed plan keeps from chunk to
chunk, and sums that a worker keeps from row to row.

What could go wrong is that a sum is used when what it sums has changed: after a reset, after
another plan in mid-episode, after a block was computed again.
"""

from __future__ import annotations

import numpy as np
import pytest
from cases import PLAN_TOLERANCE, config, random_inputs, relative_error
from engine import make, make_reference
from test_engine import BACKENDS, COMPUTE, OPEN, ROLLOUT, SKIP, STEP, TYPE

K, B = 8, 9  # of the case "odd"


def _plan(rng: np.random.Generator, computed: float) -> np.ndarray:
    """Row 0 computed, then rows of which some repeat the row before, so that sums repeat too."""
    plan = np.full((K, B), COMPUTE, np.uint8)
    for k in range(1, K):
        plan[k] = rng.choice([TYPE, STEP, STEP, ROLLOUT, SKIP], B)
        plan[k, rng.random(B) < computed] = COMPUTE
        if k > 1 and rng.random() < 0.5:
            plan[k] = np.where(plan[k - 1] == COMPUTE, STEP, plan[k - 1])
    return plan


def _inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return random_inputs(config("odd"), seed, steps=K)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_long_episodes_equal_the_reference(backend: str, threads: int) -> None:
    """Six chunks, a reset, six more: sums are made in the third and used from the fourth."""
    rng, dense = np.random.default_rng(0), np.zeros((K, B), np.uint8)
    for computed in (0.0, 0.1, 0.4):
        engine = make("odd", backend=backend, threads=threads, steps=K, **OPEN)
        reference = make_reference("odd", steps=K, **OPEN)
        plan = _plan(rng, computed)
        engine._set_plan(0, plan, dense)
        for episode in range(2):
            engine.reset()
            reference.reset()
            for chunk in range(6):
                obs, noise = _inputs(10 * episode + chunk)
                got = engine(obs, noise=noise, return_horizon=True)
                expected = reference(obs, noise, plan, return_horizon=True, first=dense)
                assert relative_error(got, expected) < PLAN_TOLERANCE


def test_a_plan_set_in_mid_episode_makes_sums_of_its_own() -> None:
    dense = np.zeros((K, B), np.uint8)
    rng = np.random.default_rng(1)
    plans = [_plan(rng, 0.1) for _ in range(3)]
    engine = make("odd", steps=K, **OPEN)
    reference = make_reference("odd", steps=K, **OPEN)
    engine._set_plan(0, plans[0], dense)
    for chunk in range(15):
        plan = plans[chunk // 5]
        if chunk % 5 == 0 and chunk:
            engine._set_plan(0, plan, dense)
        obs, noise = _inputs(chunk)
        got = engine(obs, noise=noise, return_horizon=True)
        expected = reference(obs, noise, plan, return_horizon=True, first=dense)
        assert relative_error(got, expected) < PLAN_TOLERANCE


def test_kept_sums_do_not_change_the_bits() -> None:
    """A plan set before every chunk never has its sums; one set once has them. Same numbers."""
    dense, plan = np.zeros((K, B), np.uint8), _plan(np.random.default_rng(2), 0.1)
    once, always = (make("odd", threads=2, steps=K, **OPEN) for _ in range(2))
    for policy in (once, always):
        policy._set_plan(0, plan, dense)
    before = once._bytes
    for chunk in range(6):
        obs, noise = _inputs(chunk)
        if chunk:
            always._set_plan(0, plan, dense)
        np.testing.assert_array_equal(once(obs, noise=noise), always(obs, noise=noise))
    assert once._bytes == before  # nothing is allocated while chunks run


def test_a_recomputed_block_ends_a_repeated_sum() -> None:
    """All rows reuse the step before, but for one block computed in the middle: two sums."""
    plan = np.full((K, B), STEP, np.uint8)
    plan[0] = COMPUTE
    plan[4, 2] = COMPUTE
    engine = make("odd", steps=K, **OPEN)
    reference = make_reference("odd", steps=K, **OPEN)
    engine._set_plan(0, plan, plan)
    for chunk in range(3):
        obs, noise = _inputs(chunk)
        got = engine(obs, noise=noise, return_horizon=True)
        expected = reference(obs, noise, plan, return_horizon=True, first=plan)
        assert relative_error(got, expected) < PLAN_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_closed_form_equal_the_reference(backend: str) -> None:
    """Nothing but the step before from row 1 on: the embedding, the LayerNorm and the head of all
    those rows are a closed form."""
    steps = 30
    plan = np.full((steps, B), STEP, np.uint8)
    plan[0] = COMPUTE
    engine = make("odd", backend=backend, threads=2, steps=steps, **OPEN)
    reference = make_reference("odd", steps=steps, **OPEN)
    engine._set_plan(0, plan, plan)
    for chunk in range(2):
        obs, noise = random_inputs(config("odd"), chunk, steps=steps)
        got = engine(obs, noise=noise, return_horizon=True)
        expected = reference(obs, noise, plan, return_horizon=True, first=plan)
        assert relative_error(got, expected) < PLAN_TOLERANCE
