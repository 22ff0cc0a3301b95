"""The diffusion transformer of LeRobot's ``multi_task_dit``: tokens are actions, and the condition,
the time's embedding followed by all observations, reaches every block by adaLN alone.

Of a linear layer of SiLU(condition) each transformer block has a shift, a scale and a gate for its
attention, and the same for its MLP: ``x = x + gate * branch(norm(x) * (1 + scale) + shift)``. A
block's value is its branch before the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tsad.families.dit import DitConfig
from tsad.reference.layers import (
    Array,
    Network,
    Tensors,
    Value,
    attention,
    dense,
    gelu,
    gelu_tanh,
    linear,
    rotation,
    silu,
    sinusoid,
    standardise,
)

COEFFICIENTS: type[np.floating[Any]] = np.float32
EPS = 1e-6
TERMS = 6
"""Of adaLN each block has six terms of width D: shift, scale and gate of attention, then of MLP."""
BLOCK_TYPES = ("attn", "mlp")


def check(network: Mapping[str, Any]) -> Network:
    """The settings; ``ValueError`` names what is wrong."""
    return DitConfig.from_dict(network).to_dict()


def block_names(network: Network) -> list[str]:
    """The prunable blocks in execution order, e.g. ``"transformer_blocks.0.mlp"``."""
    layers = range(network["num_layers"])
    return [f"transformer_blocks.{layer}.{kind}" for layer in layers for kind in BLOCK_TYPES]


def block_types(network: Network) -> list[str]:
    """The type of each block."""
    return list(BLOCK_TYPES) * int(network["num_layers"])


def attention_names(use_rope: bool) -> tuple[str, tuple[str, str]]:
    """A block's attention module, and in it weight and bias of queries, keys and values."""
    if use_rope:
        return "attn", ("qkv_proj.weight", "qkv_proj.bias")
    return "multihead_attn", ("in_proj_weight", "in_proj_bias")


def encode(w: Tensors, network: Network, timesteps: ArrayLike, obs: Array) -> Array:
    """The condition (..., C): the embedding of the time, then the observations, oldest first."""
    time = sinusoid(timesteps, network["timestep_embed_dim"], obs.dtype, angles=np.float32)
    time = gelu(linear(gelu(linear(time, w, "time_mlp.1")), w, "time_mlp.3"))
    return np.concatenate([time, obs.reshape(*obs.shape[:-2], -1)], -1)


def modulation(w: Tensors, block: int, condition: Array) -> tuple[Array, Array, Array]:
    """Shift, scale and gate (..., 1, D) of a prunable block."""
    name = f"transformer_blocks.{block // 2}.adaLN_modulation.1"
    terms = np.split(linear(silu(condition), w, name)[..., None, :], TERMS, -1)
    shift, scale, gate = terms[block % 2 * 3 :][:3]
    return shift, scale, gate


def modulated(w: Tensors, block: int, x: Array, condition: Array) -> Array:
    """What prunable block ``block`` sees of the tokens ``x``: normed, scaled and moved."""
    shift, scale, _ = modulation(w, block, condition)
    return standardise(x, EPS) * (1 + scale) + shift


def branch(w: Tensors, network: Network, block: int, x: Array, condition: Array) -> Array:
    """What prunable block ``block`` makes of the tokens ``x`` (..., T, D), before its gate."""
    name, y = f"transformer_blocks.{block // 2}", modulated(w, block, x, condition)
    if block % 2:
        return linear(gelu_tanh(linear(y, w, f"{name}.mlp.0")), w, f"{name}.mlp.2")
    module, packed = attention_names(network["use_rope"])
    heads, turns = network["num_heads"], None
    if network["use_rope"]:
        turns = rotation(x.shape[-2], x.shape[-1] // heads, network["rope_base"])
    return attention(y, y, w, f"{name}.{module}", heads, packed=packed, turns=turns)


def embed(w: Tensors, network: Network, sample: Array) -> Array:
    x = linear(sample, w, "input_proj")
    return x + w["pos_embedding"][0] if network["use_positional_encoding"] else x


def predict(
    w: Tensors, network: Network, sample: Array, condition: Array, value: Value = dense
) -> Array:
    """The network's output (..., T, action_dim) for ``sample`` of that shape."""
    x = embed(w, network, sample)
    for block in range(2 * network["num_layers"]):
        gate = modulation(w, block, condition)[2]
        x = x + gate * value(block, partial(branch, w, network, block, x, condition))
    return linear(x, w, "output_proj")
