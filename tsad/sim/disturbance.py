"""What may come between a scene and a policy that sees it: another light, noise, a thing in front.

A policy that plays well on a simulator's clean images may still fail behind a real camera;
``tsad eval --disturb brightness=0.3`` tells by how much. What is done to the images of an episode
depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tsad.sim.simulators import Observation


@dataclass(frozen=True)
class Disturbance:
    """How much is done to images; each from 0, nothing, to 1.

    Args:
        brightness: all of an episode's pixels are multiplied by one number from 1 - this to 1 +
            this, the same for all cameras.
        noise: standard deviation of what is added to each number of a pixel, where white is 1; new
            in every image.
        occlusion: side of a square of one colour in front of each camera, as a share of the image's
            shorter side; it stays where it is throughout an episode.
    """

    brightness: float = 0.0
    noise: float = 0.0
    occlusion: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if not any(asdict(self).values()):
            raise ValueError(f"expected one of {', '.join(KINDS)} above 0, got none")

    @classmethod
    def parse(cls, text: str) -> Disturbance:
        """Of "brightness=0.3" or "brightness=0.3,noise=0.1"; ``ValueError`` says what is wrong."""
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            try:
                amount = float(value)
            except ValueError:
                amount = None
            if name not in KINDS or amount is None or name in found:
                raise ValueError(
                    f"got {text!r}, expected KIND=AMOUNT, or several with commas between, each of "
                    f"{', '.join(KINDS)} once, from 0 to 1; e.g. brightness=0.3"
                )
            found[name] = amount
        return cls(**found)

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name, value in asdict(self).items() if value)


KINDS = tuple(field.name for field in fields(Disturbance))


class Disturbed:
    """An episode's images, disturbed.

    Args:
        how: what is done.
        seed: of the episode; as of ``numpy.random.SeedSequence``.
    """

    def __init__(self, how: Disturbance, seed: int | Sequence[int]) -> None:
        self._how = how
        # neither the simulator's stream nor the policy's (`tsad.sim.noise_seed`)
        self._rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, 0)))
        self._light = 1 + how.brightness * self._rng.uniform(-1, 1)
        self._things: dict[str, NDArray[np.float64]] = {}  # by camera: where, and its colour

    def __call__(self, obs: Mapping[str, Observation]) -> dict[str, Observation]:
        """An observation by name; arrays with three axes are images, as a policy takes them."""
        return {
            name: self._image(name, value) if value.ndim == 3 else value
            for name, value in obs.items()
        }

    def _image(self, name: str, image: Observation) -> Observation:
        # uint8 (H, W, 3), or float32 (3, H, W) from 0 to 1
        is_uint8 = image.dtype == np.uint8
        pixels = image.astype(np.float32)
        pixels = pixels / np.float32(255) if is_uint8 else np.moveaxis(pixels, 0, -1).copy()
        height, width = pixels.shape[:2]
        side = round(self._how.occlusion * min(height, width))
        if side:
            if name not in self._things:
                self._things[name] = self._rng.random(5)
            y, x, *colour = self._things[name]
            top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
            pixels[top : top + side, left : left + side] = colour
        pixels *= np.float32(self._light)
        if self._how.noise:
            pixels += self._how.noise * self._rng.standard_normal(pixels.shape, np.float32)
        pixels = pixels.clip(0, 1)
        if is_uint8:
            return np.rint(pixels * 255).astype(np.uint8)
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), image.dtype)
