"""What the tests of `tsad fit` share: observations to fit on, and fits that are stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from command_line import run

from tsad.sim.rollout import noise_seed


def slow_episodes(folder: Path) -> str:
    """Five episodes of five successive chunks, which move slowly, for the case "tiny"."""
    random = np.random.default_rng(0)
    steps = random.normal(size=(5, 5, 3, 6)).cumsum(1).astype(np.float32) / 3
    np.savez(folder / "data.npz", obs=steps.reshape(25, 3, 6), episode_ends=np.arange(5, 26, 5))
    return str(folder / "data.npz")


def last_error(policy: Any, many: Any, data: str) -> float:
    """The mean over the last episode's chunks, each a first one, of executed actions' RMS error."""
    obs = np.load(data)["obs"][20:]
    random = np.random.default_rng(noise_seed(4))
    noise = random.standard_normal((5, 1, many.horizon, many.action_dim), np.float32)
    scale, errors = np.array(many.config["normalizer"]["action"]["scale"]), []
    for seen, z in zip(obs, noise, strict=True):
        many.reset()
        policy.reset()
        apart = (policy(seen, noise=z) - many(seen, noise=z)) * scale
        errors.append(np.sqrt((apart.astype(np.float64) ** 2).mean()))
    return float(np.mean(errors))


def fit_stopped(capsys: Any, monkeypatch: Any, words: list[str], stop: int) -> str:
    """What a fit says that is interrupted in the step after so many; the same command goes on."""
    from tsad.training.targets import SettingTraining

    step = SettingTraining.train_step

    def stopped(self: Any) -> float:
        if self.step == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(SettingTraining, "train_step", stopped)
        code, _, err = run(capsys, *words)
    assert code == 130, err
    return str(err)
