"""Layers that every family uses, and what a family's parts are typed as.

``w`` is a dict of tensors by name; weights are (out, in). Everything is computed in the dtype of
its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[np.float64]  # float32 where a policy is made with that dtype
Tensors = Mapping[str, Array]
Network = Mapping[str, Any]

Compute = Callable[[], Array]
Value = Callable[[int, Compute], Array | float]
"""A block's value: given its index and how to compute it, the branch or what stands in for it."""


def dense(block: int, compute: Compute) -> Array:
    """The ``Value`` of a dense network: every block is computed."""
    return compute()


def linear(x: Array, w: Tensors, name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def standardise(x: Array, eps: float) -> Array:
    """Layer norm without scale and shift."""
    centred: Array = x - x.mean(-1, keepdims=True)
    variance: Array = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps)


def layer_norm(x: Array, w: Tensors, name: str) -> Array:
    y: Array = standardise(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
    return y


def softmax(x: Array) -> Array:
    e: Array = np.exp(x - x.max(-1, keepdims=True))
    total: Array = e.sum(-1, keepdims=True)
    return e / total


_erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x: Array) -> Array:
    erf: Any = _erf(x * math.sqrt(0.5))
    wide: Array = erf.astype(x.dtype)
    return x * 0.5 * (1 + wide)


def gelu_tanh(x: Array) -> Array:
    """PyTorch's ``approximate="tanh"``."""
    tanh: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * 0.5 * (1 + tanh)


def silu(x: Array) -> Array:
    return x * np.exp(-np.logaddexp(0, -x))


def mish(x: Array) -> Array:
    return x * np.tanh(np.logaddexp(0, x))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sinusoid(
    position: ArrayLike,
    dim: int,
    dtype: DTypeLike,
    *,
    angles: type[np.floating[Any]] = np.float64,
) -> Array:
    """Codes of positions (...): (..., dim), all sines first, then all cosines.

    ``angles`` is the type in which positions meet frequencies; PyTorch modules round to float32.
    """
    half = dim // 2
    exponent = np.arange(half, dtype=angles) * angles(-math.log(10000) / (half - 1))
    frequency = np.exp(exponent, dtype=np.float64).astype(angles)
    angle = (np.asarray(position, angles)[..., None] * frequency).astype(np.float64)
    return np.concatenate([np.sin(angle), np.cos(angle)], -1).astype(angles).astype(dtype)


def rotation(length: int, dim: int, base: float) -> Array:
    """Of rotary positions: (length, dim), ``dim / 2`` cosines of each, then the sines.

    Rounded as PyTorch modules in float32 round on the way.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = (np.float64(base) ** exponent.astype(np.float64)).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * (np.float32(1) / power)
    wide = angle.astype(np.float64)
    table: Array = np.concatenate([np.cos(wide), np.sin(wide)], -1).astype(np.float32)
    return table


def rotate(x: Array, table: Array) -> Array:
    """``x`` (..., T, dim) turned by `rotation`'s table: channel i with channel i + dim / 2."""
    cos, sin = np.split(table.astype(x.dtype), 2, -1)
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(
    query: Array,
    source: Array,
    w: Tensors,
    name: str,
    n_head: int,
    mask: Array | float = 0.0,
    *,
    packed: tuple[str, str] = ("in_proj_weight", "in_proj_bias"),
    turns: Array | None = None,
) -> Array:
    """Multi-head attention of ``query`` (..., Q, d) to ``source`` (..., N, d); ``mask`` (Q, N).

    ``packed`` names weight and bias of queries, keys and values together; ``turns`` is a `rotation`
    of queries and keys.
    """
    weight, bias = (w[f"{name}.{part}"] for part in packed)
    w_q, w_k, w_v = np.split(weight, 3)
    b_q, b_k, b_v = np.split(bias, 3)

    def heads(x: Array) -> Array:  # (..., N, d) -> (..., n_head, N, d / n_head)
        return np.moveaxis(x.reshape(*x.shape[:-1], n_head, -1), -2, -3)

    q = heads(query @ w_q.T + b_q)
    k = heads(source @ w_k.T + b_k)
    v = heads(source @ w_v.T + b_v)
    if turns is not None:
        q, k = rotate(q, turns), rotate(k, turns)
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]) + mask
    mixed = np.moveaxis(softmax(scores) @ v, -3, -2)
    return linear(mixed.reshape(query.shape), w, f"{name}.out_proj")


def group_norm(x: Array, groups: int, w: Tensors, name: str) -> Array:
    """Over the channels of a group and all time steps of ``x`` (..., C, T)."""
    *lead, channels, length = x.shape
    y = x.reshape(*lead, groups, -1)
    centred: Array = y - y.mean(-1, keepdims=True)
    variance: Array = (centred**2).mean(-1, keepdims=True)
    y = (centred / np.sqrt(variance + 1e-5)).reshape(*lead, channels, length)
    return y * w[f"{name}.weight"][:, None] + w[f"{name}.bias"][:, None]


def convolve(x: Array, weight: Array, bias: Array, *, padding: int, stride: int = 1) -> Array:
    """``x`` (..., C, T), zeros around it, along T with ``weight`` (O, C, taps): (..., O, T')."""
    out_dim, _, taps = weight.shape
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(padding, padding)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, -1)[..., ::stride, :]
    rows = np.moveaxis(windows, -3, -2)  # (..., T', C, taps)
    y: Array = rows.reshape(*rows.shape[:-2], -1) @ weight.reshape(out_dim, -1).T + bias
    return np.swapaxes(y, -1, -2)
