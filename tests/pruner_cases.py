"""A small policy, recorded observations and settings that tests of pruners' training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import config as case_config
from cases import random_tensors

import tsad
from tsad.checkpoint import read_folder, write_folder
from tsad.config import PolicyConfig
from tsad.sim.recording import Recorded

pytest.importorskip("torch")

from tsad.training.pruner import PrunerSettings, PrunerTrainer  # noqa: E402

STEPS, CHUNKS, HIDDEN = 6, 6, 16
SETTINGS = PrunerSettings(
    hidden=HIDDEN, sparsity=0.6, chunks=24, projections=1, batch=8, lr=1e-2, warmup=5, ema=0.9,
    val_episodes=1, steps=20,
)  # fmt: skip


def write_policy(path: Path) -> Path:
    """A folder of it."""
    case = case_config(
        "tiny", prediction_type="sample", clip_sample=False, num_inference_steps=STEPS
    )
    tensors = random_tensors(case["network"], 0)
    write_folder(path, PolicyConfig.from_dict(case), tensors, dtype="float32")
    return path


def episodes(count: int = 4) -> list[Recorded]:
    """Of random numbers."""
    rng = np.random.default_rng(0)
    return [
        Recorded(n, rng.standard_normal((CHUNKS, 3, 6)).astype(np.float32)) for n in range(count)
    ]


def write_data(path: Path) -> Path:
    """A file of the observations of four."""
    found = episodes()
    ends = CHUNKS * np.arange(1, len(found) + 1)
    np.savez(path, obs=np.concatenate([e.obs for e in found]), episode_ends=ends)
    return path


def make(
    folder: Path,
    out: Path,
    settings: PrunerSettings = SETTINGS,
    order: tuple[int, ...] = (0, 1, 2, 3),
    **options: Any,
) -> PrunerTrainer:
    """A training on the first three of them in this order, the last held out."""
    config, tensors, _ = read_folder(folder)
    found = episodes()
    whole = [(found[n], slice(0, CHUNKS)) for n in order]
    policy = tsad.load(folder)
    facts = {"num_inference_steps": STEPS}
    return PrunerTrainer(
        (config, tensors), policy, whole[:3], whole[3:], out, settings, facts=facts, **options
    )
