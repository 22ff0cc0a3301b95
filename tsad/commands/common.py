"""What the commands share: errors, options of a policy, progress, tables."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad._extras import MissingExtraError, package_versions
from tsad.arrays import read_any_json
from tsad.commands.parser import Formatter as Formatter
from tsad.commands.parser import did_you_mean
from tsad.config import SAMPLERS, TIMESTEP_SPACINGS
from tsad.files import output_file, sha256
from tsad.load import files_sha256 as files_sha256
from tsad.load import policy_folder, read_policy
from tsad.presets import Preset, check_clash, find_preset
from tsad.setting import Setting, read_plan
from tsad.setting import planner_name as planner_name

if TYPE_CHECKING:
    from tsad import Plan, SparsePolicy

EXIT_FAILURE, EXIT_USAGE = 1, 2


class UsageError(Exception):
    """The user asked for something that cannot be; the message names the argument and the fix."""


class InterruptedRunError(Exception):
    """Ctrl-C, with a message that says what was kept and how to go on."""


# The library's messages begin with the name of its own argument; here it has another.
OPTIONS = {
    "device": "--device",
    "n_action_steps": "--n-action-steps",
    "num_inference_steps": "--steps",
    "plan": "",
    "planner": "",
    "precision": "--precision",
    "preset": "--preset",
    "sampler": "--sampler",
    "source": "",
    "start": "--start",
    "sparsity": "",
    "threads": "--threads",
    "timestep_spacing": "--spacing",
    "warm_start": "--warm-start",
}
DIAL = {name: f"--{name}" for name in ("plan", "planner", "sparsity")}


@contextlib.contextmanager
def argument(name: str, options: Mapping[str, str] = OPTIONS) -> Iterator[None]:
    """Errors of the library inside are the user's: they name the argument, without a traceback.

    `options` are the names of the library's own arguments here.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        inner, colon, rest = text.partition(": ")
        if colon and inner in options:
            name, text = options[inner] or name, rest
        elif isinstance(error, OSError) and error.errno and error.filename is not None:
            text = f"{os.fsdecode(error.filename)!r} can't be read: {error.strerror}"
        raise UsageError(f"argument {name}: {text}") from error


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


def integer(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: an integer of a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            most_words = f" and at most {most}" if value > most else ""
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected an integer of at least {least}{most_words}"
            )
        return value

    return parse


