"""`tsad eval`: closed-loop score of a policy in a simulator."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands import jobs, realtime
from tsad.commands.common import (
    OBSERVATIONS,
    Formatter,
    UsageError,
    add_overwrite,
    add_policy_options,
    add_preset,
    add_simulator,
    add_warm_start,
    argument,
    check_policy,
    check_simulator,
    cpu_name,
    files_sha256,
    load_policy,
    natural,
    plan_of,
    plan_sha256,
    planner_name,
    playing,
    policy_source,
    positive_int,
    sampler_name,
    seed_range,
    set_sparsity,
    simulator_settings,
    sparsity,
    too_few,
    use_preset,
)
from tsad.commands.progress import EpisodeProgress

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.sim.results import Journal
    from tsad.sim.rollout import Episode

DESCRIPTION = f"""\
Play seeded episodes in a simulator and report score and success with their errors.

An episode's result depends on its seed and on the policy's settings alone: not on --lanes, not on
--threads, --jobs or the order. So two runs over the same seeds are paired, whatever their sparsity.
With --out every finished episode is on disk at once, and --resume goes on after an interruption.

--settings FILE plays many settings over the same seeds: a JSON list of objects with a "name" and
any of "sampler", "steps", "spacing", "sparsity", "planner", "plan", "precision", "n_action_steps",
"noise", "preset", "realtime", "latency", "warm_start". Then --out is a folder with a file per
setting; the same command goes on with what is missing. The first is the baseline of all; the
intervals hold for all rows together.

{OBSERVATIONS}

{realtime.HELP}"""

EPILOG = """\
examples:
  tsad eval pusht --seeds 50                                       dense, the bundled policy
  tsad eval pusht --seeds 500 --out dense.json                     kept, and resumable
  tsad eval pusht --seeds 500 --out sparse.json --sparsity 0.9 --baseline dense.json
  tsad eval pusht --policy runs/mine --sampler ddim --steps 8 --lanes 4
  tsad eval pusht --plan plan.npz --json | jq .summary.score
  tsad eval pusht --sampler ddim --steps 16 --warm-start 4 --n-action-steps 4
  tsad eval pusht --seeds 500 --preset fast                        a preset of its folder
  tsad eval pusht --seeds 500 --settings sweep.json --out sweep    many settings, one table
  tsad eval pusht --realtime 50 --n-action-steps 4                 a robot that doesn't wait
  tsad eval pusht --seeds 500 --out dense.json --jobs 8            in eight processes
  tsad eval --simulator robot:make --policy runs/mine              robot.py, a simulator of your own
  tsad eval pusht --seeds 500 --out dense.json --ray               on a Ray cluster"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "eval",
        help="score a policy in a simulator",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    add_simulator(parser)
    parser.add_argument(
        "--seeds", type=positive_int, default=50, metavar="N", help="episodes (default: 50)"
    )
    parser.add_argument(
        "--first-seed",
        type=natural,
        metavar="S",
        help="seeds S to S+N-1 (default: the task's test seeds, from 100000 for pusht)",
    )
    parser.add_argument(
        "--lanes",
        type=positive_int,
        default=1,
        metavar="L",
        help="environments stepped together (default: 1); never changes the results",
    )
    choice = parser.add_argument_group("the plan (default: dense)")
    choice.add_argument(
        "--sparsity",
        type=sparsity,
        metavar="S",
        help="share of the cost not computed, 0 to 1 (with --planner pruner: its own choice)",
    )
    choice.add_argument("--planner", metavar="NAME", help="who decides: uniform or pruner")
    choice.add_argument(
        "--plan",
        metavar="FILE",
        help="a fixed plan instead of a planner: npz, or a step mask such as 10000010",
    )
    add_preset(choice)
    choice.add_argument("--settings", metavar="FILE", help="many settings, JSON; see above")
    parser.add_argument(
        "--n-action-steps",
        type=positive_int,
        metavar="N",
        help="actions executed of each chunk (default: all that the policy returns)",
    )
    parser.add_argument(
        "--noise",
        type=natural,
        default=0,
        metavar="N",
        help="other noise in the same scenes, a number (default: 0)",
    )
    realtime.add_options(parser)
    add_warm_start(parser)
    jobs.add_options(parser)
    add_policy_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write the results, per seed, as JSON")
    output.add_argument("--resume", action="store_true", help="go on with the episodes in --out")
    add_overwrite(output)
    output.add_argument(
        "--baseline", metavar="FILE", help="results of another run: report paired differences"
    )
    output.add_argument(
        "--observations",
        metavar="DATA",
        help="with --settings: report the error of actions on these; see above",
    )
    output.add_argument(
        "--draws",
        type=positive_int,
        default=1,
        metavar="M",
        help="of noise for each of these; 2 or more compare distributions (default: 1)",
    )
    output.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


