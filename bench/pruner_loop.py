"""Does a pruner that looks at the observation do better in closed loop? Paired seeds.

    python bench/pruner_loop.py levels recorded --first-seed 23000 --seeds 300 --out loop.json \\
        --plan bench/frontier/plans/ddpm-100-search-95.npz

Arms, each with a sparse first chunk: ``static`` the plan given; ``mean`` the mean scores at
the cost that it was trained for; ``own`` the pruner's choice, chunk by chunk; ``another's`` what it
would have chosen in a recorded episode of another seed, chunk by chunk; ``levels`` a cost drawn
from those of its choices in the recorded episodes, spent along the mean scores. With ``--mix``
two more, which see nothing: the two plans given take turns (`tsad.planners.Turns`), ``every`` and
``random``, at the same average cost. FILE is written after every seed; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pruner import cut, keys_of, planned  # noqa: E402

import tsad  # noqa: E402
from tsad import Plan, sim  # noqa: E402
from tsad.arrays import read_any_json  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.planners import Turns  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.statistics import mean_interval  # noqa: E402

ARMS = ("static", "mean", "own", "another's", "levels")


class Arm:
    """A policy of one lane whose plan is chosen before each chunk."""

    lanes = 1

    def __init__(self, policy: Any, rule: str, plan: Plan, recorded: list[Any]) -> None:
        self.policy, self.rule, self.plan = policy, rule, plan
        self.costs = np.asarray(policy.block_costs, np.float64)
        self.choices = recorded  # of scores (C, K, B, 4), an episode each
        for name in ("n_obs_steps", "n_action_steps", "obs_dim", "action_dim"):
            setattr(self, name, getattr(policy, name))
        self.mean: Any = None
        self.seed = self.chunk = 0
        self.spent: list[float] = []

    def start(self, seed: int, lane: int) -> None:
        """An episode begins."""
        self.seed, self.chunk, self.spent = seed, 0, []
        self.random = np.random.default_rng([seed, 18])

    def reset(self, lanes: Any, seed: Any) -> None:
        """As of a policy."""
        self.policy.reset(seed=list(seed))

    def choose(self, obs: Any) -> Plan:
        """The plan of the next chunk."""
        if self.rule in ("static", "mean"):
            return self.plan
        if self.rule == "own":
            scores = self.policy._pruner_scores(obs)
            return planned(self.policy, scores, keys_of(scores) >= 0)
        if self.rule == "another's":
            other = self.choices[self.seed % len(self.choices)]
            scores = other[min(self.chunk, len(other) - 1)]
            return planned(self.policy, scores, keys_of(scores) >= 0)
        other = self.choices[self.random.integers(len(self.choices))]
        drawn = keys_of(other[self.random.integers(len(other))]) >= 0
        level = float((drawn * self.costs).sum())
        return planned(self.policy, self.mean, cut(keys_of(self.mean), self.costs, level))

    def __call__(self, obs: Any, *, lanes: Any) -> Any:
        if not isinstance(self.policy, Turns):
            self.policy.plan = self.choose(obs[0])
        actions = self.policy(obs)
        self.spent.append(self.policy.plan.cost)
        self.chunk += 1
        return actions


def arms_of(args: argparse.Namespace) -> dict[str, Arm]:
    """Every arm, of one policy."""
    policy = tsad.load(args.policy, threads=1, precision="float32")
    training = policy.config["provenance"]["pruner"]
    held_out = set(training["of"]["held_out"])
    _, episodes = read_observations(args.data, policy)
    scores = [
        np.stack([policy._pruner_scores(obs) for obs in episode.obs])
        for episode in episodes
        if episode.name in held_out
    ]
    mean = np.concatenate(scores).mean(0)
    costs = np.asarray(policy.block_costs, np.float64)
    budget = (1 - training["training"]["sparsity"]) * costs.sum() * policy.num_inference_steps
    static = planned(policy, mean, cut(keys_of(mean), costs, budget))
    plans = {rule: static for rule in ARMS} | {"static": Plan.load(args.plan)}
    arms = {rule: Arm(policy, rule, plans[rule], scores) for rule in ARMS}
    for arm in arms.values():
        arm.mean = mean
    if args.mix:
        cheap, dear = (Plan.load(path) for path in args.mix)
        share = (budget / (costs.sum() * policy.num_inference_steps) - cheap.cost) / (
            dear.cost - cheap.cost
        )
        rules: dict[str, Any] = {"every": {"every": round(1 / share)}, "random": {"share": share}}
        for rule, options in rules.items():
            arms[rule] = Arm(Turns(policy, cheap, dear, **options), rule, cheap, scores)
    return arms


def summary(episodes: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table of all seeds that every arm has."""
    done = sorted(set.intersection(*(set(found) for found in episodes.values())), key=int)
    lines = [["rule", "episodes", "left out", "score", "success", "score - static", "95 %"]]
    static = np.array([episodes["static"][seed]["score"] for seed in done])
    for rule, found in episodes.items():
        some = [found[seed] for seed in done]
        score = np.array([one["score"] for one in some])
        interval = mean_interval(score - static)
        within = f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else ""
        lines.append(
            [
                rule,
                str(len(done)),
                f"{1 - np.mean([one['cost'] for one in some]):.2%}",
                f"{score.mean():.3f}",
                f"{np.mean([one['success'] for one in some]):.3f}",
                f"{(score - static).mean():+.3f}",
                within,
            ]
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="folder of tsad train-pruner")
    parser.add_argument("data", help="what it was trained on: the episodes held out are the others")
    parser.add_argument("--plan", required=True, metavar="FILE", help="the static plan")
    parser.add_argument("--mix", nargs=2, metavar="FILE", help="a sparser plan and a denser one")
    parser.add_argument("--seeds", type=int, default=200, metavar="N")
    parser.add_argument("--first-seed", type=int, default=23000, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    arms = arms_of(args)
    facts = {"policy": args.policy, "plan": Path(args.plan).name, "first_seed": args.first_seed}
    document = {"facts": facts, "episodes": {rule: {} for rule in arms}}
    if args.out.exists():
        document = read_any_json(args.out)
        if document["facts"] != facts:
            parser.error(f"argument --out: {args.out} is of {document['facts']}, not of {facts}")
    environment = sim.make("pusht")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for rule, arm in arms.items():
            kept = document["episodes"][rule]
            if str(seed) in kept:
                continue
            (episode,) = sim.rollouts(arm, [environment], [seed], on_start=arm.start)
            kept[str(seed)] = {
                "score": episode.score,
                "success": episode.success,
                "chunks": episode.chunks,
                "cost": float(np.mean(arm.spent)),
                "most": float(np.max(arm.spent)),
            }
        write_json(args.out, document)
    print(table(summary(document["episodes"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
