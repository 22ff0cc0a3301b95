"""What a guard sees, how soon, how often for nothing, and what it costs: Push-T, disturbed midway.

    tsad collect pusht --out recorded --first-seed 7000 --episodes 16 --sampler ddim --steps 16
    tsad fit pusht --data recorded --out guard --guard
    python bench/guard.py guard/guard.npz --episodes 50 --first-seed 20700 --out guard.json
    tsad fit pusht --data recorded --out audit --guard --audit --sampler ddim --steps 16 \\
        --spacing trailing --warm-start 8 --plan 10000000 --precision int16
    python bench/guard.py audit/guard.npz --watch --episodes 50 --first-seed 20720 --out watch.json

Every seed is played undisturbed and with each disturbance, which begins at a step of the episode
that follows from its seed: noise on the block's keypoints from then on, a block that is pushed
once, observations that stay as they are for two seconds or from then on, a single one that is
missing (the last is seen again). Each with the guard and without, along the same setting.

``detected``: alarms by the second chunk that sees it. ``delay``: steps from where it begins to the
first alarm after it, of those detected at all. ``false``: alarms of chunks before it, and of
undisturbed episodes. ``passes``: of a chunk on average; an alarm costs all steps. Push-T's goal is
no part of what this policy sees, so a goal that moves can't be told.

``--watch``: alarms are noted and nothing is done about them, so that the change of observation and
the audit of what is computed are told of the very same episodes: what either detects, and both.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import tsad
from tsad.guard import Bound
from tsad.setting import Setting
from tsad.sim.pusht import PushT
from tsad.sim.rollout import Chunk, rollouts

KINDS = ("none", "noise 2", "noise 4", "noise 8", "kick 30", "kick 60", "pause", "frozen", "drop")
EARLIEST, LATEST = 40, 120  # steps
PAUSE = 20  # steps, two seconds
ONE_PASS = Setting(
    sampler="ddim",
    num_inference_steps=16,
    timestep_spacing="trailing",
    warm_start=8,
    plan="10000000",
    precision="int16",
    lead=0.25,
    smoothing=True,
)


class Disturbed(PushT):
    """A table on which something happens at a step that follows from the seed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, _, amount = kind.partition(" ")
        self.amount = float(amount or 0)

    def reset(self, seed: int) -> Any:
        self._random = np.random.default_rng([seed, 18])
        self.begins, self.steps = int(self._random.integers(EARLIEST, LATEST)), 0
        self.seen = super().reset(seed)
        return self.seen

    def step(self, action: Any) -> Any:
        self.steps += 1
        since = self.steps - self.begins
        if self.kind == "kick" and since == 0:
            angle = self._random.uniform(0, 2 * np.pi)
            block = self._simulator.block
            push = self.amount * np.array([np.cos(angle), np.sin(angle)])
            block.position = tuple(np.clip(np.array(block.position) + push, 60, 450))
            self._simulator.space.reindex_shapes_for_body(block)
        step = super().step(action)
        obs = np.array(step.obs)
        if self.kind == "noise" and since >= 0:
            obs[:18] += self.amount * self._random.standard_normal(18, np.float32)
        stays = {"pause": PAUSE, "frozen": 10**9, "drop": 1}.get(self.kind, 0)
        if 0 <= since < stays:
            obs = self.seen
        self.seen = obs
        return step._replace(obs=obs)


WATCHERS = ("observation", "audit", "either")


def watch(policy: Any, kind: str, seeds: range) -> dict[str, Any]:
    """What each watcher says of the episodes of a kind: shares, and the episodes that they are."""
    table = Disturbed(kind)
    calm, disturbed = 0, 0
    false, detected = dict.fromkeys(WATCHERS, 0), dict.fromkeys(WATCHERS, 0)
    delays: dict[str, list[int]] = {name: [] for name in WATCHERS}
    for seed in seeds:
        at: list[int] = []
        said: dict[str, list[bool]] = {name: [] for name in WATCHERS}

        def note(chunk: Chunk, at: list[int] = at, said: dict[str, list[bool]] = said) -> None:
            stats = policy.stats["guard"]
            value, (out,) = stats["statistic"][0], policy._flagged
            seen = value is not None and not value <= stats["bound"]
            for name, alarm in zip(WATCHERS, (seen, out, seen or out), strict=True):
                said[name].append(alarm)
            at.append(table.steps)

        list(rollouts(policy, [table], [seed], on_chunk=note))
        begins = table.begins if kind != "none" else 10**9
        calm += sum(step < begins for step in at[1:])
        later = [i for i, step in enumerate(at) if step >= begins]
        disturbed += bool(later)
        for name, alarms in said.items():
            false[name] += sum(a for step, a in zip(at, alarms, strict=True) if step < begins)
            detected[name] += any(alarms[i] for i in later[:2])
            delays[name] += [at[i] - begins for i in later if alarms[i]][:1]
    table.close()
    return {
        name: {
            "episodes": len(seeds),
            "detected": detected[name] / disturbed if disturbed else None,
            "ever": len(delays[name]) / disturbed if disturbed else None,
            "delay": float(np.mean(delays[name])) if delays[name] else None,
            "false": false[name] / max(calm, 1),
        }
        for name in WATCHERS
    }


