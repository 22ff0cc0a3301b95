"""Observations to fit and to search on, of any origin: a collection, or plain arrays.

Plain arrays, raw units, any real dtype, are in an npz file or a zarr folder (there also in groups
``data`` and ``meta``, as those of Diffusion Policy); in an npy file ``obs`` is alone.

``obs`` (N, n_obs_steps, obs_dim)   what a policy is called with: single observations; or, with
                                    ``episode_ends``, those of successive chunks of episodes
``obs`` (N, obs_dim)                every step of episodes, with ``episode_ends``, such as
                                    demonstrations are; or ``state`` (N, 5) of Push-T
``episode_ends`` (E,)               one past the last row of each episode

Of single observations nobody knows what came before: what reuses an earlier chunk, or starts from
it, can't be measured on them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.sim.recording import Recorded, read_collection
from tsad.training.data import (
    DataError,
    episode_ends,
    floats,
    observations_of_states,
    read_arrays,
)

Floats = NDArray[np.float32]


def read_observations(
    path: str | os.PathLike[str], policy: Any
) -> tuple[dict[str, Any], list[Recorded]]:
    """Settings of the collection ({} of plain arrays), and the episodes.

    Single observations are episodes of one chunk each. ``policy`` says which sizes fit, and after
    how many steps (n_action_steps) it is called again.

    Raises:
        ValueError: naming the file, the array, what came, what was expected and the fix.
        FileNotFoundError: nothing is there.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"got {os.fspath(path)!r}, where nothing is; expected a folder of 'tsad collect' or "
            "tsad.Recorder, or an npz, npy or zarr file of observations"
        )
    if file.is_dir() and not any((file / name).exists() for name in (".zgroup", "zarr.json")):
        settings, episodes = read_collection(file)
        for episode in episodes[:1]:  # those of a collection have one shape
            _check_shape(episode.obs, policy, file)
        return settings, episodes
    arrays = {"obs": _read_npy(file)} if file.suffix == ".npy" else read_arrays(file)
    if "obs" not in arrays:
        obs = observations_of_states(arrays, file)
    else:
        obs = floats(arrays["obs"], "obs", file)
    _check_shape(obs, policy, file)
    if "episode_ends" in arrays:
        ends = episode_ends(arrays, file, len(obs)).tolist()
        parts = [obs[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        if obs.ndim == 2:
            parts = [_of_chunks(part, policy) for part in parts]
    elif obs.ndim == 3:
        parts = [obs[row : row + 1] for row in range(len(obs))]
    else:
        raise DataError(
            f"{file}: obs: got shape {obs.shape}, every step of episodes, without 'episode_ends' "
            f"(E,) to say where they end; np.savez(file, obs=obs, episode_ends=[{len(obs)}]) for "
            f"a single episode, or save obs (N, {policy.n_obs_steps}, {policy.obs_dim}), what the "
            "policy is called with"
        )
    return {}, [Recorded(number, part) for number, part in enumerate(parts)]


def _read_npy(file: Path) -> NDArray[Any]:
    try:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of named arrays, whose name ends in .npz")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{file}: expected an npy file without pickled objects, got another ({error}); write "
            "it with numpy.save"
        ) from None
    return array


def _check_shape(obs: Floats, policy: Any, file: Path) -> None:
    """DataError if the policy can't be called with these numbers."""
    seen, dim = policy.n_obs_steps, policy.obs_dim
    if obs.shape[1:] in ((seen, dim), (dim,)):
        return
    fix = f"this policy sees {seen} observations of {dim} numbers"
    if obs.ndim == 3 and obs.shape[2] == dim and obs.shape[1] > seen:
        fix = f"this policy sees the last {seen}: obs[:, -{seen}:]"
    elif obs.ndim == 3 and obs.shape[1:] == (dim, seen):
        fix = "swap the axes: obs.swapaxes(1, 2)"
    elif obs.ndim == 2 and obs.shape[1] == seen * dim:
        fix = f"use obs.reshape(-1, {seen}, {dim})"
    raise DataError(
        f"{file}: obs: expected shape (N, {seen}, {dim}), what the policy is called with, or "
        f"(N, {dim}), every step of episodes, with 'episode_ends'; got {obs.shape}; {fix}"
    )


def _of_chunks(steps: Floats, policy: Any) -> Floats:
    """(C, n_obs_steps, obs_dim) of an episode's steps (T, obs_dim), as a policy would be called.

    At the start the first observation stands in for those before, as in training.
    """
    called = np.arange(0, len(steps), policy.n_action_steps)
    rows = called[:, None] + np.arange(1 - policy.n_obs_steps, 1)
    chunks: Floats = steps[rows.clip(min=0)]
    return chunks
