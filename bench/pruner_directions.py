"""Where a pruner's reused values come from, and how its error grows over the chunks of an episode.

    tsad collect pusht --out recorded --first-seed 7012 --episodes 12 --sampler ddim --steps 16
    python bench/pruner_directions.py recorded --out directions.json

For each chunk the pruner says which cells are computed, at one price for all chunks, so that they
cost on average what is asked for. What is not computed is reused, always in one direction: the last
computed value of its type (type), its own of an earlier step (step, what the pruner was trained
with), the same cell's of an earlier chunk (rollout), a direction drawn for each cell anew (any), or
it is skipped. Whole recorded episodes are run in their order, beside all computed with the same
noise; the first chunk of each is dense and counts nowhere. Errors are those of the executed
actions, root mean squares, normalised; intervals resample episodes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pruner import cut, keys_of  # noqa: E402

import tsad  # noqa: E402
from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, planners  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.planners.base import make_plan  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402

DIRECTIONS = {
    "step": [REUSE_STEP],
    "type": [REUSE_TYPE],
    "rollout": [REUSE_ROLLOUT],
    "any": [REUSE_STEP, REUSE_TYPE, REUSE_ROLLOUT],
    "skip": [SKIP],
}
SPANS = ((1, 1), (2, 4), (5, 9), (10, 19), (20, 37))


def run(policy: Any, episode: Any, noise: Any, plans: list[Any]) -> Any:
    """(chunks, n_action_steps, action_dim) normalised; a plan for each chunk but the first."""
    policy.reset()
    policy.plan = plans[0]  # its first chunk is dense, and remembered if rollouts are read
    found = []
    for obs, z, plan in zip(episode.obs, noise, [plans[0], *plans], strict=True):
        policy.plan = plan
        found.append(policy(obs, noise=np.ascontiguousarray(z[:, None])))
    return np.array(found, np.float64) * policy.config["normalizer"]["action"]["scale"]


def plans_of(policy: Any, scores: Any, price: float, sources: list[int], draw: Any) -> list[Any]:
    """A plan for each chunk after the first, of scores (C, K, B, 4) of an episode."""
    plans = []
    for keys in keys_of(scores)[1:]:
        others = draw.choice(sources, keys.shape).astype(np.uint8)
        plans.append(make_plan(policy, np.where(keys >= price, np.uint8(COMPUTE), others), None))
    return plans


def described(errors: list[Any]) -> dict[str, Any]:
    """Of mean squared errors (chunks), an episode each: all, by chunk, by spans of chunks."""
    sums = np.array([(each.sum(), len(each)) for each in errors])
    again = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    totals = sums[again].sum(1)
    number = np.concatenate([np.arange(1, len(each) + 1) for each in errors])
    every = np.concatenate(errors)

    def rms(some: Any) -> float | None:
        return float(np.sqrt(every[some].mean())) if some.any() else None

    return {
        "rms": float(np.sqrt(every.mean())),
        "interval": [
            float(x) for x in np.sqrt(np.quantile(totals.T[0] / totals.T[1], (0.025, 0.975)))
        ],
        "spans": {f"{a}-{b}": rms((number >= a) & (number <= b)) for a, b in SPANS},
        "by_chunk": [rms(number == n) for n in range(1, int(number.max()) + 1)],
        "episodes_by_chunk": [int((number == n).sum()) for n in range(1, int(number.max()) + 1)],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="episodes; those that the pruner was trained on are left out")
    parser.add_argument("--policy", default="pusht", help="one that has a pruner (default: pusht)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.9])
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    policy = tsad.load(args.policy, threads=1, precision="float32")
    trained = policy.config["provenance"]["pruner"]["of"]["seeds"]
    _, found = read_observations(args.data, policy)
    episodes = [one for one in found if one.name not in trained and len(one.obs) > 1]
    noises = [one.noise(policy) for one in episodes]
    scores = [np.stack([policy._pruner_scores(obs) for obs in one.obs]) for one in episodes]
    dense = [[planners.dense(policy)] * (len(one.obs) - 1) for one in episodes]
    right = [run(policy, *each) for each in zip(episodes, noises, dense, strict=True)]
    costs = np.asarray(policy.block_costs, np.float64)
    every = keys_of(np.concatenate(scores))
    rows = []
    for sparsity in args.sparsity:
        budget = len(every) * (1 - sparsity) * costs.sum() * policy.num_inference_steps
        price = every[cut(every, costs, budget)].min()
        for name, sources in DIRECTIONS.items():
            draw, errors, spent = np.random.default_rng(0), [], []
            for episode, noise, own, exact in zip(episodes, noises, scores, right, strict=True):
                plans = plans_of(policy, own, price, sources, draw)
                apart = run(policy, episode, noise, plans) - exact
                errors.append((apart[1:] ** 2).mean((1, 2)))
                spent += [plan.cost for plan in plans]
            of = {"direction": name, "sparsity": float(1 - np.mean(spent)), **described(errors)}
            rows.append({"asked": sparsity, **of})
            print(rows[-1]["direction"], sparsity, rows[-1]["rms"], file=sys.stderr, flush=True)
    lines = [["direction", "left out", "rms", "95 %", *rows[0]["spans"]]]
    for row in rows:
        low, high = row["interval"]
        spans = ["" if x is None else f"{x:.4f}" for x in row["spans"].values()]
        numbers = [f"{row['sparsity']:.2%}", f"{row['rms']:.4f}", f"{low:.4f} to {high:.4f}"]
        lines.append([row["direction"], *numbers, *spans])
    print(table(lines))
    if args.out is not None:
        of = {"policy": args.policy, "sha256": policy.config["provenance"]["sha256"]}
        write_json(args.out, {**of, "episodes": [one.name for one in episodes], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
