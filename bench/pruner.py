"""What a trained pruner gains by looking at the observation: error of executed actions, offline.

    python bench/pruner.py recorded --policy levels effects --plan bench/frontier/plans/*-9?.npz

Every chunk is run with each rule's plan and with all computed, the noise the same, as the first of
an episode. Rules of one average cost, of each policy: ``own`` one price for all chunks, so that the
cost differs by chunk; ``budget`` the same cost for every chunk; ``mean`` the plan of the pruner's
mean scores, which sees nothing; ``another's`` the plans of ``own``, each chunk's from a chunk of
another episode; ``levels`` the costs of ``own`` in random order, spent along the mean scores;
``hindsight`` a level for each chunk along the mean scores, chosen by its true errors: what knowing
them would be worth. Prices are chosen on the chunks themselves, for all rules alike. A pruner that
adapts beats mean, another's and levels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tsad  # noqa: E402
from tsad import Plan  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.planners.base import make_plan  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.sim.recording import pick  # noqa: E402
from tsad.training.true_errors import TrueErrors  # noqa: E402

LEVELS = 2.0 ** np.arange(-1.5, 2.25, 0.25)  # of hindsight, in units of the average cost


def keys_of(scores: Any) -> Any:
    """(..., K, B): by what a cell's first class leads the best other one; step 0 is computed."""
    keys = (scores[..., 0] - scores[..., 1:].max(-1)).astype(np.float64)
    keys[..., 0, :] = np.inf
    return keys


def planned(policy: Any, scores: Any, mask: Any) -> Plan:
    """The plan that computes a mask (K, B); the rest reuses what scores (K, B, 4) like best."""
    sources = np.where(mask, 0, 1 + scores[..., 1:].argmax(-1)).astype(np.uint8)
    return make_plan(policy, sources, sources)


def cut(keys: Any, costs: Any, budget: float) -> Any:
    """The mask (..., K, B) of the highest keys that cost at most ``budget`` together."""
    order = np.argsort(-keys, axis=None, kind="stable")
    spent = np.cumsum(np.broadcast_to(costs, keys.shape).ravel()[order])
    mask = np.zeros(keys.size, bool)
    mask[order[: int(np.searchsorted(spent, budget, side="right"))]] = True
    return mask.reshape(keys.shape)


def plans_of(
    policy: Any, scores: Any, sparsity: float, episodes: Any, seed: int
) -> dict[str, list[Plan]]:
    """N plans of every rule, from scores (N, K, B, 4) and the episode of each chunk."""
    rng = np.random.default_rng(seed)
    costs = np.asarray(policy.block_costs, np.float64)
    n, K = scores.shape[:2]
    budget = (1 - sparsity) * K * costs.sum()
    keys, mean = keys_of(scores), scores.mean(0)
    own = [
        planned(policy, *pair) for pair in zip(scores, cut(keys, costs, n * budget), strict=True)
    ]
    other = [int(rng.choice(np.flatnonzero(episodes != episodes[i]))) for i in range(n)]
    levels = rng.permutation([plan.cost * K * costs.sum() for plan in own])
    static = planned(policy, mean, cut(keys_of(mean), costs, budget))
    return {
        "mean": [static] * n,
        "own": own,
        "budget": [planned(policy, one, cut(keys_of(one), costs, budget)) for one in scores],
        "another's": [own[i] for i in other],
        "levels": [planned(policy, mean, cut(keys_of(mean), costs, level)) for level in levels],
    }


def foreseen(errors: Any, costs: Any, budget: float) -> Any:
    """(N,) which level each chunk should have, by errors (N, L) that cost (L,), on average budget.

    One price for all: the least at which the mean cost is at most the budget.
    """
    low, high = 0.0, float(errors.max() / costs.min()) + 1.0
    for _ in range(200):
        price = (low + high) / 2
        chosen = (errors + price * costs).argmin(1)
        low, high = (price, high) if costs[chosen].mean() > budget else (low, price)
    return (errors + high * costs).argmin(1)


