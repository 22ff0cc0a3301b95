"""How often the 95 % intervals of `tsad eval` hold what they should, and what they are wide.

    python bench/coverage.py

Samples of n episodes are drawn from recorded ones (bench/results) and from made-up ones that are
harder: scores that are nearly all 1, pairs that are nearly all equal. Beside each share stands that
of the plain bootstrap, of the same samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad import statistics

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (5, 10, 20, 50, 100)
Floats = NDArray[np.float64]


def recorded() -> tuple[Floats, Floats]:
    """Scores and successes (2, 500) of DDPM-100 and DDIM-8 on the same seeds."""
    files = [f"2026-11-25-pusht-{name}-500.json" for name in ("ddpm100", "ddim8")]
    rows = [json.loads((RESULTS / file).read_text())["episodes"] for file in files]
    by_seed = [sorted(row, key=lambda episode: episode["seed"]) for row in rows]
    found = ([[float(e[key]) for e in row] for row in by_seed] for key in ("score", "success"))
    scores, successes = map(np.array, found)
    return scores, successes


def populations(rng: np.random.Generator) -> dict[str, tuple[Floats, bool]]:
    """What is drawn from, and whether it is differences of pairs."""
    scores, successes = recorded()
    file = RESULTS / "2026-11-24-amd-epyc-25-17-closed-loop.json"
    parity = np.array(list(json.loads(file.read_text())["score_differences"].values()))
    n = 4000

    def rarely(share: float, values: Any, else_: Any) -> Floats:
        return np.where(rng.random(n) < share, values, else_)

    uniform = rng.random(n)
    good = [rarely(0.03, rng.random(n), 1.0) for _ in range(2)]
    return {
        "scores, Push-T, DDPM-100": (scores[0], False),
        "scores, Push-T, DDIM-8": (scores[1], False),
        "scores, 90 % are 1": (rarely(0.1, uniform, 1.0), False),
        "scores, 97 % are 1": (good[0], False),
        "scores, uniform": (uniform, False),
        "pairs, Push-T, DDIM-8 - DDPM-100": (scores[1] - scores[0], True),
        "pairs, success of these": (successes[1] - successes[0], True),
        "pairs, Push-T, tsad - PyTorch": (parity, True),
        "pairs of two that are 97 % 1": (good[1] - good[0], True),
        "pairs, equal, 5 % lose": (rarely(0.05, -uniform, 0.0), True),
    }


def plain(values: Floats) -> tuple[float, float]:
    """The bootstrap's interval of what was drawn alone."""
    low, high = np.quantile(statistics.resampled_means(values[None]), (0.025, 0.975))
    return low, high


def row(values: Floats, pairs: bool, samples: int, rng: np.random.Generator) -> list[str]:
    """Of every size: share of intervals that hold the mean, the plain one's, the mean width."""
    cells, slack = [], 1e-12
    for n in SIZES:
        held, width = np.zeros(2), 0.0
        for _ in range(samples):
            drawn = values[rng.integers(0, len(values), n)]
            ours = statistics.mean_interval(drawn, None if pairs else (0.0, 1.0))
            assert ours is not None
            both = (ours, plain(drawn))
            held += [low - slack <= values.mean() <= high + slack for low, high in both]
            width += ours[1] - ours[0]
        ours_held, plain_held = held / samples
        cells.append(f"{ours_held:.2f} ({plain_held:.2f}), {width / samples:.3f}")
    return cells


def proportions(rng: np.random.Generator) -> dict[str, list[str]]:
    """Wilson's interval, of proportions."""
    rows = {}
    for p in (0.02, 0.05, 0.25, 0.5):
        cells = []
        for n in SIZES:
            count, of = np.unique(rng.binomial(n, p, 20_000), return_counts=True)
            known = [statistics.proportion_interval(int(k), n) or [0.0, 1.0] for k in count]
            held = [low <= p <= high for low, high in known]
            width = [high - low for low, high in known]
            share, mean = (float(np.average(x, weights=of)) for x in (held, width))
            cells.append(f"{share:.2f}, {mean:.3f}")
        rows[f"successes, {p:.0%}"] = cells
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    statistics.LEAST_EPISODES, statistics.RESAMPLES = 1, 400  # to see what too few would be told
    rng = np.random.default_rng(0)
    print("| held (plain bootstrap), width | " + " | ".join(f"n = {n}" for n in SIZES) + " |")
    print("| --- |" + " ---: |" * len(SIZES))
    for name, (values, pairs) in populations(rng).items():
        cells = row(values, pairs, args.samples, rng)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for name, cells in proportions(rng).items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
