"""The conditional UNet over time of LeRobot and Diffusion Policy.

Everything is (..., channels, time steps). Levels halve the time steps on the way down and double
them on the way up, where each sees what the way down left at its length. The condition, the time's
embedding followed by all observations, scales and moves the channels of every block (FiLM).
Blocks: the residual blocks, two at each level of either way and two between.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tsad.families.unet1d import FINAL_GROUPS, Unet1dConfig
from tsad.reference.layers import (
    Array,
    Network,
    Tensors,
    Value,
    convolve,
    dense,
    group_norm,
    linear,
    mish,
    sinusoid,
)

COEFFICIENTS: type[np.floating[Any]] = np.float32
DOWN_KERNEL, UP_KERNEL = 3, 4


def check(network: Mapping[str, Any]) -> Network:
    """The settings; ``ValueError`` names what is wrong."""
    return Unet1dConfig.from_dict(network).to_dict()


def block_names(network: Network) -> list[str]:
    """The residual blocks in execution order, e.g. ``"down_modules.0.1"``."""
    levels = len(network["down_dims"])
    modules = [*(f"down_modules.{i}" for i in range(levels)), "mid_modules"]
    modules += [f"up_modules.{i}" for i in range(levels - 1)]
    return [f"{module}.{i}" for module in modules for i in (0, 1)]


def block_types(network: Network) -> list[str]:
    """The type of each block says its value's shape, e.g. ``"conv_residual[512x16]"``."""
    levels = list(enumerate(network["down_dims"]))
    shapes = [(dim, network["horizon"] >> i) for i, dim in (*levels, levels[-1])]
    shapes += [(dim, network["horizon"] >> i + 1) for i, dim in reversed(levels[:-1])]
    return [f"conv_residual[{dim}x{length}]" for dim, length in shapes for _ in range(2)]


def encode(w: Tensors, network: Network, timesteps: ArrayLike, obs: Array) -> Array:
    """The condition (..., C): the embedding of the time, then the observations, oldest first."""
    dim = network["diffusion_step_embed_dim"]
    time = sinusoid(timesteps, dim, obs.dtype, angles=np.float32)
    time = linear(mish(linear(time, w, "diffusion_step_encoder.1")), w, "diffusion_step_encoder.3")
    return np.concatenate([time, obs.reshape(*obs.shape[:-2], -1)], -1)


def conv_block(x: Array, w: Tensors, name: str, groups: int) -> Array:
    """Convolution, group norm, Mish: the length stays."""
    weight = w[f"{name}.block.0.weight"]
    y = convolve(x, weight, w[f"{name}.block.0.bias"], padding=weight.shape[-1] // 2)
    return mish(group_norm(y, groups, w, f"{name}.block.1"))


def modulated(w: Tensors, network: Network, name: str, x: Array, condition: Array) -> Array:
    """The first half of the residual block ``name``, scaled and moved by the condition."""
    y = conv_block(x, w, f"{name}.conv1", network["n_groups"])
    film = linear(mish(condition), w, f"{name}.cond_encoder.1")[..., None]
    if network["use_film_scale_modulation"]:
        scale, film = np.split(film, 2, -2)
        y = scale * y
    return y + film


def branch(w: Tensors, network: Network, name: str, x: Array, condition: Array) -> Array:
    """What the residual block ``name`` adds to its residual."""
    y = modulated(w, network, name, x, condition)
    return conv_block(y, w, f"{name}.conv2", network["n_groups"])


def residual(w: Tensors, name: str, x: Array) -> Array:
    """The input itself, or its channels mixed where the block changes their number."""
    if f"{name}.residual_conv.weight" not in w:
        return x
    weight, bias = w[f"{name}.residual_conv.weight"], w[f"{name}.residual_conv.bias"]
    return convolve(x, weight, bias, padding=0)


def downsample(w: Tensors, name: str, x: Array) -> Array:
    """Half the time steps."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return convolve(x, weight, bias, padding=DOWN_KERNEL // 2, stride=2)


def upsample(w: Tensors, name: str, x: Array) -> Array:
    """Twice the time steps: a transposed convolution, a convolution of ``x`` with zeros between."""
    spread = np.zeros_like(x, shape=(*x.shape[:-1], 2 * x.shape[-1] - 1))
    spread[..., ::2] = x
    weight = np.swapaxes(np.flip(w[f"{name}.weight"], -1), 0, 1)
    return convolve(spread, weight, w[f"{name}.bias"], padding=UP_KERNEL - 2)


def predict(
    w: Tensors, network: Network, sample: Array, condition: Array, value: Value = dense
) -> Array:
    """The network's output (..., T, action_dim) for ``sample`` of that shape."""
    names, levels = block_names(network), len(network["down_dims"])
    x = np.swapaxes(sample, -1, -2)

    def pair(block: int, x: Array) -> Array:
        for b in (block, block + 1):
            compute = partial(branch, w, network, names[b], x, condition)
            x = value(b, compute) + residual(w, names[b], x)
        return x

    skips = []
    for i in range(levels):
        x = pair(2 * i, x)
        skips.append(x)
        if i < levels - 1:
            x = downsample(w, f"down_modules.{i}.2", x)
    x = pair(2 * levels, x)
    for i in range(levels - 1):
        x = np.concatenate([x, skips[-1 - i]], -2)
        x = pair(2 * levels + 2 + 2 * i, x)
        x = upsample(w, f"up_modules.{i}.2", x)
    x = conv_block(x, w, "final_conv.0", FINAL_GROUPS)
    weight, bias = w["final_conv.1.weight"], w["final_conv.1.bias"]
    return np.swapaxes(convolve(x, weight, bias, padding=0), -1, -2)