def _check_arguments(args: argparse.Namespace) -> Path | None:
    """What argparse cannot see; returns the output path."""
    from tsad.files import output_file
    from tsad.sim.results import check_free

    check_simulator(args)
    if args.plan is not None and (args.sparsity is not None or args.planner is not None):
        raise UsageError("argument --plan: a fixed plan leaves nothing to --sparsity or --planner")
    if args.observations is not None and args.settings is None:
        raise UsageError("argument --observations: needs --settings FILE")
    if args.draws > 1 and args.observations is None:
        raise UsageError("argument --draws: needs --observations DATA")
    realtime.check(args, "--latency")
    if args.resume and args.overwrite:
        raise UsageError("argument --resume: not together with --overwrite")
    if args.out is None:
        if args.resume or args.overwrite:
            option = "--resume" if args.resume else "--overwrite"
            raise UsageError(f"argument {option}: needs --out FILE")
        return None
    with argument("--out"):
        out = output_file(args.out, overwrite=True)
        check_free(out, resume=args.resume, overwrite=args.overwrite)
    return out


def _read_baseline(path: str | None, seeds: list[int]) -> list[Any] | None:
    """The baseline's episodes, or None; refused at once if no seed is common."""
    from tsad.sim.results import ResultsError, read_results

    if path is None:
        return None
    with argument("--baseline"):
        episodes = read_results(Path(path))[1]
        if not {episode.seed for episode in episodes} & set(seeds):
            raise ResultsError(
                f"{path} has none of the seeds {seeds[0]} to {seeds[-1]}; use its --first-seed"
            )
    return episodes


def configure(policy: SparsePolicy, args: argparse.Namespace) -> dict[str, Any]:
    """Set planner, sparsity or plan; returns the settings that say so."""
    if args.plan is not None:
        plan = plan_of(args.plan, "--plan", policy)
        with argument("--plan"):
            policy.plan = plan
        return {"planner": "file", "sparsity": plan.sparsity, "plan_sha256": plan_sha256(plan)}
    if args.planner is not None:
        with argument("--planner"):
            policy.planner = args.planner
    if args.planner == "pruner" and args.sparsity is None:
        policy.sparsity = None  # its own choice
    else:
        set_sparsity(policy, args.sparsity or 0.0)
    # At sparsity 0 every planner is dense: one name, so that such runs can go on with each other.
    planner = "dense" if policy.sparsity == 0 else planner_name(policy)
    return {"planner": planner, "sparsity": policy.sparsity, "plan_sha256": None}


