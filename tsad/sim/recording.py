"""Rollouts of the dense policy on disk, for everything that is fitted or searched offline.

A collection is a folder: `collection.json` says what was played, `episode-<seed>.npz` holds one
episode each. A recorded chunk is what the policy saw, what it did, and the input of every denoising
step; the noise is not stored but drawn again from the episode's seed (`Recorded.noise`). A chunk of
100 steps x 10 actions x 2 numbers takes 8 kB.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.files import make_folder, write_atomically, write_json
from tsad.samplers import Sampler, make_sampler
from tsad.sim.results import ResultsError, differences
from tsad.sim.rollout import Episode, noise_seed

Floats = NDArray[np.float32]

FORMAT = "tsad-collection"
FORMAT_VERSION = 1
FACTS_FILE = "collection.json"
# The house's split: these seeds to collect and to search, 10,000 to 19,999 to choose, 100,000 and
# up for reports.
SEEDS = range(10_000)


@dataclass(frozen=True)
class Recorded:
    """One episode of C chunks.

    Arrays, float32: ``obs`` (C, n_obs_steps, obs_dim) and ``actions`` (C, horizon, action_dim) in
    raw units, ``inputs`` (C, K, horizon, action_dim): the normalised sample that enters each step.
    ``adds_noise``: whether the sampler does, between steps.
    """

    seed: int
    score: float
    success: bool
    adds_noise: bool
    obs: Floats
    actions: Floats
    inputs: Floats

    def noise(self) -> Floats:
        """(C, K, horizon, action_dim), float32: the noise of each chunk, as the policy drew it.

        Zeros after the initial sample if the sampler adds none.
        """
        noise = np.zeros_like(self.inputs)
        drawn = noise if self.adds_noise else noise[:, :1]
        generator = np.random.Generator(np.random.PCG64(noise_seed(self.seed)))
        drawn[:] = generator.standard_normal(drawn.shape, np.float32)
        return noise


class Recorder:
    """A dense policy that keeps every step's input: the policy of `tsad.sim.rollouts`.

    It asks ``policy.predict_noise`` step by step and runs the sampler's table in float32, so its
    actions equal the policy's own to rounding (about 1e-6, normalised), at a third more time.

    ``policy`` is a `tsad.SparsePolicy`; its lanes, plan and streams stay as they are.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._sampler: Sampler = make_sampler(policy.config["scheduler"])
        action = policy.config["normalizer"]["action"]
        self._scale = np.array(action["scale"], np.float32)
        self._offset = np.array(action["offset"], np.float32)
        self._streams: list[np.random.Generator | None] = [None] * policy.lanes
        self._kept: list[list[tuple[Floats, Floats, Floats]]] = [[] for _ in range(policy.lanes)]

    @property
    def lanes(self) -> int:
        return int(self._policy.lanes)

    @property
    def n_obs_steps(self) -> int:
        return int(self._policy.n_obs_steps)

    @property
    def n_action_steps(self) -> int:
        return int(self._policy.n_action_steps)

    @property
    def obs_dim(self) -> int:
        return int(self._policy.obs_dim)

    @property
    def action_dim(self) -> int:
        return int(self._policy.action_dim)

    def reset(self, lanes: Sequence[int], seed: Sequence[int]) -> None:
        for lane, number in zip(lanes, seed, strict=True):
            self._streams[lane] = np.random.Generator(np.random.PCG64(number))
            self._kept[lane] = []

    def __call__(self, obs: Floats, *, lanes: Sequence[int]) -> Floats:
        steps = len(self._sampler.timesteps)
        shape = (steps, self._policy.horizon, self.action_dim)
        rows = []
        for lane in lanes:
            stream = self._streams[lane]
            if stream is None:
                raise RuntimeError(f"lane {lane} has no noise yet; call reset first")
            drawn = shape if self._sampler.adds_noise else (1, *shape[1:])
            noise = stream.standard_normal(drawn, np.float32)
            rows.append(np.broadcast_to(noise, shape))  # only the first is read if none is added
        inputs, x = self._denoise(np.stack(rows, axis=1), obs)
        actions = (x - self._offset) / self._scale
        for row, lane in enumerate(lanes):
            self._kept[lane].append((obs[row].copy(), actions[row].copy(), inputs[:, row].copy()))
        start = self.n_obs_steps - 1
        return np.asarray(actions[:, start : start + self.n_action_steps], np.float32)

    def _denoise(self, noise: Floats, obs: Floats) -> tuple[Floats, Floats]:
        """Inputs (K, N, horizon, action_dim) of all steps, and the final sample."""
        table = self._sampler.table.astype(np.float32)
        inputs, x = np.empty_like(noise), noise[0]
        previous = np.zeros_like(x)
        for k, (a, b, r, c, d, f, g, h) in enumerate(table):
            inputs[k] = x
            e = self._policy.predict_noise(np.ascontiguousarray(x), k, obs)
            x0 = np.clip(a * x + b * e, -r, r)
            x = c * x0 + d * x + f * e + g * previous
            if k + 1 < len(table):
                x = x + h * noise[k + 1]
            previous = x0
        return inputs, x

    def take(self, lane: int, episode: Episode) -> Recorded:
        """What a lane did since its reset, as the recording of the episode that just ended."""
        obs, actions, inputs = (np.stack(part) for part in zip(*self._kept[lane], strict=True))
        adds_noise = self._sampler.adds_noise
        return Recorded(
            episode.seed, episode.score, episode.success, adds_noise, obs, actions, inputs
        )


