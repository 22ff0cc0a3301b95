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
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_atomically, write_json  # noqa: E402
from tsad.plan import SOURCE_NAMES, plan_sha256  # noqa: E402
from tsad.planners.base import budget, full, make_plan  # noqa: E402
from tsad.planners.search import ChunkError, Found, Search  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.sim.recording import (  # noqa: E402
    Recorded,
    names_of,
    pick,  # noqa: E402
)
from tsad.statistics import LEAST_EPISODES  # noqa: E402

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
    the programme of `planners.EffectPlanner`, over lines in place of blocks, for one price per
    cost. ``coherent``: the tables don't know how a segment's errors add up; all of one sign, or
    each for itself.
    """

    def __init__(self, effects: planners.Effects, types: Sequence[str], *, coherent: bool) -> None:
        self._effects, self._types, self._coherent = effects, list(types), coherent
        self._names = list(dict.fromkeys(types))
        self._loss = [self._losses(name) for name in self._names]

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

    def _computed(self, policy: Any, price: float) -> np.ndarray:
        """The cells (K, B) of least loss, a cost of 1 counting as ``price``."""
        computed = np.zeros((len(self._effects.skip), len(self._types)), bool)
        for name, loss in zip(self._names, self._loss, strict=True):
            members = self._members(name)
            fee = price * int(policy.block_costs[members[0]])
            steps, order = np.divmod(least_segments(loss, fee), len(members))
            computed[steps, members[order]] = True
        return computed

    def __call__(self, policy: Any, sparsity: float) -> Plan:
        most = budget(policy, sparsity)

        def fits(price: float) -> bool:
            return bool(self._computed(policy, price).sum(axis=0) @ policy.block_costs <= most)

        low, high = 0.0, 1e-12
        while not fits(high):
            low, high = high, high * 8
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        computed = self._computed(policy, high)
        sources = np.where(computed, np.uint8(COMPUTE), np.uint8(REUSE_TYPE))
        return make_plan(policy, sources, sources, planner="type", sparsity=sparsity)


def least_segments(loss: np.ndarray, fee: float) -> list[int]:
    """Where the segments begin that lose least, each with a fee; ``loss`` (N, N + 1)."""
    best, begin = np.zeros(len(loss) + 1), np.zeros(len(loss) + 1, int)
    for end in range(1, len(loss) + 1):
        candidates = best[:end] + loss[:end, end]
        begin[end] = candidates.argmin()
        best[end] = candidates[begin[end]] + fee
    begins, end = [], len(loss)
    while end:
        end = int(begin[end])
        begins.append(end)
    return begins[::-1]


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
    if not effects.knows_rollouts:
        raise ValueError("effects: of single observations; measure them on successive chunks")
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


class State:
    """What all searches reached after the last whole round, kept in a file if there is a path.

    Raises ``ValueError`` if the file is of other settings, or lacks one of the searches.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], keys: Sequence[str]) -> None:
        self.path, self.settings, self.tried = path, settings, 0
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        kept = json.loads(path.read_text())
        lacking = sorted(set(keys) - set(kept["searches"]))
        if kept["settings"] != settings or lacking:
            raise ValueError(
                f"--state: {path} is of other settings or lacks {lacking}: expected {settings}, "
                f"got {kept['settings']}; name another file"
            )
        self.tried = kept["tried"]
        self.rows = {key: kept["searches"][key] for key in keys}

    def plans(self, policy: Any, key: str) -> list[Plan]:
        """The plans of a search, from the digits of their sources."""
        shape = (policy.num_inference_steps, len(policy.blocks))
        cycle = [
            np.array(list(digits), np.uint8).reshape(shape) for digits in self.rows[key]["plans"]
        ]
        dense_first = len(cycle) > 1 or (cycle[0] == REUSE_ROLLOUT).any()
        return [make_plan(policy, each, None if dense_first else each) for each in cycle]

    def update(self, tried: int, found: dict[str, Found]) -> None:
        """After a whole round of all searches."""
        for key, each in found.items():
            row = self.rows.setdefault(key, {"begun_rms": each.begun**0.5, "taken": 0})
            row["searched_rms"] = each.error**0.5
            row["taken"] += each.taken
            row["plans"] = ["".join(map(str, plan.sources.ravel())) for plan in each.plans]
        self.tried += tried
        if self.path is not None:
            kept = {"settings": self.settings, "tried": self.tried, "searches": self.rows}
            write_atomically(self.path, json.dumps(kept).encode())
        errors = ", ".join(f"{key} {row['searched_rms']:.4f}" for key, row in self.rows.items())
        print(f"{self.tried} moves: {errors}", file=sys.stderr, flush=True)


def equal_rounds(
    searches: dict[str, Search], state: State, tries: int, size: int, minutes: float
) -> None:
    """Let all of them try ``size`` moves in turn, until each tried ``tries`` or the time is up.

    Ctrl-C ends it, too; what all did in whole rounds counts.
    """
    end = time.monotonic() + 60 * minutes
    try:
        if not state.rows:
            state.update(0, {key: each.run(math.inf, tries=0) for key, each in searches.items()})
        while state.tried < tries and time.monotonic() < end:
            number = min(size, tries - state.tried)
            found = {key: each.run(math.inf, tries=number) for key, each in searches.items()}
            state.update(number, found)
    except KeyboardInterrupt:
        if not state.rows:
            raise
        print("ended by Ctrl-C; the last whole round counts", file=sys.stderr)


# ---- the report


