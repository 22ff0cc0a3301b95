"""From images to the features of a policy: its encoders, and what each lane saw last.

A robot's new observation begins with the frames that its last one ended with. A frame of the same
bytes as one of the lane's last window is not encoded again, nor one that is twice in a window; one
that is nearly the same takes its features, too, if a bound is given (`difference`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsad import _core
from tsad.families.resnet import Camera, EncoderConfig, VisionConfig, of_encoder
from tsad.reference import resnet

Floats = NDArray[np.float32]
Images = NDArray[Any]  # uint8 (..., H, W, 3), or float32 (..., 3, H, W) from 0 to 1

SLACK = 1 / 255
"""So far pixels may be outside 0 to 1, as rounding leaves them; the core's own bound."""


SQUARE = 8  # pixels
LEVELS = 255


class Frame(NamedTuple):
    """An image that was encoded, and its features (feature_dim,)."""

    image: Images
    features: Floats


Window = dict[str, list[Frame]]
"""What each camera saw in a lane's last observation; of what was nearly the same, that."""


class Counts(NamedTuple):
    """Images of a call: encoded, known by their bytes, and near enough to one that is held."""

    encoded: int
    known: int
    reused: int


class Cameras:
    """The cameras and encoders of a policy; nothing in it changes, and copies share it."""

    def __init__(
        self,
        vision: VisionConfig,
        tensors: Mapping[str, NDArray[Any]],
        *,
        threads: int = 1,
        precision: str = "float32",
    ) -> None:
        self.vision = vision
        self.precision = precision
        self.by_name = {camera.name: camera for camera in vision.cameras}
        self._engines: dict[Any, _core.Vision] = {}
        self._turn = threading.RLock()  # an engine is used by one thread at a time
        for camera in vision.cameras:
            encoder, own = vision.encoders[camera.encoder], of_encoder(tensors, camera.encoder)
            if _key(camera) not in self._engines:
                self._engines[_key(camera)] = _engine(encoder, camera, own, threads, precision)

    @property
    def weight_bytes(self) -> int:
        """Memory of the encoders' weights."""
        return sum(engine.weight_bytes for engine in self._engines.values())

    def encode(
        self, images: Mapping[str, Images], windows: Sequence[Window], bound: float = 0.0
    ) -> tuple[dict[str, Floats], list[Window], Counts]:
        """Features (n, n_obs_steps, feature_dim) of each camera's images (n, n_obs_steps, ...).

        ``windows``: what each of the n rows saw last; they stay as they are. An image whose
        `difference` from one of them is at most ``bound`` takes the nearest one's features. Second,
        what it has seen now. ``ValueError`` names a camera whose pixels are not from 0 to 1; then
        none was encoded.
        """
        seen: list[Window] = [{} for _ in windows]
        known = reused = 0
        new: dict[Any, list[tuple[Images, Frame]]] = {}
        for name, rows in images.items():
            camera = self.by_name[name]
            for row, before, now in zip(rows, windows, seen, strict=True):
                frames = now[name] = []
                for image in row:
                    held = [*frames, *before.get(name, [])]
                    frame = _find(image, held)
                    if frame is not None:
                        known += 1
                    elif bound and (frame := _nearest(image, held, bound)) is not None:
                        check_range(name, image)
                        reused += 1
                    else:
                        check_range(name, image)
                        features = np.empty(self.vision.feature_dim(camera), np.float32)
                        frame = Frame(image.copy(), features)
                        ready = prepared(camera, frame.image)
                        new.setdefault((_key(camera), ready.dtype), []).append((ready, frame))
                    frames.append(frame)
        for (key, _), jobs in new.items():
            batch = np.stack([ready for ready, _ in jobs])
            with self._turn:
                found = self._engines[key].encode(batch)
            for (_, frame), features in zip(jobs, found, strict=True):
                frame.features[:] = features
        made = {
            name: np.array([[f.features for f in now[name]] for now in seen], np.float32).reshape(
                *rows.shape[:2], self.vision.feature_dim(self.by_name[name])
            )
            for name, rows in images.items()
        }
        return made, seen, Counts(sum(map(len, new.values())), known, reused)


def _engine(
    encoder: EncoderConfig,
    camera: Camera,
    tensors: Mapping[str, NDArray[Any]],
    threads: int,
    precision: str,
) -> _core.Vision:
    height, width = camera.seen
    return _core.Vision(
        tensors,
        depth=encoder.depth,
        norm=encoder.norm,
        keypoints=encoder.num_keypoints,
        height=height,
        width=width,
        scale=np.array(camera.scale, np.float32),
        offset=np.array(camera.offset, np.float32),
        relu=True,
        threads=threads,
        precision=precision,
    )


def _key(camera: Camera) -> Any:
    """Cameras of one key are seen through one engine."""
    return camera.encoder, camera.seen, camera.scale, camera.offset


def _find(image: Images, frames: Sequence[Frame]) -> Frame | None:
    """The frame of the same bits: 0.0 and -0.0 are two."""
    bits = f"u{image.itemsize}"
    for frame in frames:
        old = frame.image
        if old.dtype == image.dtype and np.array_equal(old.view(bits), image.view(bits)):
            return frame
    return None


def difference(image: Images, other: Images) -> float:
    """How far two images of one camera and type are apart, in levels of 255.

    Of all squares of 8 x 8 pixels, the largest mean of absolute differences: noise, which is
    everywhere and even, counts for little, and a small thing that moves for much.
    """
    if image.dtype == np.uint8:
        apart = np.abs(image.astype(np.int16) - other).mean(-1)
    else:
        apart = np.abs(image - other).mean(0) * LEVELS
    for axis, size in enumerate(apart.shape):
        begins = np.arange(0, size, SQUARE)
        pixels = np.diff(np.append(begins, size))
        sums = np.add.reduceat(apart, begins, axis)
        apart = sums / (pixels if axis else pixels[:, None])
    return float(apart.max())


def _nearest(image: Images, frames: Sequence[Frame], bound: float) -> Frame | None:
    """The frame that is least different, if that is within the bound."""
    alike = [f for f in frames if f.image.dtype == image.dtype]
    found = [difference(image, frame.image) for frame in alike]
    if not found or not min(found) <= bound:
        return None
    return alike[int(np.argmin(found))]


def check_range(name: str, image: Images) -> None:
    """``ValueError`` unless pixels are from 0 to 1, or nearly."""
    if image.dtype == np.uint8:
        return
    low, high = float(image.min()), float(image.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        place = np.unravel_index(np.argmin(np.isfinite(image)), image.shape)
        raise ValueError(
            f"obs[{name!r}]: expected finite pixels from 0 to 1, got {image[place]:g} at "
            f"{tuple(map(int, place))} of an image {image.shape}; look at the camera, or leave "
            "the frame out"
        )
    if not (-SLACK <= low and high <= 1 + SLACK):
        fix = "divide by 255, or pass uint8 as the camera gives it"
        if not high > 2:
            fix = "undo a normalisation of your own, the policy has its data's"
        raise ValueError(
            f"obs[{name!r}]: expected pixels from 0 to 1, got numbers from {low:g} to {high:g}; "
            f"{fix}"
        )


def prepared(camera: Camera, image: Images) -> Images:
    """What the trunk sees of an image, before normalisation; uint8 stays so if only cropped."""
    if camera.resize is not None:
        return resnet.prepare(camera, resnet.pixels(image, np.float32))
    if image.dtype == np.uint8:
        return np.moveaxis(resnet.prepare(camera, np.moveaxis(image, -1, 0)), 0, -1)
    return resnet.prepare(camera, image)
