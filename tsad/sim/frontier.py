"""What settings are worth: which are fastest at their loss, which lose nothing, and how sure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.statistics import LEAST_EPISODES

# Of the standard normal: 97.5 %, and 90 %.
_Z_CONFIDENCE, _Z_POWER = 1.959964, 1.281552
LEAST_ROWS = 5  # of a rank correlation

Numbers = Mapping[str, float]


def frontier(milliseconds: Numbers, loss: Numbers) -> list[str]:
    """The settings that no other beats in both, the fastest first; of equal ones, one."""
    names = sorted(loss, key=lambda name: (milliseconds[name], loss[name]))
    kept: list[str] = []
    for name in names:
        if not math.isnan(loss[name]) and (not kept or loss[name] < loss[kept[-1]]):
            kept.append(name)
    return kept


def busy(rows: Mapping[str, Any], name: str) -> float:
    """Milliseconds for as many actions as the first row executes of a chunk.

    Of rows of ``tune.json``; those from before they had ``n_action_steps`` execute alike.
    """
    first, row = next(iter(rows.values())), rows[name]
    chunks = first.get("n_action_steps", 1) / row.get("n_action_steps", 1)
    return float(row["milliseconds"] * chunks)


def fastest(milliseconds: Numbers, names: Iterable[str]) -> str | None:
    """Of some settings; None of none."""
    return min(names, key=lambda name: milliseconds[name], default=None)


def seeds_needed(differences: ArrayLike, margin: float) -> int:
    """How many paired seeds show that nothing beyond ``margin`` is lost, if nothing is.

    ``differences`` (n,) of paired scores, from a pilot. A 95 % interval of the mean difference then
    lies above -margin with 90 % power (normal approximation, one side: Chow, Shao and Wang 2008).
    At least as many as it takes for an interval.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"differences: expected two or more, got shape {values.shape}")
    if not margin > 0:
        raise ValueError(f"margin: expected a number above 0, got {margin}")
    wanted = float(((_Z_CONFIDENCE + _Z_POWER) * values.std(ddof=1) / margin) ** 2)
    return max(LEAST_EPISODES, math.ceil(wanted))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, ties share their mean rank; nan if either is constant or has less than three."""
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} numbers, as many as a, got {len(b)}")
    first, second = (_ranks(np.asarray(values, np.float64)) for values in (a, b))
    if len(a) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where]


def correlations(rows: Mapping[str, Any], baseline: str, errors: Sequence[str]) -> dict[str, Any]:
    """How well each offline error ranks the rows by closed-loop loss, the baseline left out.

    None of fewer than five rows: four that are shuffled are in order one time in 24.
    """
    found = {}
    for error in errors:
        names = [n for n in rows if n != baseline and rows[n].get(error) is not None]
        losses = [rows[baseline]["score"]["mean"] - rows[n]["score"]["mean"] for n in names]
        value = rank_correlation([rows[n][error] for n in names], losses)
        known = len(names) >= LEAST_ROWS and not math.isnan(value)
        found[error] = {"rows": len(names), "rank_correlation": value if known else None}
    return found
