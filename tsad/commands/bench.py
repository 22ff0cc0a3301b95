"""`tsad bench`: how long a chunk and its stages take, on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsad.commands.common import (
    DIAL,
    NOT_ASKED,
    Formatter,
    UsageError,
    add_lead,
    add_policy_options,
    add_preset,
    add_reuse_images,
    add_warm_start,
    argument,
    check_source,
    check_sparsity,
    load_policy,
    planner_name,
    positive_int,
    preset_note,
    real,
    sparsity,
    table,
)
from tsad.evaluation.play import Experiment
from tsad.evaluation.progress import Progress
from tsad.evaluation.sweep import Sweep, read_settings
from tsad.evaluation.timing import Clock, cpu_name, observations, sampler_name
from tsad.statistics import ENOUGH

if TYPE_CHECKING:
    from tsad import SparsePolicy

ROUNDS = 5

DESCRIPTION = """\
Time chunks and their stages (encode, prune, plan, denoise) on this machine, dense and sparse.
A policy with cameras is shown random images, and its stage "vision" is what they take.

The settings take turns in rounds, so that a machine that slows down slows all of them. The first
chunks of a round are not counted; the first after a reset, which may be dense, is timed apart.
A preset runs as it was measured: sampler, precision, warm start and planner that you ask for are
those of the settings beside it.

