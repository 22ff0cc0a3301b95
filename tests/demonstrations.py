"""A training small enough to reason about: its settings and its data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tsad.training.train import Settings

TINY = Settings(
    horizon=5, n_obs_steps=2, n_action_steps=3, n_layer=1, n_head=2, n_emb=16, batch=16, lr=3e-3,
    warmup=5, val_episodes=1, steps=20, ema=0.9,
)  # fmt: skip


def standing_demonstrations(folder: Path) -> Path:
    """Nine episodes that stand still, and whose actions can be read off the observation."""
    obs = np.random.default_rng(0).uniform(-3, 3, (9, 3)).repeat(10, axis=0).astype(np.float32)
    action = np.stack([10 * obs[:, 0] + 5, -obs[:, 1]], 1)
    path = folder / "demos.npz"
    np.savez(path, obs=obs, action=action, episode_ends=np.arange(10, 91, 10))
    return path
