"""Where reused values come from: what each direction of reuse is worth, searched with equal effort.

    tsad collect pusht --out recorded --episodes 24
    tsad plan measure pusht --data recorded --out effects.npz
    tsad collect pusht --out others --first-seed 5000 --episodes 15
    python bench/directions.py effects.npz recorded others --out directions.json

A cell that isn't computed takes the last computed value of its type (type), its own of an earlier
step (step), or the same cell's of an earlier chunk (rollout). For each of these, and for all three
together, this searches the best static plan of a sparsity: from the best plan that the tables of
effects foresee, by the same number of tried moves on the same recorded chunks, counted after the
first of each window. Then it runs what was found through whole recorded episodes that no search
saw. The first chunk of an episode is dense, and neither its cost nor its error counts. Errors are
as in plan_errors.py.

A single plan that reads a rollout never writes it again: the value is the first chunk's and gets as
old as the episode ("rollout, unbounded"). To bound its age, plans take turns: in a cycle of P
plans, each within the budget, every cell that is read is also computed, and a value is at most
P - 1 chunks old. With rollouts alone the shortest cycle computes every cell once in
1 / (1 - sparsity) chunks and has no choice left ("rollout, in turn", not searched). A cycle twice
as long ("rollout") needs half of its budget for that, and spends the other half where it matters.
All three directions: two plans that take turns, so a rollout is one chunk old.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
# Nothing is timed here, and threads that spin for each other crawl on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import measure  # noqa: E402
from plan_errors import check_apart, describe, load_policy, same_weights  # noqa: E402

import tsad  # noqa: E402
from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, Plan, planners  # noqa: E402
from tsad.checkpoint import write_atomically  # noqa: E402
from tsad.commands.common import plan_sha256, table  # noqa: E402
from tsad.commands.plan import pick  # noqa: E402
from tsad.plan import SOURCE_NAMES  # noqa: E402
from tsad.planners.base import budget, full, make_plan  # noqa: E402
from tsad.planners.search import ChunkError, Found, Search  # noqa: E402
from tsad.planners.segments import Segments  # noqa: E402
from tsad.sim.recording import Recorded, read_collection  # noqa: E402

DIRECTIONS = {
    "type": (REUSE_TYPE,),
    "step": (REUSE_STEP,),
    "rollout": (REUSE_ROLLOUT,),
    "rollout, unbounded": (REUSE_ROLLOUT,),
    "all": (REUSE_STEP, REUSE_TYPE, REUSE_ROLLOUT),
}
SPANS = ((1, 7), (8, 15), (16, 10_000))  # chunks after the first, reported apart


# ---- where searches begin: what the tables foresee


class TypePlanner:
    """The best static plan in which reused cells take the last computed value of their type.

    In execution order the cells of a type are a line, and what is computed cuts it into segments:
    the programme of `planners.EffectPlanner`, over lines in place of blocks. ``coherent``: the
    tables don't know how a segment's errors add up; all of one sign, or each for itself.
    """

    def __init__(self, effects: planners.Effects, types: Sequence[str], *, coherent: bool) -> None:
        self._effects, self._types, self._coherent = effects, list(types), coherent
        self._names = list(dict.fromkeys(types))
        self._segments = Segments(np.stack([self._losses(name) for name in self._names]))

    def _members(self, name: str) -> np.ndarray:
        return np.array([b for b, kind in enumerate(self._types) if kind == name])

    def _losses(self, name: str) -> np.ndarray:
        """(N, N + 1) of the N cells of a type: those between i and j take the value of i."""
        members, K = self._members(name), len(self._effects.skip)
        cells = [(k, b) for k in range(K) for b in members.tolist()]
        steps, blocks = (np.array(column) for column in zip(*cells, strict=True))
        loss = np.zeros((len(cells), len(cells) + 1))
        for i, (k, b) in enumerate(cells):
            own = self._effects.pair[b, k].astype(np.float64)  # b's value of step k, by age
            aged = np.where(blocks > b, steps, steps - 1)  # what `kind` knows of b
            each = np.nan_to_num(self._effects.kind[steps, blocks, b].astype(np.float64))
            each += np.where(aged > k, own[aged], 0.0)
            each = np.where(blocks == b, own[steps], each)
            each[: i + 1] = 0.0
            loss[i, 1:] = np.cumsum(np.sqrt(each)) ** 2 if self._coherent else np.cumsum(each)
        return loss

    def __call__(self, policy: Any, sparsity: float) -> Plan:
        sources = full(policy, REUSE_TYPE)
        members = [self._members(name) for name in self._names]
        costs = [int(policy.block_costs[blocks[0]]) for blocks in members]
        computed = self._segments.mask(self._segments.allot(costs, budget(policy, sparsity)))
        for blocks, line in zip(members, computed.T, strict=True):
            sources[:, blocks] = np.where(line.reshape(len(sources), -1), COMPUTE, REUSE_TYPE)
        return make_plan(policy, sources, sources, planner="type", sparsity=sparsity)


def rollouts_in_turn(policy: Any, sparsity: float) -> list[Plan]:
    """Every cell is computed once in a cycle, whole steps together, P apart."""
    turns = math.ceil(1 / (1 - sparsity) - 1e-9)
    steps = np.arange(policy.num_inference_steps)
    plans = []
    for turn in range(turns):
        sources = full(policy, REUSE_ROLLOUT)
        sources[steps % turns == turn] = COMPUTE
        plans.append(make_plan(policy, sources, None, planner="rollouts in turn"))
    return plans


def rollout_cycle(
    policy: Any, effects: planners.Effects, sparsity: float, turns: int | None
) -> list[Plan]:
    """The cells whose age costs most are always computed, the others once in a cycle of P plans.

    ``turns``: P; None: the others are never computed, one plan. What is older than the tables know
    counts as the oldest of them.
    """
    K, B = effects.skip.shape
    costs = np.tile(np.asarray(policy.block_costs, np.int64), K)
    known = effects.rollout.astype(np.float64)
    ages = np.minimum(np.arange(turns - 1 if turns else K), len(known) - 1)
    loss = np.nan_to_num(known[ages]).sum(axis=0).ravel()
    order = np.argsort(-loss / costs, kind="stable")
    spent = np.concatenate([[0], np.cumsum(costs[order])])
    rest = 0 if turns is None else (spent[-1] - spent) / turns + costs.max()
    fits = spent + rest <= budget(policy, sparsity)
    if not fits[0]:
        raise ValueError(f"turns: expected more than {turns}, every cell is computed once in them")
    always = order[: int(np.flatnonzero(fits).max())]
    others = np.setdiff1d(np.arange(K * B), always)  # in execution order
    whose = np.full(K * B, -1)
    if turns is not None:
        before = np.cumsum(costs[others]) - costs[others]
        whose[others] = before * turns // costs[others].sum()
    plans = []
    for turn in range(turns or 1):
        computed = whose == turn
        computed[always] = True
        sources = np.where(computed, np.uint8(COMPUTE), np.uint8(REUSE_ROLLOUT)).reshape(K, B)
        plans.append(make_plan(policy, sources, None, planner="rollouts by effects"))
    return plans


def starts(
    policy: Any,
    effects: planners.Effects,
    by_direction: dict[str, list[Any]],
    sparsity: float,
    error: ChunkError,
) -> dict[str, list[Plan]]:
    """The plans that each search begins with: of what the tables foresee, the least error."""
    turns = 2 * math.ceil(1 / (1 - sparsity) - 1e-9)
    candidates = {
        **{
            name: [[planner(policy, sparsity)] for planner in choice]
            for name, choice in by_direction.items()
        },
        "rollout": [rollout_cycle(policy, effects, sparsity, turns)],
    }
    found = {name: min(plans, key=error) for name, plans in candidates.items()}
    best = min(found.values(), key=error)
    found["all"] = best if len(best) > 1 else best * 2
    found["rollout, unbounded"] = rollout_cycle(policy, effects, sparsity, None)
    return found


# ---- searches, in rounds


def equal_rounds(
    searches: dict[str, Search], tries: int, size: int, minutes: float
) -> dict[str, Found]:
    """Let all of them try ``size`` moves in turn, until each tried ``tries`` or the time is up.

    Ctrl-C ends it, too; what all did in whole rounds counts.
    """
    end = time.monotonic() + 60 * minutes
    found = {name: search.run(math.inf, tries=0) for name, search in searches.items()}
    begun = {name: each.error for name, each in found.items()}
    done = 0
    while done < tries and time.monotonic() < end:
        number = min(size, tries - done)
        try:
            latest = {name: search.run(math.inf, tries=number) for name, search in searches.items()}
        except KeyboardInterrupt:
            print("ended by Ctrl-C; the last whole round counts", file=sys.stderr)
            break
        done += number
        for name, each in latest.items():
            each.begun = begun[name]
            each.tried, each.taken = done, each.taken + found[name].taken
            each.seconds += found[name].seconds
        found = latest
        errors = ", ".join(f"{name} {each.error**0.5:.4f}" for name, each in found.items())
        print(f"{done} of {tries} moves: {errors}", file=sys.stderr, flush=True)
    return found


# ---- the report


class Episodes:
    """Whole recorded episodes: the error of every chunk after the first, along a cycle of plans."""

    def __init__(self, policy: Any, episodes: Sequence[Recorded]) -> None:
        long = [episode for episode in episodes if len(episode.obs) > 1]
        self._errors = [
            ChunkError(policy, [(episode.obs, episode.noise())], counts_first=False)
            for episode in long
        ]
        self.lengths = [len(episode.obs) for episode in long]

    def __call__(self, plans: Sequence[Plan]) -> dict[str, Any]:
        """`describe` of all chunks, an interval of their rms over episodes, spans of chunks."""
        found = [error.chunks(plans, 0).ravel() for error in self._errors]
        number = np.concatenate([np.arange(1, len(each) + 1) for each in found])
        errors = np.concatenate(found)
        spans = {}
        for begin, end in SPANS:
            some = errors[(number >= begin) & (number <= end)]
            if len(some):
                last = min(end, int(number.max()))
                spans[f"{begin}-{last}"] = float(np.sqrt(some.mean()))
        sums = np.array([(each.sum(), len(each)) for each in found])
        drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
        totals = sums[drawn].sum(axis=1)
        interval = np.quantile(np.sqrt(totals[:, 0] / totals[:, 1]), (0.025, 0.975)).tolist()
        return {**describe(errors), "interval": interval, "rms_of_chunks": spans}


def ages(plans: Sequence[Plan], chunks: int) -> dict[str, float]:
    """How old the rollouts are that an episode of so many chunks reads: the oldest, the mean."""
    last = np.zeros(plans[0].sources.shape, int)  # the first chunk is dense
    read = []
    for chunk in range(1, chunks):
        sources = plans[(chunk - 1) % len(plans)].sources
        read.append((chunk - last)[sources == REUSE_ROLLOUT])
        last[sources == COMPUTE] = chunk
    found = np.concatenate([*read, [0]])
    return {"oldest": int(found.max()), "mean": float(found[:-1].mean()) if len(found) > 1 else 0.0}


def row(plans: Sequence[Plan], episodes: Episodes) -> dict[str, Any]:
    """What is reported of a plan, or of a cycle."""
    counts = np.mean([[plan.counts[name] for name in SOURCE_NAMES] for plan in plans], axis=0)
    return {
        "plans": len(plans),
        "sparsity": float(np.mean([plan.sparsity for plan in plans])),
        "least_sparsity": min(plan.sparsity for plan in plans),
        "cells": dict(zip(SOURCE_NAMES, counts.tolist(), strict=True)),
        "age": ages(plans, max(episodes.lengths)),
        "error": episodes(plans),
        "sha256": [plan_sha256(plan) for plan in plans],
    }


def report(document: dict[str, Any]) -> str:
    """The table as text: rms with its interval, the median chunk, the oldest value read."""
    lines = [["directions", "sparsity", "rms", "95 % interval", "median", "age"]]
    for asked, by_name in document["directions"].items():
        for name, found in by_name.items():
            error = found["error"]
            lines.append(
                [
                    name,
                    f"{float(asked):.0%}",
                    f"{error['rms']:.4f}",
                    "{:.4f} to {:.4f}".format(*error["interval"]),
                    f"{error['median']:.4f}",
                    str(found["age"]["oldest"]),
                ]
            )
    return table(lines)


# ---- the command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("effects", help="of tsad plan measure")
    parser.add_argument("data", type=Path, help="of tsad collect: the chunks to search with")
    parser.add_argument("others", type=Path, help="of tsad collect, other seeds: for the report")
    parser.add_argument("--policy", default="pusht")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--tries", type=int, default=300, metavar="N", help="moves of each search")
    parser.add_argument("--round", type=int, default=50, metavar="N", help="moves of one at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no round begins after")
    parser.add_argument("--windows", type=int, default=12, metavar="N", help="to search with")
    parser.add_argument("--length", type=int, default=8, metavar="C", help="chunks of a window")
    parser.add_argument("--lanes", type=int, default=2, help="windows run at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of windows and moves")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="keep the plans found there")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.windows, args.lanes, args.threads, args.round) < 1 or args.length < 2:
        parser.error("--windows, --lanes, --threads, --round: expected 1 or more; --length: 2")
    return args


def make_searches(
    args: argparse.Namespace, policy: Any, effects: planners.Effects, error: ChunkError
) -> dict[str, Search]:
    """By "direction sparsity"."""
    both, types = (True, False), policy.block_types
    by_direction: dict[str, list[Any]] = {
        "type": [TypePlanner(effects, types, coherent=each) for each in both],
        "step": [planners.EffectPlanner(effects, coherent=each) for each in both],
    }
    searches = {}
    for sparsity in args.sparsity:
        begin = starts(policy, effects, by_direction, sparsity, error)
        for name, allowed in DIRECTIONS.items():
            searches[f"{name} {sparsity:g}"] = Search(
                policy, begin[name], error, sparsity=sparsity, seed=args.seed, allowed=allowed
            )
    return searches


def search_and_report(
    args: argparse.Namespace,
    effects: planners.Effects,
    windows: list[Any],
    others: Sequence[Recorded],
) -> dict[str, Any]:
    """By sparsity and name: the rows."""
    facts = effects.metadata
    policy = load_policy(args, facts, args.lanes)
    error = ChunkError(policy, windows, counts_first=False)
    searches = make_searches(args, policy, effects, error)
    found = equal_rounds(searches, args.tries, args.round, args.minutes)
    if args.plans is not None:
        args.plans.mkdir(parents=True, exist_ok=True)
        for key, each in found.items():
            for turn, plan in enumerate(each.plans):
                plan.save(args.plans / f"{key.replace(', ', '-').replace(' ', '-')}-{turn}.npz")
    episodes = Episodes(load_policy(args, facts, 1), others)
    rows: dict[str, Any] = {}
    for sparsity in args.sparsity:
        by_name = rows.setdefault(f"{sparsity:g}", {})
        for name in DIRECTIONS:
            each = found[f"{name} {sparsity:g}"]
            by_name[name] = {
                **row(each.plans, episodes),
                "searched_rms": each.error**0.5,
                "begun_rms": each.begun**0.5,
                "tried": each.tried,
                "taken": each.taken,
            }
        by_name["rollout, in turn"] = row(rollouts_in_turn(policy, sparsity), episodes)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = arguments(argv)
    effects = planners.Effects.load(args.effects)
    facts = effects.metadata
    settings, episodes = read_collection(args.data)
    other_settings, others = read_collection(args.others)
    chosen = pick(episodes, args.windows * args.length, args.length, args.seed)
    chosen = [(each, part) for each, part in chosen if len(each.obs[part]) == args.length]
    chosen = chosen[: len(chosen) // args.lanes * args.lanes]
    seeds = sorted({episode.seed for episode, _ in chosen})
    tested = [episode.seed for episode in others]
    check_apart({args.effects: facts["seeds"], str(args.data): seeds}, tested)
    hashes = same_weights(args, facts, settings, other_settings)
    windows = [(episode.obs[part], episode.noise()[part]) for episode, part in chosen]
    document: dict[str, Any] = {
        "format": "tsad-directions",
        "date": time.strftime("%Y-%m-%d"),
        "tsad": tsad.__version__,
        "files_sha256": hashes,
        "sampler": facts["sampler"],
        "num_inference_steps": facts["num_inference_steps"],
        "effects": dict(facts),
        "search": {
            "windows": len(windows),
            "chunks_of_a_window": args.length,
            "seeds": seeds,
            "seed": args.seed,
        },
        "report": {
            "seeds": tested,
            "chunks": sum(len(episode.obs) - 1 for episode in others),
        },
        "machine": measure.machine(),
        "directions": search_and_report(args, effects, windows, others),
    }
    print(report(document))
    if args.out is not None:
        write_atomically(args.out, (json.dumps(document, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
