"""What the commands share: errors, options of a policy, progress, tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.arrays import read_any_json
from tsad.commands.parser import Formatter as Formatter
from tsad.commands.parser import did_you_mean
from tsad.config import SAMPLERS, TIMESTEP_SPACINGS
from tsad.evaluation.loading import check_sparsity as check_sparsity
from tsad.evaluation.loading import configure as configure
from tsad.evaluation.loading import load_policy as load_policy
from tsad.evaluation.loading import setting_of as setting_of
from tsad.evaluation.play import Experiment
from tsad.evaluation.timing import cpu_name
from tsad.evaluation.timing import sampler_name as sampler_name
from tsad.evaluation.usage import DIAL as DIAL
from tsad.evaluation.usage import OPTIONS as OPTIONS
from tsad.evaluation.usage import InterruptedRunError as InterruptedRunError
from tsad.evaluation.usage import UsageError as UsageError
from tsad.evaluation.usage import argument as argument
from tsad.evaluation.usage import integer as integer
from tsad.evaluation.usage import lead, reuse_images
from tsad.evaluation.usage import real as real
from tsad.files import output_file, sha256
from tsad.load import bundled, read_policy
from tsad.load import files_sha256 as files_sha256
from tsad.planners.files import read_plan
from tsad.presets import Preset
from tsad.setting import VISION_PRECISIONS
from tsad.setting import planner_name as planner_name

if TYPE_CHECKING:
    from tsad import Plan

EXIT_FAILURE, EXIT_USAGE = 1, 2


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Warnings inside are notes for people, each once and without a place in the source."""
    said: set[str] = set()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield


positive_int, natural = integer(1, 10**6), integer(0, 2**62)
sparsity = real(
    lambda value: 0 <= value <= 1,
    "a number from 0 (dense) to 1, the share of the cost not computed; e.g. 0.9",
)


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how a policy is loaded, for every command that loads one."""
    group = parser.add_argument_group("the policy")
    group.add_argument(
        "--sampler", choices=SAMPLERS, help="denoise with this sampler (default: the policy's own)"
    )
    group.add_argument(
        "--steps", type=positive_int, metavar="K", help="denoising steps (default: the policy's)"
    )
    group.add_argument(
        "--spacing", choices=TIMESTEP_SPACINGS, help="of its time steps (default: the policy's own)"
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="T", help="threads (default: the engine's choice)"
    )
    group.add_argument("--device", default="cpu", help="where it runs (default: cpu)")
    group.add_argument(
        "--precision",
        default="auto",
        help='"float32", of a CPU "int16" or "int8", of a GPU "tf32", "float16" or "bfloat16"; '
        '"auto" is float32 (default: auto)',
    )


# For the descriptions of commands that read them.
OBSERVATIONS = """\
Recorded observations are a folder of tsad collect or of tsad.Recorder (a loop of your own), or
arrays of your own in an npz, npy or zarr file, raw units: 'obs' (N, n_obs_steps, obs_dim), what the
policy is called with, of successive chunks if there is 'episode_ends' (E,), one past the last of
each episode; or 'obs' (N, obs_dim), every step, with 'episode_ends', as demonstrations are."""
OBSERVATIONS_HELP = "recorded observations: a folder, or arrays of your own; see above"


def add_preset(parser: Any) -> None:
    """The option that names a preset, for commands that ask `setting_of`."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="a measured setting of the policy: tsad info lists them, and where they were timed",
    )


def add_warm_start(parser: Any) -> None:
    """The option that `load_policy` hands to `tsad.load`, for commands that go on in episodes."""
    parser.add_argument(
        "--warm-start",
        type=positive_int,
        metavar="N",
        help="start from the chunk before: after an episode's first, only the last N steps",
    )


