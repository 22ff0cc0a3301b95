"""Demonstrations for low-dimensional policies: reading, windows, normaliser.

A file of demonstrations is an npz or a zarr v2 folder with these arrays, all episodes end to
end:

``action``        (N, action_dim), raw units
``obs``           (N, obs_dim), raw units; or ``state`` (N, 5) of Push-T: agent x, y, block x, y,
                  angle, which becomes keypoints in pixels, R(angle) @ local + block, and the agent
``episode_ends``  (E,) integers: one past the last step of each episode

In a zarr folder they may lie in the groups ``data`` and ``meta``, as those of Diffusion Policy do.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad._extras import MissingExtraError
from tsad.arrays import read_any_json, read_npz
from tsad.config import Affine, NormalizerConfig
from tsad.files import sha256

Floats = NDArray[np.float32]

STATE_DIM = 5
# A number that hardly moves would be blown up; it is centred instead, as Diffusion Policy does.
_MIN_RANGE = 1e-4


class DataError(ValueError):
    """A file of demonstrations that lacks something; the message names file, key and fix."""


@dataclass(frozen=True)
class Demonstrations:
    """Episodes end to end, raw units: ``obs`` (N, obs_dim), ``action`` (N, action_dim).

    ``coverage`` (N,), if asked for: how much of the goal is covered, 0 to 1.
    """

    obs: Floats
    action: Floats
    ends: NDArray[np.int64]
    name: str
    sha256: str
    coverage: Floats | None = None

    def split(self, n_last: int) -> tuple[Demonstrations, Demonstrations | None]:
        """All but the last ``n_last`` episodes, and those (``None`` if there are none)."""
        if n_last == 0:
            return self, None
        if not 0 < n_last < len(self.ends):
            raise DataError(
                f"validation episodes: expected 0 to {len(self.ends) - 1}, as {self.name} has "
                f"{len(self.ends)}, got {n_last}; hold out fewer"
            )
        ends = self.ends[:-n_last]
        cut = int(ends[-1])
        return self._part(slice(cut), ends), self._part(slice(cut, None), self.ends[-n_last:] - cut)

    def _part(self, steps: slice, ends: NDArray[np.int64]) -> Demonstrations:
        covered = None if self.coverage is None else self.coverage[steps]
        return replace(
            self, obs=self.obs[steps], action=self.action[steps], ends=ends, coverage=covered
        )


def load_demonstrations(
    path: str | os.PathLike[str],
    *,
    keypoints: str | os.PathLike[str] | None = None,
    coverage: bool = False,
) -> Demonstrations:
    """The demonstrations of an npz file or a zarr v2 folder; see the module docstring.

    ``keypoints`` is a JSON file with ``local_keypoints_block_frame_px``, n points in the block's
    frame (default: the nine of Push-T); only for data with ``state``. ``coverage`` asks for that
    of each step (N,), computed of a ``state`` with Push-T's goal (extra ``sim``). Raises
    ``FileNotFoundError``, or ``DataError`` naming the key.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected an npz file or a zarr folder, found nothing")
    arrays = read_arrays(file)
    action = _matrix(arrays, "action", file)
    if "obs" in arrays:
        if keypoints is not None:
            raise DataError(f"{file}: has 'obs', so keypoints are not used; leave them out")
        obs = _matrix(arrays, "obs", file)
    else:
        obs = observations_of_states(arrays, file, keypoints)
    ends = episode_ends(arrays, file, len(obs))
    if len(action) != len(obs):
        raise DataError(
            f"{file}: expected as many actions as observations, {len(obs)}, got {len(action)}; "
            "action i is what was done at observation i"
        )
    digest = hashlib.sha256()
    for array in (obs, action, ends):
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    hashed = sha256(file) if file.is_file() else digest.hexdigest()
    covered = _coverage(arrays, file) if coverage else None
    return Demonstrations(obs, action, ends, file.name, hashed, covered)


def observations_of_states(
    arrays: Mapping[str, NDArray[Any]],
    file: Path,
    keypoints: str | os.PathLike[str] | None = None,
) -> Floats:
    """The observations (N, obs_dim) of Push-T's ``state``, for a file that has no ``obs``."""
    if "state" not in arrays:
        raise DataError(
            f"{file}: expected an array 'obs' (N, obs_dim), or 'state' (N, {STATE_DIM}) of Push-T, "
            f"got only {_names(arrays)}; save the observations as 'obs'"
        )
    return state_observations(
        _matrix(arrays, "state", file), local_keypoints(keypoints), f"{file}: state"
    )


