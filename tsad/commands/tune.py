"""`tsad tune`: what a policy loses at which latency, and the fastest settings that lose nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tsad._extras import require
from tsad.commands.common import (
    NOT_ASKED,
    OBSERVATIONS,
    OBSERVATIONS_HELP,
    Formatter,
    UsageError,
    add_overwrite,
    add_simulator,
    add_workers,
    argument,
    check_result,
    check_simulator,
    check_source,
    difference,
    experiment_of,
    files_sha256,
    load_policy,
    natural,
    number,
    policy_source,
    positive_int,
    real,
    seed_range,
    table,
)
from tsad.commands.plan import recorded
from tsad.evaluation.errors import SINGLE, most_windows, recorded_windows
from tsad.evaluation.grid import LEADS, default_grid
from tsad.evaluation.judging import best, choose, compare, few_passes, shown_offline
from tsad.evaluation.sweep import (
    CHUNKS_PER_ROUND,
    Sweep,
    passes,
    read_settings,
    times,
)
from tsad.evaluation.timing import cpu_name
from tsad.files import make_folder, output_folder, write_json
from tsad.rule import Alternate

FORMAT, FORMAT_VERSION = "tsad-tune", 1
RESULT, PICTURE = "tune.json", "tune.png"
# To choose by. With fewer the mean loss is known to no better than 0.045 (Push-T, standard error),
# and of forty settings the luckiest is taken.
LEAST_SEEDS = 30
ERRORS = ("action_rms", "distance")
DESCRIPTION = f"""\
Plays a policy with many settings over the same seeds, times each afterwards, and shows the
frontier: the least loss at every time. The first setting, dense, is what all are compared with.
Time is that of as many actions as the first executes of a chunk: a setting that executes half of
its actions needs two chunks for them.

fast      the fastest setting whose mean loss is at most --within
lossless  the fastest whose 95 % interval, of all settings together, lies above -(--within)

Then the best settings, and dense, are played with leads: executed actions are smoothed and moved
further than the chunk before foresaw. That is no correction of what a setting loses: it suits the
robot's controller, and the dense policy as well. So a setting with a lead is judged by dense with
its own best lead, and each loss is shown against both.

--data RECORDED fits samplers beside that, as tsad fit does: those of the best settings of one pass
and of two, a few minutes each, which are then played beside what they are without.

"fast" and "lossless" are chosen of 30 seeds or more, and kept with --save, for
tsad.load(..., preset="fast"): in the policy's folder, or in one of yours if that can't be changed,
as those of the policies that come with tsad (tsad info says where).

Without --settings the grid is: DDIM and DPM-Solver++ with few steps, plans that compute some of the
steps, a start from the chunk before, the policy's pruner at three sparsities and by its own choice,
and rules that look within a chunk (first-block cache, TeaCache) at three thresholds each, where the
policy can have these; then what is best again in 16 bits, with half of the actions executed, and
with leads of 0.1 to 0.3. Passes of a pruner or a rule are the average of the chunks that were
played, with the most of any chunk beside it.
The format of --settings is that of tsad eval.

Without a simulator, --observations alone compare the actions of --draws samples per observation
with those of the dense policy, as distributions (energy distance, relative to the dense policy's
own spread): what is kept is "fast", by --within in these units. With both, tune.json says how well
that figure ranks the settings by what they lose in closed loop.

Scores don't mind a busy machine, times do: run the same command again when it is quiet. Episodes
and errors are kept in --out, and only times are taken again.

