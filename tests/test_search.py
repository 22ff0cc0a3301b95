"""Local search and the true error of recorded chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policies import make_policy, noises, observations

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan, planners
from tsad.planners.search import ChunkError, Found, Search


def windows(policy: Any, count: int, chunks: int = 1, seed: int = 0) -> list[tuple[Any, Any]]:
    found = []
    for row in range(count):
        obs = observations(policy, seed + row, chunks)
        found.append((obs, noises(policy, seed + row, chunks).swapaxes(0, 1)))
    return found


def test_the_error_is_that_of_executed_actions_at_the_same_noise() -> None:
    policy = make_policy(lanes=2)
    given = windows(policy, 4)
    error = ChunkError(policy, given)
    plan = planners.uniform(policy, 3)
    scale = np.array(policy.config["normalizer"]["action"]["scale"])
    alone = make_policy()
    wanted = []
    for obs, noise in given:
        results = []
        for each in (planners.dense(alone), plan):
            alone.plan = each
            alone.reset(seed=0)
            results.append(alone(obs[0], noise=noise[0][:, None]) * scale)
        wanted.append(((results[1] - results[0]) ** 2).mean())
    assert error(plan) == pytest.approx(np.mean(wanted), rel=1e-5)
    assert error.chunks(plan, 1).ravel() == pytest.approx(wanted[2:], rel=1e-5)
    assert error(planners.dense(policy)) == 0
    for wrong in (given[:3], [given[0], windows(policy, 1, 2)[0]]):
        with pytest.raises(ValueError, match="windows: expected a multiple of 2"):
            ChunkError(policy, wrong)


def test_the_error_against_more_steps_of_the_same_sampler() -> None:
    few, many = (make_policy(lanes=2, sampler="ddim", steps=steps) for steps in (4, 12))
    given = windows(few, 4)
    error = ChunkError(few, given, reference=many)
    assert error(planners.dense(few)) > 1e-4  # fewer steps are another result
    scale = np.array(few.config["normalizer"]["action"]["scale"])
    obs, noise = (np.stack(part) for part in zip(*given, strict=True))
    results = []
    for policy in (few, many):
        policy.sparsity = 0.0
        drawn = np.zeros((policy.num_inference_steps, 2, *noise.shape[3:]), np.float32)
        drawn[0] = noise[:2, 0, 0]
        results.append(policy(obs[:2, 0], noise=drawn) * scale)
    wanted = ((results[0] - results[1]) ** 2).mean(axis=(1, 2))
    assert error.chunks(planners.dense(few), 0).ravel() == pytest.approx(wanted, rel=1e-5)
    root = ChunkError(few, given, reference=many, power=0.5)
    assert root.chunks(planners.dense(few), 0).ravel() == pytest.approx(wanted**0.5, rel=1e-5)
    # the samples are those of the windows, of whatever sampler they were recorded
    other = ChunkError(many, [(o, z[:, :4]) for o, z in given])
    assert other(planners.dense(many)) == 0
    with pytest.raises(ValueError, match="reference: expected 2 lanes, got 1"):
        ChunkError(few, given, reference=make_policy(sampler="ddim", steps=12))


def test_plans_that_read_rollouts_run_in_sequence() -> None:
    policy = make_policy(lanes=2)
    error = ChunkError(policy, windows(policy, 2, chunks=3))
    plan = planners.c3ache(policy, 2, 6)
    counted = error.chunks(plan, 0)
    assert counted.shape == (2, 2) and (counted > 0).all()  # not the dense first one
    assert error.chunks(planners.uniform(policy, 4), 0).shape == (3, 2)
    assert error(planners.dense(policy)) == 0


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_search_goes_downhill_within_its_budget(sparsity: float) -> None:
    policy = make_policy(lanes=3)
    error = ChunkError(policy, windows(policy, 6))
    start = planners.uniform_sparse(policy, sparsity)
    errors: list[float] = []

    def watch(found: Found) -> None:
        errors.append(found.error)
        assert found.plan.sparsity >= sparsity - 1e-9

    found = Search(policy, start, error, sparsity=sparsity, seed=1).run(60, tries=150, on_try=watch)
    assert found.begun == pytest.approx(error(start))
    assert found.error == pytest.approx(error(found.plan)) and found.error < 0.9 * found.begun
    assert errors == sorted(errors, reverse=True) and len(errors) == found.tried == 150
    assert 0 < found.taken < 150
    assert (found.plan.sources[0] == COMPUTE).all()
    assert found.plan.first is not None  # it runs after a reset
    again = Search(policy, start, error, sparsity=sparsity, seed=1).run(60, tries=150)
    assert again.plan == found.plan
    assert Search(policy, start, error, sparsity=sparsity).run(0).plan == Plan(
        start.sources, start.sources
    )


def test_search_spends_what_is_left() -> None:
    """A start that is too sparse gets its cells back."""
    policy = make_policy(lanes=2)
    error = ChunkError(policy, windows(policy, 2))
    start = planners.uniform(policy, 1)
    found = Search(policy, start, error, sparsity=0.5).run(60, tries=200)
    assert 0.5 - 1e-9 <= found.plan.sparsity < start.sparsity and found.error < 0.5 * found.begun


def test_search_goes_on_from_blocks_that_begin_late() -> None:
    policy = make_policy(lanes=2)
    error = ChunkError(policy, windows(policy, 2))
    sources = planners.uniform(policy, 3).sources.copy()
    sources[:3, 3:] = SKIP
    sources[3:, 3:] = COMPUTE
    start = Plan(sources, sources, cost=policy.block_costs)
    found = Search(policy, start, error, sparsity=start.sparsity).run(60, tries=100)
    assert found.error < found.begun and (found.plan.sources[0, 3:] == SKIP).any()


def test_search_refuses_what_it_cannot_begin_with() -> None:
    policy = make_policy(lanes=2)
    error = ChunkError(policy, windows(policy, 2))
    with pytest.raises(ValueError, match="start: expected a plan that reads no rollout"):
        Search(policy, planners.c3ache(policy, 2, 6), error, sparsity=0.5)
    sources = np.full((8, 6), REUSE_STEP, np.uint8)
    sources[:2] = COMPUTE
    with pytest.raises(ValueError, match="start: expected a sparsity of at least 0.9"):
        Search(policy, Plan(sources, sources), error, sparsity=0.9)
    with pytest.raises(ValueError, match="start: expected no sources but 0 and `allowed`"):
        Search(policy, Plan(sources, sources), error, sparsity=0.7, allowed=[REUSE_TYPE])
    never = two_halves(policy)[:1] * 2
    with pytest.raises(ValueError, match="its value would be as old as the episode"):
        Search(policy, never, error, sparsity=0.5, allowed=[REUSE_ROLLOUT])


def test_plans_that_take_turns_refresh_what_they_read() -> None:
    """A cycle of a dense plan and one that reuses: every other chunk is right."""
    policy = make_policy(lanes=2)
    K, B = 8, len(policy.blocks)
    given = windows(policy, 4, chunks=4)
    error = ChunkError(policy, given, counts_first=False)
    reuses = Plan(np.full((K, B), REUSE_ROLLOUT), cost=policy.block_costs)
    dense = planners.dense(policy)
    found = error.chunks([reuses, dense], 0)
    assert found.shape == (3, 2) and (found[[0, 2]] > 0).all() and not found[1].any()
    # the second group of windows begins where the first ended
    assert [bool(row.any()) for row in error.chunks([reuses, dense], 1)] == [False, True, False]
    alone = error.chunks(reuses, 0)  # of the first chunk for ever
    assert alone[0] == pytest.approx(found[0]) and alone[2] != pytest.approx(found[2])
    assert error.chunks(planners.uniform(policy, 4), 0).shape == (3, 2)
    assert error([reuses, dense]) < error(reuses)


ALL = (REUSE_STEP, REUSE_TYPE, REUSE_ROLLOUT)


def two_halves(policy: Any) -> list[Plan]:
    halves = np.full((2, 8, len(policy.blocks)), REUSE_ROLLOUT)
    halves[0, ::2] = halves[1, 1::2] = COMPUTE
    return [Plan(half, cost=policy.block_costs) for half in halves]


@pytest.mark.parametrize("allowed", [(REUSE_ROLLOUT,), ALL])
def test_search_of_a_cycle(allowed: tuple[int, ...]) -> None:
    policy = make_policy(lanes=2)
    error = ChunkError(policy, windows(policy, 4, chunks=3), counts_first=False)
    step = planners.uniform_sparse(policy, 0.5)
    start = [step, step] if REUSE_STEP in allowed else two_halves(policy)
    search = Search(policy, start, error, sparsity=0.5, seed=3, allowed=allowed)

    def watch(found: Found) -> None:
        sources = np.stack([plan.sources for plan in found.plans])
        assert set(np.unique(sources)) <= {COMPUTE, *allowed}
        read, computed = (sources == REUSE_ROLLOUT).any(0), (sources == COMPUTE).any(0)
        assert not (read & ~computed).any()
        assert all(plan.sparsity >= 0.5 - 1e-9 and plan.first is None for plan in found.plans)

    found = search.run(60, tries=150, on_try=watch)
    assert len(found.plans) == 2 and found.plans[0] != found.plans[1] and found.taken > 0
    assert found.error == pytest.approx(error(found.plans)) and found.error < 0.95 * found.begun
    again = Search(policy, start, error, sparsity=0.5, seed=3, allowed=allowed)
    assert again.run(60, tries=90).tried == 90
    assert again.run(60, tries=60).plans == found.plans  # goes on where it was


@pytest.mark.parametrize("kind", [REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT])
def test_search_of_one_direction_stays_there(kind: int) -> None:
    policy = make_policy(lanes=2)
    error = ChunkError(policy, windows(policy, 4, chunks=3), counts_first=False)
    sources = np.full((8, len(policy.blocks)), kind)
    sources[[0, 4]] = COMPUTE
    start = Plan(sources, None if kind == REUSE_ROLLOUT else sources, cost=policy.block_costs)
    found = Search(policy, start, error, sparsity=0.7, allowed=[kind]).run(60, tries=100)
    assert set(np.unique(found.plan.sources)) == {COMPUTE, kind}
    assert found.error < found.begun and found.plan.sparsity >= 0.7 - 1e-9
