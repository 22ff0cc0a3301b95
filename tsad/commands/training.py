"""What the commands that train share: settings as options, resuming, the progress of a fit."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsad._extras import require
from tsad.commands.common import (
    InterruptedRunError,
    UsageError,
    argument,
    integer,
    natural,
    positive_int,
    real,
)
from tsad.evaluation.progress import Progress
from tsad.files import is_temporary, output_folder

number, steps = real(lambda value: True, "a number"), integer(1, 10**9)

Begin = Callable[[argparse.Namespace], Any]
Plan = Callable[[Any, str], str]
# option, type, help
Option = tuple[str, Any, str]
Options = tuple[Option, ...]

BUDGET_OPTIONS: Options = (
    ("minutes", real(lambda t: 0 <= t < 1e6, "minutes, e.g. 120"), "train that long"),
    ("steps", steps, "train that many steps"),
)
BUDGET = ("minutes", "steps")


def add_settings(parser: Any, options: Options, *, report_every: int) -> Any:
    """The options of every training, and its settings as a group, which is returned.

    An option that is not given leaves its setting out of the namespace: its default is that of the
    settings' class.
    """
    parser.add_argument("--out", required=True, metavar="DIR", help="the tsad folder to make")
    parser.add_argument("--resume", action="store_true", help="go on with the training in DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--threads", type=positive_int, metavar="T", help="of torch on the CPU")
    parser.add_argument(
        "--report-every",
        type=steps,
        default=report_every,
        metavar="N",
        help=f"measure the errors every N steps (default: {report_every})",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    group = parser.add_argument_group("settings", argument_default=argparse.SUPPRESS)
    for name, kind, text in options:
        whole = kind in (positive_int, steps, natural)
        metavar = "DIR" if kind is str else "N" if whole else "X"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    return group


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that are on the command line."""
    keys = [name.replace("-", "_") for name in names]
    return {key: getattr(args, key) for key in keys if hasattr(args, key)}


@contextlib.contextmanager
def named(names: Iterable[str], other: str, **more: str) -> Iterator[None]:
    """Errors of the training inside name the option; those that no option is at fault for, other.

    ``more``: settings that are called otherwise, and what names them.
    """
    options = {name.replace("-", "_"): f"--{name}" for name in (*names, "device")}
    options |= {"minutes, steps": "--minutes, --steps"} | more
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error).removeprefix("settings: ").removeprefix("network.")
        name, _, rest = text.partition(": ")
        where, text = (options[name], rest) if name in options else (other, text)
        raise UsageError(f"argument {where}: {text}") from error


def check_new(out: str) -> None:
    """UsageError if a training can't begin in this folder."""
    with argument("--out"):
        folder = output_folder(out)
    if folder.exists() and not all(map(is_temporary, folder.iterdir())):
        raise UsageError(
            f"argument --out: {out!r} exists and isn't empty; choose another folder, or go on "
            "with the training in it by --resume"
        )


def resumed_settings(out: str, settings: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """The budget given anew; UsageError if other words contradict the settings of the training."""
    for name, value in words.items():
        if name not in BUDGET and value != getattr(settings, name):
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"argument {option}: got {value}, but the training in {out} has "
                f"{getattr(settings, name)}; leave it out, or begin anew in another folder"
            )
    return {name: words[name] for name in BUDGET if name in words}


def budget_text(settings: Any) -> str:
    """For people: when a training ends."""
    budget = [f"{settings.minutes:g} minutes"] if settings.minutes else []
    budget += [f"{settings.steps} steps"] if settings.steps else []
    return " or ".join(budget)


def begin(args: argparse.Namespace, command: str, fresh: Begin, resumed: Begin, plan: Plan) -> Any:
    """The trainer of a command, whose plan is printed."""
    torch = require("torch", extra="train", purpose=command)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainer = resumed(args) if args.resume else fresh(args)
    if not args.json:
        begun = f"from step {trainer.step}" if trainer.step else "from the beginning"
        print(plan(trainer, begun), flush=True)
    return trainer


def fit(trainer: Any, args: argparse.Namespace, command: Sequence[str], **options: Any) -> Any:
    """Run the fit under a progress bar. After Ctrl-C, ``command`` is what goes on."""
    from tsad.training.running import InterruptedTrainingError

    done = round(1000 * trainer.fraction)
    with Progress(1000, "train", unit="", done=done) as progress:
        last = ""

        def on_step(trainer: Any) -> None:
            parts = min(1000, round(1000 * trainer.fraction)) - progress.done
            if parts > 0:
                progress.update(f"step {trainer.step}{last}", parts)

        def on_report(report: Any) -> None:
            nonlocal last
            last = f", at {report.step}: {report.text()}"

        try:
            return trainer.fit(
                report_every=args.report_every, on_step=on_step, on_report=on_report, **options
            )
        except InterruptedTrainingError:
            raise InterruptedRunError(
                f"saved at step {trainer.step}, {trainer.fraction:.0%} of the training; "
                f"go on with: {shlex.join(command)}"
            ) from None


def load_resumed(out: str | Path) -> dict[str, Any]:
    """The saved state of a training; UsageError if there is none."""
    from tsad.training.running import load_state

    with argument("--resume"):
        return load_state(out)
