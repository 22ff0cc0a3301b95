"""Diffusion Policy's ``TransformerForDiffusion``.

``network`` keys:

  ``type``                   ``"diffusion_policy_transformer"`` (default)
  ``horizon``                T, actions that one denoising loop predicts
  ``n_obs_steps``            To, observations in the window; the last one is now
  ``n_action_steps``         actions executed of the horizon, which must reach that far:
                             ``[n_obs_steps - 1 : n_obs_steps - 1 + n_action_steps]``
  ``obs_dim``                numbers per observation (of an image policy: encoded features)
  ``action_dim``             numbers per action
  ``n_layer``, ``n_head``    decoder layers, attention heads
  ``n_emb``                  d, width: even, divisible by ``n_head``; feed-forward width is 4 d
  ``n_cond_layers``          0: token-wise MLP encoder (default); n > 0: ``nn.TransformerEncoder``
                             of n layers
  ``causal_attn``            whether the two causal masks are applied (default true)
  ``time_as_cond``           true (default); false, the encoder-only variant, is refused
  ``obs_as_cond``            true (default); false, observations in the sample, is refused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tsad.scope import scope
from tsad.section import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Section,
    interface,
)

TYPE = "diffusion_policy_transformer"


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the denoising network: the ``network`` keys of the module docstring."""

    horizon: int
    n_obs_steps: int
    n_action_steps: int
    obs_dim: int
    action_dim: int
    n_layer: int
    n_head: int
    n_emb: int
    n_cond_layers: int = 0
    causal_attn: bool = True
    time_as_cond: bool = True
    obs_as_cond: bool = True
    type: str = TYPE

    @property
    def n_memory(self) -> int:
        """S: memory tokens that cross-attention reads, one for the time and one per observation."""
        return 1 + self.n_obs_steps

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "config.json") -> NetworkConfig:
        """The checked ``network`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "network", file)
        network = cls(
            type=section.choice("type", (TYPE,), TYPE),
            **interface(section),
            n_layer=section.integer("n_layer", 1, MAX_LAYERS),
            n_head=section.integer("n_head", 1, MAX_HEADS),
            n_emb=section.integer("n_emb", 4, MAX_WIDTH),
            n_cond_layers=section.integer("n_cond_layers", 0, MAX_LAYERS, 0),
            causal_attn=section.flag("causal_attn", True),
            time_as_cond=section.flag("time_as_cond", True),
            obs_as_cond=section.flag("obs_as_cond", True),
        )
        section.done()
        if network.n_emb % 2 or network.n_emb % network.n_head:
            expected = f"an even number divisible by n_head ({network.n_head})"
            raise section.error("n_emb", expected, network.n_emb)
        last = network.n_obs_steps - 1 + network.n_action_steps
        if last > network.horizon:
            expected = f"at least n_obs_steps - 1 + n_action_steps = {last}, the last one executed"
            fix = "lower n_action_steps, or train a longer horizon"
            raise section.error("horizon", expected, network.horizon, fix)
        fix = f"train with time_as_cond=True and obs_as_cond=True ({scope('networks')})"
        for key in ("time_as_cond", "obs_as_cond"):
            if not getattr(network, key):
                raise section.error(key, "true", False, fix)
        return network

    def to_dict(self) -> dict[str, Any]:
        """The ``network`` object of ``config.json``, every key present."""
        data = asdict(self)
        return {"type": data.pop("type"), **data}

    def arguments(self) -> dict[str, Any]:
        """What ``_core`` takes of this family alone."""
        return {
            "n_layers": self.n_layer,
            "n_heads": self.n_head,
            "n_emb": self.n_emb,
            "n_cond_layers": self.n_cond_layers,
            "causal": self.causal_attn,
        }


def describe(network: NetworkConfig) -> str:
    """Its size in a few words."""
    return f"{network.n_layer} layers, {network.n_head} heads, width {network.n_emb}"
