"""Does a pruner that looks at the observation do better in closed loop? Paired seeds.

    tsad collect pusht --out recorded --first-seed 7012 --episodes 12 --sampler ddim --steps 16
    python bench/pruner_loop.py recorded --first-seed 22000 --seeds 500 --out loop.json \\
        --level ddpm-100-search-95.npz ddpm-100-search-97.npz ddpm-100-search-93.npz

Each level is a static plan and two others, a sparser and a denser one; every row costs on average
what that plan costs, its first chunk is as sparse as the others:

    static      the plan
    mean        the pruner's order of cells, by its mean scores: nothing is looked at
    pruner      its choice for each chunk: what leads by more than a price
    another's   what it would have chosen in an episode of the recording, chunk by chunk
    levels      costs of its choices in the recording, in random order, spent along the mean order
    random      the two other plans take turns at random (`tsad.planners.Turns`)

The price and the mean are those of the recorded chunks, episodes that the pruner was trained on
left out. Differences are the pruner's to each row, the intervals of a level hold together. FILE is
written after every seed; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
from tsad.plan import plan_sha256  # noqa: E402
from tsad.planners import Turns  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.sim.results import compare_all  # noqa: E402
from tsad.statistics import proportion_interval  # noqa: E402

OWN = "pruner"


class Arm:
    """A policy of one lane whose plan is chosen before each chunk, by ``choose(arm, obs)``."""

    lanes = 1

    def __init__(self, policy: Any, choose: Callable[[Arm, Any], Plan] | None) -> None:
        self.policy, self.choose = policy, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def start(self, seed: int, lane: int) -> None:
        """An episode begins."""
        self.seed, self.chunk, self.spent = seed, 0, []
        self.random = np.random.default_rng([seed, 18])

    def __call__(self, obs: Any, *, lanes: Any, **options: Any) -> Any:
        if self.choose is not None:
            self.policy.plan = self.choose(self, obs[0])
        actions = self.policy(obs, lanes=lanes, **options)
        self.spent.append(self.policy.plan.cost)
        self.chunk += 1
        return actions


def level_of(policy: Any, recorded: list[Any], plans: list[Plan]) -> tuple[float, dict[str, Arm]]:
    """The price and the rows of a level; ``recorded`` scores (C, K, B, 4), an episode each."""
    static, sparse, dense = plans
    every = np.concatenate(recorded)
    keys, mean = keys_of(every), every.mean(0)
    costs = np.asarray(policy.block_costs, np.float64)
    whole = float(costs.sum()) * policy.num_inference_steps
    price = float(keys[cut(keys, costs, len(keys) * static.cost * whole)].min())
    fixed = planned(policy, mean, cut(keys_of(mean), costs, static.cost * whole))

    def own(scores: Any) -> Plan:
        return planned(policy, scores, keys_of(scores) >= price)

    def another(arm: Arm, obs: Any) -> Plan:
        scores = recorded[arm.seed % len(recorded)]
        return own(scores[arm.chunk % len(scores)])

    def level(arm: Arm, obs: Any) -> Plan:
        cost = own(every[arm.random.integers(len(every))]).cost
        return planned(policy, mean, cut(keys_of(mean), costs, cost * whole))

    share = (static.cost - sparse.cost) / (dense.cost - sparse.cost)
    return price, {
        "static": Arm(policy, lambda arm, obs: static),
        "mean": Arm(policy, lambda arm, obs: fixed),
        OWN: Arm(policy, lambda arm, obs: own(policy._pruner_scores(obs))),
        "another's": Arm(policy, another),
        "levels": Arm(policy, level),
        "random": Arm(Turns(policy, sparse, dense, share=share), None),
    }


def play(arm: Arm, environment: Any, seed: int) -> dict[str, Any]:
    """An episode; costs as fractions of a dense chunk, the mean over its chunks and the largest."""
    (episode,) = sim.rollouts(arm, [environment], [seed], on_start=arm.start)
    return {
        "score": episode.score,
        "success": episode.success,
        "chunks": episode.chunks,
        "cost": float(np.mean(arm.spent)),
        "most": float(np.max(arm.spent)),
    }


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of a level, over the seeds that all its rows have."""
    done = sorted(set.intersection(*(set(found) for found in rows.values())), key=int)
    n = len(done)
    episodes = {
        name: [
            sim.Episode(int(seed), found[seed]["score"], found[seed]["success"], 0, 0, 0, 0)
            for seed in done
        ]
        for name, found in rows.items()
    }
    compared = {
        of: compare_all(episodes, OWN, of=of)["rows"] if n > 1 else {}
        for of in ("score", "success")
    }
    answer: dict[str, Any] = {}
    for name, found in rows.items():
        some = [found[seed] for seed in done]
        successes = sum(one["success"] for one in some)
        answer[name] = {
            "episodes": n,
            "cost": sum(one["cost"] * one["chunks"] for one in some)
            / sum(one["chunks"] for one in some),
            "most": max(one["most"] for one in some),
            "score": float(np.mean([one["score"] for one in some])),
            "success": successes / n,
            "success_interval95": proportion_interval(successes, n),
        }
        for of, found_of in compared.items():
            if name in found_of:
                answer[name][f"pruner_less_this_{of}"] = turned(found_of[name])
    return answer


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """A row's difference to the pruner as the pruner's to the row."""
    within = row["simultaneous"]
    return {
        "mean_difference": -row["mean_difference"],
        "standard_error": row["standard_error"],
        "simultaneous": None if within is None else [-within[1], -within[0]],
    }