# ---- the folder


def _path(folder: Path, seed: int) -> Path:
    return folder / f"episode-{seed:05d}.npz"


def open_collection(folder: Path, settings: Mapping[str, Any]) -> list[int]:
    """Make the folder, or go on with it if it was made with these settings; the seeds it has.

    Raises:
        ResultsError: it holds something else, or other settings; the message names each.
    """
    facts = folder / FACTS_FILE
    if facts.exists():
        changed = differences(_read_facts(folder)["settings"], settings)
        if changed:
            raise ResultsError(
                f"{folder} was made with other settings; {'; '.join(changed)}; fix: use its "
                "settings, or another folder"
            )
        return sorted(int(path.stem.partition("-")[2]) for path in folder.glob("episode-*.npz"))
    if folder.exists() and any(folder.iterdir()):
        raise ResultsError(f"{folder} is not empty and holds no collection; name another folder")
    make_folder(folder)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": dict(settings)}
    write_json(facts, header)
    return []


def save_episode(folder: Path, episode: Recorded) -> None:
    """Write one episode, whole or not at all."""
    arrays: dict[str, Any] = {
        "score": np.float64(episode.score),
        "success": np.bool_(episode.success),
        "adds_noise": np.bool_(episode.adds_noise),
        "obs": episode.obs,
        "actions": episode.actions,
        "inputs": episode.inputs,
    }
    write_atomically(_path(folder, episode.seed), lambda stream: np.savez(stream, **arrays))


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {content['format']!r} {content['format_version']!r}")
    except FileNotFoundError:
        raise ResultsError(
            f"{folder}: no {FACTS_FILE} in it; expected a folder made by 'tsad collect'"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a collection of this version ({error})") from error
    return content


def read_collection(
    folder: Path, seeds: Sequence[int] | None = None
) -> tuple[dict[str, Any], list[Recorded]]:
    """Settings, and the episodes (all, or those of ``seeds``) in the order of their seeds.

    Raises:
        ResultsError: it is not a collection, is empty, or lacks a seed.
    """
    settings = _read_facts(folder)["settings"]
    found = open_collection(folder, settings)
    wanted = found if seeds is None else list(seeds)
    missing = sorted(set(wanted) - set(found))
    if missing or not wanted:
        what = f"no seed {missing[0]}" if missing else "no episodes"
        raise ResultsError(f"{folder}: {what} in it; tsad collect adds some")
    episodes = []
    for seed in wanted:
        path = _path(folder, seed)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            episode = Recorded(
                seed=seed,
                score=float(arrays["score"]),
                success=bool(arrays["success"]),
                adds_noise=bool(arrays["adds_noise"]),
                obs=arrays["obs"],
                actions=arrays["actions"],
                inputs=arrays["inputs"],
            )
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ResultsError(f"{path}: broken ({error}); delete it, collect again") from error
        episodes.append(episode)
    return settings, episodes
