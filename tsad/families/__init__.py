"""Network families: settings, tensors, blocks, costs, and what the core takes of each.

A family is a module with ``TYPE``, a class of settings, and functions of it; `family_of` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

from tsad.families import dit, dpt, unet1d
from tsad.scope import scope
from tsad.section import Section, Shapes

Network = dpt.NetworkConfig | unet1d.Unet1dConfig | dit.DitConfig
_FAMILIES: dict[str, tuple[ModuleType, Any]] = {
    dpt.TYPE: (dpt, dpt.NetworkConfig),
    unet1d.TYPE: (unet1d, unet1d.Unet1dConfig),
    dit.TYPE: (dit, dit.DitConfig),
}
NETWORK_TYPES = tuple(_FAMILIES)


def read_network(data: Any, *, file: str = "config.json") -> Network:
    """The checked ``network`` object of a ``config.json``; ``ValueError`` names what is wrong."""
    section = Section(data, "network", file)
    kind = section.choice("type", NETWORK_TYPES, dpt.TYPE, f"use one ({scope('networks')})")
    return cast(Network, _FAMILIES[kind][1].from_dict(data, file=file))


def as_network(network: Network | Mapping[str, Any]) -> Network:
    """The settings themselves, or those of a ``network`` object."""
    return read_network(network) if isinstance(network, Mapping) else network


def family_of(network: Network) -> ModuleType:
    """The module of a network's family."""
    return _FAMILIES[network.type][0]


def network_shapes(network: Network | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor in ``model.safetensors``; names are the family's."""
    net = as_network(network)
    return cast(Shapes, family_of(net).shapes(net))


def block_names(network: Network | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order."""
    net = as_network(network)
    return cast("list[str]", family_of(net).block_names(net))


def block_types(network: Network | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order; blocks of one type may stand in for each other."""
    net = as_network(network)
    return cast("list[str]", family_of(net).block_types(net))


def block_costs(network: Network | Mapping[str, Any]) -> tuple[int, ...]:
    """Multiply-accumulates of one cell of each block, as executed."""
    net = as_network(network)
    return cast("tuple[int, ...]", family_of(net).block_costs(net))


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
    return cast(str, family_of(network).describe(network))
