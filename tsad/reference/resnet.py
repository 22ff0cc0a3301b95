"""The image encoder of LeRobot and Diffusion Policy: pixels to a policy's numbers.

Resize, crop, normalise; torchvision's ResNet-18 or 34 without its last two layers; a 1x1
convolution to keypoint maps, of each the expected place under its softmax (spatial softmax); a
linear layer and a ReLU. Everything is (images, channels, height, width), in the dtype of the
weights; ``w`` is an encoder's tensors by the names of `tsad.families.resnet`.

In 16 bits (``bits=16``) the trunk's convolutions are those of `tsad.reference.conv16`, and all
else, the head included, is as it was. With ``bits=8`` they are the same, their weights in 8 bits,
but for the first one's, which are few and see the pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tsad.families.resnet import BLOCKS, WIDTHS, Camera, EncoderConfig, Size
from tsad.reference import conv16
from tsad.reference.conv16 import around, windows
from tsad.reference.layers import Array, Tensors, group_norm, linear, relu, softmax

Images = NDArray[np.uint8] | NDArray[np.float32]

CHANNELS_A_GROUP = 16


def encode(
    w: Tensors, encoder: EncoderConfig, camera: Camera, images: Images, bits: int = 32
) -> Array:
    """A camera's features (N, feature_dim) of images uint8 (N, H, W, 3), or float (N, 3, H, W)."""
    x = prepare(camera, pixels(images, w["out.weight"].dtype))
    return head(w, trunk(w, encoder, normalise(camera, x), bits, most_of_pixels(camera)))


def pixels(images: Images, dtype: DTypeLike) -> Array:
    """(..., 3, H, W) from 0 to 1."""
    if images.dtype == np.uint8:
        x: Array = np.moveaxis(images, -1, -3).astype(dtype) / np.asarray(255, dtype)
        return x
    return images.astype(dtype)


def prepare(camera: Camera, x: Array) -> Array:
    """Resized and cropped, (..., H, W)."""
    if camera.resize is not None:
        x = resize(x, camera.resize)
    return x if camera.crop is None else center_crop(x, camera.crop)


def normalise(camera: Camera, x: Array) -> Array:
    """Pixels from 0 to 1 (..., 3, H, W) in the network's units."""
    scale, offset = (np.array(n, x.dtype)[:, None, None] for n in (camera.scale, camera.offset))
    y: Array = x * scale + offset
    return y


def most_of_pixels(camera: Camera) -> float:
    """The largest magnitude that `normalise` makes of pixels, which may be a 255th beyond."""
    ends = np.array([[-1], [256]], np.float32) / np.float32(255)
    scale, offset = (np.array(n, np.float32) for n in (camera.scale, camera.offset))
    return float(np.abs(ends * scale + offset).max())


def resize(x: Array, size: Size) -> Array:
    """torchvision's ``Resize(size)`` of tensors: bilinear, antialiased."""
    rows, columns = (
        resampling(n, new).astype(x.dtype) for n, new in zip(x.shape[-2:], size, strict=True)
    )
    y: Array = rows @ x @ columns.T
    return y


@lru_cache(maxsize=64)
def resampling(n: int, new: int) -> Array:
    """(new, n): how much of each of n pixels in a row is in each of ``new``.

    A triangle around the middle of the new pixel, as wide as it where it is larger than the old.
    """
    width = max(n / new, 1.0)
    middle = (np.arange(new)[:, None] + 0.5) * (n / new)
    weight = np.maximum(1 - np.abs(np.arange(n) + 0.5 - middle) / width, 0)
    share: Array = weight / weight.sum(-1, keepdims=True)
    return share


