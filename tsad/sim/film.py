"""Rollouts side by side as an animated GIF, on one clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsad._extras import require
from tsad.files import write_atomically

SIZE = 288  # pixels of one scene
CAPTION, CLOCK = 88, 28  # pixels above and below it
GAP = 8
SPEED = 3  # times faster than the robot: the picture says so
TICK_MS = 30  # of a picture; GIFs count in hundredths of a second
HOLD_MS = 2500  # of the last one
INK, PAPER = (30, 30, 30), (255, 255, 255)
LAMPS = {"waits": (213, 94, 0), "moves": (0, 158, 115), "is done": (153, 153, 153)}


class Moment(NamedTuple):
    """What is seen from a time on: the scene, and what the robot does."""

    seconds: float
    frame: NDArray[np.uint8]
    note: str
    state: str
    waited: float


@dataclass
class Reel:
    """One episode in the robot's time: while the policy makes a chunk, the robot waits."""

    heading: str
    remark: str
    step_seconds: float
    moments: list[Moment] = field(default_factory=list)
    steps: int = 0
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the episode has lasted: its steps, and all that was waited."""
        return self.steps * self.step_seconds + self.waited

    def step(self, steps: int, frame: NDArray[np.uint8], note: str) -> None:
        """So many steps are done; the scene, uint8 (SIZE, SIZE, 3), and what to say of it."""
        self.steps = steps
        self.moments.append(Moment(self.seconds, frame, note, "moves", self.waited))

    def wait(self, seconds: float) -> None:
        """The policy takes so long for the next chunk."""
        now = self.moments[-1]
        self.moments.append(now._replace(seconds=self.seconds, state="waits"))
        self.waited += seconds

    def end(self, note: str) -> None:
        """The episode is over."""
        now = self.moments[-1]
        self.moments.append(now._replace(note=note, state="is done", waited=self.waited))

    def at(self, seconds: float) -> Moment:
        """What is seen at a time."""
        times = [moment.seconds for moment in self.moments]
        moment = self.moments[max(bisect_right(times, seconds) - 1, 0)]
        if moment.state == "waits":
            return moment._replace(waited=moment.waited + seconds - moment.seconds)
        return moment


def _picture(reels: Sequence[Reel], seconds: float, modules: Any) -> Any:
    """All reels at one time of the clock."""
    image_module, draw_module, font_module = modules
    width = len(reels) * SIZE + (len(reels) - 1) * GAP
    picture = image_module.new("RGB", (width, CAPTION + SIZE + CLOCK), PAPER)
    draw = draw_module.Draw(picture)
    large, small = font_module.load_default(17), font_module.load_default(13)
    for column, reel in enumerate(reels):
        moment, left = reel.at(seconds), column * (SIZE + GAP)
        draw.text((left + 6, 4), reel.heading, fill=INK, font=large)
        lines = (reel.remark, moment.note, f"waited for actions {moment.waited:.2f} s in all")
        for number, text in enumerate(lines):
            draw.text((left + 6, 27 + 19 * number), text, fill=INK, font=small)
        draw.ellipse((left + SIZE - 24, 8, left + SIZE - 10, 22), fill=LAMPS[moment.state])
        draw.text((left + SIZE - 30, 15), moment.state, fill=INK, font=small, anchor="rm")
        picture.paste(image_module.fromarray(moment.frame), (left, CAPTION))
    clock = f"{seconds:.1f} s on the robot's clock, shown {SPEED} times as fast"
    place = (width / 2, CAPTION + SIZE + CLOCK / 2)
    draw.text(place, clock, fill=INK, font=small, anchor="mm")
    return picture


def save_gif(reels: Sequence[Reel], path: Path) -> None:
    """Write the reels side by side as a GIF, whole or not at all.

    Raises:
        ImportError: Pillow is not installed; the message names the extra.
    """
    modules = tuple(
        require(f"PIL.{name}", extra="sim", purpose="a GIF")
        for name in ("Image", "ImageDraw", "ImageFont")
    )
    tick, end = SPEED * TICK_MS / 1e3, max(reel.seconds for reel in reels)
    times = [*np.arange(0.0, end, tick), end]
    pictures = [_picture(reels, seconds, modules) for seconds in times]
    # One palette for all pictures, of a few of them: the colours are few, and none may flicker.
    few = [np.asarray(pictures[index * (len(pictures) - 1) // 4]) for index in range(5)]
    palette = modules[0].fromarray(np.concatenate(few)).quantize(256)
    pictures = [picture.quantize(palette=palette, dither=0) for picture in pictures]
    write_atomically(
        path,
        lambda stream: pictures[0].save(
            stream,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            loop=0,
            optimize=False,
            duration=[TICK_MS] * (len(pictures) - 1) + [HOLD_MS],
        ),
    )
