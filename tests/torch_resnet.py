"""The image encoders of LeRobot and robomimic in PyTorch, by their names, with random weights.

Written from torchvision's ResNet, LeRobot's DiffusionRgbEncoder and robomimic's VisualCore, for the
right values; what they do to an image before the ResNet is `seen`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def norm(channels: int, group: bool) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels) if group else nn.BatchNorm2d(channels)


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, group: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels, group)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels, group)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, norm(channels, group))

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def trunk(depth: int, group: bool) -> nn.Sequential:
    """torchvision's ResNet without its last two children."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        norm(64, group),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for i, count in enumerate(BLOCKS[depth]):
        blocks = []
        for j in range(count):
            stride = 2 if i and not j else 1
            blocks.append(BasicBlock(channels, 64 * 2**i, stride, group))
            channels = 64 * 2**i
        layers.append(nn.Sequential(*blocks))
    return nn.Sequential(*layers)


def grid(height: int, width: int) -> tuple[Any, Any]:
    x, y = np.meshgrid(np.linspace(-1.0, 1.0, width), np.linspace(-1.0, 1.0, height))
    return torch.from_numpy(x.reshape(1, -1)).float(), torch.from_numpy(y.reshape(1, -1)).float()


def map_of(layers: nn.Sequential, seen: tuple[int, int]) -> tuple[int, int]:
    with torch.no_grad():
        height, width = layers.eval()(torch.zeros(1, 3, *seen)).shape[-2:]
    return height, width


class LerobotPool(nn.Module):
    def __init__(self, size: tuple[int, int], keypoints: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(512, keypoints, 1)
        self.register_buffer("pos_grid", torch.cat(grid(*size)).T.contiguous())

    def forward(self, x: Any) -> Any:
        maps = self.nets(x)
        attention = torch.softmax(maps.flatten(-2), -1)
        return attention @ self.pos_grid


class LerobotEncoder(nn.Module):
    """``DiffusionRgbEncoder`` of images that are ``seen``, in the network's units."""

    def __init__(
        self, seen: tuple[int, int], keypoints: int, depth: int = 18, group: bool = False
    ) -> None:
        super().__init__()
        self.backbone = trunk(depth, group)
        self.pool = LerobotPool(map_of(self.backbone, seen), keypoints)
        self.out = nn.Linear(2 * keypoints, 2 * keypoints)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.out(self.pool(self.backbone(x)).flatten(1)))


class RobomimicPool(nn.Module):
    def __init__(self, size: tuple[int, int], keypoints: int, temperature: float) -> None:
        super().__init__()
        self.nets = nn.Conv2d(512, keypoints, 1)
        self.register_buffer("temperature", torch.ones(1) * temperature)
        for name, places in zip(("pos_x", "pos_y"), grid(*size), strict=True):
            self.register_buffer(name, places)

    def forward(self, x: Any) -> Any:
        maps = self.nets(x).flatten(-2)
        attention = torch.softmax(maps / self.temperature, -1)
        places = [(attention * getattr(self, name)).sum(-1) for name in ("pos_x", "pos_y")]
        return torch.stack(places, -1)


class Trunk(nn.Module):
    """``ResNet18Conv``."""

    def __init__(self, group: bool) -> None:
        super().__init__()
        self.nets = trunk(18, group)

    def forward(self, x: Any) -> Any:
        return self.nets(x)


class VisualCore(nn.Module):
    """robomimic's, with the ReLU that its ObservationEncoder puts behind."""

    def __init__(
        self,
        seen: tuple[int, int],
        keypoints: int,
        dim: int,
        group: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = Trunk(group)
        size = map_of(self.backbone.nets, seen)
        self.pool = RobomimicPool(size, keypoints, temperature)
        linear = nn.Linear(2 * keypoints, dim)
        self.nets = nn.Sequential(self.backbone, self.pool, nn.Flatten(1), linear)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.nets(x))


def randomise(module: nn.Module, seed: int) -> Any:
    """Weights with which every part matters; evaluation mode."""
    torch.manual_seed(seed)
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.reset_parameters()  # its first values came before the seed
        if isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        if name.endswith("pool.nets") or name.endswith("nets.1.nets"):
            nn.init.normal_(part.weight, 0, 0.5)  # type: ignore[arg-type]
    return module.eval()


def images(rng: Any, *shape: int) -> Any:
    """Random uint8 (*shape, 3) of coarse patches: even noise looks alike to a network."""
    *lead, height, width = shape
    patches = rng.integers(0, 256, (*lead, height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(patches.repeat(8, -3).repeat(8, -2)[..., :height, :width, :])


def seen(x: Any, resize: tuple[int, int] | None = None, crop: tuple[int, int] | None = None) -> Any:
    """torchvision's Resize and CenterCrop of a tensor (..., H, W)."""
    if resize is not None:
        x = nn.functional.interpolate(
            x, size=resize, mode="bilinear", align_corners=False, antialias=True
        )
    if crop is not None:
        top, left = (int(round((n - c) / 2.0)) for n, c in zip(x.shape[-2:], crop, strict=True))
        x = x[..., top : top + crop[0], left : left + crop[1]]
    return x
