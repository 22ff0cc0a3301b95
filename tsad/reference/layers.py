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


def layer_norm(x: Array, w: Tensors, name: str) -> Array:
    centred: Array = x - x.mean(-1, keepdims=True)
    variance: Array = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax(x: Array) -> Array:
    e: Array = np.exp(x - x.max(-1, keepdims=True))
    total: Array = e.sum(-1, keepdims=True)
    return e / total


_erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x: Array) -> Array:
    erf: Array = np.asarray(_erf(x * math.sqrt(0.5)), x.dtype)
    return x * 0.5 * (1 + erf)


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


def attention(
    query: Array, source: Array, w: Tensors, name: str, n_head: int, mask: Array | float = 0.0
) -> Array:
    """Multi-head attention of ``query`` (..., Q, d) to ``source`` (..., N, d); ``mask`` (Q, N)."""
    weight, bias = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    w_q, w_k, w_v = np.split(weight, 3)
    b_q, b_k, b_v = np.split(bias, 3)

    def heads(x: Array) -> Array:  # (..., N, d) -> (..., n_head, N, d / n_head)
        return np.moveaxis(x.reshape(*x.shape[:-1], n_head, -1), -2, -3)

    q = heads(query @ w_q.T + b_q)
    k = heads(source @ w_k.T + b_k)
    v = heads(source @ w_v.T + b_v)
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