def lines_of(found: dict[str, Any]) -> list[list[str]]:
    """The table for people."""
    beside = ["pruner - this", "95 % together"]
    lines = [["rule", "episodes", "cost", "most", "score", *beside, "success", *beside]]
    for name, row in found.items():
        line = [name, str(row["episodes"]), f"{row['cost']:.2%}", f"{row['most']:.2%}"]
        for of in ("score", "success"):
            turn = row.get(f"pruner_less_this_{of}")
            within = None if turn is None else turn["simultaneous"]
            line += [f"{row[of]:.3f}", "" if turn is None else f"{turn['mean_difference']:+.3f}"]
            line += ["" if within is None else f"{within[0]:+.3f} to {within[1]:+.3f}"]
        lines.append(line)
    return lines


def document_of(out: Path, facts: Any, levels: Any, parser: argparse.ArgumentParser) -> Any:
    """What was played before, of the same facts, or nothing yet."""
    if out.exists():
        document = read_any_json(out)
        if document["facts"] != facts:
            parser.error(f"argument --out: {out} is of {document['facts']}, not of {facts}")
        return document
    episodes = {level: {name: {} for name in rows} for level, rows in levels.items()}
    return {"facts": facts, "episodes": episodes}


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="recorded episodes")
    parser.add_argument("--policy", default="pusht", help="one that has a pruner (default: pusht)")
    parser.add_argument(
        "--level", nargs=3, action="append", required=True, metavar=("PLAN", "SPARSER", "DENSER")
    )
    parser.add_argument("--seeds", type=int, default=500, metavar="N")
    parser.add_argument("--first-seed", type=int, required=True, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    policy = tsad.load(args.policy, threads=1, precision="float32")
    provenance = policy.config["provenance"]
    trained = provenance["pruner"]["of"]["seeds"]
    _, found = read_observations(args.data, policy)
    episodes = [episode for episode in found if episode.name not in trained]
    scores = [np.stack([policy._pruner_scores(obs) for obs in one.obs]) for one in episodes]
    facts: dict[str, Any] = {
        "policy": args.policy,
        "sha256": provenance["sha256"],
        "recorded": [one.name for one in episodes],
        "first_seed": args.first_seed,
        "levels": {},
    }
    levels = {}
    for paths in args.level:
        plans = [Plan.load(path) for path in paths]
        name = f"{plans[0].sparsity:.0%}"
        price, levels[name] = level_of(policy, scores, plans)
        names = {Path(path).name: plan_sha256(one) for path, one in zip(paths, plans, strict=True)}
        facts["levels"][name] = {"plans": names, "price": price}
    document = document_of(args.out, facts, levels, parser)
    environment = sim.make("pusht")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for level, rows in levels.items():
            for name, arm in rows.items():
                kept = document["episodes"][level][name]
                if str(seed) not in kept:
                    kept[str(seed)] = play(arm, environment, seed)
        write_json(args.out, document)
    document["summary"] = {level: summary(rows) for level, rows in document["episodes"].items()}
    write_json(args.out, document)
    for level, rows in document["summary"].items():
        print(f"{level} left out\n{table(lines_of(rows))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
