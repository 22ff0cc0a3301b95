"""How sure numbers of few measurements are, and how many it takes.

The interval of a mean is the bootstrap's (percentiles of resampled means), with one more value at
either end of the scale among those resampled, as Agresti and Coull (1998) add successes and
failures to a proportion, and Bonett and Price (2012) to the difference of two. Scores are skewed:
most near 1, some far below, and what was not drawn yet the plain bootstrap takes for impossible.
Differences of pairs have no such ends that say anything of runs which hardly differ; there it is
the largest difference seen, both ways, or the whole scale where all pairs are equal.
`bench/coverage.py` measures how often the intervals hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# With fewer episodes no interval is given. Down to ten those of scores hold 97 times of 100 where
# the plain bootstrap's hold 65 times (bench/coverage.py), but they say next to nothing, and what
# happens once in twenty episodes has not been seen.
LEAST_EPISODES = 20
RESAMPLES = 10_000
# How many values a percentile needs, so that it is not just the largest.
ENOUGH = {50: 1, 90: 10, 99: 100}
_Z = 1.959964  # of the standard normal, 97.5 %


def mean_interval(values: ArrayLike, ends: tuple[float, float] | None = None) -> list[float] | None:
    """95 % interval of the mean of values (n,); None of fewer than `LEAST_EPISODES`.

    ``ends`` of their scale; None for differences of pairs, which `with_ends` knows.
    """
    known = np.asarray(values, np.float64)
    if len(known) < LEAST_EPISODES:
        return None
    known = with_ends(known) if ends is None else np.append(known, ends)
    low, high = np.quantile(resampled_means(known[None])[:, 0], [0.025, 0.975])
    return [float(low), float(high)]


def with_ends(differences: Floats) -> Floats:
    """(..., n + 2): differences of pairs, in [-1, 1], and the largest seen both ways, or 1."""
    largest = np.abs(differences).max(axis=-1, keepdims=True)
    largest[largest == 0] = 1.0
    return np.concatenate([differences, -largest, largest], axis=-1)


def resampled_means(values: Floats) -> Floats:
    """(RESAMPLES, rows) of values (rows, n), all rows of a resample at the same places.

    Drawn with a fixed seed.
    """
    rng, n = np.random.default_rng(0), values.shape[1]
    share, blocks = np.full(n, 1 / n), 50  # not all at once: thousands of episodes take gigabytes
    drawn = (rng.multinomial(n, share, RESAMPLES // blocks) for _ in range(blocks))
    means: Floats = np.concatenate([counts @ values.T for counts in drawn]) / n
    return means


def proportion_interval(successes: int, n: int) -> list[float] | None:
    """95 % interval of a proportion, Wilson's; None of fewer than `LEAST_EPISODES`."""
    if n < LEAST_EPISODES:
        return None
    centre = (successes + _Z * _Z / 2) / (n + _Z * _Z)
    half = _Z / (n + _Z * _Z) * float(np.sqrt(successes * (n - successes) / n + _Z * _Z / 4))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def percentile(values: Sequence[float], q: int) -> float | None:
    """The q-th percentile, q of `ENOUGH`; None of too few values to tell it from the largest."""
    if len(values) < ENOUGH[q]:
        return None
    return float(np.percentile(np.asarray(values, np.float64), q))
