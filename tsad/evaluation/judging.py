"""What `tsad tune` makes of the rows it played: losses, the frontier, the choice of presets."""

from __future__ import annotations

import math
from typing import Any

from tsad.evaluation.sweep import Sweep, compare_rows, compare_success
from tsad.setting import MOVED
from tsad.sim.frontier import busy, fastest, frontier, seeds_needed

Rows = dict[str, Any]
FITTED_PASSES = (1, 2)
UNFITTED = frozenset(("rule", "guard", "fitted", "preset", *MOVED))
INT16 = 0.6  # of the time of float32: a guess, before anything is timed


def played(rows: Rows) -> bool:
    """Whether they have scores; else they were compared on observations alone."""
    return "score" in next(iter(rows.values()))


def choosable(sweep: Sweep, name: str) -> bool:
    """Whether a row is a setting to choose, and not another experiment."""
    return not sweep.setting(name).keys() & {"noise", "realtime", "latency"}


def shown_offline(sweep: Sweep, name: str) -> bool:
    """Whether single chunks may show what a row loses."""
    return choosable(sweep, name) and not sweep.setting(name).keys() & {
        "n_action_steps",
        "warm_start",
        *MOVED,
    }


def losses(sweep: Sweep, rows: Rows) -> dict[str, float]:
    """What each row loses: one with a lead against dense with a lead, nan if that is not there."""
    if not played(rows):
        return {name: row["distance"] for name, row in rows.items()}
    scores = {name: row["score"]["mean"] for name, row in rows.items()}
    led = sweep.dense_with_lead()
    judges = {False: scores[sweep.first], True: math.nan if led is None else scores[led]}
    return {name: judges[sweep.moved(name)] - score for name, score in scores.items()}


def best(sweep: Sweep, rows: Rows, n_action_steps: int) -> list[str]:
    """The settings without a lead that are best at their number of passes an action."""
    known = {}
    for name, row in rows.items():
        own = sweep.trials()[name]
        if row["passes"] is not None and choosable(sweep, name) and not sweep.moved(name):
            cost = row["passes"] * (INT16 if own.setting.precision == "int16" else 1.0)
            known[name] = cost / (own.setting.n_action_steps or n_action_steps)
    lost = losses(sweep, rows)
    return frontier(known, {name: lost[name] for name in known})


def few_passes(sweep: Sweep, rows: Rows) -> list[str]:
    """The settings of one pass and of two that lose least, of those that `tsad fit` can fit."""
    lost, found = losses(sweep, rows), []
    for count in FITTED_PASSES:
        names = [
            name
            for name, row in rows.items()
            if row["passes"] is not None
            and abs(row["passes"] - count) < 0.05
            and choosable(sweep, name)
            and not sweep.setting(name).keys() & UNFITTED
            and sweep.trials()[name].setting.planner != "pruner"
        ]
        found += [min(names, key=lambda name: lost[name])] if names else []
    return found


def compare(sweep: Sweep, rows: Rows, within: float) -> None:
    """Into the rows: paired differences to dense, of score and success; seeds needed.

    Of score to dense with a lead as well.

    Intervals are of all rows together.
    """
    baseline = next(iter(rows))
    compared, with_lead = compare_rows(sweep)
    for name, facts in ({} if with_lead is None else with_lead["rows"]).items():
        rows[name]["to_dense_with_lead"] = facts
    found = compared["rows"]
    scores = {n: {e.seed: e.score for e in episodes} for n, episodes in sweep.episodes.items()}
    for name, facts in found.items():
        pairs = [scores[name][seed] - scores[baseline][seed] for seed in scores[baseline]]
        rows[name] |= {**facts, "seeds_needed": seeds_needed(pairs, within)}
    for name, facts in compare_success(sweep)["rows"].items():
        rows[name]["success_difference"] = facts


def _interval(sweep: Sweep, rows: Rows, name: str) -> list[float]:
    """Of what a row loses, against the dense row that it is judged by."""
    if not sweep.moved(name):
        return list(rows[name]["simultaneous"])
    nothing = {"simultaneous": [0.0, 0.0] if name == sweep.dense_with_lead() else [-math.inf] * 2}
    return list(rows[name].get("to_dense_with_lead", nothing)["simultaneous"])


def _one_each(sweep: Sweep, rows: Rows, names: list[str]) -> list[str]:
    """Of settings that are the same but for a lead, which costs no time, the best of the names."""

    def worth(name: str) -> float:
        return float(rows[name]["score"]["mean"] if played(rows) else -rows[name]["distance"])

    return [
        name
        for name in names
        if name == max((other for other in names if other in sweep.alike(name)), key=worth)
    ]


def choose(
    sweep: Sweep, rows: Rows, within: float, *, enough: bool
) -> tuple[list[str], dict[str, str | None]]:
    """The frontier, and the settings that become presets; none of too few seeds."""
    names = [name for name in rows if choosable(sweep, name)]
    times = {name: busy(rows, name) for name in names}
    lost = {name: value for name, value in losses(sweep, rows).items() if name in times}
    if not enough:
        return frontier(times, lost), {}
    first = next(iter(rows))
    kept = _one_each(sweep, rows, [name for name in names if lost[name] <= within])
    chosen = {"fast": fastest(times, kept)}
    if played(rows):
        proven = [n for n in names if n == first or _interval(sweep, rows, n)[0] > -within]
        chosen["lossless"] = fastest(times, _one_each(sweep, rows, proven))
    dense = sweep.alike(first)
    better = {preset: None if name in dense else name for preset, name in chosen.items()}
    return frontier(times, lost), better
