"""`tsad eval`: closed-loop score of a policy in a simulator."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands import realtime
from tsad.commands.common import (
    OBSERVATIONS,
    Formatter,
    UsageError,
    add_fitted,
    add_lead,
    add_overwrite,
    add_policy_options,
    add_preset,
    add_reuse_images,
    add_simulator,
    add_warm_start,
    add_workers,
    argument,
    check_result,
    check_simulator,
    check_source,
    difference,
    experiment_of,
    natural,
    number,
    policy_source,
    positive_int,
    preset_note,
    sampler_name,
    seed_range,
    sparsity,
    table,
    too_few,
)
from tsad.evaluation.errors import SINGLE
from tsad.evaluation.play import Trial, evaluate, percent, seeds_of
from tsad.evaluation.realtime import check as check_realtime
from tsad.evaluation.sweep import Sweep, compare_rows, compare_success, read_settings
from tsad.evaluation.usage import disturbance, rule
from tsad.files import output_folder, write_json
from tsad.presets import Preset
from tsad.setting import MOVED, RULED
from tsad.statistics import LEAST_EPISODES

if TYPE_CHECKING:
    from tsad import SparsePolicy

FORMAT, FORMAT_VERSION = "tsad-sweep", 1
SUMMARY = "summary.json"

DESCRIPTION = f"""\
Play seeded episodes in a simulator and report score and success with their errors.

An episode's result depends on its seed and on the policy's settings alone: not on --lanes, not on
--threads, --jobs or the order. So two runs over the same seeds are paired, whatever their sparsity.
With --out every finished episode is on disk at once, and --resume goes on after an interruption.

--settings FILE plays many settings over the same seeds: a JSON list of objects with a "name" and
any of "sampler", "steps", "spacing", "sparsity", "planner", "plan", "precision", "n_action_steps",
"noise", "preset", "realtime", "latency", "warm_start", "lead", "smoothing", "fitted", "guard",
"disturb", "reuse_images", "vision_precision", "rule". Then --out is a folder with a file per
setting; the same command goes on with what is missing. The first is the baseline of all; the
intervals hold for all rows together.
Rows that are the first but for a lead and smoothing are dense with a lead: the best of them is a
second baseline, which rows with a lead are to be judged by, as a lead helps whatever is executed.

--rule decides how much to compute while the episode runs; a row's "rule" is an object with the same
words. Within a chunk: fbcache=X (first-block cache) or teacache=X, X the threshold, and most=N, at
most N steps computed whole. From chunk to chunk: plan=A,other=B, files or step masks, with every=M,
so many-th chunks run B, or share=P, each does at random. Results have the passes of a chunk,
on average and at most.

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
  tsad eval pusht --sampler ddim --steps 8 --smoothing --lead 0.1   executed actions go further
  tsad eval pusht --rule fbcache=0.4,most=30                       the first-block cache
  tsad eval pusht --sampler ddim --steps 8 --rule every=3,plan=10000000,other=10001000
  tsad eval pusht --seeds 500 --preset fast                        a preset of its folder
  tsad eval pusht --seeds 500 --settings sweep.json --out sweep    many settings, one table
  tsad eval pusht --realtime 50 --n-action-steps 4                 a robot that doesn't wait
  tsad eval pusht_pixels --policy mine --disturb brightness=0.3    seen in another light
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
    choice.add_argument(
        "--rule",
        type=rule,
        metavar="WORDS",
        help="a rule that decides as the episode runs, e.g. fbcache=0.2; see above",
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
    parser.add_argument(
        "--disturb",
        type=disturbance,
        metavar="KIND=AMOUNT",
        help="what is done to the images that the policy sees: brightness, noise, occlusion, from "
        "0 to 1, several with commas between (tsad.sim.Disturbance says of what)",
    )
    realtime.add_options(parser)
    add_warm_start(parser)
    add_lead(parser)
    add_reuse_images(parser)
    add_fitted(parser)
    add_workers(parser)
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
    for name in RULED if args.rule is not None else ():
        if getattr(args, name) is not None:
            raise UsageError(f"argument --rule: {RULED[name]}; leave out --{name}, or the rule")
    if args.observations is not None and args.settings is None:
        raise UsageError("argument --observations: needs --settings FILE")
    if args.draws > 1 and args.observations is None:
        raise UsageError("argument --draws: needs --observations DATA")
    check_realtime(args.realtime, args.latency, "--latency")
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


def _read_baseline(path: str | None, seeds: list[int]) -> tuple[str, list[Any]] | None:
    """The baseline and its episodes, or None; refused at once if no seed is common."""
    from tsad.sim.results import ResultsError, read_results

    if path is None:
        return None
    with argument("--baseline"):
        episodes = read_results(Path(path))[1]
        if not {episode.seed for episode in episodes} & set(seeds):
            raise ResultsError(
                f"{path} has none of the seeds {seeds[0]} to {seeds[-1]}; use its --first-seed"
            )
    return path, episodes


def _sure(row: Mapping[str, Any], n: int, what: str) -> str:
    """How far a mean of ``n`` is known, in words that follow it."""
    interval = row["interval95"]
    if interval is None:
        return f", {too_few(n, what)}"
    return (
        f" +- {row['standard_error']:.3f} (standard error), "
        f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}"
    )


