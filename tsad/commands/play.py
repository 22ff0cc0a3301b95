"""Playing the episodes of one trial: what `tsad eval` does once, and with --settings many times."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands import jobs, realtime
from tsad.commands.common import (
    argument,
    check_policy,
    configure,
    cpu_name,
    files_sha256,
    load_policy,
    playing,
    policy_source,
    setting_of,
    simulator_settings,
)
from tsad.commands.progress import EpisodeProgress
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.sim.results import Journal
    from tsad.sim.rollout import Episode


@dataclass(frozen=True)
class Trial:
    """What is played: a setting, and the conditions of the experiment.

    Args:
        setting: how the policy runs.
        noise: other noise in the same scenes, a number.
        realtime, latency: hertz and milliseconds, as of `tsad.commands.realtime`.
    """

    setting: Setting
    noise: int = 0
    realtime: float | None = None
    latency: float | None = None

    @classmethod
    def of(cls, words: Mapping[str, Any], source: str) -> Trial:
        """From arguments, or from a row of a settings file over them."""
        facts = {name: words[name] for name in ("noise", "realtime", "latency")}
        return cls(setting_of(words, source), **facts)

    def load(self, source: str, args: argparse.Namespace, *, name: str, lanes: int) -> SparsePolicy:
        """A policy that does as the setting says."""
        policy = load_policy(source, args, name=name, lanes=lanes, setting=self.setting)
        configure(policy, self.setting)
        return policy


def _settings(policy: SparsePolicy, args: argparse.Namespace, trial: Trial) -> dict[str, Any]:
    """All that decides an episode's result; a run resumes only where these are equal."""
    import tsad

    return {
        "tsad": tsad.__version__,
        **simulator_settings(args.simulator),
        "files_sha256": files_sha256(policy_source(args)),
        **trial.setting.key(policy),
        # only where it differs from the default, so that older results can be gone on with
        **({"noise": trial.noise} if trial.noise else {}),
    }


def _here(
    policy: SparsePolicy, simulator: str, lanes: int, todo: list[int], options: Mapping[str, Any]
) -> Generator[Episode, None, None]:
    """The episodes of `todo`, played by this process."""
    from tsad import sim

    environments = [sim.make(simulator) for _ in range(min(lanes, len(todo)))]
    try:
        yield from sim.rollouts(policy, environments, todo, **options)
    finally:
        for environment in environments:
            environment.close()


def _kept(journal: Journal) -> str:
    if journal.out is None:
        return "nothing was kept; --out FILE keeps episodes"
    if not journal.episodes:
        return "no episode was finished"
    return f"{len(journal.episodes)} episodes are kept; the same command with --resume goes on"


def _play(
    policy: SparsePolicy,
    args: argparse.Namespace,
    trial: Trial,
    todo: list[int],
    journal: Journal,
    workers: jobs.Workers | None,
    max_steps: int,
    label: str | None,
) -> None:
    """Play the seeds that are left, keeping each episode as it ends."""
    delay = journal.settings.get("realtime", {}).get("ticks", 0)
    options = {
        "n_action_steps": trial.setting.n_action_steps,
        "noise_stream": trial.noise,
        "delay": delay,
    }
    longest = -(-max_steps // max(trial.setting.n_action_steps or policy.n_action_steps, delay))
    done = args.seeds - len(todo)
    dense = policy.sparsity == 0
    plan = "dense" if dense else f"sparsity {percent(policy.sparsity)}"
    label = label or f"{args.simulator}, {plan}"
    progress = EpisodeProgress(args.seeds, label, longest=longest, done=done)
    if workers is None:
        options["on_chunk"] = lambda chunk: progress.chunks(len(chunk.seeds))
        played = _here(policy, args.simulator, args.lanes, todo, options)
    else:
        source = policy_source(args)
        played = jobs.play(
            workers, policy, source, args, trial.setting, todo, options, progress.chunks
        )
    with playing(lambda: _kept(journal)), contextlib.closing(played), progress:
        for episode in played:
            journal.append(episode)
            scores = [kept.score for kept in journal.episodes.values()]
            progress.episode(episode.chunks, f"score {sum(scores) / len(scores):.3f}")


def _document(
    policy: SparsePolicy,
    args: argparse.Namespace,
    setting: Setting,
    journal: Journal,
    seeds: list[int],
    workers: jobs.Workers | None,
) -> dict[str, Any]:
    """The whole result, as it is written and printed."""
    from tsad.sim import results

    asked = [journal.episodes[seed] for seed in seeds]
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    look = {"finished": finished, "first_seed": seeds[0], "last_seed": seeds[-1]}
    return {
        "format": results.FORMAT,
        "format_version": results.FORMAT_VERSION,
        "settings": journal.settings,
        # What may differ between runs of the same settings.
        "run": {
            "policy": policy_source(args),
            "plan": None if setting.plan is None else str(setting.plan),
            "lanes": policy.lanes,
            "threads": policy.threads,
            **({} if workers is None else workers._asdict()),
            "cpu": cpu_name(),
            "finished": finished,
        },
        # Every time that somebody was told: test seeds are to be looked at once.
        "looks": [*journal.looks, look],
        "summary": {"first_seed": seeds[0], "last_seed": seeds[-1], **results.summarise(asked)},
        "episodes": [asdict(journal.episodes[seed]) for seed in sorted(journal.episodes)],
    }


def percent(sparsity: float | None) -> str:
    """A sparsity in words."""
    return "of its own choice" if sparsity is None else f"{sparsity:.1%}"


def seeds_of(args: argparse.Namespace) -> list[int]:
    """The seeds that are asked for."""
    from tsad import sim

    first = sim.facts(args.simulator).first_seed if args.first_seed is None else args.first_seed
    return list(range(first, first + args.seeds))


def evaluate(
    args: argparse.Namespace,
    trial: Trial,
    out: Path | None,
    *,
    resume: bool,
    baseline: list[Any] | None = None,
    label: str | None = None,
) -> tuple[dict[str, Any], SparsePolicy]:
    """Play what is missing of one trial; the whole result, written to `out`, and the policy."""
    from tsad import sim
    from tsad.sim.results import Journal, compare

    seeds = seeds_of(args)
    # Everything that can be refused is refused here, before a file is touched or time is spent.
    source = policy_source(args)
    policy = trial.load(source, args, name="--policy", lanes=min(args.lanes, args.seeds))
    max_steps = check_policy(args, policy)
    with argument("--policy"):
        sim.check_executed(policy, trial.setting.n_action_steps)
    workers = jobs.workers_of(args, policy)
    settings = _settings(policy, args, trial) | realtime.settings(
        trial.realtime,
        trial.latency,
        None if args.overwrite else out,
        lambda: trial.load(source, args, name="--policy", lanes=1),
    )
    with argument("--out"):
        journal = Journal(out, settings, resume=resume, overwrite=args.overwrite)
    try:
        todo = [seed for seed in seeds if seed not in journal.episodes]
        if todo:
            _play(policy, args, trial, todo, journal, workers, max_steps, label)
        document = _document(policy, args, trial.setting, journal, seeds, workers)
        if baseline is not None:
            asked = [journal.episodes[seed] for seed in seeds]
            document["paired"] = {"baseline": args.baseline, **compare(asked, baseline)}
        journal.finish(document)
    finally:
        journal.close()
    return document, policy
