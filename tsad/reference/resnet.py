"""The image encoder of LeRobot and Diffusion Policy: pixels to a policy's numbers.

Resize, crop, normalise; torchvision's ResNet-18 or 34 without its last two layers; a 1x1
convolution to keypoint maps, of each the expected place under its softmax (spatial softmax); a
linear layer and a ReLU. Everything is (images, channels, height, width), in the dtype of the
weights; ``w`` is an encoder's tensors by the names of `tsad.families.resnet`.

In 16 bits (``bits=16``) the trunk's convolutions multiply integers, and all else, the head included,
is as it was. A convolution's input has one unit an image, the largest magnitude in it / `INPUT`; its
weights have one unit an output channel; both are rounded to the nearest integer, half to even.
A window's sum is made in parts (`parts`), each exact in 32 bits, and the parts are added as floats,
times both units, to the bias, in order. No part's sum, nor any on the way to it, is beyond 2^31 - 1:
inputs are at most `INPUT` in magnitude, and a unit of weights is so large that in each part they
come to at most `COLUMN` together, by `round_weights`; INPUT * COLUMN < 2^31. Behind a ReLU inputs
are not negative, so that positive and negative weights each may come to that much.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tsad.families.resnet import BLOCKS, WIDTHS, Camera, EncoderConfig, Size
from tsad.reference.layers import Array, Tensors, group_norm, linear, relu, softmax

Images = NDArray[np.uint8] | NDArray[np.float32]

CHANNELS_A_GROUP = 16
INPUT = 8191
COLUMN = (2**31 - 1) // INPUT
LARGEST = 32767
PART = 576
WINOGRAD_AREA = 100
WINOGRAD_PART = 256
COLUMN_OF = (1, 2, 1, 1)
_B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float64)
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
TINY = 2.0**-100
"""Below it an image's largest input counts as 0: its inverse would be none."""


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
    """The largest magnitude that `normalise` makes of pixels, which may be a 255th out of 0 to 1."""
    ends = np.array([[-1], [256]], np.float32) / np.float32(255)
    return float(np.abs(ends * np.float32(camera.scale) + np.float32(camera.offset)).max())


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
    """(N, 512, h, w), each a 32nd of what is seen, rounded up. most: of x, with 16 bits."""
    rounded = bits == 16
    x = relu(convolve(x, w, "conv1", "bn1", stride=2, rounded=rounded, most=most))
    x = max_pool(x)
    for layer, blocks in enumerate(BLOCKS[encoder.type], 1):
        for i in range(blocks):
            stride = 2 if layer > 1 and i == 0 else 1
            x = block(x, w, f"layer{layer}.{i}", stride, rounded)
    return x


def block(x: Array, w: Tensors, name: str, stride: int, rounded: bool = False) -> Array:
    """Two convolutions beside the input, or beside a 1x1 convolution of it."""
    y = relu(convolve(x, w, f"{name}.conv1", f"{name}.bn1", stride=stride, rounded=rounded))
    if f"{name}.downsample.weight" in w:
        x = convolve(x, w, f"{name}.downsample", f"{name}.downsample_norm", stride, rounded)
    # sums of 16 bits start from the identity, as those of the core do
    start = x if rounded and f"{name}.bn2.weight" not in w else None
    y = convolve(y, w, f"{name}.conv2", f"{name}.bn2", rounded=rounded, start=start)
    return relu(y if start is not None else x + y)


