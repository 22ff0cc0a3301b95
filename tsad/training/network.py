"""The diffusion transformer of Diffusion Policy in PyTorch: to train, and to check the core by.

Built of torch's own decoder and encoder layers. Tensor names and shapes are those of Diffusion
Policy's ``TransformerForDiffusion``, so a state dict of either loads into the other (masks are not
stored).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tsad.scope import scope

_INIT_STD = 0.02


def causal_masks(horizon: int, n_obs_steps: int) -> tuple[Tensor, Tensor]:
    """Additive masks, 0 or -inf: ``(horizon, horizon)`` and ``(horizon, 1 + n_obs_steps)``.

    Action token i sees action tokens up to i. It sees memory token s if i >= s - 1, where s = 0 is
    the time and s >= 1 the observations, oldest first: so an action token before the newest
    observation cannot see that observation.
    """
    action = torch.arange(horizon)[:, None]
    memory = torch.arange(1 + n_obs_steps)[None, :]
    blocked = float("-inf")
    mask = torch.zeros(horizon, horizon).masked_fill(action < action.T, blocked)
    memory_mask = torch.zeros(horizon, 1 + n_obs_steps).masked_fill(action < memory - 1, blocked)
    return mask, memory_mask


class TransformerForDiffusion(nn.Module):
    """Predicts the noise or the clean actions from noisy actions, a time step and observations.

    Parameters: ``horizon`` action tokens, ``n_obs_steps`` observation tokens of ``obs_dim``
    numbers, ``action_dim`` numbers per action; ``n_layer`` decoder layers of width ``n_emb`` with
    ``n_head`` heads; ``n_cond_layers`` > 0 replaces the token-wise encoder by a transformer
    encoder; ``p_drop_emb`` and ``p_drop_attn`` are dropout rates.
    """

    mask: Tensor | None
    memory_mask: Tensor | None

    def __init__(
        self,
        *,
        horizon: int,
        n_obs_steps: int,
        obs_dim: int,
        action_dim: int,
        n_layer: int = 8,
        n_head: int = 4,
        n_emb: int = 256,
        n_cond_layers: int = 0,
        causal_attn: bool = True,
        p_drop_emb: float = 0.0,
        p_drop_attn: float = 0.0,
    ) -> None:
        super().__init__()
        if n_emb % n_head or n_emb % 2 or n_emb < 4:
            raise ValueError(
                f"n_emb={n_emb} must be even, at least 4, and a multiple of n_head={n_head}"
            )
        self.horizon, self.n_obs_steps, self.n_emb = horizon, n_obs_steps, n_emb
        common: dict[str, Any] = {
            "d_model": n_emb,
            "nhead": n_head,
            "dim_feedforward": 4 * n_emb,
            "dropout": p_drop_attn,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.input_emb = nn.Linear(action_dim, n_emb)
        self.pos_emb = nn.Parameter(torch.zeros(1, horizon, n_emb))
        self.cond_obs_emb = nn.Linear(obs_dim, n_emb)
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, 1 + n_obs_steps, n_emb))
        self.drop = nn.Dropout(p_drop_emb)
        if n_cond_layers > 0:
            self.encoder: nn.Module = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**common), n_cond_layers, enable_nested_tensor=False
            )
        else:
            self.encoder = nn.Sequential(
                nn.Linear(n_emb, 4 * n_emb), nn.Mish(), nn.Linear(4 * n_emb, n_emb)
            )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**common), n_layer)
        self.ln_f = nn.LayerNorm(n_emb)
        self.head = nn.Linear(n_emb, action_dim)
        masks = causal_masks(horizon, n_obs_steps) if causal_attn else (None, None)
        self.register_buffer("mask", masks[0], persistent=False)
        self.register_buffer("memory_mask", masks[1], persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=_INIT_STD)
                nn.init.zeros_(module.in_proj_bias)
        nn.init.normal_(self.pos_emb, std=_INIT_STD)
        nn.init.normal_(self.cond_pos_emb, std=_INIT_STD)

    def encode(self, timestep: Tensor | int, cond: Tensor) -> Tensor:
        """Memory tokens ``(B, 1 + n_obs_steps, n_emb)``; arguments as those of ``forward``."""
        half = self.n_emb // 2
        dtype, device = self.pos_emb.dtype, cond.device
        time = torch.as_tensor(timestep, device=device).to(dtype).expand(len(cond))
        frequency = torch.exp(
            torch.arange(half, device=device, dtype=dtype) * (-math.log(10000.0) / (half - 1))
        )
        angle = time[:, None, None] * frequency
        token = torch.cat([angle.sin(), angle.cos()], dim=-1)
        tokens = torch.cat([token, self.cond_obs_emb(cond).to(dtype)], dim=1)
        memory: Tensor = self.encoder(self.drop(tokens + self.cond_pos_emb))
        return memory

    def forward(self, sample: Tensor, timestep: Tensor | int, cond: Tensor) -> Tensor:
        """Network output ``(B, horizon, action_dim)``.

        ``sample`` ``(B, horizon, action_dim)`` and ``cond`` ``(B, n_obs_steps, obs_dim)`` are
        normalised; ``timestep`` is ``(B,)`` or a scalar, the training time step (0 is the
        cleanest).
        """
        memory = self.encode(timestep, cond)
        hidden = self.drop(self.input_emb(sample) + self.pos_emb)
        for layer in self.decoder.layers:
            hidden = layer(
                hidden,
                memory,
                tgt_mask=self.mask,
                memory_mask=self.memory_mask,
                tgt_is_causal=False,
                memory_is_causal=False,
            )
        output: Tensor = self.head(self.ln_f(hidden))
        return output


def from_config(
    network: Mapping[str, Any], *, p_drop_emb: float = 0.0, p_drop_attn: float = 0.0
) -> TransformerForDiffusion:
    """The network that the ``"network"`` part of a config.json describes, freshly initialised."""
    for key in ("time_as_cond", "obs_as_cond"):
        if not network.get(key, True):
            raise ValueError(
                f"network.{key}: expected true, got false; train with true ({scope('networks')})"
            )
    sizes = ("horizon", "n_obs_steps", "obs_dim", "action_dim", "n_layer", "n_head", "n_emb")
    return TransformerForDiffusion(
        **{key: int(network[key]) for key in sizes},
        n_cond_layers=int(network.get("n_cond_layers", 0)),
        causal_attn=bool(network.get("causal_attn", True)),
        p_drop_emb=p_drop_emb,
        p_drop_attn=p_drop_attn,
    )
