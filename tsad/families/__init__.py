"""Network families: their settings; tensors, blocks and costs as the core's own builders say them.

A family is a module with ``TYPE``, a class of settings, and ``describe``; `family_of` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

from tsad import _core
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


@dataclass(frozen=True)
class Structure:
    """What the core makes of a network's settings."""

    tensors: Shapes
    """Name -> shape."""
    blocks: tuple[str, ...]
    """Names of the prunable blocks in order of execution."""
    types: tuple[str, ...]
    """Of each; blocks of one type can stand in for each other."""
    costs: tuple[int, ...]
    """Multiply-accumulates of a cell of each."""


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


def arguments(network: Network) -> dict[str, Any]:
    """What the core takes of a network's settings."""
    sizes = ("horizon", "n_obs_steps", "n_action_steps", "obs_dim", "action_dim")
    taken = {size: getattr(network, size) for size in sizes}
    return {"family": network.type, **taken, **network.arguments()}


@lru_cache(maxsize=64)
def structure(network: Network) -> Structure:
    """What the core makes of the settings; ``ValueError`` if it is none of its networks."""
    said = _core.describe(**arguments(network))
    blocks, types, costs = zip(*said["blocks"], strict=True)
    return Structure(said["tensors"], blocks, types, costs)


def network_shapes(network: Network | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor in ``model.safetensors``; names are the family's."""
    return dict(structure(as_network(network)).tensors)


def block_names(network: Network | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order."""
    return list(structure(as_network(network)).blocks)


def block_types(network: Network | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order; blocks of one type may stand in for each other."""
    return list(structure(as_network(network)).types)


def block_costs(network: Network | Mapping[str, Any]) -> tuple[int, ...]:
    """Multiply-accumulates of one cell of each block, as executed."""
    return structure(as_network(network)).costs


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
