"""A guard: does an observation follow from the one before and from what was done in between?

Of recorded episodes a linear model of the next observation is fitted, from the one before and the
last two actions executed. What it is off by, in units of what it is off by on recorded chunks, is
the statistic: a mean of squares, 1 on average of what it was fitted on. Noise, a sensor that stands
still and a jump break what holds between the numbers of an observation, and raise it; so does
whatever was not recorded. It detects; it proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad import _core, planners
from tsad.arrays import parse_header, read_npz
from tsad.files import path_text
from tsad.image_policy import ImagePolicy
from tsad.policy import SparsePolicy

FORMAT, FORMAT_VERSION = "tsad-guard", 1
QUANTILE = 0.99
LEAST_PAIRS = 50  # of successive chunks
FLOOR = 3e-4  # an observation, normalised, is known no better
_RIDGE, _FOLDS = 1e-4, 5
_TABLES = ("predict", "whiten", "bound")
_OWN = frozenset(
    ("policy", "bound", "alarms", "_knows_actions", "_seen", "_said", "_chunks", "_alarms",
     "_statistic")
)  # fmt: skip

Floats = NDArray[np.float64]
Episode = tuple[NDArray[Any], NDArray[Any] | None]


@dataclass(frozen=True, eq=False)
class Bound:
    """The model, and what the statistic may be.

    Args:
        predict: (X, Y) of X numbers, the observations before, two actions and a one, Y of the next.
        whiten: (Y, Y) makes independent numbers of variance 1/Y of what it is off by.
        bound: (), of the statistic.
        metadata: what it was made of.
    """

    predict: Floats
    whiten: Floats
    bound: Floats
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def statistic(self, before: Floats, after: Floats) -> Floats:
        """(N,) of rows (N, X) and (N, Y)."""
        apart = (after - before @ self.predict) @ self.whiten
        found: Floats = (apart**2).sum(1)
        return found

    @property
    def sha256(self) -> str:
        """Of the numbers that decide."""
        numbers = b"".join(getattr(self, name).tobytes() for name in _TABLES)
        return hashlib.sha256(numbers).hexdigest()

    def to_bytes(self) -> bytes:
        """The file, npz."""
        header = {"format": FORMAT, "version": FORMAT_VERSION, "metadata": dict(self.metadata)}
        stream = BytesIO()
        arrays = {name: getattr(self, name) for name in _TABLES}
        np.savez_compressed(stream, header=np.array(json.dumps(header)), **arrays)
        return stream.getvalue()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Bound:
        """A file; ``ValueError`` names it and what is wrong, ``OSError`` if it is none."""
        if not Path(path_text(path)).is_file():
            raise FileNotFoundError(
                f"got {os.fspath(path)!r}, which is not a file; expected one of tsad fit --guard"
            )
        try:
            arrays = read_npz(path)
            header = parse_header(arrays["header"])
            if header["format"] != FORMAT or header["version"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            tables = [np.asarray(arrays[name], np.float64) for name in _TABLES]
            (X, Y), square, single = (table.shape for table in tables)
            if square != (Y, Y) or single != () or not all(np.isfinite(t).all() for t in tables):
                raise ValueError(f"shapes {(X, Y)}, {square}, {single}, or numbers not finite")
            predict, whiten, bound = tables
            return cls(predict, whiten, bound, dict(header["metadata"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a guard of this version ({error}); make it anew: tsad fit --guard"
            ) from error


def _normalised(policy: Any, name: str, raw: NDArray[Any]) -> Floats:
    """Of "obs" or "action": rows (N, ...) as rows of numbers."""
    affine = policy.config["normalizer"][name]
    shift = affine.get("shift", 0.0)
    found: Floats = (np.asarray(raw, np.float64) - shift) * affine["scale"] + affine["offset"]
    return found.reshape(len(found), -1)


def _before(seen: Floats, last: Floats) -> Floats:
    """(N, X) of what was seen (N, n_obs_steps obs_dim) and the last actions (N, 2 action_dim)."""
    return np.concatenate([seen, last, np.ones((len(seen), 1))], 1)


def _last_two(actions: NDArray[Any], executed: int) -> NDArray[Any]:
    """(N, 2, action_dim) of (N, n_action_steps, action_dim), the last one executed first."""
    return actions[:, [executed - 1, max(executed - 2, 0)]]


def _fit(pairs: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    x, y = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    square = x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1])
    predict = np.linalg.solve(square, x.T @ y)
    apart = y - x @ predict
    variances, axes = np.linalg.eigh(apart.T @ apart / len(x))
    return predict, axes / np.sqrt((variances.clip(min=0) + FLOOR**2) * y.shape[1])


def measure(
    policy: Any,
    episodes: Sequence[Episode],
    *,
    quantile: float = QUANTILE,
    metadata: Mapping[str, Any] | None = None,
) -> Bound:
    """Fit the model on successive chunks, and the bound on episodes that it was not fitted on.

    Args:
        policy: that the episodes are of.
        episodes: observations (C, n_obs_steps, obs_dim) and the actions executed between them,
            (C, n_action_steps, action_dim), raw units; None where they are not known.
        quantile: of the statistic on recorded chunks, which is the bound: 0.99 has false alarms on
            one chunk of a hundred.

    ``ValueError``: fewer than `LEAST_PAIRS` pairs of successive chunks, or of one episode alone.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: expected a number between 0 and 1, got {quantile}")
    dims = 2 * policy.action_dim
    pairs = []
    for obs, actions in episodes:
        seen = _normalised(policy, "obs", obs)
        last = np.zeros((len(obs), dims))
        if actions is not None:
            last = _normalised(policy, "action", _last_two(actions, actions.shape[1]))
        if len(seen) > 1:
            pairs.append((_before(seen, last)[:-1], seen[1:]))
    count = sum(len(x) for x, _ in pairs)
    if count < LEAST_PAIRS or len(pairs) < 2:
        raise ValueError(
            f"data: expected {LEAST_PAIRS} pairs of successive chunks, of two episodes or more, "
            f"got {count} of {len(pairs)}; record more"
        )
    found, folds = [], min(_FOLDS, len(pairs))
    for fold in range(folds):
        model = _fit([pair for i, pair in enumerate(pairs) if i % folds != fold])
        found += [Bound(*model, np.array(0.0)).statistic(*pair) for pair in pairs[fold::folds]]
    bound = np.quantile(np.concatenate(found), quantile)
    facts = {"pairs": count, "episodes": len(pairs), "quantile": quantile, **(metadata or {})}
    facts["knows_actions"] = any(actions is not None for _, actions in episodes)
    return Bound(*_fit(pairs), np.asarray(bound), facts)