def real(fits: Callable[[float], bool], expected: str) -> Callable[[Any], float]:
    """An argparse type: a finite number that fits."""

    def parse(text: Any) -> float:
        try:
            value = float(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


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
        help='"auto", "float32", "int16" or "int8"; "auto" is float32 on a CPU (default: auto)',
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


def setting_of(words: Mapping[str, Any], source: str) -> Setting:
    """What arguments, or a row of a settings file, say, or the preset that they name.

    UsageError if a preset isn't there, or other words contradict it.
    """
    asked, name = Setting.of(words), words.get("preset")
    if name is None:
        return asked
    with argument("--preset"):
        folder = policy_folder(source)
        preset = find_preset(folder, name, source)
        check_clash(preset, asked)
        for option in ("plan", "planner", "sparsity"):
            if getattr(asked, option) is not None:
                raise ValueError(
                    f"--{option}: got {getattr(asked, option)!r}, but the preset {name!r} decides "
                    "what is computed; leave out one of the two"
                )
        preset.load_plan()
        scheduler = read_policy(source)[0].scheduler
    # None where it is the policy's own: the same settings then go on with each other's episodes
    own = preset.timestep_spacing == scheduler.timestep_spacing
    return replace(preset, timestep_spacing=None) if own else preset


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
    if own is not None and args.policy is None:
        raise UsageError(
            f"argument --policy: expected a policy for the simulator {own!r}: a tsad folder or a "
            "checkpoint"
        )


def policy_source(args: argparse.Namespace) -> str:
    """The policy that is asked for: --policy, or the simulator's bundled one."""
    return str(args.simulator if args.policy is None else args.policy)


def check_source(args: argparse.Namespace) -> None:
    """UsageError if there is no policy: a row of --settings would be to blame for it."""
    with argument("--policy"):
        read_policy(policy_source(args))


def check_policy(args: argparse.Namespace, policy: SparsePolicy) -> int:
    """UsageError if the simulator of `check_simulator` can't be made, or the policy doesn't fit.

    Returns its longest episode, in steps.
    """
    from tsad import sim

    with argument("SIMULATOR" if args.own_simulator is None else "--simulator"):
        environment = sim.make(args.simulator)
    try:
        with argument("--policy"):
            sim.check(policy, environment)
        if getattr(args, "realtime", None) is not None and not hasattr(environment, "rest_action"):
            raise UsageError(
                f"argument --realtime: the simulator {args.simulator!r} has no rest_action, and "
                "with a delay nothing else is known to do at first; give it one "
                "(tsad.sim.Environment)"
            )
        return int(environment.max_steps)
    finally:
        environment.close()


def simulator_settings(name: str) -> dict[str, Any]:
    """What decides the results of a simulator: its name, versions, and the hash of your own."""
    from tsad import sim

    found = sim.facts(name)
    settings = {"simulator": name, "packages": package_versions(found.packages)}
    return settings | ({"simulator_sha256": found.source_sha256} if found.source_sha256 else {})


@contextlib.contextmanager
def playing(kept: Callable[[], str]) -> Iterator[None]:
    """However playing inside ends, the error says what was kept."""
    from tsad.sim.parallel import WorkerError
    from tsad.sim.simulators import describe

    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(kept()) from None
    except WorkerError as error:
        raise WorkerError(f"{error}; {kept()}") from None
    except (UsageError, MissingExtraError, MemoryError):
        raise
    except Exception as error:  # a simulator may be anybody's
        raise RuntimeError(f"{describe(error)}; {kept()}") from error


def load_policy(
    source: str,
    args: argparse.Namespace,
    *,
    name: str,
    lanes: int,
    setting: Setting | None = None,
    **more: Any,
) -> SparsePolicy:
    """`tsad.load` with the options of `add_policy_options`; UsageError names the argument.

    A setting is loaded in place of what the options say of it; `configure` sets the rest of it.
    """
    import tsad

    setting = Setting.of(vars(args)) if setting is None else setting
    options = {**setting.options(), "device": args.device, "threads": args.threads}
    with argument(name):
        return tsad.load(source, lanes=lanes, **options, **more)


def configure(policy: SparsePolicy, setting: Setting) -> None:
    """`Setting.apply`; UsageError names the argument."""
    with argument("--plan", DIAL):
        if setting.plan is None and setting.planner is not None:
            policy.planner = setting.planner
        if setting.plan is None:
            check_sparsity(policy, setting.sparsity or 0.0)
        setting.apply(policy)


def check_sparsity(policy: SparsePolicy, value: float) -> None:
    """``ValueError``, in this command line's words, beyond what the planner reaches."""
    if value > policy.max_sparsity:
        raise ValueError(
            f"sparsity: got {value:g}, but the planner {policy.planner!r} reaches "
            f"{policy.max_sparsity:.4g} at {policy.num_inference_steps} steps; "
            "use less, or more --steps"
        )


def load_plan(path: str, name: str) -> Plan:
    """A plan file; UsageError if it is missing or not one."""
    with argument(name):
        return read_plan(path)


def cpu_name() -> str:
    """The processor's marketing name, family and model, as well as this system tells them.

    A guest may be told "AMD EPYC", which half a dozen generations are.
    """
    with contextlib.suppress(OSError, KeyError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or platform.machine()


def sampler_name(policy: SparsePolicy) -> str:
    """The sampler in words, e.g. "ddpm, 100 steps"."""
    scheduler = policy.config["scheduler"]
    steps, run = scheduler["num_inference_steps"], policy.num_inference_steps
    return f"{scheduler['type']}, {f'the last {run} of ' if run < steps else ''}{steps} steps"


def seed_range(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    return f"seed {seeds[0]}" if seeds[0] == seeds[-1] else f"seeds {seeds[0]} to {seeds[-1]}"


def span(interval: Sequence[float] | None) -> str:
    """An interval of differences in a table; empty where there are too few to tell."""
    return "" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def too_few(n: int, what: str) -> str:
    """Why there is no interval of ``n`` of them."""
    from tsad.statistics import LEAST_EPISODES

    return f"no 95 % interval: {n} {what}, it takes {LEAST_EPISODES}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right; row 0 is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