def _beside(run: Mapping[str, Any]) -> str:
    """What else went on while the chunks of a run were timed."""
    lanes, notes = run["lanes"], []
    if lanes > 1:
        notes.append(f"{lanes} lanes: a lane's share of a call")
    if "jobs" in run:
        notes.append(f"{run['jobs']} processes at a time")
    return f" ({'; '.join(notes)})" if notes else ""


def _guarded(summary: Mapping[str, Any]) -> list[str]:
    """What a guard did, in a line or none."""
    if "guarded" not in summary:
        return []
    share = summary["guarded"] / summary["chunks"]
    return [f"guard    {summary['guarded']} chunks started anew, {share:.1%}"]


def _spent(summary: Mapping[str, Any]) -> list[str]:
    """What chunks cost where a rule decides, in a line or none."""
    if "passes" not in summary:
        return []
    most = summary["most_passes"]
    return [f"passes   {summary['passes']:.2f} a chunk on average, {most:.2f} at most"]


def _report(document: dict[str, Any], policy: SparsePolicy) -> str:
    summary, settings, run_ = document["summary"], document["settings"], document["run"]
    score, success, times = summary["score"], summary["success"], summary["chunk_ms"]
    n = summary["episodes"]
    count, what = round(success["mean"] * n), f"episode{'s' if n > 1 else ''}"
    lines = [
        f"{settings['simulator']}, {seed_range([summary['first_seed'], summary['last_seed']])}, "
        f"policy {run_['policy']} ({sampler_name(policy)}), planner {settings['planner']}, "
        f"sparsity {percent(settings['sparsity'])}",
        f"score    {score['mean']:.3f}{_sure(score, n, what)}",
        f"success  {success['mean']:.3f} ({count} of {n}){_sure(success, n, what)}",
        f"chunk    {times['mean']:.2f} ms mean, {times['max']:.2f} ms largest, over "
        f"{summary['chunks']} chunks{_beside(run_)}",
        *realtime.report(settings),
        *([f"seen     with {settings['disturb']}"] if "disturb" in settings else []),
        *_guarded(summary),
        *_spent(summary),
    ]
    if "paired" in document:
        paired = document["paired"]
        pairs = f"pair{'s' if paired['pairs'] > 1 else ''}"
        lines.append(f"against {paired['baseline']}, {paired['pairs']} {pairs} of equal seed:")
        for name in ("score", "success"):
            row = paired[name]
            lines.append(
                f"{name:<8} {row['mean_difference']:+.3f}{_sure(row, paired['pairs'], pairs)}"
            )
        if any(settings.get(name) for name in MOVED):
            lines.append(
                "executed actions have a lead: judge it by a dense baseline with its own best"
            )
    return "\n".join(lines)


