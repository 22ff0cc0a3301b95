"""Reading JSON objects key by key: what is wrong is named, with the fix; and limits of sizes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Far above any policy in use: a corrupt number becomes an error, not an exhausted machine.
MAX_HORIZON = 4096
MAX_OBS_STEPS = 255
MAX_DIM = 65536
MAX_LAYERS = 256
MAX_HEADS = 256
MAX_WIDTH = 16384
MAX_TIMESTEPS = 100_000
MAX_COST = 2**53  # float64 counts exactly up to here
MAX_MAGNITUDE = 1e12  # of a number that goes into a network: TSAD_MAX_MAGNITUDE in csrc/tsad.h

Shapes = dict[str, tuple[int, ...]]


class Section:
    """A JSON object being read: methods take out a key and check it, ``done`` refuses the rest."""

    def __init__(self, data: Any, name: str, file: str) -> None:
        self.name = name
        self.file = file
        if not isinstance(data, Mapping):
            raise ValueError(
                f"{file}: {name or 'the file'}: expected a JSON object, got {_show(data)}; "
                'write it as { "key": value, ... }'
            )
        self.data: dict[Any, Any] = dict(data)
        self.known: list[str] = []

    def error(self, key: str, expected: str, got: Any, fix: str = "") -> ValueError:
        path = f"{self.name}.{key}" if self.name else key
        return ValueError(
            f"{self.file}: {path}: expected {expected}, got {_show(got)}; "
            f"{fix or 'correct this key'}"
        )

    def take(self, key: str, default: Any = None) -> Any:
        self.known.append(key)
        if key in self.data:
            return self.data.pop(key)
        if default is None:
            path = f"{self.name}.{key}" if self.name else key
            raise ValueError(
                f"{self.file}: {path}: expected this key, got nothing; add it "
                "(python -m pydoc tsad.config describes every key)"
            )
        return default

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.error(key, f"an integer from {low} to {high}", value)
        if not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return int(value)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.take(key, default)
        expected = f"a number above {low:g} and at most {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise self.error(key, expected, value)
        if not low < value <= high:  # false for NaN too
            raise self.error(key, expected, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, "true or false", value)
        return bool(value)

    def choice(
        self,
        key: str,
        choices: tuple[str, ...],
        default: str | None = None,
        fix: str = "choose one of these",
    ) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or value not in choices:
            named = ", ".join(f'"{choice}"' for choice in choices)
            raise self.error(key, f"one of {named}", value, fix)
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.take(key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise self.error(key, f"a list of {count} numbers", value)
        if len(value) != count:
            got = Text(f"a list of {len(value)}")
            raise self.error(key, f"a list of {count} numbers", got, "give one per dimension")
        for i, number in enumerate(value):
            bad = isinstance(number, bool) or not isinstance(number, int | float | np.number)
            if bad or not abs(_clamp(number)) <= MAX_MAGNITUDE:
                raise self.error(f"{key}[{i}]", f"a finite number up to {MAX_MAGNITUDE:g}", number)
        return tuple(float(number) for number in value)

    def done(self) -> None:
        if not self.data:
            return
        key = next(iter(self.data))
        close = difflib.get_close_matches(str(key), self.known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else "remove it"
        where = f" in {self.name}" if self.name else ""
        raise ValueError(
            f"{self.file}: unknown key {_show(key)}{where}: "
            f"expected only {', '.join(self.known)}; {hint}"
        )


class Text(str):
    """A description that error messages print without quotes."""


def _show(value: Any) -> str:
    if isinstance(value, Text):
        return str(value)
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    if len(text) > 80:
        text = text[:77] + "..."
    plain = value is None or isinstance(value, str | int | float)
    return text if plain else f"{text} ({type(value).__name__})"


def _clamp(number: Any) -> float:
    """A JSON integer may be too large for a float; make it infinite, which the caller refuses."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def interface(section: Section) -> dict[str, int]:
    """What every network has: how much it sees, predicts and executes."""
    most = {"horizon": MAX_HORIZON, "n_obs_steps": MAX_OBS_STEPS, "n_action_steps": MAX_HORIZON}
    most |= {"obs_dim": MAX_DIM, "action_dim": MAX_DIM}
    return {key: section.integer(key, 1, limit) for key, limit in most.items()}