def _settings(policy: SparsePolicy, source: str, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides an episode's result; a run resumes only where these are equal."""
    import tsad
    from tsad.warm import WarmPolicy

    settings: dict[str, Any] = {
        "tsad": tsad.__version__,
        **simulator_settings(args.simulator),
        "files_sha256": files_sha256(source),
        "sampler": policy.config["scheduler"]["type"],
        "num_inference_steps": policy.config["scheduler"]["num_inference_steps"],
        "device": str(policy.device),
        "precision": policy.precision,
        "backend": policy.backend,
        **configure(policy, args),
    }
    # Only where they differ from the default, so that older results can be gone on with.
    if args.n_action_steps not in (None, policy.n_action_steps):
        settings["n_action_steps"] = args.n_action_steps
    if args.noise:
        settings["noise"] = args.noise
    if isinstance(policy, WarmPolicy):
        settings["warm_start"] = policy.num_inference_steps
    if args.spacing is not None:
        settings["timestep_spacing"] = args.spacing
    return settings


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
    todo: list[int],
    journal: Journal,
    workers: jobs.Workers | None,
    max_steps: int,
) -> None:
    """Play the seeds that are left, keeping each episode as it ends."""
    delay = journal.settings.get("realtime", {}).get("ticks", 0)
    options = {
        "n_action_steps": args.n_action_steps,
        "noise_stream": args.noise,
        "delay": delay,
    }
    longest = -(-max_steps // max(args.n_action_steps or policy.n_action_steps, delay))
    done = args.seeds - len(todo)
    dense = policy.sparsity == 0
    plan = "dense" if dense else f"sparsity {_percent(policy.sparsity)}"
    label = getattr(args, "label", None) or f"{args.simulator}, {plan}"  # of a sweep's row
    progress = EpisodeProgress(args.seeds, label, longest=longest, done=done)
    if workers is None:
        options["on_chunk"] = lambda chunk: progress.chunks(len(chunk.seeds))
        played = _here(policy, args.simulator, args.lanes, todo, options)
    else:
        source = policy_source(args)
        played = jobs.play(workers, policy, source, args, todo, options, progress.chunks)
    with playing(lambda: _kept(journal)), contextlib.closing(played), progress:
        for episode in played:
            journal.append(episode)
            scores = [kept.score for kept in journal.episodes.values()]
            progress.episode(episode.chunks, f"score {sum(scores) / len(scores):.3f}")


def _document(
    policy: SparsePolicy,
    args: argparse.Namespace,
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
            "plan": args.plan,
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


def _sure(row: Mapping[str, Any], n: int, what: str) -> str:
    """How far a mean of ``n`` is known, in words that follow it."""
    interval = row["interval95"]
    if interval is None:
        return f", {too_few(n, what)}"
    return (
        f" +- {row['standard_error']:.3f} (standard error), "
        f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}"
    )


def _percent(sparsity: float | None) -> str:
    return "of its own choice" if sparsity is None else f"{sparsity:.1%}"


def _beside(run: Mapping[str, Any]) -> str:
    """What else went on while the chunks of a run were timed."""
    lanes, notes = run["lanes"], []
    if lanes > 1:
        notes.append(f"{lanes} lanes: a lane's share of a call")
    if "jobs" in run:
        notes.append(f"{run['jobs']} processes at a time")
    return f" ({'; '.join(notes)})" if notes else ""


def _report(document: dict[str, Any], policy: SparsePolicy) -> str:
    summary, settings, run_ = document["summary"], document["settings"], document["run"]
    score, success, times = summary["score"], summary["success"], summary["chunk_ms"]
    n = summary["episodes"]
    count, what = round(success["mean"] * n), f"episode{'s' if n > 1 else ''}"
    lines = [
        f"{settings['simulator']}, {seed_range([summary['first_seed'], summary['last_seed']])}, "
        f"policy {run_['policy']} ({sampler_name(policy)}), planner {settings['planner']}, "
        f"sparsity {_percent(settings['sparsity'])}",
        f"score    {score['mean']:.3f}{_sure(score, n, what)}",
        f"success  {success['mean']:.3f} ({count} of {n}){_sure(success, n, what)}",
        f"chunk    {times['mean']:.2f} ms mean, {times['max']:.2f} ms largest, over "
        f"{summary['chunks']} chunks{_beside(run_)}",
        *realtime.report(settings),
    ]
    if "paired" in document:
        paired = document["paired"]
        lines.append(f"against {paired['baseline']}, {paired['pairs']} pairs of equal seed:")
        for name in ("score", "success"):
            row = paired[name]
            lines.append(
                f"{name:<8} {row['mean_difference']:+.3f}{_sure(row, paired['pairs'], 'pairs')}"
            )
    return "\n".join(lines)


def _paired(args: argparse.Namespace, episodes: list[Any], baseline: list[Any]) -> dict[str, Any]:
    from tsad.sim.results import compare

    return {"baseline": args.baseline, **compare(episodes, baseline)}


def seeds_of(args: argparse.Namespace) -> list[int]:
    """The seeds that are asked for."""
    from tsad import sim

    first = sim.facts(args.simulator).first_seed if args.first_seed is None else args.first_seed
    return list(range(first, first + args.seeds))


def evaluate(
    args: argparse.Namespace, out: Path | None, baseline: list[Any] | None = None
) -> tuple[dict[str, Any], SparsePolicy]:
    """Play what is missing of one setting; the whole result, written to `out`, and the policy."""
    from tsad import sim
    from tsad.sim.results import Journal

    seeds = seeds_of(args)
    # Everything that can be refused is refused here, before a file is touched or time is spent.
    source = policy_source(args)
    policy = load_policy(source, args, name="--policy", lanes=min(args.lanes, args.seeds))
    max_steps = check_policy(args, policy)
    with argument("--policy"):
        sim.check_executed(policy, args.n_action_steps)
    workers = jobs.workers_of(args, policy)
    settings = {**_settings(policy, source, args), **realtime.settings(args, source, out)}
    with argument("--out"):
        journal = Journal(out, settings, resume=args.resume, overwrite=args.overwrite)
    try:
        todo = [seed for seed in seeds if seed not in journal.episodes]
        if todo:
            _play(policy, args, todo, journal, workers, max_steps)
        document = _document(policy, args, journal, seeds, workers)
        if baseline is not None:
            document["paired"] = _paired(args, [journal.episodes[seed] for seed in seeds], baseline)
        journal.finish(document)
    finally:
        journal.close()
    return document, policy


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.settings is not None:
        from tsad.commands import sweep

        return sweep.run(args)
    out = _check_arguments(args)
    use_preset(args, policy_source(args), args.preset)
    baseline = _read_baseline(args.baseline, seeds_of(args))
    document, policy = evaluate(args, out, baseline)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(_report(document, policy))
        if args.preset is not None and args.preset_note:
            print(args.preset_note)
        if out is not None:
            print(f"written to {args.out}")
    return 0
