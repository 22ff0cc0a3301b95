"""Offline errors of many settings, kept in a file: what sweeps ask.

An error costs up to a minute; whoever is interrupted finds those that are done in the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.arrays import read_any_json
from tsad.evaluation.loading import configure, load_policy
from tsad.evaluation.progress import Progress
from tsad.evaluation.usage import argument
from tsad.files import write_json
from tsad.load import files_sha256
from tsad.rule import Alternate
from tsad.setting import MOVED, Setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tsad import SparsePolicy
    from tsad.sim.offline import Floats

ERRORS_FILE = "errors.json"
LANES = 8
# Recorded observations that actions are compared on: with more draws of each, fewer.
MOST_WINDOWS, LEAST_WINDOWS, MOST_CHUNKS = 250, 12, 768


def most_windows(draws: int) -> int:
    """How many recorded observations to take with so many draws of noise each."""
    return max(min(MOST_WINDOWS, MOST_CHUNKS // draws), LEAST_WINDOWS)


def recorded_windows(
    path: str, policy: SparsePolicy, most: int, name: str = "--observations"
) -> NDArray[np.float32]:
    """(W, 2, n_obs_steps, obs_dim) consecutive observations, all episodes in turn.

    (W, 1, n_obs_steps, obs_dim) if there are single ones alone; UsageError if there are none.
    """
    import numpy as np

    from tsad.sim.observations import read_observations
    from tsad.sim.recording import pick

    with argument(name):
        _, episodes = read_observations(path, policy)
        picked = [episode.obs[part] for episode, part in pick(episodes, 10**9, 2, 0)]
    pairs = [obs for obs in picked if len(obs) == 2]
    return np.stack((pairs or picked)[:most])


def unknown(windows: NDArray[np.float32] | None, policy: SparsePolicy) -> bool:
    """Whether the policy's chunks depend on the one before, and single observations are known."""
    from tsad.sim.offline import needs_past

    return windows is not None and windows.shape[1] == 1 and needs_past(policy)


SINGLE = (
    "chunks depend on the one before, and --observations are single ones; give successive "
    "observations ('episode_ends')"
)


def _read_kept(file: Path) -> dict[str, dict[str, float | None]]:
    try:
        kept = read_any_json(file)
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or not all(isinstance(row, dict) for row in kept.values()):
        raise ValueError(f"{file}: not errors of an earlier run; fix: remove it, or another --out")
    return kept


class Errors:
    """Errors of settings on recorded observations.

    ``action_rms`` is to the dense float32 policy with the same sampler, warm start, lead and
    noise; ``distance`` (of two draws or more) to the ``reference`` setting, dense and float32: see
    `tsad.sim.offline`. None for a setting that these observations say nothing of: `unknown`, and
    plans that take turns, which only episodes show.
    """

    def __init__(
        self,
        source: str,
        windows: NDArray[np.float32],
        *,
        draws: int,
        machine: Any,
        reference: Setting,
        file: Path,
    ) -> None:
        self._source, self._windows, self._draws = source, windows, draws
        self._machine = machine  # device and threads
        self._reference, self._file = reference, file
        self._dense: dict[Any, Floats] = {}  # by sampler, steps, spacing, warm start
        seen = hashlib.sha256(windows.tobytes()).hexdigest()
        self._facts = {"files_sha256": files_sha256(source), "windows": seen, "draws": draws}
        self._kept: dict[str, dict[str, float | None]] = {}
        if file.exists():
            with argument("--out"):
                self._kept = _read_kept(file)

    def of(self, setting: Setting, name: str) -> dict[str, float | None]:
        """The errors of one setting; ``name`` is shown while they are measured."""
        policy = self._load(setting, f"--settings: {name}")
        configure(policy, setting)
        facts = {
            **self._facts,
            "scheduler": policy.config["scheduler"],
            "precision": policy.precision,
            "backend": policy.backend,
            **setting.computed(policy),
        }
        if unknown(self._windows, policy) or isinstance(setting.rule, Alternate):
            return dict.fromkeys(("action_rms", *("distance", "spread") * (self._draws > 1)))
        facts |= self._followed(setting)
        if (fitted := setting.load_fitted()) is not None:
            facts["fitted_sha256"] = fitted.sha256
        if self._draws > 1:
            facts["reference"] = self._key(self._reference)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if key not in self._kept:
            self._kept[key] = self._measure(policy, setting, name)
            write_json(self._file, self._kept)
        return self._kept[key]

    def _load(self, setting: Setting, name: str) -> SparsePolicy:
        lanes = min(LANES, len(self._windows) * self._draws)
        return load_policy(self._source, self._machine, name=name, lanes=lanes, setting=setting)

    @staticmethod
    def _key(setting: Setting) -> list[Any]:
        own = [setting.sampler, setting.num_inference_steps, setting.timestep_spacing]
        followed = Errors._followed(setting)
        return [*own, *(v if n == "warm_start" else f"{n} {v}" for n, v in followed.items())]

    @staticmethod
    def _followed(setting: Setting) -> dict[str, Any]:
        """What is set of that which goes on from the chunk before, or changes what is executed."""
        values = {name: getattr(setting, name) for name in ("warm_start", *MOVED)}
        return {name: value for name, value in values.items() if value}

    def _measure(
        self, policy: SparsePolicy, setting: Setting, name: str
    ) -> dict[str, float | None]:
        from tsad.sim import offline

        own = self._dense_actions(setting)
        found = self._run(policy, f"{name}, errors")
        errors: dict[str, float | None] = {"action_rms": offline.rms(found, own)}
        if self._draws > 1:
            reference = self._dense_actions(self._reference)
            errors["distance"] = offline.energy(found, reference)
            errors["spread"] = offline.spread(found, reference)
        return errors

    def _dense_actions(self, setting: Setting) -> Floats:
        """Of the dense float32 policy with the sampler of a setting."""
        key = tuple(self._key(setting))
        if key not in self._dense:
            policy = self._load(replace(setting, precision="float32", fitted=None), "--settings")
            policy.sparsity = 0.0
            words = setting.sampler or "own"
            self._dense[key] = self._run(policy, f"{words} {policy.num_inference_steps}, dense")
        return self._dense[key]

    def _run(self, policy: SparsePolicy, label: str) -> Floats:
        from tsad.sim import offline

        total = len(self._windows) * self._draws
        with Progress(total, label, unit="chunks") as progress:
            return offline.actions(
                policy, self._windows, self._draws, lambda done: progress.update(n=done)
            )
