"""What keeps a long training safe: its saved state, its clock, and signals that wait for a step."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tsad.checkpoint import STATE_FILE
from tsad.files import Lock, make_folder, write_atomically

if TYPE_CHECKING:
    from typing_extensions import Self

STATE_VERSION = 1
CURVE_FILE = "curve.jsonl"


class InterruptedTrainingError(Exception):
    """Training was stopped by a signal; its state is saved."""


class Budget(Protocol):
    """What the settings of every training have. ``minutes`` or ``steps`` ends it: the first."""

    @property
    def minutes(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay(self) -> float: ...


def budget_checks(settings: Any) -> dict[str, tuple[bool, str]]:
    """What `check_settings` asks of the settings that every training has."""
    if settings.minutes is None and settings.steps is None:
        raise ValueError("minutes, steps: expected one of them, got none; e.g. 60 minutes")
    return {
        "batch": (settings.batch >= 1, "at least 1"),
        "lr": (0 < settings.lr < 1, "a number in (0, 1)"),
        "weight_decay": (0 <= settings.weight_decay < 10, "a number from 0"),
        "warmup": (settings.warmup >= 0, "at least 0"),
        "decay": (0 <= settings.decay <= 1, "a share of the training, 0 to 1"),
        "ema": (0 <= settings.ema < 1, "a number in [0, 1)"),
        "val_episodes": ((settings.val_episodes or 0) >= 0, "at least 0"),
        "minutes": (settings.minutes is None or settings.minutes > 0, "above 0"),
        "steps": (settings.steps is None or settings.steps >= 1, "at least 1"),
    }


class SavedSettings:
    """Settings, a dataclass, that a saved state has as ``asdict`` gave them."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings; what another version knew is left out."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in data.items() if name in known})


def check_settings(settings: Any, checks: Mapping[str, tuple[bool, str]]) -> None:
    """``ValueError`` names the first setting that does not fit."""
    for name, (good, expected) in checks.items():
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {getattr(settings, name)!r}")


def learning_rate(settings: Budget, step: int, fraction: float) -> float:
    """Rate of a step, from 0, at ``fraction`` of the budget: warm-up, hold, linear decay to 0."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    left = max(0.0, 1.0 - fraction)
    fall = min(1.0, left / settings.decay) if settings.decay else float(left > 0)
    return settings.lr * warm * fall


def find_device(device: str) -> torch.device:
    """A device of torch by name; "auto" is the GPU if there is one. ``ValueError`` if it isn't."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        found = torch.device(name)
        if device != "auto":
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"device: got {device!r}, which torch {torch.__version__} can't use here ({why}); "
            "expected one that it can; auto takes the GPU if there is one, else the CPU"
        ) from error
    return found


def hardware(device: torch.device) -> str:
    """What it was trained on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)"


@torch.no_grad()
def move_average(average: Iterable[Tensor], weights: Iterable[Tensor], keep: float) -> None:
    """Move averaged weights towards the current ones: ``keep`` of them stays."""
    targets: list[Tensor] = list(average)
    torch._foreach_lerp_(targets, list(weights), 1 - keep)


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


R = TypeVar("R", bound=Any)  # a dataclass, one line of the curve


class Training(ABC, Generic[R]):
    """A training in a folder that can be stopped anywhere: its steps, clock and curve.

    A subclass says what a step, an evaluation, the saved state and the result are.
    """

    def __init__(self, out: str | os.PathLike[str], settings: Budget) -> None:
        self.out, self._budget = Path(out), settings
        self.step, self.seconds, self.average_loss = 0, 0.0, math.nan
        self.curve: list[R] = []

    @abstractmethod
    def train_step(self) -> float:
        """One optimiser step; the loss before it."""

    @abstractmethod
    def evaluate(self) -> R:
        """A line of the curve, now."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that a training goes on from."""

    @abstractmethod
    def write(self, folder: Path | None = None) -> Any:
        """Write the result (default: to ``out``); what `fit` returns."""

    @property
    def fraction(self) -> float:
        """Share of the budget that is used."""
        s = self._budget
        by_step = self.step / s.steps if s.steps else 0.0
        by_clock = self.seconds / (60 * s.minutes) if s.minutes else 0.0
        return max(by_step, by_clock)

    def note_loss(self, loss: Tensor) -> float:
        """Count a step and its loss in; ``RuntimeError`` if it is no number."""
        self.step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(
                f"the loss is {value} at step {self.step}; lower lr (now {self._budget.lr:g}) and "
                f"go on from the last saved state in {self.out}"
            )
        first = math.isnan(self.average_loss)
        self.average_loss = value if first else 0.99 * self.average_loss + 0.01 * value
        return value

    def fit(
        self,
        *,
        report_every: int = 250,
        save_every: int = 1000,
        keep_every: int | None = None,
        on_step: Callable[[Any], None] | None = None,
        on_report: Callable[[R], None] | None = None,
    ) -> Any:
        """Train until the budget is used, then `write` the result, which is returned.

        Every ``keep_every`` steps the averaged weights go to a folder of their own in ``out``, so
        that a simulator can tell which are best. After SIGINT or SIGTERM the state is saved and
        ``InterruptedTrainingError`` raised.
        """
        with Lock(make_folder(self.out) / STATE_FILE):
            with caught_signals() as received:
                clock = Clock()
                while self.fraction < 1:
                    self.train_step()
                    self.seconds += clock.lap()
                    if on_step:
                        on_step(self)
                    if self.step % report_every == 0 or self.fraction >= 1:
                        self._report(on_report)
                    if keep_every and self.step % keep_every == 0 and self.fraction < 1:
                        self.write(self.out / f"step-{self.step:06d}")
                    if self.step % save_every == 0 or self.fraction >= 1 or received:
                        self.save()
                    if received:
                        raise InterruptedTrainingError
            return self.write()

    def _report(self, on_report: Callable[[R], None] | None) -> None:
        report = self.evaluate()
        self.curve.append(report)
        lines = "".join(json.dumps(asdict(r)) + "\n" for r in self.curve)
        write_atomically(self.out / CURVE_FILE, lines.encode())
        if on_report:
            on_report(report)

    def progress_state(self) -> dict[str, Any]:
        """The part of a state that is every training's."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "seconds": self.seconds,
            "average_loss": self.average_loss,
            "curve": [asdict(r) for r in self.curve],
        }

    def restore_progress(self, state: Mapping[str, Any], report: type[R]) -> None:
        """Take that part over."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.average_loss = float(state["average_loss"])
        self.curve = [report(**r) for r in state["curve"]]

    def save(self) -> None:
        """Write the state, whole or not at all."""
        save_state(self.out / STATE_FILE, self.state())
