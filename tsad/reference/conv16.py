"""The image encoder's convolutions in 16 bits, and with weights of 8: products of integers, exact.

A convolution's input has one unit an image, the largest magnitude in it / `INPUT`, and its weights
one an output channel; both are rounded to the nearest integer, half to even. A window's sum is made
in parts (`parts`), each exact in 32 bits; times both units they are added as floats to the bias, in
order. What lies beyond the image is zeros, whose parts add nothing and may be left out. No part's
sum, nor any on the way to it, is beyond 2^31 - 1: inputs are at most `INPUT` in magnitude, and a
unit of weights is so large that in each part they come to at most `COLUMN` together
(`round_weights`); INPUT * COLUMN < 2^31. Behind a ReLU inputs are not negative, so that positive
and negative weights each may come to that much.

3x3 convolutions of stride 1 over `WINOGRAD_AREA` pixels or more are Winograd's F(2x2, 3x3): inputs
are transformed as integers, exactly, and come to `TIMES` as much in each of 16 places, which 16
bits hold; transformed weights are rounded with a unit for each place, a sum's parts have
`WINOGRAD_PART` channels at most, and no sum is beyond 2^31 - 1 for the same reason.

With 8 bits a weight is -127 to 127 of its unit, and nothing else is another: inputs have 16, the
sums their parts.

Everything is (images, channels, height, width), in the dtype of the weights.
"""

from __future__ import annotations

import numpy as np

from tsad.reference.layers import Array

INPUT = 8191
COLUMN = (2**31 - 1) // INPUT
LARGEST = {16: 32767, 8: 127}
"""Of a weight in so many bits."""
PART = 576
WINOGRAD_AREA = 30
WINOGRAD_PART = 256
TIMES = (1, 2, 1, 1)
TINY = 2.0**-100
"""Below it an image's largest input counts as 0: its inverse would be none."""

_B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float64)
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def direct(
    x: Array, weight: Array, bias: Array | None, stride: int, most: float | None,
    start: Array | None, bits: int = 16,
) -> Array:  # fmt: skip
    """A convolution (N, c_out, H', W') of inputs in 16 bits and weights in `bits`."""
    out_dim, channels, side, _ = weight.shape
    signed = most is not None
    unit, integers = round_images(x, most)
    rows = np.moveaxis(weight, 1, 3).reshape(out_dim, side * side * channels)
    units, weights = round_weights(rows, channels, signed, bits)
    seen = windows(np.pad(integers, around(side // 2)), side, stride)
    seen = seen.transpose(0, 2, 3, 4, 5, 1)  # (N, H', W', side, side, C)
    seen = seen.reshape(*seen.shape[:3], side * side * channels).astype(np.float64)
    y = np.zeros((*seen.shape[:3], out_dim), x.dtype)
    if bias is not None:
        y = y + bias
    if start is not None:
        y = y + np.moveaxis(start, 1, -1)
    for part in parts(rows.shape[1], channels):
        sums = seen[..., part] @ weights[:, part].T  # exact
        y = y + sums.astype(x.dtype) * (unit[:, None, None, None] * units.astype(x.dtype))
    return np.moveaxis(y, -1, 1)


def winograd(
    x: Array, weight: Array, bias: Array | None, start: Array | None, bits: int = 16
) -> Array:
    """A 3x3 convolution by Winograd's F(2x2, 3x3): of integers, but for its last additions."""
    (n, channels, height, width), out_dim = x.shape, len(weight)
    down, across = -(-height // 2), -(-width // 2)
    unit, integers = round_images(x, None)
    border = (0, 0), (0, 0), (1, 1 + height % 2), (1, 1 + width % 2)
    d = windows(np.pad(integers, border), 4, 2).transpose(0, 2, 3, 1, 4, 5).astype(np.float64)
    v = (_B @ d @ _B.T).reshape(n * down * across, channels, 16)
    u = (_G @ weight.astype(np.float64) @ _G.T).reshape(out_dim, channels, 16)
    m = np.empty((n, down, across, out_dim, 16), x.dtype)
    count = -(-channels // WINOGRAD_PART)
    edges = [i * channels // count for i in range(count + 1)]
    for k in range(16):
        most = TIMES[k // 4] * TIMES[k % 4] * INPUT
        wide = [u[:, a:b, k] for a, b in zip(edges, edges[1:], strict=False)]
        sums = [np.abs(part).sum(1) for part in wide]
        limits = [(2**31 - 1) // most - part.shape[1] / 2 for part in wide]
        units = _units(u[..., k], sums, limits, bits)
        total = np.zeros((n, down * across, out_dim), x.dtype)
        for a, b in zip(edges, edges[1:], strict=False):
            exact = v[:, a:b, k] @ _integers(u[:, a:b, k], units[:, None]).T
            scaled = exact.reshape(total.shape).astype(x.dtype)
            total = total + scaled * (unit[:, None, None] * units.astype(x.dtype))
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
    """Units (N) and integers of x; most: its largest magnitude, of all images, if that is known."""
    largest = np.abs(x).max((1, 2, 3)) if most is None else np.full(len(x), most)
    largest = largest.astype(x.dtype)
    scale = np.divide(INPUT, largest, np.zeros_like(largest), where=largest >= TINY)
    unit = np.where(largest >= TINY, largest / x.dtype.type(INPUT), 0).astype(x.dtype)
    return unit, np.rint(x * scale[:, None, None, None])


def parts(n: int, channels: int) -> list[slice]:
    """How a window of n numbers is summed: whole, or, with more than `PART`, pixel by pixel."""
    size = n if n <= PART else channels
    assert size <= PART
    return [slice(at, at + size) for at in range(0, n, size)]


def round_weights(rows: Array, channels: int, signed: bool, bits: int = 16) -> tuple[Array, Array]:
    """Units (c_out) and integers of weights (c_out, n), for inputs of one sign or of both.

    Rounding adds 1/2 at most to each of a part's weights. So a unit is at least (the sum of their
    magnitudes, or of those of either sign) / (COLUMN - a half of their number), and the largest /
    `LARGEST` of the bits; a millionth more, for float32's rounding of it.
    """
    wide = rows.astype(np.float64)
    sums, most_of = [], []
    for at in parts(rows.shape[1], channels):
        part = wide[:, at]
        above, below = np.maximum(part, 0).sum(1), np.maximum(-part, 0).sum(1)
        sums.append(above + below if signed else np.maximum(above, below))
        most_of.append(COLUMN - part.shape[1] / 2)
    units = _units(wide, sums, most_of, bits)
    return units, _integers(wide, units[:, None])


def _units(wide: Array, sums: list[Array], most: list[float], bits: int) -> Array:
    """Of weights (c_out, n) whose parts come to these sums, and may come to `most` units."""
    unit = np.abs(wide).max(1) / LARGEST[bits]
    for total, limit in zip(sums, most, strict=True):
        unit = np.maximum(unit, total / limit)
    units: Array = (unit * (1 + 1e-6)).astype(np.float32)
    return units


def _integers(wide: Array, units: Array) -> Array:
    found = np.zeros_like(wide)
    np.divide(wide, units, found, where=units > 0)
    return np.rint(found)


def around(n: int) -> tuple[tuple[int, int], ...]:
    """A border of n pixels, for np.pad."""
    return (0, 0), (0, 0), (n, n), (n, n)


def windows(x: Array, side: int, stride: int) -> Array:
    """(N, C, H', W', side, side)."""
    view = np.lib.stride_tricks.sliding_window_view(x, (side, side), (-2, -1))
    return view[:, :, ::stride, ::stride]
