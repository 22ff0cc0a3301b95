"""Demonstrations on disk: the npz file of `tsad generate`, which `tsad train-policy` reads.

Arrays: ``state`` (N, state_dim), or ``obs`` (N, obs_dim) of a simulator that tells no state, and
``action`` (N, action_dim), float32, all episodes end to end; ``episode_ends`` (E,), one past the
last step of each; ``seed`` (E,); ``next_seed`` (), where a run goes on; ``settings`` (), JSON of
all that decides what comes of a seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsad.arrays import parse_header, read_npz
from tsad.files import output_file, write_atomically
from tsad.sim.results import ResultsError, check_free, differences, lock
from tsad.sim.search import Demonstration


class Record:
    """The demonstrations of one run; whoever is interrupted loses the seed in hand, never a file.

    Raises (on construction):
        ResultsError: `out` exists and neither `resume` nor `overwrite` was given, isn't such a
            file, was made with other settings, or another run is writing it; the message names
            each difference, or the process.
    """

    SAVE_SECONDS = 30.0

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        *,
        states: str = "state",
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out, self.settings = output_file(out, overwrite=True), dict(settings)
        self._states = states
        self.next_seed = int(settings["first_seed"])
        self.demonstrations: list[Demonstration] = []
        self.steps = self.seeds_won = 0
        self._saved = time.monotonic()
        self._lock = lock(self.out)
        try:
            check_free(self.out, resume=resume, overwrite=overwrite)
            if resume and self.out.exists():
                self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        try:
            arrays = read_npz(self.out)
            recorded = parse_header(arrays["settings"])
            states, actions, seeds = (arrays[name] for name in (self._states, "action", "seed"))
            ends, next_seed = arrays["episode_ends"], arrays["next_seed"].item()
            if {states.ndim, actions.ndim} != {2} or {ends.ndim, seeds.ndim} != {1}:
                raise ValueError("arrays of other shapes")
            if not isinstance(next_seed, int):
                raise ValueError("a next_seed that is no integer")
            if {ends.dtype.kind, seeds.dtype.kind} - {"i", "u"} or len(ends) != len(seeds):
                raise ValueError("ends and seeds that are no integers, or not as many")
            if {states.dtype, actions.dtype} != {np.dtype(np.float32)}:
                raise ValueError("states and actions that are not float32")
            steps = np.diff(ends.astype(np.int64), prepend=0)
            if not len(ends) or (steps <= 0).any() or {len(states), len(actions)} != {ends[-1]}:
                raise ValueError("ends of episodes that are none")
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{self.out}: not a file of 'tsad generate' ({error})") from error
        changed = differences(recorded, self.settings)
        if changed:
            raise ResultsError(
                f"{self.out} was made with other settings; {'; '.join(changed)}; "
                "fix: use its settings, another --out, or --overwrite"
            )
        starts = [0, *ends[:-1].tolist()]
        for seed, start, end in zip(seeds.tolist(), starts, ends.tolist(), strict=True):
            self._keep([Demonstration(seed, states[start:end], actions[start:end])])
        self.seeds_won = len(set(seeds.tolist()))
        self.next_seed = next_seed

    def _keep(self, demonstrations: Sequence[Demonstration]) -> None:
        self.demonstrations += demonstrations
        self.steps += sum(len(d.actions) for d in demonstrations)

    def add(self, seed: int, demonstrations: Sequence[Demonstration]) -> None:
        """Keep what came of a seed; on disk now and then."""
        self._keep(demonstrations)
        self.seeds_won += bool(demonstrations)
        self.next_seed = seed + 1
        if time.monotonic() - self._saved > self.SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all; nothing before the first demonstration."""
        if not self.demonstrations:
            return
        arrays: dict[str, Any] = {
            self._states: np.concatenate([d.states for d in self.demonstrations]),
            "action": np.concatenate([d.actions for d in self.demonstrations]),
            "episode_ends": np.cumsum([len(d.actions) for d in self.demonstrations]),
            "seed": np.array([d.seed for d in self.demonstrations]),
            "next_seed": np.array(self.next_seed),
            "settings": np.array(json.dumps(self.settings)),
        }
        write_atomically(self.out, lambda stream: np.savez_compressed(stream, **arrays))
        self._saved = time.monotonic()

    def close(self) -> None:
        """Nothing more comes; another run may go on."""
        self._lock.release()

    def text(self) -> str:
        """For people."""
        count = len(self.demonstrations)
        return f"{count} episodes of {self.seeds_won} seeds, {self.steps:,} steps"
