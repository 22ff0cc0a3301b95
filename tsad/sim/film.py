"""Rollouts side by side as an animated GIF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad._extras import require
from tsad.files import write_atomically

SIZE = 288  # pixels of one scene
CAPTION = 64  # pixels above it
GAP = 8
EVERY = 2  # environment steps per picture: 0.2 s of the robot's time
DELAY_MS = 60  # of a picture: three times as fast as the robot
HOLD_MS = 2500  # of the last one
INK, PAPER = (30, 30, 30), (255, 255, 255)


@dataclass
class Reel:
    """The pictures of one episode: scenes, and what the caption says at each."""

    heading: str
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, frame: NDArray[np.uint8], note: str) -> None:
        """Append one scene, uint8 (SIZE, SIZE, 3), and its note."""
        self.frames.append(frame)
        self.notes.append(note)


def _picture(reels: Sequence[Reel], moment: int, modules: Any) -> Any:
    """All reels at a moment; one that is over keeps its last picture."""
    image_module, draw_module, font_module = modules
    width = len(reels) * SIZE + (len(reels) - 1) * GAP
    picture = image_module.new("RGB", (width, CAPTION + SIZE), PAPER)
    draw = draw_module.Draw(picture)
    for column, reel in enumerate(reels):
        index = min(moment, len(reel.frames) - 1)
        left = column * (SIZE + GAP)
        draw.text((left + 6, 6), reel.heading, fill=INK, font=font_module.load_default(17))
        draw.text((left + 6, 34), reel.notes[index], fill=INK, font=font_module.load_default(15))
        picture.paste(image_module.fromarray(reel.frames[index]), (left, CAPTION))
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
    length = max(len(reel.frames) for reel in reels)
    pictures = [_picture(reels, moment, modules) for moment in range(length)]
    # One palette for all pictures, of a few of them: the colours are few, and none may flicker.
    few = [np.asarray(pictures[index * (length - 1) // 4]) for index in range(5)]
    palette = modules[0].fromarray(np.concatenate(few)).quantize(256)
    pictures = [picture.quantize(palette=palette, dither=0) for picture in pictures]
    duration = [DELAY_MS] * (length - 1) + [HOLD_MS]
    write_atomically(
        path,
        lambda stream: pictures[0].save(
            stream,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            loop=0,
            optimize=False,
            duration=duration,
        ),
    )