def watched(args: argparse.Namespace, seeds: range) -> None:
    """Report what is detected."""
    print("| disturbance |", " | ".join(f"{n}: detected | delay | false" for n in WATCHERS), "|")
    print("| --- |" + " ---: |" * 3 * len(WATCHERS))
    rows: dict[str, Any] = {}
    for kind in args.kinds:
        rows[kind] = watch(loaded(args.guard, plan=args.plan, restart=False), kind, seeds)
        cells = [
            f"{show(r['detected'], '.0%')} | {show(r['delay'], '.1f')} | {r['false']:.1%}"
            for r in rows[kind].values()
        ]
        print(f"| {kind} |", " | ".join(cells), "|", flush=True)
        write(args, seeds, rows)


def write(args: argparse.Namespace, seeds: range, rows: dict[str, Any]) -> None:
    """The report as far as it goes."""
    if args.out is not None:
        facts = {"seeds": [seeds[0], seeds[-1]], "machine": platform.machine(), "rows": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


@dataclass
class Found:
    """Of one kind: what happened in its episodes."""

    scores: list[float] = field(default_factory=list)
    chunks: int = 0
    alarms: int = 0
    calm: int = 0  # chunks compared before anything happens
    false: int = 0
    disturbed: int = 0
    detected: int = 0
    delays: list[int] = field(default_factory=list)

    def summary(self, passes: tuple[float, float]) -> dict[str, Any]:
        """For the report; ``passes`` of a chunk and of one after an alarm."""
        share = self.alarms / max(self.chunks, 1)
        return {
            "score": float(np.mean(self.scores)),
            "standard_error": float(np.std(self.scores, ddof=1) / np.sqrt(len(self.scores))),
            "episodes": len(self.scores),
            "detected": self.detected / self.disturbed if self.disturbed else None,
            "delay": float(np.mean(self.delays)) if self.delays else None,
            "false": self.false / max(self.calm, 1),
            "alarms": share,
            "passes": passes[0] + share * (passes[1] - passes[0]),
        }


def play(policy: Any, kind: str, seeds: range, guarded: bool) -> Found:
    """All seeds of a kind, one after another."""
    found, table = Found(), Disturbed(kind)
    for seed in seeds:
        at: list[int] = []  # the steps at which chunks begin
        alarms: list[bool] = []

        def note(chunk: Chunk, at: list[int] = at, alarms: list[bool] = alarms) -> None:
            at.append(table.steps)
            alarms.append(guarded and policy.alarms[0])

        (episode,) = rollouts(policy, [table], [seed], on_chunk=note)
        found.scores.append(episode.score)
        found.chunks += len(at)
        found.alarms += sum(alarms)
        begins = table.begins if kind != "none" else 10**9
        found.calm += sum(step < begins for step in at[1:])
        found.false += sum(a for step, a in zip(at, alarms, strict=True) if step < begins)
        later = [(step, a) for step, a in zip(at, alarms, strict=True) if step >= begins]
        if later:
            found.disturbed += 1
            found.detected += any(a for _, a in later[:2])
            found.delays += [step - begins for step, a in later if a][:1]
    table.close()
    return found


def loaded(guard: Path | Bound | None, *, plan: str | None = None, restart: bool = True) -> Any:
    """The setting's policy, with the guard or without."""
    setting = ONE_PASS if plan is None else replace(ONE_PASS, plan=plan)
    policy = tsad.load("pusht", threads=1, **setting.options())
    setting.apply(policy)
    return policy if guard is None else tsad.Guard(policy, guard, restart=restart)


def show(x: float | None, kind: str) -> str:
    """A cell."""
    return "" if x is None else f"{x:{kind}}"


def main() -> None:
    """Play and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("guard", type=Path, help="guard.npz of tsad fit --guard")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=20700)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--watch", action="store_true", help="only note alarms: see above")
    parser.add_argument("--plan", help="of --watch, a step mask of eight (default: 10000000)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    if args.watch:
        watched(args, seeds)
        return
    bound = Bound.read(args.guard)
    head = "| disturbance | detected | delay, steps | false | passes | score | without a guard |"
    print(head, "| --- |" + " ---: |" * 6, sep="\n")
    rows: dict[str, Any] = {}
    for kind in args.kinds:
        with_guard = play(loaded(args.guard), kind, seeds, True).summary((1.0, 16.0))
        without = play(loaded(None), kind, seeds, False).summary((1.0, 16.0))
        rows[kind] = {"guarded": with_guard, "plain": without}
        if bound.audit is not None:
            alone = loaded(replace(bound, audit=None))
            rows[kind]["without audit"] = play(alone, kind, seeds, True).summary((1.0, 16.0))
        g = with_guard
        print(
            f"| {kind} | {show(g['detected'], '.0%')} | {show(g['delay'], '.1f')} "
            f"| {g['false']:.1%} | {g['passes']:.2f} | {g['score']:.3f} | {without['score']:.3f} |",
            flush=True,
        )
        write(args, seeds, rows)


if __name__ == "__main__":
    main()