def add_lead(parser: Any) -> None:
    """The options of what is made of executed actions; `load_policy` hands them to `tsad.load`."""
    parser.add_argument(
        "--lead",
        type=lead,
        metavar="G",
        help="move executed actions further from what the chunk before foresaw, by G of the way",
    )
    parser.add_argument(
        "--smoothing",
        action="store_const",
        const=True,
        help="weigh each executed action with its neighbours, 1/4, 1/2, 1/4",
    )


def add_reuse_images(parser: Any) -> None:
    """The options of policies that see; `load_policy` hands it to `tsad.load`."""
    parser.add_argument(
        "--reuse-images",
        type=reuse_images,
        metavar="BOUND",
        help="don't encode images that differ by so few levels from one that is encoded",
    )
    parser.add_argument(
        "--vision-precision",
        choices=VISION_PRECISIONS,
        help="of the image encoders (default: float32)",
    )


def add_fitted(parser: Any) -> None:
    """The option of what `tsad fit` found; `load_policy` hands it to `tsad.load`."""
    parser.add_argument(
        "--fitted", metavar="FILE", help="what tsad fit found for this sampler and plan"
    )
    parser.add_argument(
        "--guard",
        metavar="FILE",
        help="start anew, densely, where an observation is not to be expected: tsad fit --guard",
    )


def timed_on(measured: Mapping[str, Any]) -> str:
    """A preset's time and the processor that it is of, in words; empty without a time."""
    milliseconds, cpu = measured.get("milliseconds"), measured.get("cpu")
    if not isinstance(milliseconds, int | float):  # it is free what a preset says of itself
        return ""
    where = "on an unknown processor" if cpu is None else f"on {cpu}"
    threads = measured.get("threads")
    where += "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"
    here = cpu_name()
    other = "" if cpu in (None, here) else f" (not here: {here})"
    return f"{milliseconds:.2f} ms a chunk {where}{other}"


def preset_note(preset: Preset) -> str:
    """A line for reports of what a preset was chosen for; empty if nothing was measured."""
    text = timed_on(preset.measured)
    return f"preset {preset.name} was timed at {text}" if text else ""


# of a command that plays rows of settings: what others ask for all of them
NOT_ASKED: dict[str, Any] = {
    "sampler": None, "steps": None, "spacing": None, "precision": "auto", "plan": None,
    "planner": None, "sparsity": None, "preset": None, "n_action_steps": None, "warm_start": None,
    "noise": 0, "realtime": None, "latency": None, "disturb": None, "resume": True,
}  # fmt: skip


def add_workers(parser: argparse.ArgumentParser) -> None:
    """--jobs and --ray."""
    group = parser.add_argument_group("who plays; never changes the results, but for times")
    group.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="N processes, which share the CPUs (default: 1; with --ray: one per CPU)",
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="processes of a Ray cluster: $RAY_ADDRESS, or the one on this machine, or a new one; "
        "tsad and the policy's files must be where they run; --threads each, default 1",
    )