def convolve(
    x: Array,
    w: Tensors,
    name: str,
    norm: str,
    stride: int = 1,
    rounded: bool = False,
    *,
    most: float | None = None,
    start: Array | None = None,
) -> Array:
    """Zeros around, half a window; then the bias of a folded norm, or the GroupNorm.

    rounded: in 16 bits; `most` is then the largest magnitude of x, if it is none of its own, and
    `start` is added before.
    """
    weight = w[f"{name}.weight"]
    out_dim, _, side, _ = weight.shape
    if rounded and side == 3 and stride == 1 and x.shape[-2] * x.shape[-1] >= WINOGRAD_AREA:
        y = _rounded_winograd(x, weight, w.get(f"{name}.bias"), start)
    elif rounded:
        y = _rounded(x, weight, w.get(f"{name}.bias"), stride, most, start)
    else:
        windows = _windows(np.pad(x, _around(side // 2)), side, stride)
        rows = np.moveaxis(windows, 1, 3)  # (N, H', W', C, side, side)
        y = rows.reshape(*rows.shape[:3], -1) @ weight.reshape(out_dim, -1).T
        y = np.moveaxis(y, -1, 1)
        if f"{name}.bias" in w:
            y = y + w[f"{name}.bias"][:, None, None]
    if f"{norm}.weight" not in w:
        return y
    flat = y.reshape(*y.shape[:2], -1)
    return group_norm(flat, out_dim // CHANNELS_A_GROUP, w, norm).reshape(y.shape)


def _rounded(
    x: Array, weight: Array, bias: Array | None, stride: int, most: float | None,
    start: Array | None,
) -> Array:  # fmt: skip
    """A convolution in 16 bits (N, c_out, H', W')."""
    out_dim, channels, side, _ = weight.shape
    signed = most is not None
    unit, integers = round_images(x, most)
    rows = np.moveaxis(weight, 1, 3).reshape(out_dim, side, side * channels)
    units, weights = round_weights(rows, signed)
    windows = _windows(np.pad(integers, _around(side // 2)), side, stride)
    windows = windows.transpose(0, 2, 3, 4, 5, 1)  # (N, H', W', side, side, C)
    windows = windows.reshape(*windows.shape[:4], side * channels).astype(np.float64)
    y = np.zeros((*windows.shape[:3], out_dim), x.dtype)
    if bias is not None:
        y = y + bias
    if start is not None:
        y = y + np.moveaxis(start, 1, -1)
    for rows_in, inputs in parts(side, side * channels):
        here = weights[:, rows_in, inputs].reshape(out_dim, -1)
        sums = windows[..., rows_in, inputs].reshape(*windows.shape[:3], -1) @ here.T  # exact
        y = y + sums.astype(x.dtype) * (unit[:, None, None, None] * units.astype(x.dtype))
    return np.moveaxis(y, -1, 1)


def _rounded_winograd(x: Array, weight: Array, bias: Array | None, start: Array | None) -> Array:
    """A 3x3 convolution by Winograd's F(2x2, 3x3): of integers, but for its last additions."""
    (n, channels, height, width), out_dim = x.shape, len(weight)
    down, across = -(-height // 2), -(-width // 2)
    unit, integers = round_images(x, None)
    around = (0, 0), (0, 0), (1, 1 + height % 2), (1, 1 + width % 2)
    d = _windows(np.pad(integers, around), 4, 2).transpose(0, 2, 3, 1, 4, 5).astype(np.float64)
    v = (_B @ d @ _B.T).reshape(n * down * across, channels, 16)
    u = (_G @ weight.astype(np.float64) @ _G.T).reshape(out_dim, channels, 16)
    m = np.empty((n, down, across, out_dim, 16), x.dtype)
    count = -(-channels // WINOGRAD_PART)
    edges = [i * channels // count for i in range(count + 1)]
    for k in range(16):
        most = COLUMN_OF[k // 4] * COLUMN_OF[k % 4] * INPUT
        wide = [u[:, a:b, k] for a, b in zip(edges, edges[1:], strict=False)]
        units = _units(u[..., k], [np.abs(part).sum(1) for part in wide],
                          [(2**31 - 1) // most - part.shape[1] / 2 for part in wide])  # fmt: skip
        total = np.zeros((n, down * across, out_dim), x.dtype)
        for a, b in zip(edges, edges[1:], strict=False):
            sums = v[:, a:b, k] @ _integers(u[:, a:b, k], units[:, None]).T
            exact = sums.reshape(total.shape).astype(x.dtype)
            total = total + exact * (unit[:, None, None] * units.astype(x.dtype))
        m[..., k] = total.reshape(n, down, across, out_dim)
    m = m.reshape(n, down, across, out_dim, 4, 4)
    s = [m[..., 0, :] + m[..., 1, :] + m[..., 2, :], m[..., 1, :] - m[..., 2, :] - m[..., 3, :]]
    y = np.empty((n, out_dim, 2 * down, 2 * across), x.dtype)
    for i, row in enumerate(s):
        for j in range(2):
            four = [row[..., c] for c in range(4)]
            out = four[0] + four[1] + four[2] if j == 0 else four[1] - four[2] - four[3]
            y[:, :, i::2, j::2] = np.moveaxis(out, -1, 1)
    y = y[:, :, :height, :width]
    y = y if bias is None else y + bias[:, None, None]
    return y if start is None else y + start


def round_images(x: Array, most: float | None) -> tuple[Array, Array]:
    """Units (N) and integers of x; most: its largest magnitude, if each image has none of its own."""
    largest = np.abs(x).max((1, 2, 3)) if most is None else np.full(len(x), most)
    largest = largest.astype(x.dtype)
    scale = np.divide(INPUT, largest, np.zeros_like(largest), where=largest >= TINY)
    unit = np.where(largest >= TINY, largest / x.dtype.type(INPUT), 0).astype(x.dtype)
    return unit, np.rint(x * scale[:, None, None, None])


def parts(side: int, run: int) -> list[tuple[slice, slice]]:
    """How a window of `side` rows of `run` numbers is summed: rows, and numbers of each.

    Some rows, if they have `PART` numbers at most, else parts of a row.
    """
    n = -(-run // PART)
    if n == 1:
        rows = PART // run
        return [(slice(at, min(at + rows, side)), slice(0, run)) for at in range(0, side, rows)]
    columns = [slice(i * run // n, (i + 1) * run // n) for i in range(n)]
    return [(slice(row, row + 1), part) for row in range(side) for part in columns]


def round_weights(rows: Array, signed: bool) -> tuple[Array, Array]:
    """Units (c_out) and integers of weights (c_out, side, run), for inputs of one sign or of both.

    In a part of n weights the magnitudes, or those of either sign, come to S units at most; rounding
    adds n / 2. So a unit is at least (their sum) / (COLUMN - n / 2), a millionth more for float32's
    rounding; and at least the largest / `LARGEST`.
    """
    wide = rows.astype(np.float64)
    sums, most_of = [], []
    for rows_in, inputs in parts(*rows.shape[1:]):
        part = wide[:, rows_in, inputs].reshape(len(rows), -1)
        above, below = np.maximum(part, 0).sum(1), np.maximum(-part, 0).sum(1)
        sums.append(above + below if signed else np.maximum(above, below))
        most_of.append(COLUMN - part.shape[1] / 2)
    units = _units(wide.reshape(len(rows), -1), sums, most_of)
    return units, _integers(wide, units[:, None, None])


def _units(wide: Array, sums: list[Array], most: list[float]) -> Array:
    """Of weights (c_out, n) whose parts come to these sums, and may come to `most` units."""
    unit = np.abs(wide).max(1) / LARGEST
    for total, limit in zip(sums, most, strict=True):
        unit = np.maximum(unit, total / limit)
    units: Array = (unit * (1 + 1e-6)).astype(np.float32)
    return units


def _integers(wide: Array, units: Array) -> Array:
    found = np.zeros_like(wide)
    np.divide(wide, units, found, where=units > 0)
    return np.rint(found)


def max_pool(x: Array) -> Array:
    """The largest of 3 x 3, every other one."""
    windows = _windows(np.pad(x, _around(1), constant_values=-np.inf), 3, 2)
    y: Array = windows.max((-1, -2))
    return y


def _around(n: int) -> tuple[tuple[int, int], ...]:
    return (0, 0), (0, 0), (n, n), (n, n)


def _windows(x: Array, side: int, stride: int) -> Array:
    """(N, C, H', W', side, side)."""
    view = np.lib.stride_tricks.sliding_window_view(x, (side, side), (-2, -1))
    return view[:, :, ::stride, ::stride]


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
