"""`tsad generate`: successful episodes of a policy, by search in a simulator."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    Formatter,
    UsageError,
    add_overwrite,
    add_policy_options,
    add_simulator,
    argument,
    check_simulator,
    files_sha256,
    load_policy,
    policy_source,
    positive_int,
    real,
    sampler_name,
)
from tsad.evaluation.play import check_policy, playing, simulator_settings
from tsad.evaluation.progress import Progress

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.sim.demonstrations import Record
    from tsad.sim.search import Search

DESCRIPTION = """\
Make demonstrations that a policy can learn precision from: its own samples, chosen with hindsight.

Each seed's episode is played by the policy until its score reaches --start. There the world is
copied into --particles, which the policy plays on with different noise; every --interval chunks
the better half replaces the worse. The particles that succeed first become demonstrations.

What comes of a seed depends on it and the settings alone. OUT is an npz file that `tsad
train-policy` reads, whole at any time; after Ctrl-C --resume goes on. Keep its seeds apart from
those that a policy is chosen and scored on. A simulator of your own needs two methods more, to be
copied: those of tsad.sim.search.Searchable."""

EPILOG = """\
examples:
  tsad generate pusht --out more.npz --seeds 20000:21000
  tsad generate pusht --out more.npz --seeds 20000:21000 --resume   go on after Ctrl-C
  tsad generate pusht --out more.npz --seeds 20000:22000 --resume   more seeds than first said
  tsad train-policy human.npz more.npz --shares 0.5 0.5 --out policy --minutes 60"""


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last))
    except ValueError:
        seeds = range(0)
    if not seeds or seeds[0] < 0 or len(seeds) > 10**6:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected A:B, the seeds A to B-1, a million at most; e.g. 20000:21000"
        )
    return seeds


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "generate",
        help="successful episodes, by search in a simulator",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    add_simulator(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the npz file to make")
    parser.add_argument(
        "--seeds", type=_range, required=True, metavar="A:B", help="one episode each, A to B-1"
    )
    search = parser.add_argument_group("the search")
    for name, kind, default, text in (
        ("particles", positive_int, 8, "copies of the world"),
        (
            "start",
            real(lambda score: 0 <= score < 1, "a score from 0 up to 1"),
            0.6,
            "score from which on there are particles",
        ),
        ("interval", positive_int, 2, "chunks between two selections"),
        ("chunks", positive_int, 24, "longest search"),
        ("winners", positive_int, 3, "demonstrations of a seed at most"),
    ):
        option_help = f"{text} (default: {default})"
        search.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=option_help)
    search.add_argument(
        "--execute", type=positive_int, metavar="N", help="actions of a chunk (default: all)"
    )
    search.add_argument(
        "--last",
        type=positive_int,
        metavar="N",
        help="keep the last N steps of each (default: all)",
    )
    add_policy_options(parser)
    parser.set_defaults(sampler="ddim", steps=4)
    output = parser.add_argument_group("output")
    output.add_argument("--resume", action="store_true", help="go on with the seeds in --out")
    add_overwrite(output)
    output.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def _check_arguments(args: argparse.Namespace) -> Path:
    """What argparse cannot see; returns the output path."""
    from tsad.files import output_file
    from tsad.sim.results import check_free

    check_simulator(args)
    if args.resume and args.overwrite:
        raise UsageError("argument --resume: not together with --overwrite")
    if not args.out.endswith(".npz"):
        raise UsageError(f"argument --out: got {args.out!r}, expected a name that ends in .npz")
    with argument("--out"):
        out = output_file(args.out, overwrite=True)
        check_free(out, resume=args.resume, overwrite=args.overwrite)
    return out


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from tsad import sim
    from tsad.sim.search import Search

    out = _check_arguments(args)
    names = ("particles", "start", "interval", "chunks", "winners", "execute", "last")
    with argument("--particles", {name: f"--{name}" for name in names}):
        search = Search(**{name: getattr(args, name) for name in names})
    policy = load_policy(policy_source(args), args, name="--policy", lanes=search.particles)
    check_policy(args.simulator, policy, own=args.own_simulator is not None)
    environments: list[Any] = [sim.make(args.simulator) for _ in range(search.particles)]
    try:
        record = _search(args, search, policy, environments, out)
    finally:
        for environment in environments:
            environment.close()
    _report(record, args)
    return 0


def _search(
    args: argparse.Namespace,
    search: Search,
    policy: SparsePolicy,
    environments: list[Any],
    out: Path,
) -> Record:
    import tsad
    from tsad.sim.demonstrations import Record
    from tsad.sim.search import Searcher

    missing = [name for name in ("snapshot", "restore") if not hasattr(environments[0], name)]
    if missing:
        raise UsageError(
            f"argument SIMULATOR: {args.simulator!r} can't be copied: it has no "
            f"{' and no '.join(missing)}; give it the methods of tsad.sim.search.Searchable"
        )
    with argument("--policy"):
        searcher = Searcher(policy, environments, search)
    settings = {
        "tsad": tsad.__version__,
        **{k: v for k, v in simulator_settings(args.simulator).items() if k != "packages"},
        "first_seed": args.seeds[0],
        "files_sha256": files_sha256(policy_source(args)),
        "sampler": sampler_name(policy),
        "precision": policy.precision,
        "search": asdict(search),
    }
    states = "state" if hasattr(environments[0], "state") else "obs"
    with argument("--out"):
        record = Record(out, settings, states=states, resume=args.resume, overwrite=args.overwrite)
    todo = [seed for seed in args.seeds if seed >= record.next_seed]

    def kept() -> str:
        record.save()
        return f"{record.text()} are kept; the same command with --resume goes on"

    done = len(args.seeds) - len(todo)
    try:
        with (
            playing(kept),
            Progress(len(args.seeds), args.simulator, unit="seeds", done=done) as progress,
        ):
            for seed in todo:
                record.add(seed, searcher(seed))
                progress.update(f"{record.text()}")
        record.save()
    finally:
        record.close()
    return record


def _report(record: Record, args: argparse.Namespace) -> None:
    summary = {
        "out": os.fspath(args.out),
        "seeds": record.next_seed - args.seeds[0],
        "seeds_won": record.seeds_won,
        "episodes": len(record.demonstrations),
        "steps": record.steps,
    }
    if args.json:
        print(json.dumps(summary))
    else:
        written = f"written to {args.out}" if record.demonstrations else "nothing is written"
        print(f"{record.text()}, of {summary['seeds']} seeds\n{written}")