class Episodes:
    """Whole recorded episodes: the error of every chunk after the first, along a cycle of plans."""

    def __init__(self, policy: Any, episodes: Sequence[Recorded]) -> None:
        long = [episode for episode in episodes if len(episode.obs) > 1]
        self._errors = [
            ChunkError(
                policy,
                [(episode.obs, episode.noise(policy))],
                counts_first=False,
            )
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
        roots = np.sqrt(totals[:, 0] / totals[:, 1])
        known = len(sums) >= LEAST_EPISODES
        interval = np.quantile(roots, (0.025, 0.975)).tolist() if known else None
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
                    "{:.4f} to {:.4f}".format(*error["interval"]) if error["interval"] else "",
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
    parser.add_argument(
        "--precision",
        choices=("float32", "int16"),
        default="float32",
        help="of the search; the report is float32's",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of windows and moves")
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="keep the searches there, and go on with them"
    )
    parser.add_argument("--episodes", type=int, metavar="N", help="of the report (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.windows, args.lanes, args.threads, args.round) < 1 or args.length < 2:
        parser.error("--windows, --lanes, --threads, --round: expected 1 or more; --length: 2")
    return args


def make_searches(
    args: argparse.Namespace,
    policy: Any,
    effects: planners.Effects,
    error: ChunkError,
    state: State,
) -> dict[str, Search]:
    """By "direction sparsity", from where they were."""
    both, types = (True, False), policy.block_types
    by_direction: dict[str, list[Any]] = {}
    if not state.rows:
        by_direction = {
            "type": [TypePlanner(effects, types, coherent=each) for each in both],
            "step": [planners.EffectPlanner(effects, coherent=each) for each in both],
        }
    searches = {}
    for sparsity in args.sparsity:
        if state.rows:
            begin = {name: state.plans(policy, f"{name} {sparsity:g}") for name in DIRECTIONS}
        else:
            begin = starts(policy, effects, by_direction, sparsity, error)
        for name, allowed in DIRECTIONS.items():
            searches[f"{name} {sparsity:g}"] = Search(
                policy,
                begin[name],
                error,
                sparsity=sparsity,
                seed=args.seed + state.tried,  # other moves than before
                allowed=allowed,
            )
    return searches


def search_and_report(
    args: argparse.Namespace,
    effects: planners.Effects,
    chosen: Sequence[tuple[Recorded, slice]],
    others: Sequence[Recorded],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """By sparsity and name: the rows."""
    facts = effects.metadata
    policy = load_policy(args, facts, args.lanes, args.precision)
    error = ChunkError(
        policy,
        [(episode.obs[part], episode.noise(policy, part)) for episode, part in chosen],
        reference=load_policy(args, facts, args.lanes),
        counts_first=False,
    )
    keys = [f"{name} {sparsity:g}" for sparsity in args.sparsity for name in DIRECTIONS]
    state = State(args.state, settings, keys)
    if state.tried < args.tries or not state.rows:
        searches = make_searches(args, policy, effects, error, state)
        equal_rounds(searches, state, args.tries, args.round, args.minutes)
    episodes = Episodes(load_policy(args, facts, 1), others)
    rows: dict[str, Any] = {}
    for sparsity in args.sparsity:
        by_name = rows.setdefault(f"{sparsity:g}", {})
        for name in DIRECTIONS:
            key = f"{name} {sparsity:g}"
            facts_of_search = {k: v for k, v in state.rows[key].items() if k != "plans"}
            by_name[name] = {
                **row(state.plans(policy, key), episodes),
                **facts_of_search,
                "tried": state.tried,
            }
            print(f"{key}: {by_name[name]['error']}", file=sys.stderr, flush=True)
        by_name["rollout, in turn"] = row(rollouts_in_turn(policy, sparsity), episodes)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = arguments(argv)
    effects = planners.Effects.load(args.effects)
    facts = effects.metadata
    alone = load_policy(args, facts, 1)
    settings, episodes = read_observations(args.data, alone)
    other_settings, others = read_observations(args.others, alone)
    others = others[: args.episodes]
    chosen = pick(episodes, args.windows * args.length, args.length, args.seed)
    chosen = [(each, part) for each, part in chosen if len(each.obs[part]) == args.length]
    chosen = chosen[: len(chosen) // args.lanes * args.lanes]
    seeds, tested = names_of([episode for episode, _ in chosen]), names_of(others)
    check_apart({args.effects: facts["seeds"], str(args.data): seeds}, tested)
    if not chosen or all(len(episode.obs) == 1 for episode in others):
        raise ValueError(
            f"data, others: expected {args.lanes} windows (--lanes) of {args.length} successive "
            "chunks (--length), and episodes of two; record longer ones"
        )
    hashes = same_weights(args, facts, settings, other_settings)
    search_settings = {
        "windows": len(chosen),
        "chunks_of_a_window": args.length,
        "seeds": seeds,
        "seed": args.seed,
        "precision": args.precision,
    }
    document: dict[str, Any] = {
        "format": "tsad-directions",
        "date": time.strftime("%Y-%m-%d"),
        "tsad": tsad.__version__,
        "files_sha256": hashes,
        "sampler": facts["sampler"],
        "num_inference_steps": facts["num_inference_steps"],
        "effects": dict(facts),
        "search": search_settings,
        "report": {
            "seeds": tested,
            "chunks": sum(len(episode.obs) - 1 for episode in others),
        },
        "machine": measure.machine(),
        "directions": search_and_report(args, effects, chosen, others, search_settings),
    }
    print(report(document))
    if args.out is not None:
        write_json(args.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