{OBSERVATIONS}"""

EPILOG = """\
examples:
  tsad tune pusht --out tuned                                        100 seeds, the default grid
  tsad tune pusht --out tuned --seeds 500 --settings mine.json       settings of your own
  tsad tune pusht --policy runs/mine --out tuned --within 0.05 --save
  tsad collect pusht --out recorded --episodes 16 --sampler ddim --steps 16
  tsad tune pusht --out tuned --data recorded --save                 and fitted samplers
  tsad tune --policy runs/mine --observations recorded --out tuned   no simulator"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "tune",
        help="find the fastest settings that lose nothing",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    add_simulator(parser, without="; without one, --observations alone")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument("--settings", metavar="FILE", help="instead of the default grid, JSON")
    parser.add_argument(
        "--seeds", type=positive_int, default=100, metavar="N", help="episodes (default: 100)"
    )
    parser.add_argument(
        "--first-seed",
        type=natural,
        default=10_000,
        metavar="S",
        help="seeds S to S+N-1 (default: 10000; keep the test seeds, from 100000, for the report)",
    )
    parser.add_argument(
        "--lanes", type=positive_int, default=8, metavar="L", help="environments (default: 8)"
    )
    parser.add_argument(
        "--within",
        type=real(lambda loss: 0 < loss < 1e6, "a number above 0, e.g. 0.03"),
        default=0.03,
        metavar="X",
        help="what may be lost: of the score, or without a simulator of distance (default: 0.03)",
    )
    parser.add_argument("--observations", metavar="DATA", help=OBSERVATIONS_HELP)
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="fit the best settings of one and two passes on these recorded observations",
    )
    parser.add_argument(
        "--draws",
        type=positive_int,
        default=16,
        metavar="M",
        help="of noise per observation, 2 or more (default: 16)",
    )
    parser.add_argument(
        "--int16",
        action=argparse.BooleanOptionalAction,
        help="the best again in 16 bits (default: without --settings)",
    )
    parser.add_argument(
        "--fewer-actions",
        action=argparse.BooleanOptionalAction,
        help="the best again with half of a chunk's actions executed (default: without --settings)",
    )
    parser.add_argument(
        "--leads",
        action=argparse.BooleanOptionalAction,
        help="the best again with leads, and dense (default: without --settings, in a simulator)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=5,
        metavar="N",
        help=f"of {CHUNKS_PER_ROUND} chunks to time each setting, in turns (default: 5)",
    )
    parser.add_argument("--save", action="store_true", help="keep the presets")
    add_overwrite(parser, "results of other settings in --out, and presets of an earlier --save")
    add_workers(parser)
    parser.add_argument("--threads", type=positive_int, metavar="T", help="the engine's choice")
    parser.add_argument("--device", default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    # what a setting may say, and this command leaves to the settings
    parser.set_defaults(run=run, **NOT_ASKED | {"precision": "float32"})


def _check(args: argparse.Namespace) -> Path:
    if args.data is not None:
        require("torch", extra="train", purpose="tsad tune --data")
    if args.simulator is None and args.own_simulator is None:
        if args.observations is None:
            raise UsageError(
                "argument SIMULATOR: expected a simulator, or --observations DATA to do without"
            )
        if args.policy is None:
            raise UsageError("argument --policy: without a simulator, expected a policy")
        if args.draws < 2:
            raise UsageError("argument --draws: expected 2 or more without a simulator")
        if args.leads:
            raise UsageError(
                "argument --leads: a lead is chosen by score, which takes a simulator; leave it out"
            )
    else:
        check_simulator(args)
        if args.seeds < 2:
            raise UsageError("argument --seeds: got 1, expected 2 or more: settings are compared")
        if args.save and not _enough(args):
            raise UsageError(
                f"argument --save: got {args.seeds} seeds, it takes {LEAST_SEEDS} to choose "
                "presets; more --seeds, or leave it out"
            )
    with argument("--out"):
        out = output_folder(args.out)
    if args.save:
        _place(args, overwrite=args.overwrite)
    return out


def _place(args: argparse.Namespace, *, overwrite: bool = True) -> Path:
    """Where presets go, after checking that they can."""
    from tsad.presets import place_for

    names = ("fast",) if args.simulator is None else ("fast", "lossless")
    with argument("--save"):
        return place_for(_folder(args), names, overwrite=overwrite)


def _folder(args: argparse.Namespace) -> Path:
    from tsad.load import policy_folder

    folder = policy_folder(policy_source(args))
    if folder is None:
        raise ValueError(
            f"{policy_source(args)!r} is a checkpoint, and only folders have presets; make one "
            "with: tsad convert CHECKPOINT FOLDER"
        )
    return folder


# ---- measuring


def _score(sweep: Sweep, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of all settings so far, played or compared on observations alone."""
    if args.simulator is not None:
        sweep.play()
        return sweep.rows
    return {
        name: {"passes": passes(sweep.load(name)), **sweep.error(name)} for name in sweep.trials()
    }


def _again(sweep: Sweep, names: list[str], ending: str, change: dict[str, Any]) -> None:
    """Add these settings again, changed."""
    more = [
        {**sweep.setting(name), "name": f"{name}-{ending}", **change}
        for name in names
        if not sweep.setting(name).keys() & change.keys()
    ]
    sweep.add([row for row in more if row["name"] not in sweep.trials()])  # a file may have them


def _fit(sweep: Sweep, rows: dict[str, Any], out: Path, args: argparse.Namespace) -> dict[str, str]:
    """Add the best of few passes again, fitted; why some could not be, by name."""
    from tsad.commands.fit import fit_setting
    from tsad.training.fit import FITTED_FILE, FitSettings

    words = argparse.Namespace(**vars(args), source=policy_source(args), report_every=25)
    failed: dict[str, str] = {}
    for name in few_passes(sweep, rows):
        folder = out / f"{name}-fitted"
        try:
            fit_setting(words, sweep.trials()[name].setting, FitSettings(), folder)
        except UsageError as error:
            failed[name] = str(error)
            continue
        _again(sweep, [name], "fitted", {"fitted": str((folder / FITTED_FILE).resolve())})
    return failed


# ---- choosing


def _enough(args: argparse.Namespace) -> bool:
    return args.simulator is None or args.seeds >= LEAST_SEEDS


def _save(
    sweep: Sweep, rows: dict[str, Any], chosen: dict[str, str | None], args: argparse.Namespace
) -> None:
    from tsad.presets import Preset, model_sha256, pruner_sha256, save_presets

    folder = _folder(args)
    facts: dict[str, Any] = {"cpu": cpu_name()}
    if args.simulator is not None:
        facts["seeds"] = sweep.seeds
    presets = []
    for preset, name in chosen.items():
        if name is None:
            continue
        own = sweep.trials()[name].setting
        policy = sweep.load(name)
        scheduler = policy.config["scheduler"]
        measured = {key: rows[name][key] for key in MEASURED if key in rows[name]}
        made = Preset(
            preset,
            model_sha256(folder),
            sampler=scheduler["type"],
            num_inference_steps=scheduler["num_inference_steps"],  # all, where a chunk starts warm
            timestep_spacing=scheduler["timestep_spacing"],
            precision=policy.precision,
            n_action_steps=own.n_action_steps,
            warm_start=own.warm_start,
            lead=own.lead,
            smoothing=own.smoothing,
            reuse_images=own.reuse_images,
            vision_precision=own.vision_precision,
            fitted=own.load_fitted(),
            rule=own.rule,
            pruner_sha256=pruner_sha256(folder) if policy.planner == "pruner" else None,
            planner=own.planner,
            sparsity=own.sparsity,
            measured={"setting": name, **facts, "threads": policy.threads, **measured},
        )
        presets.append((made, own.load_plan(policy)))
    with argument("--save"):
        save_presets(_place(args), presets)


MEASURED = (
    "milliseconds", "passes", "score", "success", "mean_difference", "simultaneous", "distance",
    "to_dense_with_lead", "most_passes", "success_difference",
)  # fmt: skip


# ---- reporting


def _table(document: dict[str, Any]) -> str:
    from tsad.sim.frontier import busy

    rows = document["rows"]
    played = document["simulator"] is not None
    decided = any("most_passes" in row for row in rows.values())
    lines = [["setting", "", "ms", "actions", "passes", *["most"] * decided]]
    lines[0] += ["score", "success"] * played + ["distance", "spread"] * document["drawn"]
    lines[0] += ["difference", "95 % together"] * played
    led = document["dense_with_lead"]
    lines[0] += ["to dense with lead", "95 % together"] * (led is not None)
    lines[0] += ["success, difference", "95 % together"] * played
    for name in sorted(rows, key=lambda name: -busy(rows, name)):
        row = rows[name]
        line = [name, "*" if name in document["frontier"] else ""]
        line += [number(row["milliseconds"], 2), str(row["n_action_steps"])]
        line += [number(row["passes"], 2), *[number(row.get("most_passes"), 2)] * decided]
        if played:
            line += [number(row["score"]["mean"], 3), number(row["success"]["mean"], 3)]
        if document["drawn"]:
            line += [number(row["distance"], 3), number(row["spread"], 2)]
        if played:
            line += difference(row) if "mean_difference" in row else ["", ""]
        if led is not None:
            beside = row.get("to_dense_with_lead")
            line += ["", ""] if beside is None else difference(beside)
        if played:
            known = row.get("success_difference")
            line += ["", ""] if known is None else difference(known)
        lines.append(line)
    return table(lines)


def _words(document: dict[str, Any]) -> list[str]:
    """The choice, and what stands in its way."""
    from tsad.sim.frontier import busy

    lines = ["* nothing is both faster and better, leads judged by dense with a lead"]
    lines += [f"no errors of {name}: its {SINGLE}" for name in document["unmeasured"]]
    lines += [f"not fitted: {name}: {why}" for name, why in document["unfitted"].items()]
    rows, within = document["rows"], document["within"]
    if not document["presets"]:
        first, last = document["seeds"]
        known = f"{last - first + 1} seeds"
        lines.append(f"no preset is chosen: {known}, it takes {LEAST_SEEDS} (--seeds)")
    for preset, name in document["presets"].items():
        if name is None:
            lines.append(f"{preset}: nothing faster is shown to lose at most {within:g}")
            continue
        times = [busy(rows, n) for n in (next(iter(rows)), name)]
        what = f"{times[1]:.2f} ms"
        if times[1] != rows[name]["milliseconds"]:
            what = f"{rows[name]['milliseconds']:.2f} ms a chunk, {what} for as many actions"
        lines.append(f"{preset}: {name}, {what}, {times[0] / times[1]:.1f} times faster")
    chosen = document["presets"]
    if (led := document["dense_with_lead"]) is not None:
        lines.append(
            f"dense with its own best lead: {led}, {rows[led]['score']['mean']:.3f}; a lead suits "
            "the controller of this simulator, and mends nothing that a setting loses"
        )
    if "lossless" in chosen and chosen["fast"] not in (None, chosen["lossless"]):
        more = rows[chosen["fast"]].get("seeds_needed")
        lines.append(f"to prove {chosen['fast']} within {within:g}, if it is: about {more} seeds")
    for error, found in document["rank_correlation"].items():
        if found["rank_correlation"] is not None:
            lines.append(
                f"rank correlation of {error} and loss over {found['rows']} settings: "
                f"{found['rank_correlation']:.2f}"
            )
    return lines


def _document(
    sweep: Sweep, rows: dict[str, Any], times: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    import tsad
    from tsad.sim.frontier import correlations

    probe = sweep.load(sweep.first)
    for name, row in rows.items():
        row |= times[name]
    baseline, played = next(iter(rows)), args.simulator is not None
    if played:
        compare(sweep, rows, args.within)
    kept, chosen = choose(sweep, rows, args.within, enough=_enough(args))
    # whose loss may come from what no chunk alone shows is left out
    alike = {n: row for n, row in rows.items() if shown_offline(sweep, n)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tsad": tsad.__version__,
        "policy": policy_source(args),
        "files_sha256": files_sha256(policy_source(args)),
        "simulator": args.simulator,
        "seeds": sweep.seeds if played else None,
        "machine": {"cpu": cpu_name(), "backend": probe.backend, "threads": probe.threads},
        "drawn": any("distance" in row for row in rows.values()),
        "draws": args.draws if args.observations is not None else None,
        "within": args.within,
        "baseline": baseline,
        "dense_with_lead": sweep.dense_with_lead() if played else None,
        "settings": {name: sweep.setting(name) for name in rows},
        "rows": rows,
        "frontier": kept,
        "presets": chosen,
        "rank_correlation": correlations(alike, baseline, ERRORS) if played else {},
    }


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    out = _check(args)
    folder = Path()
    if args.settings is not None:
        check_source(args)
    with argument("--policy"):
        policy = load_policy(policy_source(args), args, name="--policy", lanes=1)
    # what was recorded is refused now, not after hours
    if args.observations is not None:
        recorded_windows(args.observations, policy, most_windows(args.draws))
    if args.data is not None:
        recorded(argparse.Namespace(source=policy_source(args), data=args.data), policy)
    if args.settings is None:
        settings = default_grid(policy)
    else:
        settings, folder = read_settings(args.settings), Path(args.settings).resolve().parent
    # a run of anything else does not replace the result: its times would be lost
    run_of = {"simulator": args.simulator, "files_sha256": files_sha256(policy_source(args))}
    run_of |= {"format": FORMAT, "asked": [row["name"] for row in settings]}
    with argument("--out"):
        check_result(out, (RESULT, PICTURE), run_of, overwrite=args.overwrite)
    experiment = experiment_of(args, resume=True)
    sweep = Sweep(experiment, settings, folder, out, words=vars(args))
    sweep.measure(args.observations, args.draws)
    own_grid = args.settings is None
    for name, trial in sweep.trials().items() if args.simulator is None else ():
        if isinstance(trial.setting.rule, Alternate):
            raise UsageError(
                f"argument --settings: {name}: what plans that take turns do takes episodes to "
                "see; leave it out, or name a simulator"
            )
    for name in sweep.unmeasured() if args.simulator is None else ():
        if not own_grid or len(sweep.trials()) == 1:
            raise UsageError(f"argument --settings: {name}: its {SINGLE}, or leave it out")
        sweep.leave_out(name)
    rows = _score(sweep, args)
    n = sweep.load(sweep.first).n_action_steps
    unfitted: dict[str, str] = {}
    if args.data is not None:
        unfitted = _fit(sweep, rows, out, args)
        rows = _score(sweep, args)
    if own_grid if args.int16 is None else args.int16:
        _again(sweep, best(sweep, rows, n), "int16", {"precision": "int16"})
        rows = _score(sweep, args)
    fewer = own_grid and args.simulator is not None
    if n > 1 and (fewer if args.fewer_actions is None else args.fewer_actions):
        half = {"n_action_steps": n // 2}
        _again(sweep, best(sweep, rows, n), f"{n // 2}-actions", half)
        rows = _score(sweep, args)
    if own_grid and args.simulator is not None if args.leads is None else args.leads:
        few = list(dict.fromkeys([sweep.first, *best(sweep, rows, n)]))
        for change in LEADS:
            ending = "smooth-" * ("smoothing" in change) + f"lead-{change['lead']:g}"
            _again(sweep, few, ending, change)
        rows = _score(sweep, args)
    document = _document(sweep, rows, times(sweep, args.rounds, CHUNKS_PER_ROUND)[0], args) | run_of
    document |= {"unmeasured": sweep.unmeasured(), "unfitted": unfitted}
    write_json(make_folder(out) / RESULT, document)
    if args.save:
        _save(sweep, rows, document["presets"], args)
    print(json.dumps(document, indent=1) if args.json else _report(document, out, args))
    return 0


def _saved(chosen: dict[str, str | None], args: argparse.Namespace) -> list[str]:
    """What presets there are now, from this run or from before."""
    from tsad.presets import read_presets

    place, lines = _place(args), []
    for preset, name in chosen.items():
        if name is not None:
            lines.append(f'kept in {place}: tsad.load(..., preset="{preset}")')
        elif preset in read_presets(place):
            lines.append(f"the preset {preset} in {place} is from before: this run found none")
    return lines


def _report(document: dict[str, Any], out: Path, args: argparse.Namespace) -> str:
    from tsad._extras import MissingExtraError
    from tsad.plot.frontier import save_frontier

    seeds = document["seeds"]
    where = "recorded observations" if seeds is None else f"{args.simulator}, {seed_range(seeds)}"
    machine = document["machine"]
    lines = [
        f"{where}, policy {document['policy']}; {machine['cpu']}, {machine['threads']} threads",
        _table(document),
        *_words(document),
    ]
    written = str(out / RESULT)
    try:
        save_frontier(document, out / PICTURE)
        written += f" and {out / PICTURE}"
    except MissingExtraError as missing:
        lines.append(f"no picture: {missing}")
    lines.append(f"written to {written}")
    if args.save:
        lines += _saved(document["presets"], args)
    return "\n".join(lines)