def add_overwrite(parser: Any, what: str = "an existing --out") -> None:
    """The option without which nothing that exists is replaced."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def check_result(
    out: Path, names: Sequence[str], facts: Mapping[str, Any], *, overwrite: bool
) -> None:
    """FileExistsError if files of these names are there, and not by an earlier run of this.

    The first holds its results, a JSON object: ``facts`` are what it must say. It may tell the
    SHA-256 of others as ``written``.
    """
    there = [name for name in names if os.path.lexists(out / name)]
    for name in there:
        output_file(out / name, overwrite=True)
    if overwrite or not there:
        return
    try:
        old = read_any_json(out / names[0])
        wrong = [key for key, value in facts.items() if old[key] != value]
        written = old.get("written", {}).items()
        wrong += [n for n, digest in written if n in there and sha256(out / n) != digest]
    except (OSError, ValueError, KeyError, TypeError):
        wrong = ["content"]
    if wrong:
        other = out / (wrong[0] if wrong[0] in there else there[0])
        raise FileExistsError(
            f"{other} exists, and is of another kind or run ({', '.join(wrong)}); fix: another "
            "--out, or --overwrite"
        )


def add_simulator(parser: argparse.ArgumentParser, *, without: str = "") -> None:
    """The simulator and the policy that plays in it; ``without``: what runs if there is none."""
    parser.add_argument(
        "simulator", metavar="SIMULATOR", nargs="?", help=f"the simulator: pusht{without}"
    )
    parser.add_argument(
        "--simulator",
        dest="own_simulator",
        metavar="MODULE:FACTORY",
        help="one of your own: FACTORY() of MODULE, which is here or installed, makes a "
        "tsad.sim.Environment (docs/own_robot.md)",
    )
    parser.add_argument(
        "--policy",
        metavar="SRC",
        help="bundled name, tsad folder or checkpoint (default: the simulator's bundled policy)",
    )


def check_simulator(args: argparse.Namespace) -> None:
    """Finds the simulator of `add_simulator`; UsageError if there is no such one."""
    from tsad import sim
    from tsad.sim.simulators import register_own

    own = args.own_simulator
    if own is not None:
        if args.simulator not in (None, own):
            raise UsageError(
                f"argument --simulator: got {own!r} beside {args.simulator!r}; name one simulator"
            )
        if ":" in own or own not in sim.names():
            with argument("--simulator"):
                register_own(own, Path.cwd())
        args.simulator = own
    if args.simulator is None:
        raise UsageError(
            f"argument SIMULATOR: expected one of {', '.join(sim.names())}, or your own with "
            "--simulator MODULE:FACTORY"
        )
    if args.simulator not in sim.names():
        hint = did_you_mean(args.simulator.lower(), sim.names())
        if os.path.exists(args.simulator):
            hint = f"; a policy is given by --policy {args.simulator}"
        raise UsageError(
            f"argument SIMULATOR: unknown simulator {args.simulator!r}; expected one of "
            f"{', '.join(sim.names())}, or your own with --simulator MODULE:FACTORY{hint}"
        )
    if args.policy is None and args.simulator not in bundled():
        raise UsageError(
            f"argument --policy: expected a policy for the simulator {args.simulator!r}: a tsad "
            "folder or a checkpoint"
        )


def policy_source(args: argparse.Namespace) -> str:
    """The policy that is asked for: --policy, or the simulator's bundled one."""
    return str(args.simulator if args.policy is None else args.policy)


def experiment_of(args: argparse.Namespace, *, resume: bool) -> Experiment:
    """What the options of `add_simulator`, `add_workers` and others ask for."""
    same = ("simulator", "seeds", "first_seed", "lanes", "jobs", "ray", "device", "threads")
    return Experiment(
        policy_source(args),
        own=args.own_simulator is not None,
        overwrite=args.overwrite,
        resume=resume,
        **{name: getattr(args, name) for name in same},
    )


def check_source(args: argparse.Namespace, name: str = "--policy") -> None:
    """UsageError if there is no policy: a row of --settings would be to blame for it."""
    with argument(name):
        read_policy(policy_source(args))


def load_plan(path: str, name: str) -> Plan:
    """A plan file; UsageError if it is missing or not one."""
    with argument(name):
        return read_plan(path)


def seed_range(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    return f"seed {seeds[0]}" if seeds[0] == seeds[-1] else f"seeds {seeds[0]} to {seeds[-1]}"


def span(interval: Sequence[float] | None) -> str:
    """An interval of differences in a table; empty where there are too few to tell."""
    return "" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def difference(facts: Mapping[str, Any]) -> list[str]:
    """Two cells: a row's difference to another, and its interval."""
    return [f"{facts['mean_difference']:+.3f}", span(facts["simultaneous"])]


def too_few(n: int, what: str) -> str:
    """Why there is no interval of ``n`` of them."""
    from tsad.statistics import LEAST_EPISODES

    return f"no 95 % interval: {n} {what}, it takes {LEAST_EPISODES}"


def number(value: float | None, digits: int) -> str:
    """A cell of a table; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right; row 0 is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
