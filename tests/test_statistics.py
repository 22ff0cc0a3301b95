"""tsad/statistics.py: intervals that hold as often as they say, and none of too few."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsad import statistics
from tsad.sim import results
from tsad.sim.rollout import Episode

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

N = statistics.LEAST_EPISODES


def test_too_few_have_no_interval() -> None:
    ones = np.ones(N)
    for few in range(N):
        assert statistics.mean_interval(ones[:few], (0.0, 1.0)) is None
        assert statistics.proportion_interval(few, few) is None
    assert statistics.mean_interval(ones, (0.0, 1.0)) is not None
    assert statistics.mean_interval(ones) is not None


def test_what_was_never_seen_is_not_impossible() -> None:
    """All alike: by the rule of three up to 3 / n of the episodes may still be others."""
    for n in (N, 100):
        interval = statistics.mean_interval(np.ones(n), (0.0, 1.0))
        assert interval is not None
        assert 1 - 5 / n < interval[0] < 1 - 2 / n and interval[1] == 1
        interval = statistics.mean_interval(np.zeros(n))
        assert interval is not None
        assert 1 / n < interval[1] < 4 / n and interval[0] == pytest.approx(-interval[1], abs=1 / n)
    # pairs that hardly differ: by what they do
    interval = statistics.mean_interval(np.full(N, 1e-4))
    assert interval is not None and 0 < interval[0] < 1e-4 < interval[1] + 1e-9


def test_the_interval_is_the_bootstraps_of_the_values_and_their_ends() -> None:
    scipy = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(0).beta(8, 1, 60)
    wanted = scipy.bootstrap(
        ([*scores, 0.0, 1.0],), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    found = statistics.mean_interval(scores, (0.0, 1.0))
    assert found == pytest.approx([wanted.low, wanted.high], abs=2e-3)


def test_proportions_are_wilsons() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for k, n in ((0, 20), (1, 24), (12, 24), (50, 50), (499, 500)):
        wanted = scipy.binomtest(k, n).proportion_ci(method="wilson")
        assert statistics.proportion_interval(k, n) == pytest.approx(list(wanted), abs=1e-6)


def test_percentiles_of_enough() -> None:
    values = list(range(100))
    assert statistics.percentile(values, 99) == np.percentile(values, 99)
    for q, enough in statistics.ENOUGH.items():
        assert statistics.percentile(values[:enough], q) is not None
        assert statistics.percentile(values[: enough - 1], q) is None


@pytest.mark.parametrize("n", [N, 50])
def test_intervals_hold_as_often_as_they_say(monkeypatch: Any, n: int) -> None:
    """Where the plain bootstrap's don't: real scores, and some that are nearly all 1."""
    import coverage

    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    for name, (values, pairs) in coverage.populations(rng).items():
        if "tsad - PyTorch" in name or "5 % lose" in name:
            continue  # what is seen once in fifty times takes more than that
        held = 0
        for _ in range(150):
            drawn = rng.choice(values, n)
            low, high = statistics.mean_interval(drawn, None if pairs else (0, 1)) or (1, 0)
            held += low - 1e-9 <= values.mean() <= high + 1e-9
        assert held >= 0.9 * 150, name  # 95 % but for three standard errors


def test_intervals_of_many_rows_hold_together() -> None:
    scores, _ = coverage_scores()
    rng, held, samples = np.random.default_rng(0), 0, 60
    truth = np.array([0.0, scores[1].mean() - scores[0].mean()])
    for _ in range(samples):
        drawn = rng.integers(0, scores.shape[1], N)
        noise = rng.integers(0, scores.shape[1], N)  # the same setting in other episodes
        rows = {
            "base": episodes(scores[0][drawn]),
            "other": episodes(scores[0][noise]),
            "eight": episodes(scores[1][drawn]),
        }
        found = results.compare_all(rows, "base")["rows"]
        pairs = zip((found["other"], found["eight"]), truth, strict=True)
        held += all(r["simultaneous"][0] <= t <= r["simultaneous"][1] for r, t in pairs)
    assert held >= 0.87 * samples


def coverage_scores() -> Any:
    import coverage

    return coverage.recorded()


def episodes(scores: Any) -> list[Episode]:
    return [Episode(i, float(s), False, 1, 1, 0.0, 0.0) for i, s in enumerate(scores)]