def _table(
    rows: Mapping[str, Any],
    compared: Mapping[str, Any] | None,
    to_lead: Mapping[str, Any] | None,
    success: Mapping[str, Any] | None,
) -> str:
    distance = any("distance" in row for row in rows.values())
    decided = any("most_passes" in row for row in rows.values())
    head = ["setting", "passes", *["most"] * decided, "score", "success", "action rms"]
    lines = [[*head, *["distance", "spread"] * distance, "difference", "95 % together"]]
    lines[0] += ["to dense with lead", "95 % together"] * (to_lead is not None)
    lines[0] += ["success, difference", "95 % together"]
    for name, row in rows.items():
        line = [
            name,
            number(row["passes"], 2),
            *[number(row.get("most_passes"), 2)] * decided,
            number(row["score"]["mean"], 3),
            number(row["success"]["mean"], 3),
            number(row["action_rms"], 4),
        ]
        if distance:
            line += [number(row["distance"], 3), number(row["spread"], 2)]
        beside = [] if to_lead is None else [to_lead]
        for found in [compared, *beside, success]:
            other = None if found is None else found["rows"].get(name)
            line += ["", ""] if other is None else difference(other)
        lines.append(line)
    return table(lines)


def _check_sweep(args: argparse.Namespace) -> Path:

    check_simulator(args)
    if args.out is None:
        raise UsageError("argument --settings: needs --out DIR, a file per setting goes there")
    if args.seeds < 2:
        raise UsageError("argument --seeds: expected 2 or more with --settings: rows are compared")
    for name in ("plan", "planner", "preset", "sparsity", "rule", "baseline"):
        if getattr(args, name) is not None:
            raise UsageError(f"argument --{name}: not together with --settings; put it in the file")
    with argument("--out"):
        out = output_folder(args.out)
        check_result(out, (SUMMARY,), {"format": FORMAT}, overwrite=args.overwrite)
    return out


def _run_sweep(args: argparse.Namespace) -> int:
    """Play every setting's missing seeds; print and write the comparison."""
    out = _check_sweep(args)
    check_source(args)
    settings = read_settings(args.settings)
    experiment = experiment_of(args, resume=args.resume)
    folder = Path(args.settings).resolve().parent
    sweep = Sweep(experiment, settings, folder, out, words=vars(args))
    sweep.measure(args.observations, args.draws)
    sweep.play()
    rows = sweep.rows
    several = len(settings) > 1
    compared, to_lead = compare_rows(sweep) if several else (None, None)
    success = compare_success(sweep) if several else None
    summary = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seeds": sweep.seeds,
        "rows": rows,
        "compared": compared,
        "compared_with_lead": to_lead,
        "compared_success": success,
    }
    write_json(out / SUMMARY, summary)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"{args.simulator}, {seed_range(sweep.seeds)}, policy {policy_source(args)}")
        print(_table(rows, compared, to_lead, success))
        if to_lead is not None:
            print(f"dense with lead: {to_lead['baseline']}, which rows with a lead are judged by")
        for name in sweep.unmeasured():
            print(f"no errors of {name}: its {SINGLE}")
        if compared is not None and compared["pairs"] < LEAST_EPISODES:
            print(too_few(compared["pairs"], "seeds"))
        print(f"written to {args.out}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.settings is not None:
        return _run_sweep(args)
    out = _check_arguments(args)
    trial = Trial.of(vars(args), policy_source(args))
    experiment = experiment_of(args, resume=args.resume)
    baseline = _read_baseline(args.baseline, seeds_of(experiment))
    document, policy = evaluate(experiment, trial, out, baseline=baseline, resume=args.resume)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(_report(document, policy))
        if isinstance(trial.setting, Preset) and (note := preset_note(trial.setting)):
            print(note)
        if out is not None:
            print(f"written to {args.out}")
    return 0
