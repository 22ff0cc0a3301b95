"""What a trained pruner gains by looking at the observation: error of executed actions, offline.

    python bench/pruner.py adaptive recorded --plan bench/frontier/plans/ddpm-100-search-95.npz

Every chunk is run with each rule's plan and with all computed, the noise the same. Rules of one
average cost: ``own`` one price for all chunks, so that the cost differs by chunk; ``budget`` the
same cost for every chunk; ``mean`` the plan of the pruner's mean scores, which sees nothing;
``another's`` the plans of ``own``, each chunk's from a chunk of another episode; ``levels`` the
costs of ``own`` in random order, spent along the mean scores. Prices are chosen on the chunks
themselves, for all rules alike. A pruner that adapts beats mean, another's and levels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tsad  # noqa: E402
from tsad import Plan, planners  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.planners.base import own_values  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.sim.recording import pick  # noqa: E402


def keys_of(policy: Any, obs: Any) -> Any:
    """(K, B): what a cell's first class leads the best other one by; step 0 is always computed."""
    scores = policy._pruner_scores(np.ascontiguousarray(obs, np.float32))
    keys = (scores[..., 0] - scores[..., 1:].max(-1)).astype(np.float64)
    keys[0] = np.inf
    return keys


def cut(keys: Any, costs: Any, budget: float) -> Any:
    """The mask (..., K, B) of the highest keys that cost at most ``budget`` together."""
    order = np.argsort(-keys, axis=None, kind="stable")
    spent = np.cumsum(np.broadcast_to(costs, keys.shape).ravel()[order])
    mask = np.zeros(keys.size, bool)
    mask[order[: int(np.searchsorted(spent, budget, side="right"))]] = True
    return mask.reshape(keys.shape)


def masks_of(keys: Any, costs: Any, sparsity: float, episodes: Any, seed: int) -> dict[str, Any]:
    """(N, K, B) of every rule, from keys (N, K, B) and the episode of each chunk."""
    rng = np.random.default_rng(seed)
    n, dense = len(keys), keys.shape[1] * costs.sum()
    budget = (1 - sparsity) * dense
    own = cut(keys, costs, n * budget)
    mean = keys.mean(0)
    other = [int(rng.choice(np.flatnonzero(episodes != episodes[i]))) for i in range(n)]
    levels = rng.permutation((own * costs).sum((1, 2)))
    return {
        "own": own,
        "budget": np.stack([cut(one, costs, budget) for one in keys]),
        "mean": np.stack([cut(mean, costs, budget)] * n),
        "another's": own[other],
        "levels": np.stack([cut(mean, costs, level) for level in levels]),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="folder of tsad train-pruner")
    parser.add_argument("data", help="episodes that it was not trained on")
    parser.add_argument("--chunks", type=int, default=200, metavar="N")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--plan", nargs="+", default=[], metavar="FILE", help="static plans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    policy = tsad.load(args.policy, threads=1, precision="float32")
    facts = policy.config["provenance"]["pruner"]["of"]
    seen = [*facts["seeds"], *facts["held_out"]]
    _, every = read_observations(args.data, policy)
    found = [episode for episode in every if episode.name not in set(seen)]
    chosen = pick(found, args.chunks, 1, args.seed)
    obs = [episode.obs[part] for episode, part in chosen]
    noise = [episode.noise(policy, part)[0][:, None] for episode, part in chosen]
    scale = np.array(policy.config["normalizer"]["action"]["scale"])
    costs = np.asarray(policy.block_costs, np.float64)

    def run(plan: Plan, i: int) -> Any:
        policy.reset()
        policy.plan = plan
        return np.asarray(policy(obs[i][0], noise=noise[i])) * scale

    dense = [run(planners.dense(policy), i) for i in range(len(obs))]
    keys = np.stack([keys_of(policy, one[0]) for one in obs])
    names = np.array([str(episode.name) for episode, _ in chosen])
    rows = []
    plans: dict[str, list[Plan]] = {path: [Plan.load(path)] * len(obs) for path in args.plan}
    for sparsity in args.sparsity:
        for rule, masks in masks_of(keys, costs, sparsity, names, args.seed).items():
            plans[f"{rule}, {sparsity:.0%}"] = [own_values(policy, mask) for mask in masks]
    for rule, some in plans.items():
        errors = np.array([((run(p, i) - dense[i]) ** 2).mean() for i, p in enumerate(some)])
        again = np.random.default_rng(0).integers(len(errors), size=(2000, len(errors)))
        low, high = np.percentile(np.sqrt(errors[again].mean(1)), [2.5, 97.5])
        spent = np.array([plan.cost for plan in some])
        rows.append(
            {
                "rule": rule,
                "sparsity": float(1 - spent.mean()),
                "spread": float(spent.std()),
                "rms": float(np.sqrt(errors.mean())),
                "low": float(low),
                "high": float(high),
                "median": float(np.median(np.sqrt(errors))),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    lines = [["rule", "left out", "spread", "rms", "95 % interval", "median"]]
    for r in rows:
        interval = f"{r['low']:.4f} to {r['high']:.4f}"
        numbers = [f"{r['sparsity']:.2%}", f"{r['spread']:.2%}", f"{r['rms']:.4f}", interval]
        lines.append([str(r["rule"]), *numbers, f"{r['median']:.4f}"])
    print(table(lines))
    if args.out is not None:
        training = policy.config["provenance"]["pruner"]
        write_json(args.out, {"chunks": len(obs), "rows": rows, "pruner": training})
    return 0


if __name__ == "__main__":
    sys.exit(main())
