"""What static plans of equal cost do to the actions, and how well that is foreseen.

    tsad collect pusht --out recorded --episodes 24
    tsad plan measure pusht --data recorded --out effects.npz
    tsad collect pusht --out others --first-seed 5000 --episodes 15
    python bench/plan_errors.py effects.npz others --out errors.json

Every plan runs on the same recorded observations, which neither the effects nor a search has seen,
with the same noise as the dense policy. Errors are differences of executed actions in the network's
units, where their range is -1 to 1 (for Push-T, 1 is about 245 pixels). `--plan NAME=FILE` adds
plans, e.g. of `tsad plan search`. Cells: what the tables foresee of a single reuse against what
the engine does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
# Nothing is timed here, and threads that spin for each other crawl on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import measure  # noqa: E402

import tsad  # noqa: E402
from tsad import REUSE_STEP, REUSE_TYPE, SKIP, Plan, planners  # noqa: E402
from tsad.commands.common import files_sha256, table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.plan import plan_sha256  # noqa: E402
from tsad.planners.search import ChunkError  # noqa: E402
from tsad.sim.frontier import rank_correlation  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.sim.recording import names_of, pick  # noqa: E402
from tsad.statistics import percentile  # noqa: E402

Name = int | str  # of an episode

RANDOM_PLANS = 3
DIAL = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
SINGLE = {"reuse_step": REUSE_STEP, "reuse_type": REUSE_TYPE, "skip": SKIP}


def describe(errors: np.ndarray) -> dict[str, float | None]:
    """Of mean squared errors per chunk: the root of their mean, and quantiles of their roots."""
    roots = np.sqrt(errors)
    return {
        "rms": float(np.sqrt(errors.mean())),
        "median": float(np.median(roots)),
        "p90": percentile(roots, 90),
        "max": float(roots.max()),
    }


def makers(effects: planners.Effects) -> dict[str, Any]:
    """The planners of the table, by name."""
    K, B = effects.skip.shape

    def random(seed: int) -> Any:
        return planners.Scores(np.random.default_rng(seed).random((K, B)), name="random")

    return {
        "effects": planners.EffectPlanner(effects),
        "effects, steps apart": planners.EffectPlanner(effects, coherent=False),
        "bac": planners.Bac(effects.alike),
        "bac, union of 3": planners.Bac(effects.alike, n_bu=3, errors=effects.changes),
        "bac, neighbours": planners.Bac(effects.alike, objective="paper"),
        "uniform": planners.uniform_sparse,
        **{f"random cells {seed}": random(seed) for seed in range(RANDOM_PLANS)},
    }


def run_plan(plan: Plan, error: ChunkError, effects: planners.Effects) -> dict[str, Any]:
    """One row of the table."""
    errors = np.concatenate([error.chunks(plan, group).ravel() for group in range(error.groups)])
    return {
        "sparsity": plan.sparsity,
        "cell_sparsity": plan.cell_sparsity,
        "passes": plan.cost * len(plan.sources),
        "foreseen_rms": effects.predict(plan) ** 0.5,
        "error": describe(errors),
        "sha256": plan_sha256(plan),
    }


def single_cells(
    policy: Any, effects: planners.Effects, error: ChunkError, count: int
) -> dict[str, Any]:
    """Foreseen and true mean squared error where one cell reuses, and their rank correlations."""
    K, B = effects.skip.shape
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        name = list(SINGLE)[i % len(SINGLE)]
        step, block = int(rng.integers(1, K)), int(rng.integers(B))
        sources = np.zeros((K, B), np.uint8)
        sources[step, block] = SINGLE[name]
        plan = Plan(sources, sources, types=policy.block_types, cost=policy.block_costs)
        true = float(error.chunks(plan, 0).mean())
        rows.append(
            {
                "source": name,
                "step": step,
                "block": block,
                "foreseen": effects.predict(plan),
                "true": true,
            }
        )
        print(f"cell {i + 1} of {count}", file=sys.stderr, end="\r", flush=True)
    by_source = {name: [row for row in rows if row["source"] == name] for name in SINGLE}
    by_source["all"] = rows
    correlation = {
        name: rank_correlation([r["foreseen"] for r in some], [r["true"] for r in some])
        for name, some in by_source.items()
        if len(some) > 2
    }
    return {"rank_correlation": correlation, "cells": rows}


def dial(policy: Any, effects: planners.Effects) -> dict[str, dict[str, float]]:
    """The sparsity of the cost that each planner makes, by what was asked of it."""
    most = 1 - 1 / policy.num_inference_steps  # step 0 is computed
    return {
        name: {f"{asked:g}": maker(policy, asked).sparsity for asked in DIAL if asked <= most}
        for name, maker in makers(effects).items()
    }


def report(document: dict[str, Any]) -> str:
    """The table as text: the root mean square, and the median chunk behind a slash."""
    asked = document["asked"]
    lines = [["plan", *(f"{sparsity:.0%}" for sparsity in asked)]]
    for name, by_sparsity in document["plans"].items():
        cells = [by_sparsity.get(f"{sparsity:g}") for sparsity in asked]
        lines.append(
            [
                name,
                *(
                    "" if c is None else f"{c['error']['rms']:.4f} / {c['error']['median']:.4f}"
                    for c in cells
                ),
            ]
        )
    return table(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("effects", help="of tsad plan measure")
    parser.add_argument(
        "data", type=Path, help="other episodes of tsad collect or tsad.Recorder, or arrays"
    )
    parser.add_argument("--policy", default="pusht")
    parser.add_argument("--observations", type=int, default=500, metavar="N")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.93, 0.95, 0.97])
    parser.add_argument("--plan", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--cells", type=int, default=60, metavar="N", help="single cells tried")
    parser.add_argument("--lanes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.observations, args.lanes, args.threads) < 1 or args.cells < 0:
        parser.error("--observations, --lanes, --threads, --cells: expected 1 or more (cells: 0)")
    if any("=" not in item for item in args.plan):
        parser.error("--plan: expected NAME=FILE")
    return args


def check_apart(seen: dict[str, list[Name]], tested: list[Name]) -> None:
    """ValueError if an observation was used to make what is tested."""
    for name, seeds in seen.items():
        both = [name for name in tested if name in set(seeds)]
        if both:
            raise ValueError(
                f"{name} was made with the episodes {both[:5]} that are to test it; record others "
                "(tsad collect --first-seed)"
            )


def same_weights(args: argparse.Namespace, *made: dict[str, Any]) -> dict[str, str]:
    """The hashes of the policy's files; ValueError if what was made is of others."""
    hashes = files_sha256(args.policy)
    if any(facts.get("files_sha256", hashes) != hashes for facts in made):  # arrays don't say
        raise ValueError("effects, observations and policy are not of the same weights")
    return hashes


