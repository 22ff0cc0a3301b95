"""The diffusion transformer of LeRobot's ``multi_task_dit`` policies (DiT with adaLN-Zero).

``network`` keys of a policy of this family, all of them required:

``type``                       ``"dit"``
``horizon``                    actions predicted at once, the tokens
``n_obs_steps``                observations seen
``n_action_steps``             actions executed; there are none beyond the horizon
``obs_dim``                    numbers per observation: what LeRobot's encoder makes of one
``action_dim``                 numbers per action
``hidden_dim``                 D, width; the MLP's is 4 D
``num_layers``, ``num_heads``  transformer blocks, attention heads
``timestep_embed_dim``         width of the time embedding, even
``use_rope``, ``rope_base``    whether attention turns queries and keys by their positions
``use_positional_encoding``    whether learned positions are added to the tokens

Tensor names are those of LeRobot's ``DiffusionTransformer``. Each transformer block has two
prunable blocks, attention and MLP; a block's value is what it computes before its gate, so that a
reused one is gated by the step that reuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tsad.families.dpt import linear_shapes
from tsad.section import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Section,
    Shapes,
    interface,
)

TYPE = "dit"
BLOCK_TYPES = ("attn", "mlp")
MLP_EXPANSION, STEP_EXPANSION, TERMS = 4, 2, 6
"""Of adaLN each block has six terms of width D: shift, scale and gate of attention, then of MLP."""


@dataclass(frozen=True)
class DitConfig:
    """The ``network`` keys of the module docstring."""

    horizon: int
    n_obs_steps: int
    n_action_steps: int
    obs_dim: int
    action_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    timestep_embed_dim: int
    use_rope: bool
    rope_base: float
    use_positional_encoding: bool
    type: str = TYPE

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, name: str = "network", file: str = "config.json"
    ) -> DitConfig:
        """The checked ``network`` object; ``ValueError`` names key, value and expectation.

        ``name`` and ``file`` say in errors where it stood.
        """
        section = Section(data, name, file)
        network = cls(
            type=section.choice("type", (TYPE,)),
            **interface(section),
            hidden_dim=section.integer("hidden_dim", 1, MAX_WIDTH),
            num_layers=section.integer("num_layers", 1, MAX_LAYERS),
            num_heads=section.integer("num_heads", 1, MAX_HEADS),
            timestep_embed_dim=section.integer("timestep_embed_dim", 4, MAX_WIDTH),
            use_rope=section.flag("use_rope", True),
            rope_base=section.number("rope_base", 1e-3, 1e12),
            use_positional_encoding=section.flag("use_positional_encoding", False),
        )
        section.done()
        if network.hidden_dim % network.num_heads:
            expected = f"a number divisible by num_heads ({network.num_heads})"
            raise section.error("hidden_dim", expected, network.hidden_dim)
        if network.use_rope and network.head_dim % 2:
            expected = f"an even multiple of num_heads ({network.num_heads}) with use_rope"
            raise section.error("hidden_dim", expected, network.hidden_dim)
        if network.timestep_embed_dim % 2:
            got = network.timestep_embed_dim
            raise section.error("timestep_embed_dim", "an even number", got)
        return network

    def to_dict(self) -> dict[str, Any]:
        """The ``network`` object of ``config.json``, every key present."""
        data = asdict(self)
        return {"type": data.pop("type"), **data}

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def n_blocks(self) -> int:
        """B: prunable blocks, attention and MLP of each transformer block."""
        return len(BLOCK_TYPES) * self.num_layers

    @property
    def condition_dim(self) -> int:
        """Width of what conditions every block: the time's embedding, then all observations."""
        return self.timestep_embed_dim + self.n_obs_steps * self.obs_dim


def _as_network(network: DitConfig | Mapping[str, Any]) -> DitConfig:
    return network if isinstance(network, DitConfig) else DitConfig.from_dict(network)


def block_names(network: DitConfig | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order, e.g. ``"transformer_blocks.0.mlp"``."""
    layers = range(_as_network(network).num_layers)
    return [f"transformer_blocks.{layer}.{kind}" for layer in layers for kind in BLOCK_TYPES]


def block_types(network: DitConfig | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order: one of ``BLOCK_TYPES``."""
    return list(BLOCK_TYPES) * _as_network(network).num_layers


def block_costs(network: DitConfig | Mapping[str, Any]) -> tuple[int, ...]:
    """Multiply-accumulates of one cell of each block as executed.

    Attention: four D x D projections of T tokens, scores and mix. MLP: two D x 4 D matrices.
    adaLN is a table and one product per chunk.
    """
    net = _as_network(network)
    T, D = net.horizon, net.hidden_dim
    return (4 * T * D * D + 2 * T * T * D, 2 * MLP_EXPANSION * T * D * D) * net.num_layers


def attention_names(use_rope: bool) -> tuple[str, tuple[str, str]]:
    """A block's attention module, and in it weight and bias of queries, keys and values."""
    if use_rope:
        return "attn", ("qkv_proj.weight", "qkv_proj.bias")
    return "multihead_attn", ("in_proj_weight", "in_proj_bias")


def shapes(network: DitConfig | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor; weights are (out, in)."""
    net = _as_network(network)
    D, E = net.hidden_dim, net.timestep_embed_dim
    found: Shapes = {}
    if net.use_positional_encoding:
        found["pos_embedding"] = (1, net.horizon, D)
    found |= linear_shapes("time_mlp.1", STEP_EXPANSION * E, E)
    found |= linear_shapes("time_mlp.3", E, STEP_EXPANSION * E)
    found |= linear_shapes("input_proj", D, net.action_dim)
    module, (weight, bias) = attention_names(net.use_rope)
    for layer in range(net.num_layers):
        name = f"transformer_blocks.{layer}"
        found[f"{name}.{module}.{weight}"] = (3 * D, D)
        found[f"{name}.{module}.{bias}"] = (3 * D,)
        found |= linear_shapes(f"{name}.{module}.out_proj", D, D)
        found |= linear_shapes(f"{name}.mlp.0", MLP_EXPANSION * D, D)
        found |= linear_shapes(f"{name}.mlp.2", D, MLP_EXPANSION * D)
        found |= linear_shapes(f"{name}.adaLN_modulation.1", TERMS * D, net.condition_dim)
    return found | linear_shapes("output_proj", net.action_dim, D)


def describe(network: DitConfig) -> str:
    """Its size in a few words."""
    layers, heads = network.num_layers, network.num_heads
    return f"DiT of {layers} layers, {heads} heads, width {network.hidden_dim}"
