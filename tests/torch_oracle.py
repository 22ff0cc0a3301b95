"""The policy out of PyTorch's own layers and the installed diffusers: what everything must equal.

``TorchPolicy.chunk`` runs any plan with caches kept as the paper describes them, written apart from
``tsad.reference``. Import it after ``pytest.importorskip("torch")`` and ``("diffusers")``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsad.training.network import from_config

torch.set_num_threads(1)  # these matrices are small: more threads only wait for each other


class ClippedSolver(diffusers.DPMSolverMultistepScheduler):
    """What ``clip_sample`` means for DPM-Solver++: diffusers has no such option."""

    clip_range = float("inf")

    def convert_model_output(self, *args: Any, **kwargs: Any) -> Tensor:
        x0 = super().convert_model_output(*args, **kwargs)
        return x0.clamp(-self.clip_range, self.clip_range)


def diffusers_scheduler(scheduler: Mapping[str, Any], *, double: bool = False) -> Any:
    """diffusers' own scheduler of a ``scheduler`` object of config.json, timesteps set.

    ``double``: its float32 noise levels, converted, so that it computes with them in float64.
    """
    keys = ["num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"]
    keys += ["timestep_spacing", "steps_offset"]
    kind = scheduler["type"]
    if kind == "dpmsolver++":
        solver: Any = ClippedSolver(**{key: scheduler[key] for key in keys})
        if scheduler["clip_sample"]:
            solver.clip_range = scheduler["clip_sample_range"]
    else:
        keys += ["clip_sample", "clip_sample_range"]
        keys.append("variance_type" if kind == "ddpm" else "set_alpha_to_one")
        factory = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[kind]
        solver = factory(**{key: scheduler[key] for key in keys})
    if double and kind != "dpmsolver++":  # DPM-Solver++ is float32 inside, whatever it is given
        solver.alphas_cumprod = solver.alphas_cumprod.double()
        if kind == "ddim":
            solver.final_alpha_cumprod = solver.final_alpha_cumprod.double()
    solver.set_timesteps(scheduler["num_inference_steps"])
    return solver


def run_diffusers(
    solver: Any,
    noise: NDArray[Any],
    predict: Callable[[int, Tensor], Tensor],
    dtype: Any,
    *,
    last: int = 0,
) -> NDArray[Any]:
    """The final sample of diffusers' loop; ``noise[0]`` is the first, ``noise[k]`` added after k-1.

    ``predict(k, sample)`` is the network at loop index k. ``last``: that many steps at the end of
    the schedule, 0: all.
    """
    # After the last step there is no draw of ours: DDPM may ask for one, of deviation 1e-10.
    draws = iter([*noise[1:], np.zeros_like(noise[0])])

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(next(draws), dtype=dtype)

    x = torch.tensor(noise[0], dtype=dtype)
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", draw):
        for k, t in enumerate(solver.timesteps[-last:]):
            x = solver.step(predict(k, x), t, x).prev_sample
    return x.numpy()


class TorchPolicy:
    """One lane, float64. ``rollout`` holds what each cell was when last computed this episode."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        self.config = config
        self.model = from_config(config["network"])
        state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        self.model.load_state_dict(state)
        self.model.double().eval().requires_grad_(False)
        self.rollout: dict[tuple[int, int], Tensor] = {}

    def _obs(self, obs: NDArray[Any]) -> Tensor:
        affine = self.config["normalizer"]["obs"]
        scaled = np.asarray(obs, np.float64) * np.array(affine["scale"]) + affine["offset"]
        return torch.from_numpy(scaled)

    def predict_noise(self, sample: NDArray[Any], step: int, obs: NDArray[Any]) -> NDArray[Any]:
        """Dense, of ``sample`` (N, T, action_dim) and raw ``obs`` (N, n_obs_steps, obs_dim)."""
        timestep = diffusers_scheduler(self.config["scheduler"]).timesteps[step]
        sample = torch.tensor(sample, dtype=torch.float64)
        return self.model(sample, timestep, self._obs(obs)).numpy()

    def memory(self, obs: NDArray[Any]) -> Tensor:
        """Memory (K, S, d) of every step from one raw obs (n_obs_steps, obs_dim)."""
        timesteps = diffusers_scheduler(self.config["scheduler"]).timesteps
        return torch.cat([self.model.encode(t, self._obs(obs)[None]) for t in timesteps])

    def chunk(
        self,
        obs: NDArray[Any],
        noise: NDArray[Any],
        sources: NDArray[Any] | None = None,
        *,
        double: bool = True,
    ) -> NDArray[Any]:
        """Raw actions (T, action_dim) from ``obs`` (n_obs_steps, obs_dim) and one lane's noise."""
        solver = diffusers_scheduler(self.config["scheduler"], double=double)
        if sources is None:
            sources = np.zeros((len(noise), 3 * len(self.model.decoder.layers)), np.uint8)
        cond = self._obs(obs)[None]
        by_type: dict[int, Tensor] = {}
        by_block: dict[int, Tensor] = {}

        def predict(k: int, x: Tensor) -> Tensor:
            memory = self.model.encode(solver.timesteps[k], cond)
            h = self.model.input_emb(x.double()) + self.model.pos_emb
            for b, source in enumerate(sources[k]):
                if source == 0:
                    value = self._branch(b, h, memory)
                    by_type[b % 3] = by_block[b] = self.rollout[k, b] = value
                elif source < 4:
                    value = (by_type.get(b % 3), by_block.get(b), self.rollout.get((k, b)))[
                        source - 1
                    ]
                    assert value is not None, f"the test's plan reads an empty cache: {k}, {b}"
                else:
                    value = torch.zeros_like(h)
                h = h + value
            return self.model.head(self.model.ln_f(h)).to(x.dtype)

        noise = np.asarray(noise, np.float64)[:, None]
        x = run_diffusers(solver, noise, predict, torch.float64)[0]
        affine = self.config["normalizer"]["action"]
        return (x - affine["offset"]) / np.array(affine["scale"])

    def _branch(self, b: int, h: Tensor, memory: Tensor) -> Tensor:
        layer: Any = self.model.decoder.layers[b // 3]
        if b % 3 == 0:
            y = layer.norm1(h)
            return layer.self_attn(y, y, y, attn_mask=self.model.mask, need_weights=False)[0]
        if b % 3 == 1:
            y, mask = layer.norm2(h), self.model.memory_mask
            return layer.multihead_attn(y, memory, memory, attn_mask=mask, need_weights=False)[0]
        return layer.linear2(nn.functional.gelu(layer.linear1(layer.norm3(h))))


class TorchPruner(nn.Module):
    """The published pruner: a torch decoder layer between two linears, float64."""

    def __init__(self, pruner: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        hidden = pruner["hidden_dim"]
        self.memory_proj = nn.Linear(tensors["memory_proj.weight"].shape[1], hidden)
        layer = nn.TransformerDecoderLayer(
            hidden,
            pruner["n_head"],
            pruner["dim_feedforward"],
            dropout=0.0,
            activation="relu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer_decoder = nn.TransformerDecoder(layer, 1)
        self.head = nn.Linear(hidden, 4)
        self.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
        self.double().eval().requires_grad_(False)

    def forward(self, memory: Tensor, n_blocks: int) -> Tensor:
        """Logits (K, n_blocks, 4) from memory (K, S, d)."""
        half = self.head.in_features // 2
        angle = torch.arange(n_blocks)[:, None] * torch.exp(
            torch.arange(half, dtype=torch.float64) * (-np.log(10000.0) / (half - 1))
        )
        tokens = torch.cat([angle.sin(), angle.cos()], -1).expand(len(memory), -1, -1)
        return self.head(self.transformer_decoder(tokens, self.memory_proj(memory)))
