"""The image encoder of LeRobot's and Diffusion Policy's policies: a ResNet and a spatial softmax.

``vision`` of a ``config.json``:

``encoders``           a list, of each:
  ``type``               ``"resnet18"`` or ``"resnet34"``, torchvision's
  ``norm``               ``"folded"``, BatchNorm that is in the convolutions already, or
                         ``"group"``, GroupNorm of 16 channels a group
  ``num_keypoints``      of the spatial softmax, each an x and a y
  ``feature_dim``        numbers that a linear layer and a ReLU make of them
``cameras``            a list, in the order of the features of type ``"VISUAL"``, of each:
  ``name``               the feature's
  ``encoder``            which of the list, from 0; cameras may share one
  ``height``, ``width``  of its images, in pixels
  ``resize``             ``[height, width]`` that they are resized to (default: they are not) ...
  ``crop``               ... and of the middle of that, which is seen (default: all of it)
  ``scale``, ``offset``  of red, green and blue: pixels, from 0 to 1, reach the network times scale
                         plus offset

Tensors are called as in torchvision (``layer1.0.conv1.weight``), but a block's ``downsample`` is
the convolution and ``downsample_norm`` its norm; ``pool`` is the spatial softmax's convolution and
``out`` the linear layer. In a file of a policy they begin with ``vision.0.``, the encoder's number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tsad.section import MAX_DIM, Section, Shapes

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)
NORMS = ("folded", "group")
COLOURS = 3
MAX_PIXELS = 8192  # a side of an image
MAX_ENCODERS = 64
VISION = "vision."  # how names of encoders' tensors begin in a policy's file

Size = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """Of the trunk: its name, that of its norm, channels and the side of its window."""

    name: str
    norm: str
    channels: int
    channels_in: int
    side: int


@dataclass(frozen=True)
class EncoderConfig:
    """One of ``encoders``."""

    type: str
    norm: str
    num_keypoints: int
    feature_dim: int

    @classmethod
    def from_section(cls, section: Section) -> EncoderConfig:
        """Checked."""
        encoder = cls(
            section.choice("type", tuple(BLOCKS)),
            section.choice("norm", NORMS),
            section.integer("num_keypoints", 1, MAX_DIM),
            section.integer("feature_dim", 1, MAX_DIM),
        )
        section.done()
        return encoder

    @property
    def depth(self) -> int:
        """18 or 34, layers of the trunk by torchvision's count."""
        return int(self.type.removeprefix("resnet"))


