"""What `tsad fit` found for a setting of a policy, and the file that it is kept in.

Coefficients of the sampler's rows, fitted through the plan that they are for, and what is made of
each chunk after them, x + gain (x - start) + shift, where a warm chunk starts from ``start``: its
bias taken back. All of it is a few hundred numbers, and costs nothing to run::

  {
    "format": "tsad-fitted", "format_version": 1, "model_sha256": "2ba0801a...",
    "sampler": "ddim", "num_inference_steps": 16, "timestep_spacing": "trailing", "warm_start": 8,
    "plan_sha256": "...", "n_action_steps": 8,
    "coefficients": [[a, b, c, d, f, g], ...], "gain": [[...], ...], "shift": [[...], ...],
    "measured": {...}
  }

``coefficients`` are those of `tsad.samplers`, one row for each step that a chunk runs, without the
clipping and the noise, which stay the sampler's own. ``gain`` and ``shift`` (horizon, action_dim),
normalised actions. ``measured`` is free.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.checkpoint import CheckpointError, format_json, read_json
from tsad.config import MAX_HORIZON, MAX_TIMESTEPS, SAMPLERS, TIMESTEP_SPACINGS
from tsad.samplers import COLUMNS, Sampler
from tsad.section import Section

FORMAT, FORMAT_VERSION = "tsad-fitted", 1
FITTED = ("a", "b", "c", "d", "f", "g")
FITTED_AT = [COLUMNS.index(name) for name in FITTED]
_DIGITS = frozenset("0123456789abcdef")

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """See the module; the fields are the keys of the file."""

    model_sha256: str
    sampler: str
    num_inference_steps: int
    timestep_spacing: str
    warm_start: int | None
    plan_sha256: str
    n_action_steps: int
    coefficients: Rows
    gain: Rows
    shift: Rows
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Fitted:
        """A file; ``CheckpointError`` names it and the key, ``OSError`` if it is none."""
        try:
            return cls._read(path)
        except (ValueError, OSError) as error:
            kind = CheckpointError if isinstance(error, ValueError) else type(error)
            raise kind(f"fitted: {error}") from error

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Fitted:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"got {os.fspath(path)!r}, which is not a file; expected one that 'tsad fit' made"
            )
        section = Section(read_json(Path(path)), "", str(path))
        section.choice("format", (FORMAT,))
        version = section.take("format_version")
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise section.error("format_version", str(FORMAT_VERSION), version, "update tsad")
        warm = "warm_start" in section.data
        steps = section.integer("num_inference_steps", 1, MAX_TIMESTEPS)
        last = section.integer("warm_start", 1, steps) if warm else None
        fitted = cls(
            model_sha256=_digest(section, "model_sha256"),
            sampler=section.choice("sampler", SAMPLERS),
            num_inference_steps=steps,
            timestep_spacing=section.choice("timestep_spacing", TIMESTEP_SPACINGS),
            warm_start=last,
            plan_sha256=_digest(section, "plan_sha256"),
            n_action_steps=section.integer("n_action_steps", 1, MAX_HORIZON),
            coefficients=_rows(section, "coefficients", last or steps, len(FITTED)),
            gain=(gain := _rows(section, "gain")),
            shift=_rows(section, "shift", len(gain), len(gain[0])),
            measured=section.take("measured", {}),
        )
        section.known.append("warm_start")
        section.done()
        if last is None and np.any(gain):
            raise section.error("gain", "zeros without a warm_start", "others", "fit it anew")
        if not isinstance(fitted.measured, Mapping):
            raise section.error("measured", "a JSON object", fitted.measured)
        return fitted

    def to_dict(self) -> dict[str, Any]:
        """The object of the file."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    def to_bytes(self) -> bytes:
        """The file."""
        return format_json(self.to_dict()).encode()

    @property
    def sha256(self) -> str:
        """Of the numbers that run."""
        numbers = json.dumps([self.coefficients, self.gain, self.shift])
        return hashlib.sha256(numbers.encode()).hexdigest()

    def applied(self, sampler: Sampler) -> Sampler:
        """A sampler of these steps with the coefficients."""
        table = sampler.table.copy()
        table[:, FITTED_AT] = self.coefficients
        table.setflags(write=False)
        return replace(sampler, table=table)

    def correction(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Gain and shift for the core; None if they do nothing."""
        gain, shift = np.array(self.gain, np.float32), np.array(self.shift, np.float32)
        return (gain, shift) if gain.any() or shift.any() else None

    def check(self, wanted: Mapping[str, Any], shape: tuple[int, int]) -> None:
        """``ValueError`` if it is of something else: of other weights, steps, sizes."""
        for name, value in wanted.items():
            if getattr(self, name) != value:
                fix = "load the policy that way, or fit this one anew (tsad fit)"
                wanted_one = f"expected what was made for {name} {value!r}, as this policy's is"
                raise ValueError(f"fitted: {wanted_one}, got {getattr(self, name)!r}; {fix}")
        if np.shape(self.gain) != shape:
            raise ValueError(
                f"fitted: expected gain and shift of shape {shape}, as this policy's actions have, "
                f"got {np.shape(self.gain)}; fit it anew (tsad fit)"
            )


def coefficients_of(sampler: Sampler) -> NDArray[np.float64]:
    """(K, 6): those of a sampler that are fitted."""
    return sampler.table[:, FITTED_AT].copy()


def rows_of(array: NDArray[Any]) -> Rows:
    """Numbers of float32 as the file has them: short, and read back to the same float32."""
    return tuple(tuple(float(str(x)) for x in row) for row in np.asarray(array, np.float32))


def _digest(section: Section, key: str) -> str:
    value = section.take(key)
    if not isinstance(value, str) or len(value) != 64 or not _DIGITS.issuperset(value):
        raise section.error(key, "64 hexadecimal digits", value)
    return value


def _rows(section: Section, key: str, rows: int | None = None, columns: int | None = None) -> Rows:
    value = section.take(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], list) or not value[0]:
        raise section.error(key, "rows of numbers", value)
    rows, columns = rows or len(value), columns or len(value[0])
    if len(value) != rows:
        raise section.error(key, f"{rows} rows", len(value), "fit it anew")
    part = Section({str(i): row for i, row in enumerate(value)}, key, section.file)
    return tuple(part.numbers(str(i), columns) for i in range(rows))
