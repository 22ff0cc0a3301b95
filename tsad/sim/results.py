"""Results of a closed-loop evaluation on disk, and what they amount to.

While a run goes on, `<out>.partial` holds one JSON line of settings and one per finished episode,
each flushed to disk; when it ends, `<out>` is written whole and the partial file goes. Whoever is
interrupted loses the episodes in flight, never a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.arrays import read_any_json
from tsad.files import Lock, named, output_file, write_atomically, write_json
from tsad.sim.rollout import Episode
from tsad.statistics import (
    LEAST_EPISODES,
    mean_interval,
    proportion_interval,
    resampled_means,
    with_ends,
)

FORMAT = "tsad-eval"
FORMAT_VERSION = 1
SCORES = (0.0, 1.0)  # the ends of their scale, `tsad.sim.Step`


class ResultsError(ValueError):
    """A results file that cannot be used, or that belongs to other settings."""


def partial_path(out: Path) -> Path:
    """Where the episodes of an unfinished run are kept."""
    return out.with_name(out.name + ".partial")


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Mean, standard error and 95 % interval of score and success, and the time per chunk.

    Intervals (`tsad.statistics`) are None where there are too few episodes.
    """
    if not episodes:
        return {"episodes": 0}
    scores = np.array([episode.score for episode in episodes])
    success = np.array([float(episode.success) for episode in episodes])
    chunks = np.array([episode.chunks for episode in episodes])
    means = np.array([episode.chunk_ms_mean for episode in episodes])
    guarded = [episode.guarded for episode in episodes if episode.guarded is not None]
    return {
        "episodes": len(episodes),
        "score": {
            "mean": float(scores.mean()),
            "standard_error": _standard_error(scores),
            "interval95": mean_interval(scores, SCORES),
        },
        "success": {
            "mean": float(success.mean()),
            "standard_error": _standard_error(success),
            "interval95": proportion_interval(int(success.sum()), len(success)),
        },
        "steps_to_success": _mean([episode.steps for episode in episodes if episode.success]),
        "chunks": int(chunks.sum()),
        "chunk_ms": {
            "mean": float((means * chunks).sum() / chunks.sum()),
            "max": max(episode.chunk_ms_max for episode in episodes),
        },
        **({"guarded": sum(guarded)} if guarded else {}),
        **_passes(episodes),
    }


def _passes(episodes: Sequence[Episode]) -> dict[str, float]:
    """Of a chunk after the first on average and at most, where all episodes know it."""
    spent = [
        (e.passes, e.most_passes, max(e.chunks - 1, 1))
        for e in episodes
        if e.passes is not None and e.most_passes is not None
    ]
    if len(spent) < len(episodes):
        return {}
    chunks = sum(n for *_, n in spent)
    return {
        "passes": sum(passes * n for passes, _, n in spent) / chunks,
        "most_passes": max(most for _, most, _ in spent),
    }


def compare(episodes: Sequence[Episode], baseline: Sequence[Episode]) -> dict[str, Any]:
    """Differences to a baseline over the seeds that both have: mean, error, interval or None."""
    other = {episode.seed: episode for episode in baseline}
    pairs = [(episode, other[episode.seed]) for episode in episodes if episode.seed in other]
    if not pairs:
        raise ResultsError("the two runs have no seed in common; use the same --first-seed")
    answer: dict[str, Any] = {"pairs": len(pairs)}
    for name in ("score", "success"):
        values = np.array([float(getattr(a, name)) - float(getattr(b, name)) for a, b in pairs])
        answer[name] = {
            "mean_difference": float(values.mean()),
            "standard_error": _standard_error(values),
            "interval95": mean_interval(values),
        }
    return answer