@dataclass(frozen=True)
class Camera:
    """One of ``cameras``."""

    name: str
    encoder: int
    height: int
    width: int
    resize: Size | None
    crop: Size | None
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def from_section(cls, section: Section, n_encoders: int) -> Camera:
        """Checked."""
        name = section.take("name")
        camera = cls(
            name if isinstance(name, str) else "",
            section.integer("encoder", 0, n_encoders - 1),
            section.integer("height", 1, MAX_PIXELS),
            section.integer("width", 1, MAX_PIXELS),
            _size(section, "resize"),
            _size(section, "crop"),
            section.numbers("scale", COLOURS),
            section.numbers("offset", COLOURS),
        )
        section.done()
        whole = camera.resize or (camera.height, camera.width)
        if camera.crop is not None and (camera.crop[0] > whole[0] or camera.crop[1] > whole[1]):
            expected = f"at most what there is to crop, {list(whole)}"
            raise section.error("crop", expected, list(camera.crop))
        return camera

    @property
    def seen(self) -> Size:
        """Height and width of what the trunk sees."""
        return self.crop or self.resize or (self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """One of the list ``cameras``."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value is not None
        }


def _size(section: Section, key: str) -> Size | None:
    section.known.append(key)
    value = section.data.pop(key, None)
    if value is None:
        return None
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(type(n) is int and 1 <= n <= MAX_PIXELS for n in value):
        raise section.error(key, f"[height, width] of 1 to {MAX_PIXELS} pixels", value)
    return value[0], value[1]


@dataclass(frozen=True)
class VisionConfig:
    """The ``vision`` keys of the module docstring."""

    encoders: tuple[EncoderConfig, ...]
    cameras: tuple[Camera, ...]

    @classmethod
    def from_dict(cls, data: Any, *, file: str = "config.json") -> VisionConfig:
        """The checked ``vision`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "vision", file)
        parts: dict[str, list[Section]] = {}
        for key in ("encoders", "cameras"):
            items = section.take(key)
            if not isinstance(items, list | tuple) or not 1 <= len(items) <= MAX_ENCODERS:
                raise section.error(key, f"a list of 1 to {MAX_ENCODERS} objects", items)
            parts[key] = [Section(x, f"vision.{key}[{i}]", file) for i, x in enumerate(items)]
        section.done()
        encoders = tuple(map(EncoderConfig.from_section, parts["encoders"]))
        cameras = tuple(Camera.from_section(part, len(encoders)) for part in parts["cameras"])
        unused = set(range(len(encoders))) - {camera.encoder for camera in cameras}
        if unused:
            raise section.error("cameras", f"one with the encoder {min(unused)}", parts["cameras"])
        return cls(encoders, cameras)

    def to_dict(self) -> dict[str, Any]:
        """The ``vision`` object of ``config.json``."""
        return {
            "encoders": [asdict(encoder) for encoder in self.encoders],
            "cameras": [camera.to_dict() for camera in self.cameras],
        }

    def shapes(self) -> Shapes:
        """Name -> shape of every tensor of all encoders, as in a policy's file."""
        return {
            f"{prefix(i)}{name}": shape
            for i, encoder in enumerate(self.encoders)
            for name, shape in shapes(encoder).items()
        }

    def feature_dim(self, camera: Camera) -> int:
        """Numbers that are made of an image of the camera."""
        return self.encoders[camera.encoder].feature_dim


def prefix(encoder: int) -> str:
    """How the names of an encoder's tensors begin in a policy's file."""
    return f"{VISION}{encoder}."


def convolutions(encoder: EncoderConfig) -> Iterator[Convolution]:
    """The trunk's, in the order of execution."""
    yield Convolution("conv1", "bn1", WIDTHS[0], COLOURS, 7)
    channels = WIDTHS[0]
    for layer, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS[encoder.type], strict=True), 1):
        for i in range(blocks):
            name = f"layer{layer}.{i}"
            yield Convolution(f"{name}.conv1", f"{name}.bn1", width, channels, 3)
            yield Convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            if channels != width:
                norm = f"{name}.downsample_norm"
                yield Convolution(f"{name}.downsample", norm, width, channels, 1)
            channels = width


def shapes(encoder: EncoderConfig) -> Shapes:
    """Name -> shape of every tensor of an encoder; convolutions are (out, in, height, width)."""
    found: Shapes = {}
    for c in convolutions(encoder):
        found[f"{c.name}.weight"] = (c.channels, c.channels_in, c.side, c.side)
        biases = (c.name,) if encoder.norm == "folded" else (c.norm,)
        found |= {f"{name}.bias": (c.channels,) for name in biases}
        if encoder.norm == "group":
            found[f"{c.norm}.weight"] = (c.channels,)
    return found | head_shapes(encoder)


def head_shapes(encoder: EncoderConfig) -> Shapes:
    """Those of the tensors behind the trunk."""
    keypoints, dim = encoder.num_keypoints, encoder.feature_dim
    return {
        "pool.weight": (keypoints, WIDTHS[-1], 1, 1),
        "pool.bias": (keypoints,),
        "out.weight": (dim, 2 * keypoints),
        "out.bias": (dim,),
    }


def map_size(seen: Size) -> Size:
    """Height and width of the trunk's output."""
    height, width = seen
    for _ in range(5):  # conv1, the pooling and three layers halve it
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def of_encoder(tensors: Mapping[str, Any], encoder: int) -> dict[str, Any]:
    """One encoder's tensors of a policy's, by their own names."""
    start = prefix(encoder)
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
