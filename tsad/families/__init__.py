"""Network families: settings, tensors, blocks, costs, and what the core takes of each.

A family is a module with ``TYPE``, a class of settings, and functions of it; `family_of` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsad.families import dpt, unet1d
from tsad.scope import scope
from tsad.section import Section, Shapes

Network = dpt.NetworkConfig | unet1d.Unet1dConfig
NETWORK_TYPES = (dpt.TYPE, unet1d.TYPE)


def read_network(data: Any, *, file: str = "config.json") -> Network:
    """The checked ``network`` object of a ``config.json``; ``ValueError`` names what is wrong."""
    section = Section(data, "network", file)
    kind = section.choice("type", NETWORK_TYPES, dpt.TYPE, f"use one ({scope('networks')})")
    if kind == unet1d.TYPE:
        return unet1d.Unet1dConfig.from_dict(data, file=file)
    return dpt.NetworkConfig.from_dict(data, file=file)


def as_network(network: Network | Mapping[str, Any]) -> Network:
    """The settings themselves, or those of a ``network`` object."""
    return read_network(network) if isinstance(network, Mapping) else network


def network_shapes(network: Network | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor in ``model.safetensors``; names are the family's."""
    net = as_network(network)
    return unet1d.shapes(net) if isinstance(net, unet1d.Unet1dConfig) else dpt.shapes(net)


def block_names(network: Network | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order."""
    net = as_network(network)
    if isinstance(net, unet1d.Unet1dConfig):
        return unet1d.block_names(net)
    return dpt.block_names(net)


def block_types(network: Network | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order; blocks of one type may stand in for each other."""
    net = as_network(network)
    if isinstance(net, unet1d.Unet1dConfig):
        return unet1d.block_types(net)
    return dpt.block_types(net)


def block_costs(network: Network | Mapping[str, Any]) -> tuple[int, ...]:
    """Multiply-accumulates of one cell of each block, as executed."""
    net = as_network(network)
    if isinstance(net, unet1d.Unet1dConfig):
        return unet1d.block_costs(net)
    return dpt.block_costs(net)


def as_transformer(network: Network, what: str) -> dpt.NetworkConfig:
    """``network`` where ``what`` can only be had for Diffusion Policy's transformer."""
    if isinstance(network, dpt.NetworkConfig):
        return network
    raise ValueError(
        f"{what}: expected a network of type {dpt.TYPE!r}, got {network.type!r}; use a "
        "policy with such a network"
    )


def describe(network: Network) -> str:
    """A network's size in a few words."""
    if isinstance(network, unet1d.Unet1dConfig):
        return unet1d.describe(network)
    return dpt.describe(network)
