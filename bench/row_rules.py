"""Rules that decide within a chunk beside steps that are evenly spaced: error at what they cost.

    tsad collect pusht --out recorded --first-seed 7012 --episodes 12 --sampler ddim --steps 16
    python bench/row_rules.py recorded --chunks 48 --out rules.json

Each recorded chunk is run by each rule (`tsad.planners.RowRule`) and with all computed, the noise
the same. Beside it ``uniform``, evenly spaced steps of which there are as many as the rule costs,
and ``another's``: the rows that the rule chose in another chunk, chosen at random. Errors are those
of the executed actions, root mean squares, normalised.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tsad  # noqa: E402
from tsad import planners  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.planners import RowRule  # noqa: E402
from tsad.planners.base import make_plan  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.sim.recording import pick  # noqa: E402
from tsad.training.true_errors import TrueErrors  # noqa: E402

THRESHOLDS = {"fbcache": (0.1, 0.2, 0.4, 0.8), "teacache": (0.25, 0.5, 1.0, 2.0)}


def rms(errors: Any) -> float:
    """Of mean squared errors."""
    return float(np.sqrt(np.mean(errors)))


def measured(policy: Any, errors: TrueErrors, rule: RowRule, seed: int) -> dict[str, Any]:
    """A rule, beside plans that cost what it costs."""
    found, plans = [], []
    for i in range(len(errors)):
        policy.reset()
        policy.planner = rule
        noise = np.ascontiguousarray(errors.noise(i)[:, None])
        actions = np.asarray(policy(errors.obs[i], noise=noise))
        plan = policy.plan
        plans.append(make_plan(policy, plan.sources, plan.sources))
        scale = np.asarray(policy.config["normalizer"]["action"]["scale"], np.float64)
        found.append(float(((actions * scale - errors.dense(i)) ** 2).mean()))
    cost = np.array([plan.cost for plan in plans])
    steps = max(1, round(float(cost.mean()) * policy.num_inference_steps))
    uniform = planners.uniform(policy, steps)
    others = np.random.default_rng(seed).permutation(len(plans))
    return {
        "rule": rule.rule,
        "threshold": rule.threshold,
        "cost": float(cost.mean()),
        "least": float(cost.min()),
        "most": float(cost.max()),
        "plans": len({plan.sources.tobytes() for plan in plans}),
        "rms": rms(found),
        "uniform": rms([errors(i, uniform) for i in range(len(errors))]),
        "another's": rms([errors(i, plans[j]) for i, j in enumerate(others)]),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="recorded episodes")
    parser.add_argument("--policy", default="pusht")
    parser.add_argument("--chunks", type=int, default=48, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    policy = tsad.load(args.policy, threads=1, precision="float32")
    _, episodes = read_observations(args.data, policy)
    errors = TrueErrors(policy, pick(episodes, args.chunks, 1, args.seed))
    rows = []
    for name, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            rows.append(measured(policy, errors, RowRule(name, threshold), args.seed))
            print(rows[-1], file=sys.stderr, flush=True)
    columns = ("rms", "uniform", "another's")
    lines = [["rule", "threshold", "cost", "least", "most", "plans", *columns]]
    for row in rows:
        costs = [f"{row[key]:.1%}" for key in ("cost", "least", "most")]
        of = [row["rule"], f"{row['threshold']:g}", *costs, str(row["plans"])]
        lines.append([*of, *(f"{row[key]:.4f}" for key in columns)])
    print(table(lines))
    if args.out is not None:
        digest = policy.config["provenance"]["sha256"]
        write_json(args.out, {"policy": digest, "chunks": len(errors), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