def load_policy(
    args: argparse.Namespace, facts: dict[str, Any], lanes: int, precision: str = "float32"
) -> Any:
    """The policy with the sampler that the effects are of."""
    return tsad.load(
        args.policy,
        lanes=lanes,
        threads=args.threads,
        precision=precision,
        sampler=facts["sampler"],
        num_inference_steps=facts["num_inference_steps"],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = arguments(argv)
    effects = planners.Effects.load(args.effects)
    facts = effects.metadata
    given = {name: Plan.load(path) for name, _, path in (item.partition("=") for item in args.plan)}
    policy = load_policy(args, facts, args.lanes)
    settings, episodes = read_observations(args.data, policy)
    seen = {args.effects: facts["seeds"]}
    seen |= {name: plan.metadata.get("seeds", []) for name, plan in given.items()}
    check_apart(seen, names_of(episodes))
    hashes = same_weights(args, facts, settings)
    chosen = pick(episodes, args.observations, 1, 0)
    windows = [(episode.obs[part], episode.noise(policy, part)) for episode, part in chosen]
    windows = windows[: len(windows) // args.lanes * args.lanes]
    error = ChunkError(policy, windows)
    document: dict[str, Any] = {
        "format": "tsad-plan-errors",
        "date": time.strftime("%Y-%m-%d"),
        "tsad": tsad.__version__,
        "files_sha256": hashes,
        "sampler": facts["sampler"],
        "num_inference_steps": facts["num_inference_steps"],
        "effects": dict(facts),
        "observations": len(windows),
        "seeds": names_of([episode for episode, _ in chosen]),
        "machine": measure.machine(),
        "asked": args.sparsity,
        "plans": {},
    }
    for name, maker in makers(effects).items():
        for sparsity in args.sparsity:
            row = run_plan(maker(policy, sparsity), error, effects)
            document["plans"].setdefault(name, {})[f"{sparsity:g}"] = row
            print(f"{name}, {sparsity:.0%}: {row['error']}", file=sys.stderr, flush=True)
    for name, plan in given.items():
        row = run_plan(plan, error, effects)
        nearest = min(args.sparsity, key=lambda asked: abs(asked - row["sparsity"]))
        document["plans"].setdefault(name.partition(":")[0], {})[f"{nearest:g}"] = row
        print(f"{name}: {row['error']}", file=sys.stderr, flush=True)
    rows = [row for by_sparsity in document["plans"].values() for row in by_sparsity.values()]
    document["whole_plans"] = {
        "rank_correlation": rank_correlation(
            [row["foreseen_rms"] for row in rows], [row["error"]["rms"] for row in rows]
        ),
        "plans": len(rows),
    }
    document["dial"] = dial(policy, effects)
    document["single_cells"] = single_cells(policy, effects, error, args.cells)
    print(report(document))
    lines = [["sparsity asked", *(f"{float(a):.0%}" for a in document["dial"]["uniform"])]]
    for name, made in document["dial"].items():
        lines.append([name, *(f"{value:.3%}" for value in made.values())])
    print(table(lines))
    print(f"whole plans: {document['whole_plans']}")
    print(f"single cells: {document['single_cells'].get('rank_correlation')}")
    if args.out is not None:
        write_json(args.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
