"""The transformer of LeRobot's multi_task_dit in PyTorch's own operators, and its weights.

Names are LeRobot's. Written from the published architecture for the tests alone; whether it is
LeRobot's network is for tests/fixtures to say, which LeRobot recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """Of a network; LeRobot's defaults but for the sizes."""

    hidden_dim: int = 32
    num_layers: int = 2
    num_heads: int = 4
    horizon: int = 16
    n_obs_steps: int = 2
    obs_dim: int = 5
    action_dim: int = 3
    n_emb: int = 8
    use_rope: bool = True
    rope_base: float = 10000.0
    positions: bool = False

    def network(self, n_action_steps: int = 1) -> dict[str, Any]:
        """The ``network`` object of a config.json."""
        return {
            "type": "dit",
            "horizon": self.horizon,
            "n_obs_steps": self.n_obs_steps,
            "n_action_steps": n_action_steps,
            "obs_dim": self.obs_dim,
            "action_dim": self.action_dim,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "timestep_embed_dim": self.n_emb,
            "use_rope": self.use_rope,
            "rope_base": self.rope_base,
            "use_positional_encoding": self.positions,
        }

    def weights(self, seed: int) -> Weights:
        """Seeded; activations stay of the order of 1, and no bias, scale or gate is trivial."""
        rng = np.random.default_rng(seed)
        made: Weights = {}

        def layer(name: str, n_out: int, n_in: int, dot: str = ".", gain: float = 1) -> None:
            weight = rng.normal(0, gain * n_in**-0.5, (n_out, n_in))
            made[f"{name}{dot}weight"] = weight.astype(np.float32)
            made[f"{name}{dot}bias"] = rng.normal(0, 0.3 * gain, n_out).astype(np.float32)

        D, E = self.hidden_dim, self.n_emb
        if self.positions:
            made["pos_embedding"] = rng.normal(0, 0.5, (1, self.horizon, D)).astype(np.float32)
        layer("time_mlp.1", 2 * E, E)
        layer("time_mlp.3", E, 2 * E)
        layer("input_proj", D, self.action_dim)
        for i in range(self.num_layers):
            name = f"transformer_blocks.{i}"
            if self.use_rope:
                layer(f"{name}.attn.qkv_proj", 3 * D, D)
                layer(f"{name}.attn.out_proj", D, D)
            else:
                layer(f"{name}.multihead_attn.in_proj", 3 * D, D, dot="_")
                layer(f"{name}.multihead_attn.out_proj", D, D)
            layer(f"{name}.mlp.0", 4 * D, D)
            layer(f"{name}.mlp.2", D, 4 * D)
            cond = E + self.n_obs_steps * self.obs_dim
            layer(f"{name}.adaLN_modulation.1", 6 * D, cond, gain=0.7)
        layer("output_proj", self.action_dim, D)
        return made


def turn(x: Tensor, base: float) -> Tensor:
    """Rotary positions; angles, sines and cosines are float32, as in LeRobot."""
    half = x.shape[-1] // 2
    frequency = 1 / base ** (torch.arange(half).float() * 2 / x.shape[-1])
    angle = torch.arange(x.shape[-2]).float()[:, None] * frequency
    cos, sin = (f(angle.double()).float().to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def predict(shape: Shape, weights: Weights, sample: Any, time_emb: Any, obs: Any) -> Tensor:
    """The network in float64: sample (N, T, A), time_emb (N, E), obs (N, n_obs_steps, obs_dim)."""
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    inputs = (torch.as_tensor(value).double() for value in (sample, time_emb, obs))
    return forward(shape, w, *inputs)


def forward(shape: Shape, w: dict[str, Tensor], sample: Any, time_emb: Any, obs: Any) -> Tensor:
    """The same, of tensors in any precision."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attend(name: str, x: Tensor) -> Tensor:
        if not shape.use_rope:
            with torch.random.fork_rng():  # which its initial weights would draw from
                module = torch.nn.MultiheadAttention(x.shape[-1], shape.num_heads, batch_first=True)
            prefix = f"{name}.multihead_attn."
            own = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
            module.to(x.dtype).load_state_dict(own)
            with torch.no_grad():
                y: Tensor = module.eval()(x, x, x)[0]
            return y
        qkv = linear(f"{name}.attn.qkv_proj", x).unflatten(-1, (3, shape.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = turn(q, shape.rope_base), turn(k, shape.rope_base)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return linear(f"{name}.attn.out_proj", mixed.transpose(1, 2).flatten(2))

    time = F.gelu(linear("time_mlp.1", time_emb))
    time = F.gelu(linear("time_mlp.3", time))
    cond = torch.cat([time, obs.flatten(1)], 1)
    x = linear("input_proj", sample)
    if shape.positions:
        x = x + w["pos_embedding"]
    for i in range(shape.num_layers):
        name = f"transformer_blocks.{i}"
        terms = linear(f"{name}.adaLN_modulation.1", F.silu(cond))[:, None]
        shift, scale, gate, shift2, scale2, gate2 = terms.chunk(6, -1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = x + gate * attend(name, y)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        y = F.gelu(linear(f"{name}.mlp.0", y), approximate="tanh")
        x = x + gate2 * linear(f"{name}.mlp.2", y)
    return linear("output_proj", x)