def center_crop(x: Array, size: Size) -> Array:
    """torchvision's ``CenterCrop(size)`` of the last two axes; an odd margin as it rounds it."""
    top, left = (round((n - new) / 2) for n, new in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def trunk(
    w: Tensors, encoder: EncoderConfig, x: Array, bits: int = 32, most: float | None = None
) -> Array:
    """(N, 512, h, w), each a 32nd of what is seen, rounded up. most: of x, if it is rounded."""
    x = relu(convolve(x, w, "conv1", "bn1", 2, max(bits, 16), most=most))
    x = max_pool(x)
    for layer, blocks in enumerate(BLOCKS[encoder.type], 1):
        for i in range(blocks):
            stride = 2 if layer > 1 and i == 0 else 1
            x = block(x, w, f"layer{layer}.{i}", stride, bits)
    return x


def block(x: Array, w: Tensors, name: str, stride: int, bits: int = 32) -> Array:
    """Two convolutions beside the input, or beside a 1x1 convolution of it."""
    y = relu(convolve(x, w, f"{name}.conv1", f"{name}.bn1", stride, bits))
    if f"{name}.downsample.weight" in w:
        x = convolve(x, w, f"{name}.downsample", f"{name}.downsample_norm", stride, bits)
    # sums of integers start from the identity, as those of the core do
    start = x if bits < 32 and f"{name}.bn2.weight" not in w else None
    y = convolve(y, w, f"{name}.conv2", f"{name}.bn2", bits=bits, start=start)
    return relu(y if start is not None else x + y)


def convolve(
    x: Array,
    w: Tensors,
    name: str,
    norm: str,
    stride: int = 1,
    bits: int = 32,
    *,
    most: float | None = None,
    start: Array | None = None,
) -> Array:
    """Zeros around, half a window; then the bias of a folded norm, or the GroupNorm.

    bits: of the weights; below 32 x is rounded to 16 bits, `most` is the largest magnitude of x, if
    it is none of its own, and `start` is added before.
    """
    weight = w[f"{name}.weight"]
    out_dim, _, side, _ = weight.shape
    area = x.shape[-2] * x.shape[-1]
    if bits < 32 and side == 3 and stride == 1 and area >= conv16.WINOGRAD_AREA:
        y = conv16.winograd(x, weight, w.get(f"{name}.bias"), start, bits)
    elif bits < 32:
        y = conv16.direct(x, weight, w.get(f"{name}.bias"), stride, most, start, bits)
    else:
        view = windows(np.pad(x, around(side // 2)), side, stride)
        rows = np.moveaxis(view, 1, 3)  # (N, H', W', C, side, side)
        y = rows.reshape(*rows.shape[:3], -1) @ weight.reshape(out_dim, -1).T
        y = np.moveaxis(y, -1, 1)
        if f"{name}.bias" in w:
            y = y + w[f"{name}.bias"][:, None, None]
    if f"{norm}.weight" not in w:
        return y
    flat = y.reshape(*y.shape[:2], -1)
    return group_norm(flat, out_dim // CHANNELS_A_GROUP, w, norm).reshape(y.shape)


def max_pool(x: Array) -> Array:
    """The largest of 3 x 3, every other one."""
    y: Array = windows(np.pad(x, around(1), constant_values=-np.inf), 3, 2).max((-1, -2))
    return y


def head(w: Tensors, x: Array) -> Array:
    """(N, feature_dim) of the trunk's output."""
    n, channels, height, width = x.shape
    assert channels == WIDTHS[-1]
    weight = w["pool.weight"].reshape(-1, channels)
    maps = weight @ x.reshape(n, channels, -1) + w["pool.bias"][:, None]
    return relu(linear(keypoints(maps, (height, width)), w, "out"))


def keypoints(maps: Array, size: Size) -> Array:
    """(N, 2 K): x and y, from -1 to 1, expected under the softmax of each of K maps (N, K, H W)."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n).astype(np.float32) for n in size), indexing="ij")
    places = np.stack([x.ravel(), y.ravel()], -1).astype(maps.dtype)
    expected: Array = softmax(maps) @ places
    return expected.reshape(len(maps), -1)
