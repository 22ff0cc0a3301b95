"""The image encoders of a LeRobot diffusion policy: ``diffusion.rgb_encoder`` of its file.

One for all cameras, or one of each (``use_separate_rgb_encoder_per_camera``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.checkpoint import CheckpointError
from tsad.convert.lerobot_processors import Statistics
from tsad.convert.trunk import COUNTER, places, trunk_shapes, trunk_tensors
from tsad.families.resnet import (
    BLOCKS,
    COLOURS,
    EncoderConfig,
    Size,
    VisionConfig,
    head_shapes,
    map_size,
    prefix,
)
from tsad.scope import scope
from tsad.section import Section, Shapes

ENCODER = "diffusion.rgb_encoder."
_POOL = "pool.nets"  # their name of ours, "pool"
_GRID = "pool.pos_grid"
_TOLERANCE = 1e-6  # of places from -1 to 1


def read_vision(
    section: Section, images: Mapping[str, tuple[int, ...]], keypoints: int
) -> tuple[VisionConfig, bool]:
    """The encoders and cameras that ``config.json`` describes, and whether each has its own.

    Scales are still 1. ``images``: the shape (3, height, width) of each camera's, in their
    order.
    """
    kind = section.choice(
        "vision_backbone", tuple(BLOCKS), fix=f"train with one of these ({scope('networks')})"
    )
    norm = "group" if section.flag("use_group_norm", False) else "folded"
    encoder = EncoderConfig(kind, norm, keypoints, 2 * keypoints)
    separate = section.flag("use_separate_rgb_encoder_per_camera", False)
    first = next(iter(images.values()))
    for name, shape in images.items():
        if len(shape) != 3 or shape[0] != COLOURS or shape != first:
            expected = f"(3, height, width), and of all cameras the same, {list(first)}"
            raise section.error(f"{name}.shape", expected, list(shape))
    resize, crop = _shape(section, "resize_shape"), _shape(section, "crop_shape")
    if resize is not None:  # as LeRobot's configuration has it from 0.4.4 on
        ratio = section.data.get("crop_ratio", 1.0)
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise section.error("crop_ratio", "a number above 0 and at most 1", ratio)
        crop = (int(resize[0] * ratio), int(resize[1] * ratio)) if ratio < 1 else None
    cameras = [
        {
            "name": name,
            "encoder": i if separate else 0,
            "height": shape[1],
            "width": shape[2],
            "resize": resize,
            "crop": crop,
            "scale": [1.0] * COLOURS,
            "offset": [0.0] * COLOURS,
        }
        for i, (name, shape) in enumerate(images.items())
    ]
    number = len(cameras) if separate else 1
    parts = VisionConfig((encoder,) * number, ()).to_dict()
    return VisionConfig.from_dict(parts | {"cameras": cameras}, file=section.file), separate


def _shape(section: Section, key: str) -> Size | None:
    value = section.data.get(key)  # LeRobot before 0.4.4 did not resize
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise section.error(key, "[height, width], or null", value)
    return value[0], value[1]


def _prefixes(vision: VisionConfig, separate: bool) -> list[str]:
    count = len(vision.encoders)
    return [f"{ENCODER}{i}." for i in range(count)] if separate else [ENCODER]


def wanted(vision: VisionConfig, separate: bool) -> Shapes:
    """Name -> shape of every tensor of the encoders in the file."""
    found: Shapes = {}
    height, width = map_size(vision.cameras[0].seen)
    for start, encoder in zip(_prefixes(vision, separate), vision.encoders, strict=True):
        found |= {f"{start}backbone.{k}": shape for k, shape in trunk_shapes(encoder).items()}
        heads = {k.replace("pool", _POOL): shape for k, shape in head_shapes(encoder).items()}
        found |= {f"{start}{k}": shape for k, shape in heads.items()}
        found[f"{start}{_GRID}"] = (height * width, 2)
    return found


def is_counter(name: str) -> bool:
    """How many batches a norm has seen: no number of the network, and absent in old files."""
    return name.startswith(ENCODER) and name.endswith(f".{COUNTER}")


def encoder_tensors(
    vision: VisionConfig, separate: bool, tensors: Mapping[str, NDArray[Any]], file: str
) -> dict[str, NDArray[np.float32]]:
    """The encoders' tensors as in a tsad folder, of those in the file, which are all there."""
    found: dict[str, NDArray[np.float32]] = {}
    for i, start in enumerate(_prefixes(vision, separate)):
        encoder = vision.encoders[i]
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        _check_grid(own[_GRID], map_size(vision.cameras[0].seen), f"{file}: {start}{_GRID}")
        backbone = {k.removeprefix("backbone."): v for k, v in own.items()}
        parts = trunk_tensors(encoder, backbone)
        for name in head_shapes(encoder):
            value = own[name.replace("pool", _POOL)]
            parts[name] = np.ascontiguousarray(value, np.float32)
        found |= {f"{prefix(i)}{name}": value for name, value in parts.items()}
    return found


def _check_grid(grid: NDArray[Any], size: Size, name: str) -> None:
    if not np.abs(grid - places(size)).max() <= _TOLERANCE:
        raise CheckpointError(
            f"{name}: expected x and y of a {size[0]} x {size[1]} map from -1 to 1, got others; "
            "the file is damaged"
        )


def with_statistics(vision: VisionConfig, before: Statistics, notes: list[str]) -> VisionConfig:
    """The cameras' scales and offsets: what the preprocessor does to pixels."""
    cameras = []
    for camera in vision.cameras:
        m = before.map_of(camera.name, "VISUAL", COLOURS, notes, (COLOURS, 1, 1))
        scale, offset = m.scale.tolist(), (m.offset - m.shift * m.scale).tolist()
        cameras.append(replace(camera, scale=tuple(scale), offset=tuple(offset)))
    return replace(vision, cameras=tuple(cameras))
