"""One order of cells for the whole dial, against an exhaustive walk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tsad import REUSE_STEP, REUSE_TYPE, SKIP, Plan, planners
from tsad.planners.effects import Effects
from tsad.planners.nested import NestedOrder, nested_order

K, B = 7, 3
COSTS = (5, 1, 9)


def make_effects(seed: int) -> Effects:
    """Random segments that lose more the longer they are."""
    rng = np.random.default_rng(seed)
    segment = np.cumsum(rng.exponential(size=(B, K, K + 1)), axis=2).astype(np.float32)
    empty = {name: np.zeros(1, np.float32) for name in Effects.__annotations__}
    tables: Any = empty | {"segment": np.triu(segment, 1), "metadata": {}}
    tables |= {"skip": np.zeros((K, B), np.float32), "kind": np.full((K, B, B), np.nan)}
    return Effects(**tables)


POLICY: Any = SimpleNamespace(
    num_inference_steps=K,
    blocks=("a", "b", "c"),
    block_types=("a", "b", "c"),
    block_costs=COSTS,
)


def loss(effects: Effects, computed: Any) -> list[float]:
    """Of each block, the sum over its segments."""
    found = []
    for b in range(B):
        ends = [*np.flatnonzero(computed[:, b]).tolist(), K]
        pairs = zip(ends[:-1], ends[1:], strict=True)
        found.append(sum(float(effects.segment[b, i, j]) for i, j in pairs))
    return found


def neighbours(computed: Any, k: int, b: int) -> tuple[int, int]:
    others = [i for i in range(K) if computed[i, b] and i != k]
    return max(i for i in others if i < k), min([i for i in others if i > k], default=K)


@pytest.mark.parametrize("seed", range(4))
def test_cells_come_and_leave_by_what_they_gain_per_cost(seed: int) -> None:
    effects = make_effects(seed)
    order = nested_order(effects, POLICY, 0.5)
    middle = planners.EffectPlanner(effects)(POLICY, 0.5).sources == 0
    for outwards in (True, False):
        computed = middle.copy()
        turns = [tuple(c) for c in np.argwhere(computed != outwards).tolist() if c[0]]
        scores = []
        while turns:
            before = sum(loss(effects, computed))
            gains = {}
            for k, b in turns:
                changed = computed.copy()
                changed[k, b] = outwards
                less = before - sum(loss(effects, changed))
                gains[k, b] = (less if outwards else -less) / COSTS[b]
            turn = (max if outwards else min)(gains, key=lambda cell: gains[cell])
            assert (order.begin[turn], order.end[turn]) == neighbours(computed, *turn)
            scores.append(order.scores[turn])
            turns.remove(turn)
            computed[turn] = outwards
        steps = np.diff(scores)
        assert (steps < 0).all() if outwards else (steps > 0).all()
    assert order.scores[middle].min() > order.scores[~middle].max()
    assert (order.scores[0] > order.scores[1:].max()).all()


def test_the_dial_meets_the_best_plan_where_it_was_made() -> None:
    effects = make_effects(0)
    order = nested_order(effects, POLICY, 0.5)
    best = planners.EffectPlanner(effects)(POLICY, 0.5)
    lowest = order.scores[best.sources == 0].min()
    np.testing.assert_array_equal(order.plan(POLICY, lowest).sources, best.sources)


def test_gains_are_differences_of_segments() -> None:
    effects = make_effects(1)
    order = nested_order(effects, POLICY, 0.5)
    several = np.stack([effects.segment, 3 * effects.segment])
    gains = order.gains(several)
    assert gains.shape == (2, K, B) and (gains[:, 0] == 0).all()
    for k in range(1, K):
        for b in range(B):
            i, j = order.begin[k, b], order.end[k, b]
            table = effects.segment[b].astype(np.float64)
            assert gains[0, k, b] == pytest.approx(table[i, j] - table[i, k] - table[k, j])
    np.testing.assert_allclose(gains[1], 3 * gains[0], rtol=1e-6)


def test_nothing_between_the_ends_is_an_order_too() -> None:
    """Of a plan that computes step 0 alone nothing leaves; of a dense one nothing comes."""
    effects = make_effects(2)
    for sparsity in (0.0, 1 - 1 / K):
        order = nested_order(effects, POLICY, sparsity)
        assert isinstance(order, NestedOrder) and np.isfinite(order.scores).all()
        assert len(np.unique(order.scores[1:])) == (K - 1) * B


def searched(seed: int, *shares: float) -> list[Plan]:
    """Plans that compute these shares of the cells, with sources of every kind."""
    rng = np.random.default_rng(seed)
    found = []
    for share in shares:
        sources = rng.choice([REUSE_TYPE, REUSE_STEP, SKIP], (K, B)).astype(np.uint8)
        sources[rng.random((K, B)) < share] = 0
        sources[0] = 0
        found.append(Plan(sources, sources, blocks=POLICY.blocks, types=POLICY.block_types))
    return found


def spent(mask: Any) -> int:
    return int((mask * COSTS).sum())


@pytest.mark.parametrize("seed", range(4))
def test_searched_plans_lead_the_way(seed: int) -> None:
    """The nearest is met as it is; what a denser one computes comes before the rest, and so on."""
    plans = searched(seed, 0.2, 0.4, 0.6, 0.8)
    masks = sorted((plan.sources == 0 for plan in plans), key=spent)
    middle = masks[1]
    plan = next(p for p in plans if spent(p.sources == 0) == spent(middle))
    order = nested_order(make_effects(seed), POLICY, 1 - spent(middle) / (K * sum(COSTS)), plans)
    found = order.within(POLICY, spent(middle)).sources
    np.testing.assert_array_equal(found, np.where(plan.sources == 0, 0, REUSE_STEP))
    scores = order.scores
    for denser in (masks[2], masks[2] | masks[3]):
        outside = ~(middle | denser)
        if outside.any():
            assert scores[middle | denser].min() > scores[outside].max()
    sparser = middle & masks[0]
    leaves = middle & ~masks[0]
    assert scores[sparser].min() > scores[leaves].max(initial=-np.inf)


def test_a_plan_of_other_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"plans: expected 7 steps x 3 blocks.*got 2 x 3"):
        nested_order(make_effects(0), POLICY, 0.5, [Plan(np.zeros((2, 3), np.uint8))])


def test_calibrated_scores_are_what_the_error_falls_by() -> None:
    """Of errors that fall with the third power of the cost: slopes are known, the order stays."""
    order = nested_order(make_effects(3), POLICY, 0.5)
    upto = np.geomspace(30.0, 90.0, 9)
    found = order.calibrated(COSTS, upto, upto**-3.0)
    before, after = (np.argsort(-o.scores[1:], axis=None) for o in (order, found))
    np.testing.assert_array_equal(before, after)
    assert (np.diff(found.scores[1:].ravel()[after]) <= -9.9e-4).all()
    cost = np.broadcast_to(COSTS, (K - 1, B)).ravel()[after]
    total = sum(COSTS) + np.cumsum(cost)
    inside = (total > 32) & (total < 85)
    wanted = np.log(3) - 4 * np.log(total[inside])
    np.testing.assert_allclose(found.scores[1:].ravel()[after][inside], wanted, atol=0.05)
    assert found.scores[0].min() >= found.scores[1:].max()
