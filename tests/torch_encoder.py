"""LeRobot's and Diffusion Policy's image encoder in PyTorch's own operators, and random weights.

A ResNet trunk of torchvision's names, spatial softmax, a linear layer. Written from the published
architecture for the tests alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, npt.NDArray[np.float32]]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@dataclass(frozen=True)
class Encoder:
    """Of an encoder: what makes its weights, and how an image comes to it."""

    depth: int = 18
    norm: str = "folded"
    keypoints: int = 32
    features: int = 64
    height: int = 84
    width: int = 84
    relu: bool = True
    channels: int = 3
    temperature: float | None = None
    scale: tuple[float, ...] = field(default=(1 / 0.229, 1 / 0.224, 1 / 0.225))
    offset: tuple[float, ...] = field(default=(-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225))

    def arguments(self) -> dict[str, Any]:
        """For ``_core.Vision``, without the tensors."""
        return {
            "depth": self.depth,
            "norm": self.norm,
            "keypoints": self.keypoints,
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "scale": np.array(self.scale, np.float32),
            "offset": np.array(self.offset, np.float32),
            "relu": self.relu,
        }

    def weights(self) -> Weights:
        """Random ones, at which numbers stay about 1 throughout."""
        return dict(
            _weights(self.depth, self.norm, self.keypoints, self.features, self.channels,
                     self.temperature)
        )  # fmt: skip


@lru_cache(maxsize=8)
def _weights(
    depth: int, norm: str, keypoints: int, features: int, channels: int, temperature: float | None
) -> Weights:
    rng = np.random.default_rng(depth + keypoints + features)
    w: Weights = {}

    def normal(*shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    def conv(name: str, normed: str, c_in: int, c_out: int, kernel: int, gain: float) -> None:
        fan_in = c_in * kernel**2
        w[f"{name}.weight"] = normal(c_out, c_in, kernel, kernel, scale=gain / fan_in**0.5)
        if norm == "group":
            w[f"{normed}.weight"] = 1 + normal(c_out, scale=0.2)
            w[f"{normed}.bias"] = normal(c_out, scale=0.2)
        else:
            w[f"{name}.bias"] = normal(c_out, scale=0.1)

    conv("conv1", "bn1", channels, 64, 7, 1.4)
    c = 64
    for i, blocks in enumerate(BLOCKS[depth]):
        c_out = 64 << i
        for j in range(blocks):
            name = f"layer{i + 1}.{j}"
            conv(f"{name}.conv1", f"{name}.bn1", c, c_out, 3, 1.4)
            conv(f"{name}.conv2", f"{name}.bn2", c_out, c_out, 3, 0.5)
            if i and not j:
                conv(f"{name}.downsample", f"{name}.downsample_norm", c, c_out, 1, 1.0)
            c = c_out
    w["pool.weight"] = normal(keypoints, 512, 1, 1, scale=0.1)
    w["pool.bias"] = normal(keypoints)
    if temperature is not None:
        w["pool.temperature"] = np.array(temperature, np.float32)
    w["out.weight"] = normal(features, 2 * keypoints, scale=1 / keypoints**0.5)
    w["out.bias"] = normal(features, scale=0.3)
    return w


def encode(encoder: Encoder, weights: Weights, images: npt.NDArray[Any]) -> Tensor:
    """Features (n, features) of images (n, channels, height, width) from 0 to 1, in float64."""
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    return forward(encoder, w, torch.from_numpy(images).double())


def forward(encoder: Encoder, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same, in the precision of x and weights."""

    def conv_norm(name: str, normed: str, x: Tensor, stride: int) -> Tensor:
        weight = w[f"{name}.weight"]
        x = F.conv2d(x, weight, w.get(f"{name}.bias"), stride, weight.shape[-1] // 2)
        if encoder.norm == "group":
            x = F.group_norm(x, x.shape[1] // 16, w[f"{normed}.weight"], w[f"{normed}.bias"])
        return x

    def affine(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(x.dtype)[:, None, None]

    x = x * affine(encoder.scale) + affine(encoder.offset)
    x = F.max_pool2d(F.relu(conv_norm("conv1", "bn1", x, 2)), 3, 2, 1)
    for i, blocks in enumerate(BLOCKS[encoder.depth]):
        for j in range(blocks):
            name, stride = f"layer{i + 1}.{j}", 2 if i and not j else 1
            h = F.relu(conv_norm(f"{name}.conv1", f"{name}.bn1", x, stride))
            h = conv_norm(f"{name}.conv2", f"{name}.bn2", h, 1)
            if stride == 2:
                x = conv_norm(f"{name}.downsample", f"{name}.downsample_norm", x, stride)
            x = F.relu(x + h)
    x = F.conv2d(x, w["pool.weight"], w["pool.bias"])
    n, k, height, width = x.shape
    attention = torch.softmax(x.reshape(n, k, -1) / w.get("pool.temperature", 1), -1)
    columns = torch.linspace(-1, 1, width, dtype=x.dtype).repeat(height)
    rows = torch.linspace(-1, 1, height, dtype=x.dtype).repeat_interleave(width)
    points = attention @ torch.stack([columns, rows], 1)  # (n, k, 2): x, y
    out = F.linear(points.flatten(1), w["out.weight"], w["out.bias"])
    return F.relu(out) if encoder.relu else out
