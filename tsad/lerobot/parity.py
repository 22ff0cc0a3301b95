"""A LeRobot folder run by LeRobot itself: what a certificate compares tsad with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.lerobot.engine import lerobot_noise

Floats = NDArray[np.float32]


def available() -> bool:
    """Whether LeRobot and PyTorch are installed."""
    return all(importlib.util.find_spec(name) for name in ("lerobot", "torch"))


def name() -> str:
    """LeRobot and PyTorch with their versions."""
    versions = [importlib.metadata.version(name) for name in ("lerobot", "torch")]
    return f"LeRobot {versions[0]}, PyTorch {versions[1]}"


class LerobotPolicy:
    """A diffusion policy without cameras, in PyTorch, with its processors: raw units on both sides.

    ``features`` are those of its config.json as tsad reads it: what an observation is made of.
    """

    def __init__(self, folder: str | os.PathLike[str], features: list[dict[str, Any]]) -> None:
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
        from lerobot.policies.factory import make_pre_post_processors

        self._features = features
        self._policy: Any = DiffusionPolicy.from_pretrained(folder).to("cpu").eval()
        cpu = {"device_processor": {"device": "cpu"}}
        self._before, self._after = make_pre_post_processors(
            self._policy.config,
            pretrained_path=os.fspath(folder),
            preprocessor_overrides=cpu,
            postprocessor_overrides=cpu,
        )

    @property
    def name(self) -> str:
        """Who computes it, and how."""
        return f"{name()} (float32)"

    def __call__(self, obs: Floats) -> Floats:
        """Actions (1, n_action_steps, action_dim) for obs (1, n_obs_steps, obs_dim)."""
        import torch

        ends = np.cumsum([feature["dim"] for feature in self._features])[:-1]
        parts = np.split(obs, ends, axis=-1)
        batch = {
            feature["name"]: torch.from_numpy(np.ascontiguousarray(part))
            for feature, part in zip(self._features, parts, strict=True)
        }
        with torch.inference_mode():
            ready = self._before(batch)
            actions = self._policy.diffusion.generate_actions({name: ready[name] for name in batch})
            actions = torch.stack([self._after(actions[:, i]) for i in range(actions.shape[1])], 1)
        result: Floats = actions.float().numpy()
        return result

    def chunk(self, policy: Any, obs: Floats, seed: int) -> tuple[Floats, Floats]:
        """The noise (K, 1, horizon, action_dim) that LeRobot draws, and its actions with it."""
        import torch

        def draw() -> Any:
            return torch.randn((1, policy.horizon, policy.action_dim))

        torch.manual_seed(seed)
        noise: Floats = lerobot_noise(policy, draw, draw()).numpy()
        torch.manual_seed(seed)
        return noise, self(obs)