--settings FILE times many settings: a JSON list of objects with a "name", as 'tsad eval --help'
describes them. What a row leaves unsaid is as the other options say."""

EPILOG = """\
examples:
  tsad bench                                        the bundled policy, dense and 0.9
  tsad bench pusht --sparsity 0.5 0.9 0.95 --chunks 500
  tsad bench pusht --sampler ddim --steps 16 --threads 1
  tsad bench pusht --preset fast                    dense, and a preset of its folder
  tsad bench pusht --preset fast --paced 10         as a robot calls it, idle in between
  tsad bench runs/mine --lanes 8 --json
  tsad bench runs/mine --settings sweep.json        each setting of a file"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "bench",
        help="time chunks and their stages here",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "policy",
        metavar="SRC",
        nargs="?",
        default="pusht",
        help="bundled name, tsad folder or checkpoint (default: pusht)",
    )
    parser.add_argument(
        "--sparsity",
        type=sparsity,
        nargs="+",
        metavar="S",
        help="times these beside dense (default: 0.9, less if the steps are few; with --preset: "
        "none)",
    )
    add_preset(parser)
    parser.add_argument("--settings", metavar="FILE", help="many settings, JSON; see above")
    parser.add_argument("--planner", metavar="NAME", help="who decides: uniform or pruner")
    parser.add_argument("--lanes", type=positive_int, default=1, metavar="L", help="default: 1")
    parser.add_argument(
        "--chunks", type=positive_int, default=100, metavar="N", help="of each (default: 100)"
    )
    parser.add_argument(
        "--paced",
        type=real(lambda hz: 0 < hz <= 1e4, "calls a second, above 0 and up to 10000; e.g. 10"),
        metavar="HZ",
        help="call at this rate, as a robot does: cores rest in between (default: back to back)",
    )
    add_warm_start(parser)
    add_lead(parser)
    add_reuse_images(parser)
    add_policy_options(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _report(document: dict[str, Any]) -> str:
    results = document["results"]
    calls = results[0]["chunks"] // document["lanes"]
    shown = [f"p{q}" for q in ENOUGH if calls >= ENOUGH[q]]
    shown += [] if "p99" in shown else ["max"]
    rows = [[f"ms, {' / '.join(shown)}", *(r["name"] for r in results)]]

    def three(values: dict[str, float]) -> str:
        return " / ".join(_digits(values[name]) for name in shown)

    for stage in [stage for stage in results[0]["stages_ms"] if stage != "total"]:
        rows.append([stage, *(three(r["stages_ms"][stage]) for r in results)])
    rows.append(["chunk, as called", *(three(r["call_ms"]) for r in results)])
    rows.append(["first after reset", *(_digits(r["first_call_ms"]) for r in results)])
    rows.append(["chunks/s", *(f"{r['chunks_per_second']:.1f}" for r in results)])
    rows.append(["actions/s", *(f"{r['actions_per_second']:.0f}" for r in results)])
    rows.append(["sparsity of cells", *(f"{r['cell_sparsity']:.1%}" for r in results)])
    rows.append(["dense passes", *(f"{r['passes']:.2f}" for r in results)])
    dense = results[0]["call_ms"]["p50"]
    rows.append(["times faster, p50", *(f"{dense / r['call_ms']['p50']:.2f}" for r in results)])
    lanes, paced = document["lanes"], document["paced_hz"]
    own = f" ({document['sampler']}), planner {document['planner']}"
    if document["settings"] is not None:  # each row has its own
        own = f", settings of {document['settings']}"
        rows[1:1] = [[what, *(r[what] for r in results)] for what in ("sampler", "precision")]
    return (
        f"policy {document['policy']}{own}, {lanes} lane{'s' if lanes > 1 else ''}\n"
        f"{document['cpu']}, {document['backend']}, threads {document['threads']}"
        f"{'' if paced is None else f', called at {paced:g} Hz'}\n{_images(document)}\n"
        f"{table(rows)}"
        + ("" if "p99" in shown else f"\n{calls} calls: a p99 takes {ENOUGH[99]} (--chunks)")
    )


def _images(document: dict[str, Any]) -> str:
    """What the policy was shown, a line; empty for one that sees nothing."""
    sizes = [f"{name} {w} x {h}" for name, (h, w) in document["images"].items()]
    if not sizes:
        return ""
    return f"images: random, every one new ({', '.join(sizes)}); vision is what they took\n"


def _clocks(policy: SparsePolicy, args: argparse.Namespace) -> list[Clock]:
    """Dense, the sparsities, and the preset."""
    import tsad
    from tsad.load import policy_folder
    from tsad.presets import find_preset

    def clock(value: float) -> Clock:
        name = f"{value:.1%}" if value else "dense"
        return Clock(name, lambda: policy, lambda policy: setattr(policy, "sparsity", value))

    default = [] if args.preset else [min(0.9, policy.max_sparsity)]
    values = [value for value in args.sparsity or default if value > 0]
    for value in values:
        with argument("--sparsity", DIAL):
            check_sparsity(policy, value)
            policy.sparsity = value
    policy.sparsity = 0.0
    clocks = [clock(value) for value in [0.0, *values]]
    if args.preset:
        with argument("--preset"):
            chosen = tsad.load(
                args.policy,
                lanes=args.lanes,
                device=args.device,
                threads=args.threads,
                preset=args.preset,
            )
            preset = find_preset(policy_folder(args.policy), args.preset, args.policy)
        clocks.append(Clock(args.preset, lambda: chosen, lambda _: None))
        args.preset_note = preset_note(preset)
    return clocks


def _rows(args: argparse.Namespace) -> tuple[SparsePolicy, list[Clock]]:
    """The first of the settings file, and all of them."""
    for name in ("planner", "preset", "sparsity"):
        if getattr(args, name) is not None:
            raise UsageError(f"argument --{name}: not together with --settings; put it in the file")
    if args.lanes != 1:
        raise UsageError(f"argument --lanes: got {args.lanes}, but --settings times one lane")
    check_source(args, "SRC")
    rows, folder = read_settings(args.settings), Path(args.settings).resolve().parent
    experiment = Experiment(args.policy, None, device=args.device, threads=args.threads)
    sweep = Sweep(experiment, rows, folder, Path(), words=NOT_ASKED | vars(args))
    return sweep.load(sweep.first), sweep.clocks()


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import tsad

    if args.settings is not None:
        policy, clocks = _rows(args)
    else:
        policy = load_policy(args.policy, args, name="SRC", lanes=args.lanes)
        if args.planner is not None:
            with argument("--planner"):
                policy.planner = args.planner
        clocks = _clocks(policy, args)
    obs = observations(policy, max(2, -(-args.chunks // ROUNDS)))
    period = 0.0 if args.paced is None else 1 / args.paced
    with Progress(ROUNDS * len(clocks), "bench", unit="rounds") as progress:
        for _ in range(ROUNDS):
            for clock in clocks:
                clock.round(obs, period)
                progress.update(f"{np.median(clock.wall):.2f} ms")
    document = {
        "tsad": tsad.__version__,
        "policy": args.policy,
        "sampler": sampler_name(policy),
        "planner": planner_name(policy),
        "cpu": cpu_name(),
        "backend": policy.backend,
        "threads": policy.threads,
        "lanes": policy.lanes,
        "paced_hz": args.paced,
        "settings": args.settings,
        "images": {
            camera["name"]: [camera["height"], camera["width"]]
            for camera in policy.config.get("vision", {}).get("cameras", ())
        },
        "results": [clock.facts() for clock in clocks],
    }
    print(json.dumps(document, indent=1) if args.json else _report(document))
    if args.preset and args.preset_note and not args.json:
        print(args.preset_note)
    return 0
