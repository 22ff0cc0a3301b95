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
    Shapes,
    interface,
)

TYPE = "diffusion_policy_transformer"
BLOCK_TYPES = ("self_attn", "cross_attn", "feed_forward")


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

    @property
    def n_blocks(self) -> int:
        """B: prunable residual blocks."""
        return len(BLOCK_TYPES) * self.n_layer

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


def _as_network(network: NetworkConfig | Mapping[str, Any]) -> NetworkConfig:
    return network if isinstance(network, NetworkConfig) else NetworkConfig.from_dict(network)


def linear_shapes(name: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _attention(name: str, dim: int) -> Shapes:
    packed: Shapes = {
        f"{name}.in_proj_weight": (3 * dim, dim),
        f"{name}.in_proj_bias": (3 * dim,),
    }
    return packed | linear_shapes(f"{name}.out_proj", dim, dim)


def layer_shapes(name: str, dim: int, feed_forward: int, *, decoder: bool) -> Shapes:
    """Tensors of torch's ``TransformerDecoderLayer``, or of ``TransformerEncoderLayer``."""
    shapes = _attention(f"{name}.self_attn", dim)
    if decoder:
        shapes |= _attention(f"{name}.multihead_attn", dim)
    shapes |= linear_shapes(f"{name}.linear1", feed_forward, dim)
    shapes |= linear_shapes(f"{name}.linear2", dim, feed_forward)
    for i in range(1, 4 if decoder else 3):
        shapes |= _norm(f"{name}.norm{i}", dim)
    return shapes


def shapes(network: NetworkConfig | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor in ``model.safetensors``.

    Names are those of ``TransformerForDiffusion`` in github.com/real-stanford/diffusion_policy; its
    masks and its empty ``_dummy_variable`` are not stored. Weights are (out, in), as in torch.
    """
    net = _as_network(network)
    dim = net.n_emb
    found: Shapes = {"pos_emb": (1, net.horizon, dim), "cond_pos_emb": (1, net.n_memory, dim)}
    found |= linear_shapes("input_emb", dim, net.action_dim)
    found |= linear_shapes("cond_obs_emb", dim, net.obs_dim)
    if net.n_cond_layers == 0:
        found |= linear_shapes("encoder.0", 4 * dim, dim) | linear_shapes("encoder.2", dim, 4 * dim)
    for i in range(net.n_cond_layers):
        found |= layer_shapes(f"encoder.layers.{i}", dim, 4 * dim, decoder=False)
    for i in range(net.n_layer):
        found |= layer_shapes(f"decoder.layers.{i}", dim, 4 * dim, decoder=True)
    return found | _norm("ln_f", dim) | linear_shapes("head", net.action_dim, dim)


def block_names(network: NetworkConfig | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order, e.g. ``"layers.0.cross_attn"``."""
    net = _as_network(network)
    return [f"layers.{layer}.{kind}" for layer in range(net.n_layer) for kind in BLOCK_TYPES]


def block_types(network: NetworkConfig | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order: one of ``BLOCK_TYPES``."""
    return list(BLOCK_TYPES) * _as_network(network).n_layer


def block_costs(network: NetworkConfig | Mapping[str, Any]) -> tuple[int, ...]:
    """Cost table, version 1: multiply-accumulates of one cell of each block, as executed.

    Self-attention: four d x d projections of T tokens, scores and mix. Feed-forward: two d x 4d
    matrices. Cross-attention: keys, values and output projection fold into S = 1 + n_obs_steps
    score and value vectors per head, so a cell is two (T x d) by (d x S n_head) products.
    """
    net = _as_network(network)
    tokens, dim = net.horizon, net.n_emb
    self_attn = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    cross_attn = 2 * tokens * net.n_memory * net.n_head * dim
    feed_forward = 8 * tokens * dim * dim
    return (self_attn, cross_attn, feed_forward) * net.n_layer


def describe(network: NetworkConfig) -> str:
    """Its size in a few words."""
    return f"{network.n_layer} layers, {network.n_head} heads, width {network.n_emb}"
