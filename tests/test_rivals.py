"""Published planners against brute force and examples worked by hand, and the dial of all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import make_policy, noises, observations

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, Plan, planners
from tsad.planners.base import layers
from tsad.planners.segments import Segments


def computed(plan: Plan) -> Any:
    return plan.sources == COMPUTE


def loss_of(loss: Any, steps: tuple[int, ...], K: int) -> float:
    ends = [*steps[1:], K][: len(steps)]
    return float(sum(loss[i, j] for i, j in zip(steps, ends, strict=True)))


def every_choice(K: int) -> list[tuple[int, ...]]:
    return [
        (0, *rest)
        for n in range(K)
        for rest in itertools.combinations(range(1, K), n)
    ]  # fmt: skip


# ---- segments


def test_segments_equal_brute_force() -> None:
    K, B = 7, 3
    loss = np.random.default_rng(0).standard_normal((B, K, K + 1))
    segments = Segments(loss)
    for b, m in itertools.product(range(B), range(1, K + 1)):
        choices = [steps for steps in every_choice(K) if len(steps) == m]
        best = min(choices, key=lambda steps: loss_of(loss[b], steps, K))
        assert segments.steps(b, m) == list(best)
        assert segments.values[m, b] == pytest.approx(loss_of(loss[b], best, K))
    mask = segments.mask([1, 2, 7])
    assert mask.sum(axis=0).tolist() == [1, 2, 7] and mask[0].all()
    for wrong in (0, K + 1):
        with pytest.raises(ValueError, match=f"count: expected 1 to {K}"):
            segments.steps(0, wrong)
    with pytest.raises(ValueError, match=r"before: expected numbers of shape \(3, 8\)"):
        Segments(loss, np.zeros((3, 7)))
    with pytest.raises(ValueError, match=r"loss: expected shape \(blocks, steps, steps \+ 1\)"):
        Segments(np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="NaN"):
        Segments(np.full((2, 3, 4), np.nan))


def test_segments_that_begin_late_equal_brute_force() -> None:
    K, B = 6, 3
    rng = np.random.default_rng(4)
    loss = rng.standard_normal((B, K, K + 1))
    before = np.concatenate([np.zeros((B, 1)), rng.standard_normal((B, K))], axis=1)
    before[2, 1:] = np.inf  # the last block can't wait
    segments = Segments(loss, before)
    for b, m in itertools.product(range(B), range(K + 1)):
        totals = {
            steps: before[b, steps[0] if steps else K] + loss_of(loss[b], steps, K)
            for steps in itertools.combinations(range(K), m)
        }
        best = min(totals, key=totals.__getitem__)
        assert segments.values[m, b] == pytest.approx(totals[best])
        if np.isfinite(totals[best]):
            assert segments.steps(b, m) == list(best)
    with pytest.raises(ValueError, match="count: expected 1 to 6"):
        segments.steps(2, 0)
    assert segments.allot([1, 1, 1], 1)[2] == 1
    with pytest.raises(ValueError, match="budget: expected at least 1"):
        segments.allot([1, 1, 1], 0.5)


def test_a_budget_is_spent_as_well_as_one_price_can() -> None:
    """Where the losses are convex in the number of cells, the price finds the very best split."""
    K, costs = 6, np.array([1, 3, 5])
    rng = np.random.default_rng(1)
    for _ in range(20):
        loss = np.zeros((3, K, K + 1))
        age = np.arange(K + 1)[None, :] - np.arange(K)[:, None]
        for b in range(3):
            # the same per step of age: m segments of equal length are best, and gains fall
            loss[b] = rng.uniform(0.5, 2) * np.maximum(age, 0) ** 2
        segments = Segments(loss)
        assert (np.diff(segments.values[1:], 2, axis=0) >= -1e-9).all()
        for budget in range(9, 9 * K + 1):
            counts = segments.allot(costs, budget)
            spent, lost = counts @ costs, segments.values[counts, np.arange(3)].sum()
            assert spent <= budget
            better = [
                sum(segments.values[c, b] for b, c in enumerate(other))
                for other in itertools.product(range(1, K + 1), repeat=3)
                if np.dot(other, costs) <= spent - costs.max()
            ]
            assert not better or lost <= min(better) + 1e-9
            assert spent > budget - costs[counts < K].min(initial=budget + 1)
    with pytest.raises(ValueError, match="budget: expected at least 9"):
        segments.allot(costs, 8)


# ---- BAC


def features(policy: Any, seed: int = 0) -> Any:
    """A random walk: neighbours are alike."""
    shape = (policy.num_inference_steps, len(policy.blocks), 4, 3)
    steps = np.random.default_rng(seed).standard_normal(shape)
    return np.cumsum(steps, axis=0) + 3


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2", "mse", "wasserstein"])
def test_similarity_by_hand(metric: str) -> None:
    x = np.random.default_rng(2).standard_normal((5, 2, 3, 4))
    table = planners.similarity(x, metric)
    assert table.shape == (2, 5, 5)
    for b, i, k in itertools.product(range(2), range(5), range(5)):
        u, v = x[i, b].ravel(), x[k, b].ravel()
        wanted = {
            "cosine": u @ v / np.sqrt((u @ u) * (v @ v)),
            "l1": -np.abs(u - v).mean(),
            "l2": -np.sqrt(((u - v) ** 2).sum()),
            "mse": -((u - v) ** 2).mean(),
            "wasserstein": -np.abs(np.sort(u) - np.sort(v)).mean(),
        }[metric]
        assert table[b, i, k] == pytest.approx(wanted, abs=1e-12)
    two = planners.similarity([x, x + 1], metric)
    one = planners.similarity(x + 1, metric)
    np.testing.assert_allclose(two, (table + one) / 2)
    with pytest.raises(ValueError, match="metric: expected one of cosine"):
        planners.similarity(x, "cosin")


def test_similarity_of_nothing_is_a_number() -> None:
    assert np.isfinite(planners.similarity(np.zeros((3, 2, 4)))).all()


@pytest.mark.parametrize("objective", ["paper", "code"])
def test_bac_equals_brute_force(objective: str) -> None:
    policy = make_policy(steps=7)
    alike = planners.similarity(features(policy))
    bac = planners.Bac(alike, objective=objective)

    def collected(table: Any, steps: tuple[int, ...]) -> float:
        total = 0.0
        for begin, end in zip(steps, [*steps[1:], 7], strict=True):
            for t in range(begin, end):
                if objective == "code":
                    total += table[begin, t]
                elif t > begin:
                    total += table[t - 1, t]
        return total

    for n in (1, 3, 7):
        plan = bac.plan(policy, n)
        assert (plan.first or plan) == Plan(plan.sources)  # it runs after a reset
        for b in range(len(policy.blocks)):
            choices = [steps for steps in every_choice(7) if len(steps) == n]
            best = max(choices, key=lambda steps: collected(alike[b], steps))
            assert np.flatnonzero(computed(plan)[:, b]).tolist() == list(best)


def test_bubbling_union_adds_the_steps_of_deeper_feed_forwards() -> None:
    policy = make_policy(steps=8)
    alike = planners.similarity(features(policy, 3))
    kinds, layer = np.array(policy.block_types), layers(policy)
    errors = np.arange(len(kinds))[::-1] == 3  # the one block that changes
    plain = computed(planners.Bac(alike).plan(policy, 2))
    union = computed(planners.Bac(alike, n_bu=1, errors=errors).plan(policy, 2))
    block = int(np.argmax(errors))
    deeper = (kinds == "feed_forward") & (layer >= layer[block])
    wanted = plain.copy()
    wanted[:, block] |= plain[:, deeper].any(axis=1)
    np.testing.assert_array_equal(union, wanted)
    with pytest.raises(ValueError, match="n_bu: expected 0 to"):
        planners.Bac(alike, n_bu=99)
    with pytest.raises(ValueError, match="objective: expected one of code, paper"):
        planners.Bac(alike, objective="both")
    with pytest.raises(ValueError, match="policy: expected 8 steps"):
        planners.Bac(alike).plan(make_policy(steps=4), 2)


# ---- rules


def test_c3ache_reuses_the_chunk_before_in_its_steps() -> None:
    policy = make_policy(steps=8)
    plan = planners.c3ache(policy, 2, 5)
    assert plan.first is None  # dense
    assert (plan.sources[2:6] == REUSE_ROLLOUT).all()
    assert (np.delete(plan.sources, np.s_[2:6], 0) == COMPUTE).all()
    policy.plan = plan
    policy.reset(seed=0)
    for seed in range(3):
        policy(observations(policy, seed))
    assert policy.stats["max_age"] == 2
    for start, end in ((3, 2), (-1, 2), (0, 8)):
        with pytest.raises(ValueError, match="(start|end): expected|start, end: expected"):
            planners.c3ache(policy, start, end)


def test_delta_dit_by_hand() -> None:
    policy = make_policy(steps=6)
    count = int(layers(policy).max()) + 1
    assert count == 2
    plan = computed(planners.delta_dit(policy, 3, 1, 3))
    front, rear = layers(policy) == 0, layers(policy) == 1
    assert plan[[0, 3]].all()
    for k in (1, 2):  # before the boundary the rear rests
        assert plan[k, front].all() and not plan[k, rear].any()
    for k in (4, 5):
        assert plan[k, rear].all() and not plan[k, front].any()
    assert planners.delta_dit(policy, 3, 1, 1).sparsity == 0
    for wrong in ({"n_layers": 3}, {"boundary": 7}, {"interval": 0}):
        arguments = {"boundary": 3, "n_layers": 1, "interval": 2, **wrong}
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            planners.delta_dit(policy, **arguments)


def test_teacache_by_hand() -> None:
    #       sum since computed:  -   .1  .3* .1  .2  .3* last
    rows = planners.teacache_rows([9, 0.1, 0.2, 0.1, 0.1, 0.1, 0.0], 0.299)
    assert rows.tolist() == [True, False, True, False, False, True, True]
    policy = make_policy(steps=7)
    plans = planners.teacache(policy, np.stack([np.full(7, 0.1), np.full(7, 1.0)]), 0.35)
    assert isinstance(plans, list)
    assert computed(plans[0])[:, 0].tolist() == [True, False, False, False, True, False, True]
    assert plans[1].sparsity == 0
    with pytest.raises(ValueError, match=r"distances: expected shape \(7\)"):
        planners.teacache(policy, np.zeros(6), 0.1)


def test_teacache_polynomial_and_its_fit() -> None:
    x = np.linspace(0, 1, 50)
    polynomial, r2 = planners.fit_teacache(x, 1 + 2 * x - 3 * x**4)
    np.testing.assert_allclose(polynomial(np.array([0.3])), 1 + 0.6 - 3 * 0.3**4, rtol=1e-9)
    assert r2 == pytest.approx(1)
    noise = np.random.default_rng(0).standard_normal(50)
    assert planners.fit_teacache(x, noise)[1] < 0.5
    with pytest.raises(ValueError, match="more than 4 distances"):
        planners.fit_teacache(x[:4], x[:4])


def test_first_block_cache_by_hand() -> None:
    values = np.array([1.0, 1.05, 1.2, 1.25, 1.25])[:, None]
    distances = planners.relative_l1(values)
    assert distances[0, 2] == pytest.approx(0.2) and distances[2, 0] == pytest.approx(1 / 6)
    # from 1: .05, .2 computed; from 1.2: .0417
    rows = planners.fbcache_rows(distances, 0.1)
    assert rows.tolist() == [True, False, True, False, False]
    policy = make_policy(steps=5)
    plan = planners.fbcache(policy, distances, 0.1)
    assert isinstance(plan, Plan)
    wanted = np.repeat(rows[:, None], len(policy.blocks), axis=1)
    wanted[:, layers(policy) == 0] = True
    np.testing.assert_array_equal(computed(plan), wanted)


# ---- trained tables


def test_l2c_by_hand() -> None:
    policy = make_policy(steps=5)
    B = len(policy.blocks)
    logits = np.full((2, B), -9.0)
    logits[0, 0] = 9
    logits[1, 1] = -2.0  # sigmoid .119
    plan = computed(planners.l2c(policy, logits, 0.1))
    assert plan[[0, 2, 4]].all()
    assert np.flatnonzero(plan[1]).tolist() == [0] and np.flatnonzero(plan[3]).tolist() == [1]
    assert not computed(planners.l2c(policy, logits, 0.2))[3].any()
    with pytest.raises(ValueError, match=rf"logits: expected shape \(2, {B}\)"):
        planners.l2c(policy, logits[:1])


def test_scores_take_the_best_that_fit() -> None:
    policy = make_policy(steps=4)
    costs, B = policy.block_costs, len(policy.blocks)
    scores = np.random.default_rng(0).standard_normal((4, B))
    scores[0] = -100  # step 0 is computed all the same
    for sparsity in (0.0, 0.3, 0.5, 0.75):
        plan = planners.Scores(scores)(policy, sparsity)
        mask = computed(plan)
        assert mask[0].all() and plan.sparsity >= sparsity - 1e-12
        limit = (1 - sparsity) * 4 * costs.sum()
        left = limit - (mask * costs).sum()
        for step, block in np.argwhere(~mask[1:]):
            # it did not fit when its turn came
            before = (scores > scores[step + 1, block]) & mask
            before[0] = True
            assert (before * costs).sum() + costs[block] > limit - 1e-6
        assert mask.all() or left < costs[~mask[1:].all(axis=0)].min()


# ---- files


def test_evo_pairs(tmp_path: Path) -> None:
    policy = make_policy(steps=100)
    B = len(policy.blocks)
    pairs = [[b, 7 * b % 100] for b in range(B - 1)] + [[0, 50]]
    wanted = np.zeros((100, B), bool)
    for block, step in pairs:
        wanted[step, block] = True
    wanted[:, B - 1] = True  # named by no pair
    wanted[[0, 99]] = True
    for content in (pairs, {"pairs": pairs}, {"selected_block_timestep_pairs": pairs}):
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(content))
        plan = planners.import_plan(policy, path)
        np.testing.assert_array_equal(computed(plan), wanted)
        assert (plan.sources[~wanted] == REUSE_STEP).all()
    path.write_text(json.dumps([[B, 3]]))
    with pytest.raises(ValueError, match=rf"pairs.json: .*pair \[{B}, 3\]"):
        planners.import_plan(policy, path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="none of the keys"):
        planners.import_plan(policy, path)


def test_step_masks(tmp_path: Path) -> None:
    policy = make_policy(steps=6)
    path = tmp_path / "mask.txt"
    for text in ("110100", "1,1,0,1,0,0\n", "[1, 1, 0, 1, 0, 0]"):
        path.write_text(text)
        plan = planners.import_plan(policy, path)
        assert np.flatnonzero(computed(plan).all(axis=1)).tolist() == [0, 1, 3]
    assert planners.from_steps(policy, [1, 1, 0, 1, 0, 0]) == plan
    for text, message in (
        ("11010", "expected 6 times"),
        ("012345", "expected 6"),
        ("010111", "first step"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"mask.txt: .*{message}"):
            planners.import_plan(policy, path)


def test_arrays(tmp_path: Path) -> None:
    policy = make_policy(steps=4)
    B = len(policy.blocks)
    mask = np.random.default_rng(0).random((4, B)) < 0.5
    mask[0] = True
    path = tmp_path / "plan.npy"
    for array in (mask, mask.astype(np.int64)):
        np.save(path, array)
        np.testing.assert_array_equal(computed(planners.import_plan(policy, path)), mask)
    sources = planners.random(policy, 0.5, 0).sources
    np.save(path, sources.astype(np.int32))
    assert planners.import_plan(policy, path) == planners.random(policy, 0.5, 0)
    np.save(path, np.where(mask, 0, REUSE_STEP))  # no rollout: it is the first chunk's, too
    plan = planners.import_plan(policy, path)
    assert plan.first is not None and plan.first.sparsity == plan.sparsity
    np.save(path, np.zeros((4, B), np.uint8))
    assert planners.import_plan(policy, path, opcodes=True).sparsity == 0
    for array, message in (
        (np.zeros((3, B), bool), "expected shape"),
        (np.zeros((4, B)), "expected bool or integers"),
        (np.full((4, B), 7), "expected 0"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=rf"plan.npy: .*{message}"):
            planners.import_plan(policy, path)
    planners.random(policy, 0.5, 0).save(tmp_path / "plan.npz")
    assert planners.import_plan(policy, tmp_path / "plan.npz") == planners.random(policy, 0.5, 0)


# ---- the dial

DIAL = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)


def made_up_effects(policy: Any) -> planners.Effects:
    """Effects that grow with age, each block and step at its own rate; the rest is not read."""
    K, B = policy.num_inference_steps, len(policy.blocks)
    rate = np.random.default_rng(1).uniform(0, 1, (B, K, 1)) ** 3
    age = np.arange(K + 1)[None, None, :] - np.arange(K)[None, :, None]
    segment = rate * np.clip(age - 1, 0, None) ** 2
    rest, kind = np.zeros(1, np.float32), np.full((K, B, B), np.nan)
    return planners.Effects(rest, segment, kind, np.zeros((K, B)), *[rest] * 6, {})


def scoring_planners(policy: Any) -> dict[str, Any]:
    alike = planners.similarity(features(policy, 5))
    shape = (policy.num_inference_steps, len(policy.blocks))
    return {
        "bac paper": planners.Bac(alike, objective="paper"),
        "bac code": planners.Bac(alike),
        "bac union": planners.Bac(alike, n_bu=3),
        "effects": planners.EffectPlanner(made_up_effects(policy)),
        "scores": planners.Scores(np.random.default_rng(0).standard_normal(shape)),
    }


@pytest.mark.parametrize("name", ["bac paper", "bac code", "bac union", "effects", "scores"])
def test_the_dial_is_met(name: str) -> None:
    """What a chunk costs is within one cell, or 2 % of the budget, of what was asked."""
    policy = make_policy(steps=100)
    policy.planner = scoring_planners(policy)[name]
    costs = policy.block_costs
    for sparsity in DIAL:
        policy.sparsity = sparsity
        policy.reset(seed=0)
        policy(observations(policy, 0), noise=noises(policy, 0))
        realised = policy.stats["sparsity"]
        allowed = max(costs.max() / (costs.sum() * 100), 0.02 * (1 - sparsity))
        assert sparsity - 1e-9 <= realised <= sparsity + allowed


def test_row_rules_meet_the_dial_within_a_step() -> None:
    policy = make_policy(steps=100)
    walk = features(policy, 6)
    distances = planners.relative_l1(walk)
    consecutive = np.append(0, np.diagonal(distances, 1))
    policy.planner = planners.Threshold(planners.teacache, consecutive)
    for sparsity in DIAL:
        policy.sparsity = sparsity
        assert sparsity - 1e-9 <= policy.plan.sparsity <= sparsity + 0.0101
    rule = planners.Threshold(planners.fbcache, distances)
    policy.sparsity = 0.0
    policy.planner = rule
    assert policy.plan.sparsity == 0
    with pytest.raises(ValueError, match=r"sparsity: expected at most 0\.4.*fbcache"):
        policy.sparsity = 0.9  # the first of two layers is always computed
