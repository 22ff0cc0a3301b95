"""Errors that are the user's, in the words of the command line, and numbers that it takes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tsad.rule import Rule, rule_of
from tsad.setting import MAX_LEAD, MAX_REUSE


class UsageError(Exception):
    """The user asked for something that cannot be; the message names the argument and the fix."""


class InterruptedRunError(Exception):
    """Ctrl-C, with a message that says what was kept and how to go on."""


# The library's messages begin with the name of its own argument; here it has another.
OPTIONS = {
    "device": "--device",
    "disturb": "--disturb",
    "fitted": "--fitted",
    "guard": "--guard",
    "lead": "--lead",
    "n_action_steps": "--n-action-steps",
    "num_inference_steps": "--steps",
    "plan": "",
    "planner": "",
    "precision": "--precision",
    "preset": "--preset",
    "reuse_images": "--reuse-images",
    "rule": "--rule",
    "sampler": "--sampler",
    "smoothing": "--smoothing",
    "source": "",
    "start": "--start",
    "sparsity": "",
    "threads": "--threads",
    "timestep_spacing": "--spacing",
    "vision_precision": "--vision-precision",
    "warm_start": "--warm-start",
}


RULE = {"rule": "--rule"}
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


lead = real(lambda gain: 0 <= gain <= MAX_LEAD, f"a number from 0 (none) to {MAX_LEAD:g}, e.g. 0.2")


reuse_images = real(
    lambda bound: 0 <= bound <= MAX_REUSE,
    f"a number of levels from 0 (none) to {MAX_REUSE:g}, e.g. 2",
)


def disturbance(text: str) -> str:
    """An argparse type: words of `tsad.sim.Disturbance`."""
    from tsad.sim import Disturbance

    try:
        Disturbance.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def rule(text: str) -> Rule:
    """An argparse type: words of `tsad.rule`."""
    try:
        found = rule_of(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("rule: ")) from None
    assert found is not None
    return found