class Guard:
    """A policy that starts anew where an observation is not what was to be expected.

    >>> policy = tsad.Guard(tsad.load("pusht", preset="one_pass"), "guard.npz")
    >>> policy.reset(seed=0)
    >>> actions = policy(obs)
    >>> policy.stats["guard"]

    It is called and reset like the policy, and has its attributes. Before a chunk it compares the
    observation with the one of the lane's chunk before; past the bound that lane starts anew, as
    after `reset`, and its chunk is dense, all steps from noise. The first chunk of an episode has
    nothing before it. Expected is that as many actions are executed of a chunk as were where the
    bound was recorded. ``stats["guard"]``: ``chunks`` compared and ``alarms`` since it was made,
    ``statistic`` of the last call by row (None: not compared), and ``bound``.

    Args:
        policy: a `tsad.SparsePolicy` that sees numbers.
        bound: a `Bound`, or the file of one (``tsad fit --guard``).

    Raises ``ValueError``, ``TypeError`` or ``OSError`` naming the argument.
    """

    def __init__(self, policy: SparsePolicy, bound: Bound | str | os.PathLike[str]) -> None:
        if isinstance(policy, ImagePolicy):
            raise ValueError("policy: expected one that sees numbers, got one that sees images")
        if not isinstance(policy, SparsePolicy):
            raise TypeError(f"policy: expected one of tsad.load, got {type(policy).__name__}")
        if not isinstance(bound, Bound):
            path_text(bound, "bound")
        try:
            own = bound if isinstance(bound, Bound) else Bound.read(bound)
        except (ValueError, OSError) as error:
            kind = ValueError if isinstance(error, ValueError) else type(error)
            raise kind(f"guard: {error}") from error
        Y = policy.n_obs_steps * policy.obs_dim
        shape = (Y + 2 * policy.action_dim + 1, Y)
        if own.predict.shape != shape:
            raise ValueError(
                f"guard: expected one of {Y} observed numbers, {policy.action_dim} of an action, "
                f"shape {shape}, got {own.predict.shape}; make it for this policy: tsad fit --guard"
            )
        self.policy, self.bound = policy, own
        self._knows_actions = bool(own.metadata.get("knows_actions", True))
        self._seen: list[Floats | None] = [None] * policy.lanes  # (1, Y)
        self._said: list[NDArray[Any] | None] = [None] * policy.lanes
        self._chunks = self._alarms = 0
        self._statistic: list[float | None] = []
        self.alarms: list[bool] = []
        """Of the last call, by row."""

    def __getattr__(self, name: str) -> Any:
        if name == "policy":  # of one not made yet
            raise AttributeError(name)
        return getattr(self.policy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.policy, name, value)

    def __repr__(self) -> str:
        return f"Guard({self.policy!r}, bound {float(self.bound.bound):.4g})"

    @property
    def _varies(self) -> bool:
        """Whether chunks may cost more or less than the one before: an alarm's is dense."""
        return True

    @property
    def stats(self) -> dict[str, Any]:
        """The policy's, and ``guard``."""
        guard = {
            "chunks": self._chunks,
            "alarms": self._alarms,
            "statistic": self._statistic,
            "bound": float(self.bound.bound),
        }
        return {**self.policy.stats, "guard": guard}

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        """As the policy's."""
        rows = self.policy._lanes(lanes)
        self.policy.reset(lanes=lanes, seed=seed)
        for lane in rows:
            self._seen[lane] = self._said[lane] = None

    def __call__(
        self,
        obs: Any,
        *,
        lanes: Any = None,
        executed: Any = None,
        return_horizon: bool = False,
        **options: Any,
    ) -> Any:
        """As the policy's."""
        policy = self.policy
        if policy._plans is None and policy.planner != "pruner":
            raise ValueError(
                f"planner: expected plans or the pruner under a guard, which lets lanes begin "
                f"densely, got {policy.planner!r}; set policy.planner = 'uniform' or a plan"
            )
        rows = policy._lanes(lanes)
        given = policy._side_by_side(obs, len(rows)) if isinstance(obs, dict) else obs
        raw = _core._copy(given, "obs").reshape(len(rows), -1)
        if raw.shape[1] == policy.n_obs_steps * policy.obs_dim:  # else it is refused
            shape = (len(rows), policy.n_obs_steps, policy.obs_dim)
            seen = _normalised(policy, "obs", raw.reshape(shape))
            moved = np.broadcast_to(policy.n_action_steps if executed is None else executed,
                                    len(rows))  # fmt: skip
            statistic = [self._compared(*each) for each in zip(rows, seen, moved, strict=True)]
        else:
            seen, statistic = np.empty((len(rows), 0)), [None] * len(rows)
        alarms = [value is not None and not value <= self.bound.bound for value in statistic]
        options |= {"lanes": rows, "return_horizon": return_horizon}
        options |= {} if executed is None else {"executed": executed}
        late = [lane for lane, alarm in zip(rows, alarms, strict=True) if alarm]
        actions = self._run(obs, late, options)
        said = _core._copy(actions, "actions").reshape(len(rows), -1, policy.action_dim)
        if return_horizon:
            begin = policy.n_obs_steps - 1
            said = said[:, begin : begin + policy.n_action_steps]
        for row, lane in enumerate(rows):
            self._seen[lane], self._said[lane] = seen[row][None], said[row][None]
        self._chunks += sum(value is not None for value in statistic)
        self._alarms += len(late)
        self.alarms, self._statistic = alarms, statistic
        return actions

    def _compared(self, lane: int, seen: Floats, executed: int) -> float | None:
        before, said = self._seen[lane], self._said[lane]
        if before is None or said is None or not 1 <= executed <= said.shape[1]:
            return None
        last = _normalised(self.policy, "action", _last_two(said, int(executed)))
        last = last if self._knows_actions else np.zeros_like(last)
        return float(self.bound.statistic(_before(before, last), seen[None])[0])

    def _run(self, obs: Any, late: list[int], options: Mapping[str, Any]) -> Any:
        """A call in which these lanes start anew, densely; if it is refused, the next one."""
        policy = self.policy
        if not late:
            return policy(obs, **options)
        policy.reset(lanes=late)
        choice = policy._choice()
        planner, dial, plans, _, _ = choice
        if plans is None:  # a pruner begins densely
            return policy(obs, **options)
        dense = planners.dense(policy)
        own = plans
        if policy.warm_start is None:  # else the cold chunk is
            own = [dense if lane in late else plan for lane, plan in enumerate(plans)]
        policy._adopt((planner, dial, own, True, None))
        try:
            return policy(obs, **options)
        finally:
            policy._adopt(choice)