def compare_all(
    rows: Mapping[str, Sequence[Episode]],
    baseline: str,
    *,
    of: str = "score",
    level: float = 0.95,
) -> dict[str, Any]:
    """Differences of every row's score to the baseline's, with intervals that hold together.

    ``of``: "score", or "success".

    Seeds are paired and resampled together for all rows; the intervals are d +- q s, s a row's
    standard error, q the quantile of the largest |d* - d| / s over the rows (a studentised maximum,
    Romano and Wolf 2005): with probability `level` all of them hold. As in `tsad.statistics` the
    ends of each row are among what is resampled, and of too few seeds the intervals are None. Only
    seeds that all rows have count.
    """
    by_seed = {
        name: {e.seed: float(getattr(e, of)) for e in episodes} for name, episodes in rows.items()
    }
    seeds = sorted(set.intersection(*(set(scores) for scores in by_seed.values())))
    if len(seeds) < 2:
        raise ResultsError("the rows have fewer than two seeds in common; play the same seeds")
    names = [name for name in rows if name != baseline]
    right = np.array([by_seed[baseline][seed] for seed in seeds])
    scores = [[by_seed[name][seed] for seed in seeds] for name in names]
    paired = np.reshape(scores, (len(names), len(seeds))) - right
    found: dict[str, Any] = {
        name: {"mean_difference": float(row.mean()), "standard_error": _standard_error(row)}
        for name, row in zip(names, paired, strict=True)
    }
    intervals: list[Any] = [None] * len(names)
    if names and len(seeds) >= LEAST_EPISODES:
        wide = with_ends(paired)
        means, errors = wide.mean(axis=1), wide.std(axis=1, ddof=1) / np.sqrt(wide.shape[1])
        largest = (np.abs(resampled_means(wide) - means) / errors).max(axis=1)
        away = float(np.quantile(largest, level)) * errors
        intervals = np.stack([means - away, means + away], axis=1).tolist()
    for name, interval in zip(names, intervals, strict=True):
        found[name]["simultaneous"] = interval
    return {"baseline": baseline, "pairs": len(seeds), "level": level, "rows": found}


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The settings that differ, each as "name: the file has A, this run B"."""
    found: list[str] = []
    for name in sorted({*recorded, *asked}):
        old, new = recorded.get(name), asked.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}, {inner}" for inner in differences(old, new)]
        elif old != new:
            found.append(f"{name}: the file has {old!r}, this run {new!r}")
    return found


_REAL = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "score": _REAL,
    "success": (bool,),
    "steps": (int,),
    "chunks": (int,),
    "chunk_ms_mean": _REAL,
    "chunk_ms_max": _REAL,
    "guarded": (int,),
    "passes": _REAL,
    "most_passes": _REAL,
}
_UNCOUNTED = ("guarded", "passes", "most_passes")  # of a policy that nothing decides in


def fields_of(episode: Episode) -> dict[str, Any]:
    """As it is kept; what nobody counted is left out."""
    return {name: value for name, value in asdict(episode).items() if value is not None}


def _episode(fields: Any, where: str) -> Episode:
    try:
        episode = Episode(**fields)
    except TypeError as error:
        raise ResultsError(f"{where}: not an episode ({error})") from error
    for name, kinds in _KINDS.items():
        value = getattr(episode, name)
        if name in _UNCOUNTED and value is None:
            continue
        if type(value) not in kinds or (isinstance(value, int) and abs(value) >= 2**63):
            raise ResultsError(f"{where}: not an episode (its {name})")
    return episode


def _check_format(header: Any, path: Path) -> None:
    good = isinstance(header, dict) and header.get("format") == FORMAT
    if not good or not isinstance(header.get("settings"), dict):
        raise ResultsError(f"{path}: not a results file of 'tsad eval'")
    if header.get("format_version") != FORMAT_VERSION:
        raise ResultsError(
            f"{path}: format version {header.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "it was written by another version of tsad"
        )


def read_results(path: Path) -> tuple[dict[str, Any], list[Episode]]:
    """Settings and episodes of a finished run; ResultsError if the file is not one."""
    try:
        content = read_any_json(path)
    except ValueError as error:
        raise ResultsError(f"{path}: not a results file of 'tsad eval' ({error})") from error
    _check_format(content, path)
    rows = content.get("episodes")
    if not isinstance(rows, list):
        raise ResultsError(f"{path}: episodes: expected a list of them, got {rows!r:.100}")
    return content["settings"], [_episode(fields, str(path)) for fields in rows]


def _read_partial(path: Path) -> tuple[dict[str, Any], list[Episode]]:
    """As `read_results`, of an unfinished run. A torn last line is dropped: its episode reruns."""
    lines = path.read_bytes().split(b"\n")
    rows: list[Any] = []
    # What follows the last newline was never finished.
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ResultsError(f"{path}: line {number} is broken ({error}); delete it") from error
    if not rows:
        raise ResultsError(f"{path}: holds no settings; delete it")
    _check_format(rows[0], path)
    return rows[0]["settings"], [_episode(row, str(path)) for row in rows[1:]]


def _existing(out: Path) -> Path | None:
    """The file of a run to go on with: of one that is unfinished first."""
    return next((path for path in (partial_path(out), out) if path.exists()), None)


def _read(out: Path, existing: Path) -> tuple[dict[str, Any], list[Episode]]:
    return read_results(out) if existing == out else _read_partial(existing)


def check_free(out: Path, *, resume: bool, overwrite: bool) -> None:
    """``ResultsError`` if a run, finished or not, is at `out` and neither was asked for."""
    existing = _existing(out)
    if existing is not None and not (resume or overwrite):
        raise ResultsError(
            f"{existing} exists; fix: --resume goes on with it, --overwrite starts anew"
        )


def recorded_settings(out: Path) -> dict[str, Any] | None:
    """The settings of the run at `out`, finished or not; None if there is none."""
    existing = _existing(out)
    return None if existing is None else _read(out, existing)[0]


def lock(path: Path) -> Lock:
    """`Lock`, or ResultsError if another run has it; the message names the process."""
    try:
        return Lock(path)
    except BlockingIOError as error:
        raise ResultsError(str(error)) from None


class Journal:
    """The record of one run: `episodes` so far, `append` for the next, `finish` at the end.

    With `out` None nothing is written, and only memory remembers. Until `close` or `finish` no
    other run can open the same file (`lock`). With both `resume` and `overwrite` it goes on with a
    run of these settings and replaces any other.

    Raises (on construction):
        ResultsError: `out` or its partial file exists and neither `resume` nor `overwrite` was
            given, resuming finds other settings, or another run is writing it; the message names
            each difference, or the process.
        OSError: `out` can't be written (`tsad.files.output_file`).
    """

    def __init__(
        self,
        out: Path | None,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = None if out is None else output_file(out, overwrite=True)
        self.settings = dict(settings)
        self.episodes: dict[int, Episode] = {}
        self.looks: list[Any] = []  # of the finished file that this run goes on with
        self._file: Any = None
        self._began = False  # whether there may be an episode on disk
        self._lock: Lock | None = None
        if self.out is None:
            return
        self._lock = lock(self.out)
        try:
            self._open(self.out, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, out: Path, resume: bool, overwrite: bool) -> None:
        check_free(out, resume=resume, overwrite=overwrite)
        existing = _existing(out) if resume else None
        if existing is not None:
            try:
                self._take(out, existing)
            except ResultsError:
                if not overwrite:
                    raise
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": self.settings}
        rows = [header, *(fields_of(episode) for episode in self.episodes.values())]
        partial = partial_path(out)
        write_atomically(partial, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file, self._began = open(str(partial), "ab"), bool(self.episodes)

    def _take(self, out: Path, existing: Path) -> None:
        """Go on with what is there."""
        recorded, episodes = _read(out, existing)
        changed = differences(recorded, self.settings)
        if changed:
            raise ResultsError(
                f"{existing} was made with other settings; {'; '.join(changed)}; "
                "fix: use its settings, another --out, or --overwrite"
            )
        # of a finished run; what a run that was told to replace another finds there is not its own
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = read_any_json(out)
            if not differences(content["settings"], self.settings):
                self.looks = content.get("looks", [])
        self.episodes = {episode.seed: episode for episode in episodes}

    def append(self, episode: Episode) -> None:
        """Keep one finished episode, on disk before this returns."""
        self._began = True
        if self._file is not None:
            with named(self._file.name):
                self._file.write(json.dumps(fields_of(episode)).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
        self.episodes[episode.seed] = episode  # last: Ctrl-C in between claims nothing

    def finish(self, document: Mapping[str, Any]) -> None:
        """Write `out` and drop the partial file."""
        if self.out is not None:
            write_json(self.out, document)
            partial_path(self.out).unlink()
        self.close()

    def close(self) -> None:
        """Nothing more comes; what is kept stays, and another run may go on.

        Of a run without an episode nothing stays: there is nothing to go on with.
        """
        if self._file is not None:
            with contextlib.suppress(OSError):  # a disk that was full for `append` still is
                self._file.close()
            self._file = None
            if self.out is not None and not self._began:
                partial_path(self.out).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()