def _coverage(arrays: Mapping[str, NDArray[Any]], file: Path) -> Floats:
    if "state" not in arrays:
        raise DataError(
            f"{file}: coverage: expected an array 'state' (N, {STATE_DIM}) of Push-T to compute it "
            f"from, got only {_names(arrays)}; train on all windows"
        )
    from tsad.sim import pusht

    return pusht.coverage(_matrix(arrays, "state", file))


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file or a zarr folder; of others than the known the names alone."""
    return _read_zarr(file) if file.is_dir() else _read_npz(file)


def _read_npz(file: Path) -> dict[str, NDArray[Any]]:
    try:
        return read_npz(file, ("obs", "state", "action", "episode_ends"))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{file}: expected an npz file without pickled objects, got another ({error}); "
            "write it with numpy.savez"
        ) from None


def _read_zarr(folder: Path) -> dict[str, NDArray[Any]]:
    try:
        zarr: Any = importlib.import_module("zarr")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"reading the zarr folder {folder} needs the Python package '{error.name}', which is "
            "not installed; fix: pip install zarr, or save the arrays with numpy.savez"
        ) from error
    try:
        root = zarr.open(str(folder), mode="r")
    except Exception as error:  # zarr raises errors of its own, which differ between versions
        raise DataError(f"{folder}: expected a zarr v2 group, got another ({error})") from None
    arrays = {}
    for name in ("obs", "state", "action", "episode_ends"):
        for key in (name, f"data/{name}", f"meta/{name}"):
            if key in root:
                arrays[name] = np.asarray(root[key])
    return arrays


def _names(arrays: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in arrays) or "nothing"


def _matrix(arrays: Mapping[str, NDArray[Any]], key: str, file: Path) -> Floats:
    if key not in arrays:
        raise DataError(
            f"{file}: expected an array '{key}' (N, {key}_dim), got only {_names(arrays)}; add it"
        )
    if arrays[key].ndim != 2:
        raise DataError(
            f"{file}: {key}: expected numbers of shape (N, {key}_dim), got {arrays[key].dtype} of "
            f"shape {arrays[key].shape}; flatten each step's numbers into one row"
        )
    return floats(arrays[key], key, file)


def floats(value: NDArray[Any], key: str, file: Path) -> Floats:
    """An array of a file as float32, row after row; DataError if it is none, or not finite."""
    if 0 in value.shape or value.dtype.kind not in "fiu":
        raise DataError(
            f"{file}: {key}: expected numbers, got {value.dtype} of shape {value.shape}; "
            "save it with .astype(np.float32)"
        )
    with np.errstate(over="ignore"):
        matrix = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(matrix).all():
        row = int(np.argwhere(~np.isfinite(matrix))[0, 0])
        raise DataError(f"{file}: {key}: expected finite float32 numbers, got others in row {row}")
    return matrix


def episode_ends(arrays: Mapping[str, NDArray[Any]], file: Path, n: int) -> NDArray[np.int64]:
    """The ends (E,) of the episodes of n steps, checked."""
    if "episode_ends" not in arrays:
        raise DataError(
            f"{file}: expected an array 'episode_ends' (E,), got only {_names(arrays)}; "
            f"for a single episode it is [{n}]"
        )
    value = arrays["episode_ends"]
    if value.ndim != 1 or not len(value) or value.dtype.kind not in "iu":
        raise DataError(
            f"{file}: episode_ends: expected integers of shape (E,), got {value.dtype} of shape "
            f"{value.shape}"
        )
    ends = value.astype(np.int64)
    if (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != n:
        raise DataError(
            f"{file}: episode_ends: expected increasing numbers from above 0 that end at {n}, the "
            f"number of steps, got {ends[0]} .. {ends[-1]}"
        )
    return ends


def local_keypoints(path: str | os.PathLike[str] | None = None) -> NDArray[np.float64]:
    """Keypoints in the block's frame, (n, 2) pixels, of a JSON file (default: Push-T's nine)."""
    source = resources.files("tsad").joinpath("assets/pusht/keypoints.json")
    key = "local_keypoints_block_frame_px"
    try:
        content = json.loads(source.read_text()) if path is None else read_any_json(path)
        points = np.asarray(content[key], np.float64)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path}: expected JSON with '{key}', a list of [x, y], got another ({error!r})"
        ) from None
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise DataError(f"{path}: {key}: expected shape (n, 2), got {points.shape}")
    return points


def state_observations(state: Floats, local: NDArray[np.float64], where: str = "state") -> Floats:
    """Observations (N, 2 n + 2) of Push-T states (N, 5): n keypoints x, y, then the agent's."""
    if state.shape[1] != STATE_DIM:
        raise DataError(
            f"{where}: expected shape (N, {STATE_DIM}): agent x, y, block x, y, angle; got "
            f"{state.shape}; give other layouts as 'obs'"
        )
    cos, sin = np.cos(state[:, 4], dtype=np.float64), np.sin(state[:, 4], dtype=np.float64)
    # Points are rows, so the rotation stands transposed on the right.
    rotation = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    points = local @ rotation + state[:, None, 2:4]
    return np.concatenate([points.reshape(len(state), -1), state[:, :2]], 1).astype(np.float32)


def windows(
    ends: Sequence[int] | NDArray[np.int64], horizon: int, n_obs_steps: int, n_action_steps: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Windows of ``horizon`` steps in padded episodes, and where they lie within the episode.

    Row i of the first, (W, horizon), holds the steps of window i. Windows begin up to ``n_obs_steps
    - 1`` steps before their episode and end up to ``n_action_steps - 1`` after it, where they
    repeat its first and last step, as those of Diffusion Policy do. The second, same shape, is
    false for steps past the end: nobody demonstrated those actions.
    """
    steps, inside, start = [], [], 0
    for end in (int(value) for value in ends):
        last = end - horizon + n_action_steps - 1
        for begin in range(start - (n_obs_steps - 1), last + 1):
            wanted = np.arange(begin, begin + horizon)
            steps.append(np.clip(wanted, start, end - 1))
            inside.append(wanted < end)
        start = end
    if not steps:
        raise DataError(
            f"episodes: expected one of at least {horizon - n_action_steps - n_obs_steps + 3} "
            f"steps for horizon {horizon}, got none; shorten the horizon"
        )
    return np.stack(steps), np.stack(inside)


def limits(values: Floats) -> Affine:
    """The map of each column's range onto [-1, 1]; a column that hardly moves is only centred."""
    low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
    moves = high - low > _MIN_RANGE
    scale = np.where(moves, 2 / np.where(moves, high - low, 1), 1.0)
    offset = -scale * (low + high) / 2
    return Affine(tuple(scale.tolist()), tuple(offset.tolist()))


def fit_normalizer(demonstrations: Demonstrations) -> NormalizerConfig:
    """Normaliser that maps the range of each observation and action number onto [-1, 1]."""
    return NormalizerConfig(limits(demonstrations.obs), limits(demonstrations.action))
