"""The command line: `tsad COMMAND`, one module of `tsad.commands` each.

A command module offers `add_parser(subparsers)`, which sets `run`, and `run(args) -> int`. Anything
heavy is imported inside `run`, so `--help` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from tsad._extras import MissingExtraError
from tsad._program import EXIT_INTERRUPTED, interruptible
from tsad.commands.common import (
    EXIT_FAILURE,
    EXIT_USAGE,
    InterruptedRunError,
    UsageError,
    noted,
)
from tsad.commands.parser import Formatter, Parser

COMMANDS = (
    "demo",
    "eval",
    "collect",
    "plan",
    "tune",
    "bench",
    "show",
    "info",
    "fit",
    "certify",
    "convert",
    "generate",
    "train_policy",
    "train_pruner",
)

DESCRIPTION = """\
Diffusion action heads with test-time sparsity: before each chunk of actions, most of the network's
residual blocks are replaced by cached results."""

EPILOG = """\
examples:
  tsad demo                                       see a policy push the T, dense and sparse
  tsad info pusht                                 what is in a policy, and this machine
  tsad bench pusht --sparsity 0.9                 time it here
  tsad eval pusht --seeds 50 --sparsity 0.9       score it in the simulator
  tsad collect pusht --out recorded               rollouts to calibrate and search plans on
  tsad plan --help                                static plans: measure, make, search, import
  tsad train-pruner --help                        plans made anew for every observation
  tsad fit --help                                 what few steps lose, mended
  tsad tune pusht --out tuned                     the fastest settings that lose nothing
  tsad certify mine/ --out certificate            parity, times and losses for a model card
  tsad convert policy.ckpt policy/                a Diffusion Policy checkpoint to a tsad folder
  tsad COMMAND --help                             options and examples of one command

exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted"""


class _Version(argparse.Action):
    """Prints the version; imported only then, so that `--help` needs no built extension."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import tsad

        print(f"tsad {tsad.__version__}")
        parser.exit()


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="tsad", description=DESCRIPTION, epilog=EPILOG, formatter_class=Formatter)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands"
    )
    for name in COMMANDS:
        importlib.import_module(f"tsad.commands.{name}").add_parser(subparsers)
    return parser


def _prepare(name: str) -> None:
    """Make a standard stream take any text, whatever the terminal; a closed one leads nowhere."""
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, io.StringIO())
    elif hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _without_tilde(word: str) -> str:
    """A word with ~ put in, as shells don't in --out=~/plan.npz."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(value)


def _give_up_output() -> None:
    """Drop what can't be written to standard output: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None, parser: Parser | None = None) -> int:
    """Run one command; returns its exit code. Wrong options leave by SystemExit(2).

    ``parser``: another program's, of the same kind.
    """
    for name in ("stdout", "stderr"):
        _prepare(name)
    prog = "tsad"
    try:
        try:
            words = sys.argv[1:] if argv is None else argv
            parser = parser or build_parser()
            args = parser.parse_args([_without_tilde(word) for word in words])
            prog = args.prog
            with interruptible(), noted():
                return int(args.run(args))
        finally:
            sys.stdout.flush()  # here, where it can fail
    except UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (KeyboardInterrupt, InterruptedRunError) as error:
        detail = f"; {error}" if isinstance(error, InterruptedRunError) else ""
        print(f"\n{prog}: interrupted{detail}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left (`tsad show ... | head`)
        _give_up_output()
        return EXIT_FAILURE
    except (MissingExtraError, OSError, RuntimeError, MemoryError) as error:
        print(f"{prog}: error: {str(error) or type(error).__name__}", file=sys.stderr)
        _give_up_output()
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
