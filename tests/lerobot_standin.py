"""What of LeRobot `tsad.lerobot` touches, for tests where LeRobot cannot be installed.

The classes have the names, attributes and loops of ``lerobot.policies``'
``diffusion.modeling_diffusion`` (0.4 to 0.6) and ``multi_task_dit.modeling_multi_task_dit`` (0.5.1
on); the networks are `torch_unet`'s and `torch_dit`'s, the schedulers are diffusers' own.
"""

from __future__ import annotations

import sys
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch_dit import Shape as DitShape
from torch_dit import predict as predict_dit
from torch_unet import Shape, predict

from tsad.reference.layers import sinusoid

MODULE = "lerobot.policies.diffusion.modeling_diffusion"
DIT_MODULE = "lerobot.policies.multi_task_dit.modeling_multi_task_dit"


class Network(nn.Module):
    """Parameters under LeRobot's names, nested as there."""

    def __init__(self, shape: Any, seed: int) -> None:
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

    def compute(self, predict: Any, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        time = sinusoid(timestep.numpy(), self.shape.n_emb, np.float32, angles=np.float32)
        weights = {name: p.detach().numpy() for name, p in self.named_parameters()}
        obs = cond.reshape(len(x), self.shape.n_obs_steps, -1)
        output: Tensor = predict(self.shape, weights, x, time, obs).float()
        return output


class Unet(Network):
    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        return self.compute(predict, x, timestep, global_cond)


class DiffusionTransformer(Network):
    def forward(self, x: Tensor, timestep: Tensor, conditioning_vec: Tensor) -> Tensor:
        return self.compute(predict_dit, x, timestep, conditioning_vec)


def scheduler_of(config: Any) -> Any:
    scheduler = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler}[config.noise_scheduler_type]
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample")
    keys = (*keys, "clip_sample_range", "prediction_type")
    return scheduler(**{key: getattr(config, key) for key in keys})


class DiffusionModel(nn.Module):
    def __init__(self, config: Any, shape: Shape, seed: int) -> None:
        super().__init__()
        self.config = config
        self.unet = Unet(shape, seed)
        self.noise_scheduler = scheduler_of(config)
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


class DiffusionObjective(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.noise_scheduler = scheduler_of(config)
        self.num_inference_steps = config.num_inference_steps

    def conditional_sample(
        self, model: nn.Module, batch_size: int, conditioning_vec: Tensor
    ) -> Tensor:
        sample = torch.randn((batch_size, self.config.horizon, *self.config.action_feature.shape))
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            times = torch.full(sample.shape[:1], t, dtype=torch.long)
            output = model(sample, times, conditioning_vec=conditioning_vec)
            sample = self.noise_scheduler.step(output, t, sample).prev_sample
        return sample


class FlowMatchingObjective(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def conditional_sample(
        self, model: nn.Module, batch_size: int, conditioning_vec: Tensor
    ) -> Tensor:
        x = torch.randn((batch_size, self.config.horizon, *self.config.action_feature.shape))
        grid = torch.linspace(0, 1, self.config.num_integration_steps + 1)
        for i in range(len(grid) - 1):
            t, dt = grid[i].item(), (grid[i + 1] - grid[i]).item()

            def velocity(x: Tensor, time: float) -> Tensor:
                times = torch.full((len(x),), time)
                return cast(Tensor, model(x, times, conditioning_vec=conditioning_vec))

            k1 = velocity(x, t)
            if self.config.integration_method == "euler":
                x = x + dt * k1
                continue
            k2 = velocity(x + dt * k1 / 2, t + dt / 2)
            k3 = velocity(x + dt * k2 / 2, t + dt / 2)
            k4 = velocity(x + dt * k3, t + dt)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


class MultiTaskDiTPolicy(nn.Module):
    def __init__(self, config: Any, shape: DitShape, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.noise_predictor = DiffusionTransformer(shape, seed)
        flow = config.objective == "flow_matching"
        self.objective = FlowMatchingObjective(config) if flow else DiffusionObjective(config)
        self.reset()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    @torch.no_grad()
    def predict_action_chunk(self, cond: Tensor) -> Tensor:
        return self.objective.conditional_sample(self.noise_predictor, len(cond), cond)


def dit_config(shape: DitShape, **changes: Any) -> SimpleNamespace:
    """LeRobot's ``MultiTaskDiTConfig``, its defaults but for the sizes."""
    return SimpleNamespace(
        **common(shape)
        | dict(
            hidden_dim=shape.hidden_dim,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            timestep_embed_dim=shape.n_emb,
            use_rope=shape.use_rope,
            rope_base=shape.rope_base,
            use_positional_encoding=shape.positions,
            objective="diffusion",
            num_integration_steps=100,
            integration_method="euler",
        )
        | changes
    )


def config(shape: Shape, **changes: Any) -> SimpleNamespace:
    """LeRobot's ``DiffusionConfig``, its defaults but for the sizes."""
    return SimpleNamespace(
        **common(shape)
        | dict(
            down_dims=shape.down_dims,
            kernel_size=shape.kernel_size,
            n_groups=shape.n_groups,
            diffusion_step_embed_dim=shape.n_emb,
            use_film_scale_modulation=shape.scales,
        )
        | changes
    )


def common(shape: Any) -> dict[str, Any]:
    """What both have."""
    return dict(
        horizon=shape.horizon,
        n_obs_steps=shape.n_obs_steps,
        action_feature=SimpleNamespace(shape=(shape.action_dim,)),
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


def install(monkeypatch: Any) -> None:
    """Make ``import lerobot...`` find these classes."""
    classes = {
        MODULE: (DiffusionModel, DiffusionPolicy),
        DIT_MODULE: (DiffusionObjective, FlowMatchingObjective, MultiTaskDiTPolicy),
    }
    for module in classes:
        path = module.split(".")
        for n in range(1, len(path) + 1):
            monkeypatch.setitem(sys.modules, ".".join(path[:n]), ModuleType(".".join(path[:n])))
    for module, found in classes.items():
        for own in found:
            setattr(sys.modules[module], own.__name__, own)
