"""Diffusion Policy's ``TransformerForDiffusion``: observations and time are memory that a decoder
attends to. Blocks: self-attention, cross-attention and feed-forward of each layer.

T horizon, S = 1 + n_obs_steps memory tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tsad.families.dpt import NetworkConfig
from tsad.reference.layers import (
    Array,
    Network,
    Tensors,
    Value,
    attention,
    dense,
    gelu,
    layer_norm,
    linear,
    mish,
    sinusoid,
)

COEFFICIENTS: type[np.floating[Any]] = np.float64
BLOCK_TYPES = ("self_attn", "cross_attn", "feed_forward")


def check(network: Mapping[str, Any]) -> Network:
    """The settings, every key present; ``ValueError`` names what is wrong."""
    return NetworkConfig.from_dict(network).to_dict()


def block_names(network: Network) -> list[str]:
    """The prunable blocks in execution order, e.g. ``"layers.0.cross_attn"``."""
    return [f"layers.{layer}.{kind}" for layer in range(network["n_layer"]) for kind in BLOCK_TYPES]


def block_types(network: Network) -> list[str]:
    """The type of each block."""
    return list(BLOCK_TYPES) * int(network["n_layer"])


def causal_masks(network: Network, dtype: DTypeLike) -> tuple[Array, Array]:
    """Additive masks (T, T) and (T, S).

    Action token i sees action tokens up to i, and memory token s if i >= s - 1: the time (s = 0)
    and the oldest observation always, a newer observation from its own time on.
    """
    T, S = network["horizon"], 1 + network["n_obs_steps"]
    i = np.arange(T)[:, None]
    hidden = np.array(-np.inf, dtype) if network["causal_attn"] else np.array(0, dtype)
    action = np.where(i >= np.arange(T), np.array(0, dtype), hidden)
    memory = np.where(i >= np.arange(S) - 1, np.array(0, dtype), hidden)
    return action, memory


def encode(w: Tensors, network: Network, timesteps: ArrayLike, obs: Array) -> Array:
    """Memory (..., S, d): a token of the time, then one per observation, oldest first.

    ``timesteps`` (...) are training timesteps, ``obs`` (..., n_obs_steps, obs_dim) is normalised.
    The encoder is an MLP on each token by itself, so observation tokens are the same at every
    timestep; with ``n_cond_layers`` it is a pre-norm transformer encoder and they are not.
    """
    tokens = linear(obs, w, "cond_obs_emb")
    time = sinusoid(timesteps, network["n_emb"], obs.dtype)[..., None, :]
    x: Array = np.concatenate([time, tokens], -2) + w["cond_pos_emb"][0]
    if network["n_cond_layers"] == 0:
        return linear(mish(linear(x, w, "encoder.0")), w, "encoder.2")
    for i in range(network["n_cond_layers"]):
        name = f"encoder.layers.{i}"
        y = layer_norm(x, w, f"{name}.norm1")
        x = x + attention(y, y, w, f"{name}.self_attn", network["n_head"])
        y = layer_norm(x, w, f"{name}.norm2")
        x = x + linear(gelu(linear(y, w, f"{name}.linear1")), w, f"{name}.linear2")
    return x


def branch(w: Tensors, network: Network, block: int, h: Array, memory: Array) -> Array:
    """What block ``block`` adds to the residual stream ``h`` (..., T, d)."""
    name, n_head = f"decoder.layers.{block // 3}", network["n_head"]
    action_mask, memory_mask = causal_masks(network, h.dtype)
    kind = BLOCK_TYPES[block % 3]
    y = layer_norm(h, w, f"{name}.norm{block % 3 + 1}")
    if kind == "self_attn":
        return attention(y, y, w, f"{name}.self_attn", n_head, action_mask)
    if kind == "cross_attn":
        return attention(y, memory, w, f"{name}.multihead_attn", n_head, memory_mask)
    return linear(gelu(linear(y, w, f"{name}.linear1")), w, f"{name}.linear2")


def embed(w: Tensors, sample: Array) -> Array:
    position: Array = w["pos_emb"][0]
    return linear(sample, w, "input_emb") + position


def head(w: Tensors, h: Array) -> Array:
    return linear(layer_norm(h, w, "ln_f"), w, "head")


def predict(
    w: Tensors, network: Network, sample: Array, memory: Array, value: Value = dense
) -> Array:
    """The network's output (..., T, action_dim) for ``sample`` of that shape."""
    h = embed(w, sample)
    for block in range(3 * network["n_layer"]):
        h = h + value(block, partial(branch, w, network, block, h, memory))
    return head(w, h)
