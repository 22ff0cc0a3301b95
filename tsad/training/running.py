"""What keeps a long training safe: its saved state, its clock, and signals that wait for a step."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tsad.files import write_atomically

STATE_FILE = "training.pt"
STATE_VERSION = 1


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all: an interrupted write leaves the old one valid."""
    write_atomically(path, lambda stream: torch.save(dict(state), stream))


def load_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a folder, read without running code in it; ``ValueError`` if it isn't one."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the state of a training to resume, found nothing; start one first"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # torch raises many kinds for damaged files
        raise ValueError(f"{path}: expected a training state, got another ({error})") from None
    if version != STATE_VERSION:
        raise ValueError(f"{path}: expected version {STATE_VERSION}, got {version!r}; train anew")
    return state


class Clock:
    """Seconds between laps, without those in which the process was stopped."""

    _SLACK, _FACTOR = 5.0, 10.0

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._usual: float | None = None

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        if self._usual is None:  # the first lap may compile; there is nothing to compare it with
            self._usual = elapsed
            return elapsed
        elapsed = min(elapsed, self._SLACK + self._FACTOR * self._usual)
        self._usual += 0.1 * (elapsed - self._usual)
        return elapsed


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM until left, so that a step is never cut; the second one cuts."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step ...", file=sys.stderr)

    try:
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
