"""Ctrl-C while `tsad` starts and ends: what it imports is nothing to lose, so it leaves at once.

An exception in the middle of imports would be a traceback, or be lost in a callback of Python's
own. The package imports this first, which is enough; but only its own command line is stopped so.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

EXIT_INTERRUPTED = 130
PROGRAMS = ("tsad", "tsad.gpu_check")


def _leave(number: int, frame: object) -> None:
    os.write(2, b"\ntsad: interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _is_program() -> bool:
    """Whether this process is `python -m tsad`, about to run it, or the script `tsad`."""
    argument: str = getattr(sys, "argv", [""])[0]
    if argument == "-m":
        return any(part.removeprefix("-m") in PROGRAMS for part in sys.orig_argv)
    return os.path.splitext(os.path.basename(argument))[0] == "tsad"


def _begin() -> None:
    """What the caller of `tsad` ignores stays ignored."""
    if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # another thread than the main one: signals are not its affair
            signal.signal(signal.SIGINT, _leave)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C is KeyboardInterrupt, as ever."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


_begin()