def row_of(rule: str, errors: Any, spent: Any, beside: Any) -> dict[str, Any]:
    """Of one rule: root mean squares, bootstrapped with the same chunks as those of ``beside``."""
    again = np.random.default_rng(0).integers(len(errors), size=(2000, len(errors)))

    def interval(values: Any) -> list[float]:
        return [float(x) for x in np.percentile(values, [2.5, 97.5])]

    means, others = np.sqrt(errors[again].mean(1)), np.sqrt(beside[again].mean(1))
    rms = float(np.sqrt(errors.mean()))
    return {
        "rule": rule,
        "sparsity": float(1 - spent.mean()),
        "spread": float(spent.std()),
        "most": float(spent.max()),
        "rms": rms,
        "interval": interval(means),
        "beside": float(rms / np.sqrt(beside.mean()) - 1),
        "beside_interval": interval(means / others - 1),
        "median": float(np.median(np.sqrt(errors))),
    }


def lines_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table for people."""
    lines = [["rule", "left out", "spread", "rms", "95 %", "beside mean", "95 %", "median"]]
    for r in rows:
        low, high = r["interval"]
        less, more = r["beside_interval"]
        numbers = [f"{r['sparsity']:.2%}", f"{r['spread']:.2%}", f"{r['rms']:.4f}"]
        beside = [f"{low:.4f} to {high:.4f}", f"{r['beside']:+.1%}", f"{less:+.1%} to {more:+.1%}"]
        lines.append([r["rule"], *numbers, *beside, f"{r['median']:.4f}"])
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="episodes; those that a pruner was trained on are left out")
    parser.add_argument("--policy", nargs="+", required=True, help="folders of tsad train-pruner")
    parser.add_argument("--chunks", type=int, default=200, metavar="N")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--plan", nargs="+", default=[], metavar="FILE", help="static plans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    policies = {
        Path(path).name: tsad.load(path, threads=1, precision="float32") for path in args.policy
    }
    trained = {name: one.config["provenance"]["pruner"] for name, one in policies.items()}
    # those held out chose the weights that were kept; with so few weights that is close to fair
    seen = {seed for facts in trained.values() for seed in facts["of"]["seeds"]}
    policy = next(iter(policies.values()))
    _, every = read_observations(args.data, policy)
    found = [episode for episode in every if episode.name not in seen]
    windows = pick(found, args.chunks, 1, args.seed)
    errors = TrueErrors(policy, windows)
    names = np.array([str(episode.name) for episode, _ in windows])
    costs = np.asarray(policy.block_costs, np.float64)
    n, dense = len(errors), float(costs.sum()) * policy.num_inference_steps
    rows: list[dict[str, Any]] = []

    def run(rule: str, plans: list[Plan], beside: Any = None) -> Any:
        each = np.array([errors(i, plan) for i, plan in enumerate(plans)])
        spent = np.array([plan.cost for plan in plans])
        rows.append(row_of(rule, each, spent, each if beside is None else beside))
        print(rows[-1], file=sys.stderr, flush=True)
        return each

    for path in args.plan:
        run(Path(path).stem, [Plan.load(path)] * n)
    for name, one in policies.items():
        scores = np.stack([one._pruner_scores(obs) for obs in errors.obs])
        mean = scores.mean(0)
        for sparsity in args.sparsity:
            plans = plans_of(policy, scores, sparsity, names, args.seed)
            beside = run(f"{name}, mean, {sparsity:.0%}", plans.pop("mean"))
            for rule, some in plans.items():
                run(f"{name}, {rule}, {sparsity:.0%}", some, beside)
            spent = (LEVELS * (1 - sparsity) * dense).clip(costs.sum(), dense - costs.sum())
            along = [planned(policy, mean, cut(keys_of(mean), costs, level)) for level in spent]
            known = np.array([[errors(i, plan) for plan in along] for i in range(n)])
            exact = np.array([plan.cost for plan in along])
            chosen = foreseen(known, exact, 1 - sparsity)
            each = np.take_along_axis(known, chosen[:, None], 1)[:, 0]
            rows.append(row_of(f"{name}, hindsight, {sparsity:.0%}", each, exact[chosen], beside))
    print(table(lines_of(rows)))
    if args.out is not None:
        write_json(args.out, {"chunks": n, "data": args.data, "rows": rows, "pruners": trained})
    return 0


if __name__ == "__main__":
    sys.exit(main())
