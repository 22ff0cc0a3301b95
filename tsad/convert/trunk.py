"""torchvision's ResNet, as LeRobot and robomimic store it, in the form of `tsad.families.resnet`.

Both keep its layers in an ``nn.Sequential``, so that ``conv1`` is ``0``, ``bn1`` is ``1`` and
``layer1`` is ``4``. BatchNorm at inference is a scale and a shift of each channel, which become
part of the convolution before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.families.resnet import EncoderConfig, Size, convolutions
from tsad.section import Shapes

COUNTER = "num_batches_tracked"  # of a BatchNorm; no number of the network
_EPS = 1e-5
_FIRST = {"conv1": "0", "bn1": "1"}
_FIRST_LAYER = 3  # layer1 is the Sequential's 4


def _theirs(name: str) -> str:
    """Their name of a convolution or norm."""
    if name in _FIRST:
        return _FIRST[name]
    layer, rest = name.removeprefix("layer").split(".", 1)
    rest = re.sub(r"\.downsample_norm$", ".downsample.1", rest)
    rest = re.sub(r"\.downsample$", ".downsample.0", rest)
    return f"{_FIRST_LAYER + int(layer)}.{rest}"


def trunk_shapes(encoder: EncoderConfig) -> Shapes:
    """Their name -> shape of every tensor; with norm "folded" they have BatchNorm's statistics."""
    found: Shapes = {}
    parts = ("weight", "bias")
    if encoder.norm == "folded":
        parts += ("running_mean", "running_var")  # type: ignore[assignment]
    for c in convolutions(encoder):
        found[f"{_theirs(c.name)}.weight"] = (c.channels, c.channels_in, c.side, c.side)
        found |= {f"{_theirs(c.norm)}.{part}": (c.channels,) for part in parts}
    return found


def trunk_tensors(
    encoder: EncoderConfig, tensors: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float32]]:
    """The trunk's tensors by our names, of theirs by `trunk_shapes`."""
    found: dict[str, NDArray[np.float32]] = {}
    for c in convolutions(encoder):
        weight = tensors[f"{_theirs(c.name)}.weight"]
        norm = {
            key.rpartition(".")[2]: value
            for key, value in tensors.items()
            if key.rpartition(".")[0] == _theirs(c.norm)
        }
        if encoder.norm == "folded":
            wide = {key: value.astype(np.float64) for key, value in norm.items()}
            scale = wide["weight"] / np.sqrt(wide["running_var"] + _EPS)
            bias = wide["bias"] - wide["running_mean"] * scale
            found[f"{c.name}.weight"] = _float32(weight * scale[:, None, None, None])
            found[f"{c.name}.bias"] = _float32(bias)
        else:
            found[f"{c.name}.weight"] = _float32(weight)
            found |= {f"{c.norm}.{part}": _float32(norm[part]) for part in ("weight", "bias")}
    return found


def places(size: Size) -> NDArray[np.float64]:
    """(H W, 2): x and y of a map's places from -1 to 1, which both store."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], -1)


def _float32(value: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(value, np.float32)
