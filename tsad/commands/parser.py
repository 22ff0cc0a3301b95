"""The parser of the command line: what is mistyped is answered by the command it was meant for."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples; room for long option names."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, **options})
        self._action_max_length = 16  # argparse forgets that sub-commands are indented


class Parser(argparse.ArgumentParser):
    """Of a command, and of its sub-commands; sets ``prog`` to the name of the innermost.

    argparse reports options that no sub-command knows by the usage of the whole program, after what
    is missing, and suggests nothing.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but that nothing is left over."""
        words = sys.argv[1:] if args is None else list(args)
        self._check_options(words)
        found, more = super().parse_known_args(words, namespace)
        if more:
            self.error(f"unexpected argument {more[0]!r} ({self.prog} --help says what it takes)")
        found.prog = getattr(found, "prog", self.prog)
        return found, more

    def _check_options(self, words: Sequence[str]) -> None:
        """An option that is unknown is said before what is missing: it may be the same one."""
        known = self._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows are no options, or a sub-command's
            if not word.startswith("-") or word == "-" or " " in word or _is_number(word):
                continue
            if name in known or (name.startswith("--") and any(k.startswith(name) for k in known)):
                continue
            more = "options follow COMMAND" if self._subparsers else f"{self.prog} --help lists all"
            self.error(f"unknown option {name}{did_you_mean(name, known)} ({more})")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"got {value!r}, expected one of {', '.join(known)}"
                f"{did_you_mean(str(value), known)}",
            )

    def _print_message(self, message: str, file: Any = None) -> None:
        """Unlike argparse's it does not hide that nothing could be written."""
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Exit code 2, after the usage of this command."""
        missing = "the following arguments are required: "
        if message.startswith(missing):
            message = f"missing {message[len(missing) :]} ({self.prog} --help has examples)"
        super().error(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names what resembles a word most; empty if nothing does."""
    names = {name.lstrip("-"): name for name in known}  # that dashes are alike says nothing
    word = word.lstrip("-")
    close = [name for name in names if word and name.startswith(word)]
    close = close or [name for name in names if sorted(name) == sorted(word)]  # --rl for --lr
    close = close or difflib.get_close_matches(word, names, 1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
