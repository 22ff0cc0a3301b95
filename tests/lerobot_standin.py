"""What of LeRobot `tsad.lerobot` touches, for tests where LeRobot cannot be installed.

The classes have the names, attributes and loop of ``lerobot.policies.diffusion.modeling_diffusion``
(0.4 to 0.6); the network is `torch_unet`'s, the schedulers are diffusers' own.
"""

from __future__ import annotations

import sys
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch_unet import Shape, predict

from tsad.reference.layers import sinusoid

MODULE = "lerobot.policies.diffusion.modeling_diffusion"


class Unet(nn.Module):
    """Parameters under LeRobot's names, nested as there."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        for name, value in shape.weights(seed).items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.from_numpy(value)))

    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        time = sinusoid(timestep.numpy(), self.shape.n_emb, np.float32, angles=np.float32)
        weights = {name: p.detach().numpy() for name, p in self.named_parameters()}
        obs = global_cond.reshape(len(x), self.shape.n_obs_steps, -1)
        return predict(self.shape, weights, x, time, obs).float()


class DiffusionModel(nn.Module):
    def __init__(self, config: Any, shape: Shape, seed: int) -> None:
        super().__init__()
        self.config = config
        self.unet = Unet(shape, seed)
        scheduler = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler}[config.noise_scheduler_type]
        self.noise_scheduler = scheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            clip_sample=config.clip_sample,
            clip_sample_range=config.clip_sample_range,
            prediction_type=config.prediction_type,
        )
        self.num_inference_steps = config.num_inference_steps

    def conditional_sample(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        shape = (batch_size, self.config.horizon, self.config.action_feature.shape[0])
        sample = torch.randn(shape, generator=generator) if noise is None else noise
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            times = torch.full(sample.shape[:1], t, dtype=torch.long)
            output = self.unet(sample, times, global_cond=global_cond)
            step = self.noise_scheduler.step(output, t, sample, generator=generator)
            sample = step.prev_sample
        return sample


class DiffusionPolicy(nn.Module):
    def __init__(self, config: Any, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.diffusion = DiffusionModel(config, shape, seed)
        self.reset()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    @torch.no_grad()
    def predict_action_chunk(self, cond: Tensor, **given: Any) -> Tensor:
        return self.diffusion.conditional_sample(len(cond), global_cond=cond, **given)


def config(shape: Shape, **changes: Any) -> SimpleNamespace:
    """LeRobot's ``DiffusionConfig``, its defaults but for the sizes."""
    return SimpleNamespace(
        **dict(
            horizon=shape.horizon,
            n_obs_steps=shape.n_obs_steps,
            action_feature=SimpleNamespace(shape=(shape.action_dim,)),
            down_dims=shape.down_dims,
            kernel_size=shape.kernel_size,
            n_groups=shape.n_groups,
            diffusion_step_embed_dim=shape.n_emb,
            use_film_scale_modulation=shape.scales,
            noise_scheduler_type="DDPM",
            num_train_timesteps=100,
            num_inference_steps=100,
            beta_schedule="squaredcos_cap_v2",
            beta_start=0.0001,
            beta_end=0.02,
            prediction_type="epsilon",
            clip_sample=True,
            clip_sample_range=1.0,
            pretrained_path=None,
        )
        | changes
    )


def install(monkeypatch: Any) -> None:
    """Make ``import lerobot...`` find these classes."""
    path = MODULE.split(".")
    for n in range(1, len(path) + 1):
        name = ".".join(path[:n])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules[MODULE]
    module.DiffusionModel = DiffusionModel  # type: ignore[attr-defined]
    module.DiffusionPolicy = DiffusionPolicy  # type: ignore[attr-defined]
    sys.modules[path[0] + ".policies.diffusion"].modeling_diffusion = module  # type: ignore[attr-defined]
