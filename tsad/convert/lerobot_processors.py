"""How a LeRobot policy maps raw units to those of its network, and back.

From 0.4 on a folder has two processors, ``policy_preprocessor.json`` and
``policy_postprocessor.json``, each with the statistics of the training data in a safetensors file.
Before, the statistics were buffers in the model's own file. Either way a feature's map is

    normalised = (raw - shift) * scale + offset

with ``shift`` apart, because LeRobot divides a dimension that never moved by 1e-8: only a
difference of equal numbers is 0 in any precision.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.checkpoint import CheckpointError, map_safetensors, read_json

PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"

# steps that leave the numbers as they are
_PLAIN_STEPS = ("to_batch_processor", "device_processor")
# each mode's statistics: those that become -1 and 1, or mean and deviation
_BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
_MODES = (*_BOUNDS, "MEAN_STD", "IDENTITY")
_OLD_EPS = 1e-8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Map:
    """``normalised = (raw - shift) * scale + offset``, each (dim,) float64."""

    shift: Floats
    scale: Floats
    offset: Floats

    @classmethod
    def identity(cls, dim: int) -> Map:
        """The map that changes nothing."""
        return cls(np.zeros(dim), np.ones(dim), np.zeros(dim))

    @classmethod
    def side_by_side(cls, maps: list[Map]) -> Map:
        """One map of several features in a row."""
        parts = ([getattr(m, name) for m in maps] for name in ("shift", "scale", "offset"))
        return cls(*(np.concatenate(part) for part in parts))

    def to_dict(self) -> dict[str, list[float]]:
        """Lists of numbers."""
        return {name: getattr(self, name).tolist() for name in ("shift", "scale", "offset")}


@dataclass(frozen=True)
class Statistics:
    """Where maps come from: modes by type of feature, and numbers by ``feature.statistic``."""

    file: str
    modes: Mapping[str, str]
    values: Mapping[str, NDArray[Any]]
    eps: float
    kinds: Mapping[str, str] | None = None
    """Observations that are normalised, and their types; None: all, of those that they have."""
    old: bool = False
    """Before 0.4: eps is added to every range, and a missing statistic is an error."""

    def mode(self, kind: str) -> str:
        """The mode of a type of feature; identity for one without an entry, as in LeRobot."""
        mode = self.modes.get(kind, "IDENTITY")
        if mode not in _MODES:
            raise CheckpointError(
                f"{self.file}: normalisation of {kind}: expected one of {', '.join(_MODES)}, got "
                f"{mode!r}; it is newer than what tsad reads"
            )
        return mode

    def map_of(
        self,
        feature: str,
        kind: str,
        dim: int,
        notes: list[str],
        shape: tuple[int, ...] | None = None,
    ) -> Map:
        """The map of a feature of ``dim`` numbers; ``notes`` gets what should be said about it.

        ``shape``: of its statistics, (dim,) unless given.
        """
        if self.kinds is not None and kind != "ACTION":
            if feature not in self.kinds:
                notes.append(f"{feature}: not normalised, as the preprocessor does not list it")
                return Map.identity(dim)
            kind = self.kinds[feature]
        mode = self.mode(kind)
        if mode == "IDENTITY":
            return Map.identity(dim)
        if not self.old and not any(key.startswith(f"{feature}.") for key in self.values):
            notes.append(
                f"{feature}: {self.file} has no statistics of it, so that LeRobot passes it on "
                f"as it is, although its mode is {mode}; tsad does too"
            )
            return Map.identity(dim)
        eps = np.float32(self.eps)

        def take(name: str) -> NDArray[np.float32]:
            return self._take(feature, name, mode, shape or (dim,)).reshape(dim)

        if mode == "MEAN_STD":
            shift, std = (take(name) for name in ("mean", "std"))
            # LeRobot adds eps on the way in only; without a deviation there is no way back
            spread = std + eps if kind != "ACTION" else np.where(std == 0, eps, std)
            return Map(shift.astype(np.float64), 1 / spread.astype(np.float64), np.zeros(dim))
        shift, high = (take(name) for name in _BOUNDS[mode])
        spread = high - shift
        spread = spread + eps if self.old else np.where(spread == 0, eps, spread)
        return Map(shift.astype(np.float64), 2 / spread.astype(np.float64), np.full(dim, -1.0))

    def _take(
        self, feature: str, name: str, mode: str, shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """A statistic in float32, the type that LeRobot computes in, whatever the file has."""
        key = f"{feature}.{name}"
        if key not in self.values:
            there = sorted(k for k in self.values if k.startswith(f"{feature}."))
            raise CheckpointError(
                f"{self.file}: {key}: expected this statistic, as {feature} is normalised by "
                f"{mode}, found {', '.join(there) or 'none of the feature'}; compute it with "
                "LeRobot's dataset tools and save the processors again"
            )
        value = self.values[key]
        with np.errstate(over="ignore"):
            numbers = np.asarray(value, np.float32)
        if numbers.shape != shape:
            raise CheckpointError(
                f"{self.file}: {key}: expected shape {list(shape)}, as config.json says of "
                f"{feature}, got {list(numbers.shape)}; the statistics are those of another policy"
            )
        if not np.isfinite(numbers).all():
            raise CheckpointError(
                f"{self.file}: {key}: expected finite float32 numbers, got "
                f"{numbers[~np.isfinite(numbers)][0]}; the policy was saved without statistics"
            )
        return numbers


def read_processors(folder: Path) -> tuple[Statistics, Statistics, dict[str, str]] | None:
    """Statistics of the way in and of the way out, and new names of observations.

    None for a folder without processors. Raises ``CheckpointError`` for a processor that does
    something else with the numbers.
    """
    found = [(folder / name).is_file() for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE)]
    if not any(found):
        return None
    before, renamed = _read_processor(folder / PREPROCESSOR_FILE, "normalizer_processor")
    after, _ = _read_processor(folder / POSTPROCESSOR_FILE, "unnormalizer_processor")
    return before, after, renamed


def read_postprocessor(folder: Path) -> Statistics | None:
    """Statistics of the way out alone; None for a folder without that processor."""
    if not (folder / POSTPROCESSOR_FILE).is_file():
        return None
    return _read_processor(folder / POSTPROCESSOR_FILE, "unnormalizer_processor")[0]


def _read_processor(path: Path, wanted: str) -> tuple[Statistics, dict[str, str]]:
    data = read_json(path)
    steps = data.get("steps") if isinstance(data, Mapping) else None
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise CheckpointError(
            f"{path}: steps: expected a list of processing steps, got none; LeRobot writes this "
            "file with save_pretrained"
        )
    statistics, renamed = None, {}
    for i, step in enumerate(steps):
        name, config = step.get("registry_name", step.get("class")), step.get("config", {})
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{path}: steps[{i}].config: expected an object, got {config!r}")
        if name == wanted and statistics is None:
            statistics = _statistics(path, i, step, config)
        elif name == "rename_observations_processor":
            names = config.get("rename_map", {})
            if not isinstance(names, Mapping):
                raise CheckpointError(
                    f"{path}: steps[{i}].config.rename_map: expected an object, got {names!r}"
                )
            renamed = {str(old): str(new) for old, new in names.items()}
        elif name not in _PLAIN_STEPS:
            raise CheckpointError(
                f"{path}: steps[{i}]: expected {wanted} once and steps that leave the numbers as "
                f"they are ({', '.join(_PLAIN_STEPS)}), got {str(name)[:100]!r}; tsad can't tell "
                "what it does: run this policy in LeRobot"
            )
    if statistics is None:
        found = ", ".join(str(step.get("registry_name")) for step in steps)
        raise CheckpointError(
            f"{path}: steps: expected {wanted}, got {found or 'no step'}; save the policy's "
            "processors beside it"
        )
    return statistics, renamed


def _statistics(
    path: Path, i: int, step: Mapping[str, Any], config: Mapping[str, Any]
) -> Statistics:
    where = f"{path}: steps[{i}]"
    modes, features, eps = (config.get(key) for key in ("norm_map", "features", "eps"))
    if not isinstance(modes, Mapping) or not isinstance(features, Mapping):
        raise CheckpointError(
            f"{where}.config: expected norm_map and features, two objects, got {modes!r:.100} and "
            f"{features!r:.100}; save the processors again"
        )
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise CheckpointError(f"{where}.config.eps: expected a small number, got {eps!r:.100}")
    kinds = {
        str(name): str(feature.get("type") if isinstance(feature, Mapping) else None)
        for name, feature in features.items()
    }
    only = config.get("normalize_observation_keys")
    if isinstance(only, list):
        kinds = {name: kind for name, kind in kinds.items() if name in only}
    file = step.get("state_file")
    if file is None:
        source, values = str(path), {}
    elif isinstance(file, str) and os.path.basename(file) == file:
        source, values = str(path.parent / file), map_safetensors(path.parent / file)
    else:
        raise CheckpointError(
            f"{where}.state_file: expected the name of a file beside it, got {file!r:.100}"
        )
    modes = {str(kind): str(mode) for kind, mode in modes.items()}
    return Statistics(source, modes, values, float(eps), kinds)


def buffers(
    file: str, modes: Mapping[str, str], tensors: Mapping[str, NDArray[Any]], features: list[str]
) -> tuple[Statistics, Statistics]:
    """Statistics of a model of LeRobot before 0.4, from ``tensors`` that it has beside its network.

    ``modes`` is ``normalization_mapping`` of config.json.
    """

    def of(module: str) -> Statistics:
        values = {}
        for feature in features:
            prefix = f"{module}.buffer_{feature.replace('.', '_')}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    values[f"{feature}.{name.removeprefix(prefix)}"] = value
        return Statistics(file, modes, values, _OLD_EPS, old=True)

    return of("normalize_inputs"), of("unnormalize_outputs")
