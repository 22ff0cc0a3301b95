"""The network families, and what one has to offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from tsad.reference import dit, dpt, unet1d
from tsad.reference.layers import Array, Network, Tensors, Value, dense


class Family(Protocol):
    """A module of plain functions."""

    COEFFICIENTS: type[np.floating[Any]]
    """In what type the samplers of its policies compute coefficients."""

    def check(self, network: Mapping[str, Any]) -> Network:
        """The settings, every key present; ``ValueError`` names what is wrong."""

    def block_names(self, network: Network) -> list[str]:
        """The prunable blocks in execution order."""

    def block_types(self, network: Network) -> list[str]:
        """The type of each block; those of one type can stand in for each other."""

    def encode(self, w: Tensors, network: Network, timesteps: ArrayLike, obs: Array) -> Array:
        """What conditions the network at timesteps (...): an array (..., ...).

        ``obs`` (..., n_obs_steps, obs_dim) is normalised.
        """

    def predict(
        self, w: Tensors, network: Network, sample: Array, condition: Array, value: Value = dense
    ) -> Array:
        """The network's output for ``sample`` (..., T, action_dim), of the same shape.

        It asks ``value(block, compute)`` for what each block adds.
        """


FAMILIES: dict[str, Family] = {
    "diffusion_policy_transformer": dpt,
    "unet1d": unet1d,
    "dit": dit,
}


def family_of(network: Mapping[str, Any]) -> Family:
    """The family of a network's ``type``; ``ValueError`` if there is none."""
    kind = network.get("type", "diffusion_policy_transformer")
    if kind not in FAMILIES:
        choices = ", ".join(f'"{name}"' for name in FAMILIES)
        raise ValueError(f"network.type: expected one of {choices}, got {kind!r}; correct this key")
    return FAMILIES[kind]
