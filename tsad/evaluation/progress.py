"""Progress of long work: a bar on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A progress bar on standard error; in a log file, a line now and then.

    Without a ``unit`` the share of ``total`` is shown, and no count. Of ``brief`` work a log says
    nothing before it has taken long.
    """

    LOG_SECONDS, BAR_SECONDS = 15.0, 0.1

    def __init__(
        self, total: int, label: str, *, unit: str, done: int = 0, brief: bool = False
    ) -> None:
        self._brief = brief
        self.total, self.label, self.unit, self.done = total, label, unit, done
        self._note, self._part = "", 0.0
        self._begin = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            # rich comes with the extras; without it the lines of a log do.
            with contextlib.suppress(ModuleNotFoundError):
                self._bar = self._rich()

    def _rich(self) -> Any:
        from rich import console, progress

        def text(form: str) -> progress.TextColumn:
            return progress.TextColumn(form, markup=False)

        count = " {task.fields[done]}/{task.total} {task.fields[unit]}"

        bar = progress.Progress(
            text("{task.description}"),
            progress.BarColumn(),
            text("{task.percentage:.0f}%" + count * bool(self.unit)),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            text("{task.fields[note]}"),
            console=console.Console(file=sys.stderr),
            # Nothing happens between two updates: what runs there may be timed.
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.add_task(
            self.label,
            total=self.total,
            completed=self.done,
            done=self.done,
            unit=self.unit,
            note="",
        )
        bar.start()
        return bar

    def update(self, note: str = "", n: int = 1) -> None:
        """`n` more are done; `note` is shown beside."""
        self.done, self._note = self.done + n, note
        self._show()

    def part(self, part: float) -> None:
        """So much of further ones is done, in their unit: of many at once, their sum."""
        self._part = part
        self._show()

    def _show(self) -> None:
        now, ready = time.monotonic(), self.done >= self.total
        wait = self.LOG_SECONDS if self._bar is None else self.BAR_SECONDS
        if now - self._said < wait and (self._brief or not ready):
            return
        self._said = now
        position = min(self.done + self._part, self.total)
        if self._bar is not None:
            self._bar.update(0, completed=position, done=self.done, note=self._note, refresh=True)
            return
        share = "100%" if ready else f"{position / self.total:.0%}"
        note = f", {self._note}" if self._note else ""
        count = f"{self.done} of {self.total} {self.unit}" + ("" if ready else f" ({share})")
        text = f"{self.label}: {count if self.unit else share}"
        print(f"{text}, {now - self._begin:.0f} s{note}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class EpisodeProgress(Progress):
    """Of episodes; chunks of those under way count, by how many the longest episode has."""

    def __init__(self, total: int, label: str, *, longest: int, done: int = 0) -> None:
        super().__init__(total, label, unit="episodes", done=done)
        self._longest, self._chunks = longest, 0

    def chunks(self, n: int) -> None:
        """So many more were played."""
        self._chunks += n
        self.part(self._chunks / self._longest)

    def episode(self, chunks: int, note: str) -> None:
        """One of so many chunks, all counted before, has ended."""
        self._chunks -= chunks
        self._part = self._chunks / self._longest
        self.update(note)
