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

from tsad.section import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Section,
    interface,
)

TYPE = "dit"


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

    def arguments(self) -> dict[str, Any]:
        """What ``_core`` takes of this family alone, but for the ``rotation`` of ``use_rope``."""
        return {
            "n_emb": self.timestep_embed_dim,
            "n_layers": self.num_layers,
            "n_heads": self.num_heads,
            "hidden_dim": self.hidden_dim,
            "use_rope": self.use_rope,
            "use_positional_encoding": self.use_positional_encoding,
        }


def describe(network: DitConfig) -> str:
    """Its size in a few words."""
    layers, heads = network.num_layers, network.num_heads
    return f"DiT of {layers} layers, {heads} heads, width {network.hidden_dim}"
