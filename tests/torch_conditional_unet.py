"""Diffusion Policy's ``ConditionalUnet1D`` as a torch module, for its names and its numbers.

Written from its published structure for the tests alone: modules are registered where its are, so
that ``state_dict`` has the names of a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Sinusoid(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, step: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(1e4)) / (half - 1)))
        angle = step[:, None] * frequency[None]
        return torch.cat((angle.sin(), angle.cos()), -1)


class ConvBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, groups: int = 8) -> None:
        super().__init__()
        convolution = nn.Conv1d(c_in, c_out, kernel, padding=kernel // 2)
        self.block = nn.Sequential(convolution, nn.GroupNorm(groups, c_out), nn.Mish())

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class Residual(nn.Module):
    def __init__(
        self, c_in: int, c_out: int, cond: int, kernel: int, groups: int, scales: bool
    ) -> None:
        super().__init__()
        self.scales = scales
        self.blocks = nn.ModuleList(
            [ConvBlock(c_in, c_out, kernel, groups), ConvBlock(c_out, c_out, kernel, groups)]
        )
        width = c_out * 2 if scales else c_out
        self.cond_encoder = nn.Sequential(
            nn.Mish(), nn.Linear(cond, width), nn.Unflatten(1, (-1, 1))
        )
        self.residual_conv = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Any:
        h, film = self.blocks[0](x), self.cond_encoder(cond)
        if self.scales:
            scale, film = film.unflatten(1, (2, -1)).unbind(1)
            h = h * scale
        return self.blocks[1](h + film) + self.residual_conv(x)


class Resample(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


class ConditionalUnet1D(nn.Module):
    """forward: sample (N, T, A), step (N,), condition (N, global_cond_dim)."""

    def __init__(
        self,
        input_dim: int,
        global_cond_dim: int,
        diffusion_step_embed_dim: int,
        down_dims: tuple[int, ...],
        kernel_size: int,
        n_groups: int,
        cond_predict_scale: bool,
        local_cond_dim: int | None = None,
    ) -> None:
        super().__init__()
        n, dims = diffusion_step_embed_dim, (input_dim, *down_dims)
        levels = list(zip(dims[:-1], dims[1:], strict=True))

        def residual(c_in: int, c_out: int) -> Residual:
            cond = n + global_cond_dim
            return Residual(c_in, c_out, cond, kernel_size, n_groups, cond_predict_scale)

        self.mid_modules = nn.ModuleList([residual(dims[-1], dims[-1]) for _ in range(2)])
        self.diffusion_step_encoder = nn.Sequential(
            Sinusoid(n), nn.Linear(n, 4 * n), nn.Mish(), nn.Linear(4 * n, n)
        )
        self.local_cond_encoder = None
        if local_cond_dim is not None:
            self.local_cond_encoder = nn.ModuleList(
                [residual(local_cond_dim, dims[1]) for _ in range(2)]
            )
        self.up_modules, self.down_modules = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in reversed(levels[1:]):
            up = Resample(nn.ConvTranspose1d(c_in, c_in, 4, 2, 1))
            parts = [residual(2 * c_out, c_in), residual(c_in, c_in), up]
            self.up_modules.append(nn.ModuleList(parts))
        for i, (c_in, c_out) in enumerate(levels):
            last = i == len(levels) - 1
            down = nn.Identity() if last else Resample(nn.Conv1d(c_out, c_out, 3, 2, 1))
            parts = [residual(c_in, c_out), residual(c_out, c_out), down]
            self.down_modules.append(nn.ModuleList(parts))
        self.final_conv = nn.Sequential(
            ConvBlock(dims[1], dims[1], kernel_size), nn.Conv1d(dims[1], input_dim, 1)
        )

    def forward(self, sample: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        x, kept = sample.mT, []
        time = self.diffusion_step_encoder[0](step).to(x.dtype)
        cond = torch.cat([self.diffusion_step_encoder[1:](time), condition], -1)
        for one, two, down in self.down_modules:  # type: ignore[misc]
            x = two(one(x, cond), cond)
            kept.append(x)
            x = down(x)
        for middle in self.mid_modules:
            x = middle(x, cond)
        for one, two, up in self.up_modules:  # type: ignore[misc]
            x = up(two(one(torch.cat((x, kept.pop()), 1), cond), cond))
        return self.final_conv(x).mT  # type: ignore[no-any-return]
