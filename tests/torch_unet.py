"""The conditional UNet of LeRobot and Diffusion Policy in PyTorch's own operators, and its weights.

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

FINAL_GROUPS = 8
Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """Of a network; LeRobot's defaults but for the sizes."""

    down_dims: tuple[int, ...] = (16, 32, 64)
    horizon: int = 16
    n_obs_steps: int = 2
    obs_dim: int = 5
    action_dim: int = 2
    kernel_size: int = 5
    n_groups: int = 8
    n_emb: int = 8
    scales: bool = True

    def network(self, n_action_steps: int = 1) -> dict[str, Any]:
        """The ``network`` object of a config.json."""
        return {
            "type": "unet1d",
            "horizon": self.horizon,
            "n_obs_steps": self.n_obs_steps,
            "n_action_steps": n_action_steps,
            "obs_dim": self.obs_dim,
            "action_dim": self.action_dim,
            "down_dims": list(self.down_dims),
            "kernel_size": self.kernel_size,
            "n_groups": self.n_groups,
            "diffusion_step_embed_dim": self.n_emb,
            "use_film_scale_modulation": self.scales,
        }

    def blocks(self) -> list[tuple[str, int, int, int]]:
        """(name, channels in, channels out, tokens) in order of execution."""
        found, c, tokens, dims = [], self.action_dim, self.horizon, self.down_dims
        for i, dim in enumerate(dims):
            found += [(f"down_modules.{i}.{j}", dim if j else c, dim, tokens) for j in (0, 1)]
            c = dim
            tokens //= 2 if i + 1 < len(dims) else 1
        found += [(f"mid_modules.{j}", c, c, tokens) for j in (0, 1)]
        for i, dim in enumerate(reversed(dims[:-1])):
            found += [(f"up_modules.{i}.{j}", dim if j else 2 * c, dim, tokens) for j in (0, 1)]
            c, tokens = dim, 2 * tokens
        return found

    def weights(self, seed: int) -> Weights:
        """Seeded; activations stay of the order of 1, and no bias or gain is trivial."""
        rng = np.random.default_rng(seed)
        made: Weights = {}

        def layer(name: str, *shape: int, fan: int = 0) -> None:
            n_in = fan or int(np.prod(shape[1:]))
            made[f"{name}.weight"] = rng.normal(0, n_in**-0.5, shape).astype(np.float32)
            out = shape[1] if fan else shape[0]
            made[f"{name}.bias"] = rng.normal(0, 0.3, out).astype(np.float32)

        def conv_norm(name: str, c_out: int, c_in: int) -> None:
            layer(f"{name}.0", c_out, c_in, self.kernel_size)
            made[f"{name}.1.weight"] = rng.normal(1, 0.3, c_out).astype(np.float32)
            made[f"{name}.1.bias"] = rng.normal(0, 0.3, c_out).astype(np.float32)

        D, cond = self.n_emb, self.n_emb + self.n_obs_steps * self.obs_dim
        layer("diffusion_step_encoder.1", 4 * D, D)
        layer("diffusion_step_encoder.3", D, 4 * D)
        for name, c_in, c_out, _ in self.blocks():
            conv_norm(f"{name}.conv1.block", c_out, c_in)
            conv_norm(f"{name}.conv2.block", c_out, c_out)
            layer(f"{name}.cond_encoder.1", (1 + self.scales) * c_out, cond)
            if c_in != c_out:
                layer(f"{name}.residual_conv", c_out, c_in, 1)
        for i, dim in enumerate(self.down_dims[:-1]):
            layer(f"down_modules.{i}.2", dim, dim, 3)
            layer(f"up_modules.{len(self.down_dims) - 2 - i}.2", dim, dim, 4, fan=2 * dim)
        conv_norm("final_conv.0.block", self.down_dims[0], self.down_dims[0])
        layer("final_conv.1", self.action_dim, self.down_dims[0], 1)
        return made


def conv_norm(w: dict[str, Tensor], name: str, x: Tensor, groups: int) -> Tensor:
    weight = w[f"{name}.0.weight"]
    x = F.conv1d(x, weight, w[f"{name}.0.bias"], padding=weight.shape[-1] // 2)
    return F.mish(F.group_norm(x, groups, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def predict(shape: Shape, weights: Weights, sample: Any, time_emb: Any, obs: Any) -> Tensor:
    """The network in float64: sample (N, T, A), time_emb (N, D), obs (N, n_obs_steps, obs_dim)."""
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    inputs = (torch.as_tensor(value).double() for value in (sample, time_emb, obs))
    return forward(shape, w, *inputs)


def forward(shape: Shape, w: dict[str, Tensor], sample: Any, time_emb: Any, obs: Any) -> Tensor:
    """The same, of tensors in any precision."""
    x = sample.mT
    time = linear(w, "diffusion_step_encoder.1", time_emb)
    time = linear(w, "diffusion_step_encoder.3", F.mish(time))
    cond = F.mish(torch.cat([time, obs.flatten(1)], 1))

    def block(name: str, x: Tensor) -> Tensor:
        h = conv_norm(w, f"{name}.conv1.block", x, shape.n_groups)
        film = linear(w, f"{name}.cond_encoder.1", cond)[..., None]
        if shape.scales:
            scale, film = film.chunk(2, 1)
            h = scale * h
        h = conv_norm(w, f"{name}.conv2.block", h + film, shape.n_groups)
        if f"{name}.residual_conv.weight" in w:
            residual = f"{name}.residual_conv"
            x = F.conv1d(x, w[f"{residual}.weight"], w[f"{residual}.bias"])
        return x + h

    def pair(level: str, x: Tensor) -> Tensor:
        return block(f"{level}.1", block(f"{level}.0", x))

    levels, skips = len(shape.down_dims), []
    for i in range(levels):
        x = pair(f"down_modules.{i}", x)
        skips.append(x)
        if i + 1 < levels:
            name = f"down_modules.{i}.2"
            x = F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
    x = pair("mid_modules", x)
    for i in range(levels - 1):
        x = pair(f"up_modules.{i}", torch.cat([x, skips.pop()], 1))
        name = f"up_modules.{i}.2"
        x = F.conv_transpose1d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
    x = conv_norm(w, "final_conv.0.block", x, FINAL_GROUPS)
    return F.conv1d(x, w["final_conv.1.weight"], w["final_conv.1.bias"]).mT
