"""A guard: does an observation follow from the one before and from what was done in between?

Of recorded episodes a linear model of the next observation is fitted, from the one before and the
last two actions executed. What it is off by, in units of what it is off by on recorded chunks, is
the statistic: a mean of squares, 1 on average of what it was fitted on. Noise, a sensor that stands
still and a jump break what holds between the numbers of an observation, and raise it; so does
whatever was not recorded. It detects; it proves nothing.

Beside it there may be an audit: what a chunk computes is compared with the values that this
replaces, and that reuse would have taken (`tsad.reference.audit`). How far they are apart costs
next to nothing to know, and is known after the chunk; there are bounds to either side.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from tsad.plan import REUSE_ROLLOUT, plan_sha256
from tsad.policy import SparsePolicy

FORMAT, FORMAT_VERSION = "tsad-guard", 1
QUANTILE = 0.99
LEAST_PAIRS = 50  # of successive chunks
FLOOR = 3e-4  # an observation, normalised, is known no better
_RIDGE, _FOLDS = 1e-4, 5
_TABLES = ("predict", "whiten", "bound")
_OWN = frozenset(
    ("policy", "bound", "alarms", "restart", "_knows_actions", "_seen", "_said", "_chunks",
     "_alarms", "_statistic", "_flagged", "_audited", "_audit_alarms")
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
        audit: (2, 2), the least and the most that the relative differences of an audit may be, to
            earlier steps and to earlier chunks, NaN of a kind that there was none of; None: there
            is no audit.
    """

    predict: Floats
    whiten: Floats
    bound: Floats
    metadata: Mapping[str, Any] = field(default_factory=dict)
    audit: Floats | None = None

    def statistic(self, before: Floats, after: Floats) -> Floats:
        """(N,) of rows (N, X) and (N, Y)."""
        apart = (after - before @ self.predict) @ self.whiten
        found: Floats = (apart**2).sum(1)
        return found

    @property
    def sha256(self) -> str:
        """Of the numbers that decide."""
        numbers = b"".join(getattr(self, name).tobytes() for name in _TABLES)
        numbers += b"" if self.audit is None else self.audit.tobytes()
        return hashlib.sha256(numbers).hexdigest()

    def to_bytes(self) -> bytes:
        """The file, npz."""
        header = {"format": FORMAT, "version": FORMAT_VERSION, "metadata": dict(self.metadata)}
        stream = BytesIO()
        arrays = {name: getattr(self, name) for name in _TABLES}
        arrays |= {} if self.audit is None else {"audit": self.audit}
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
            audit = np.asarray(arrays["audit"], np.float64) if "audit" in arrays else None
            if audit is not None and audit.shape != (2, 2):
                raise ValueError(f"audit of shape {audit.shape}")
            return cls(predict, whiten, bound, dict(header["metadata"]), audit)
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
    audit: bool = False,
) -> Bound:
    """Fit the model on successive chunks, and the bound on episodes that it was not fitted on.

    Args:
        policy: that the episodes are of.
        episodes: observations (C, n_obs_steps, obs_dim) and the actions executed between them,
            (C, n_action_steps, action_dim), raw units; None where they are not known.
        quantile: of the statistic on recorded chunks, which is the bound: 0.99 has false alarms on
            one chunk of a hundred. Of an audit as many lie within its bounds, of each kind.
        audit: run the policy, of one lane and set as it is to run, along the episodes for an audit;
            it is reset.

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
    within = None
    if audit:
        within = _audit_bounds(policy, episodes, quantile)
        facts["audit"] = audit_facts(policy)
    return Bound(*_fit(pairs), np.asarray(bound), facts, within)


def audit_facts(policy: SparsePolicy) -> dict[str, Any]:
    """What an audit is of: other steps or plans have other differences."""
    plans = policy._plans
    return {
        "sampler": policy.config["scheduler"]["type"],
        "num_inference_steps": policy.config["scheduler"]["num_inference_steps"],
        "timestep_spacing": policy.config["scheduler"]["timestep_spacing"],
        "warm_start": policy.warm_start,
        "plan_sha256": None if plans is None else plan_sha256(plans[0]),
    }


def audited(policy: Any, lane: int) -> Floats:
    """(2,) of a lane's last chunk: relative root mean squares to earlier steps, to earlier chunks.

    NaN where no cell was compared.
    """
    apart_step, step, apart_chunk, chunk = policy._audit(lane)
    found: Floats = np.full(2, np.nan)
    for kind, (apart, size) in enumerate(((apart_step, step), (apart_chunk, chunk))):
        if size > 0:
            found[kind] = math.sqrt(apart / size)
    return found


def known(numbers: Floats) -> list[list[float | None]]:
    """Rows for people; None of what is not known."""
    return [[None if math.isnan(x) else x for x in row] for row in numbers.tolist()]


def _audit_bounds(policy: Any, episodes: Sequence[Episode], quantile: float) -> Floats:
    """What is within the bounds of `measure`: (2, 2)."""
    _check_audit(policy)
    policy._set_audit(True)
    found = []
    for number, (obs, _) in enumerate(episodes):
        policy.reset(seed=number)
        for i, seen in enumerate(obs):
            policy(np.ascontiguousarray(seen[None], np.float32))
            if i:
                found.append(audited(policy, 0))
    policy._set_audit(False)
    policy.reset()
    bounds = np.full((2, 2), np.nan)
    for kind, values in enumerate(np.array(found).T):
        known = values[np.isfinite(values)]
        if len(known) >= LEAST_PAIRS:
            bounds[kind] = np.quantile(known, [(1 - quantile) / 2, (1 + quantile) / 2])
    if np.isnan(bounds).all():
        raise ValueError(
            "plan: expected one that computes cells again, or the same ones in every chunk, for an "
            "audit; there is nothing to compare"
        )
    return bounds


def _check_audit(policy: Any) -> None:
    """ValueError where an audit says nothing: values of earlier chunks stay where they were."""
    plans = policy._plans
    if plans is None or any((plan.sources == REUSE_ROLLOUT).any() for plan in plans):
        raise ValueError(
            "guard: its audit expects plans that read no rollouts, and no pruner; set such a plan, "
            "or make the guard without --audit"
        )


def _fits_audit(policy: SparsePolicy, bound: Bound) -> None:
    """ValueError if an audit's bounds were recorded of another setting."""
    wanted, found = bound.metadata.get("audit", {}), audit_facts(policy)
    for name, value in wanted.items():
        if name in found and found[name] != value:
            raise ValueError(
                f"guard: its audit was recorded with {name} {value!r}, and this policy has "
                f"{found[name]!r}; set the policy so first, or make it for this one: tsad fit "
                "--guard --audit"
            )


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
    ``statistic`` of the last call by row (None: not compared), and ``bound``. Of a bound with an
    audit also ``audit``, of the last call by row the relative differences to earlier steps and to
    earlier chunks, ``audit_alarms`` and ``audit_bound``; an alarm of the audit comes with a chunk,
    and the lane starts anew before the next one.

    Args:
        policy: a `tsad.SparsePolicy` that sees numbers.
        bound: a `Bound`, or the file of one (``tsad fit --guard``).
        restart: whether lanes start anew; else alarms are counted, and that is all.

    Raises ``ValueError``, ``TypeError`` or ``OSError`` naming the argument.
    """

    def __init__(
        self,
        policy: SparsePolicy,
        bound: Bound | str | os.PathLike[str],
        *,
        restart: bool = True,
    ) -> None:
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
        if own.audit is not None:
            _fits_audit(policy, own)
            policy._set_audit(True)
        self.policy, self.bound, self.restart = policy, own, restart
        self._knows_actions = bool(own.metadata.get("knows_actions", True))
        self._seen: list[Floats | None] = [None] * policy.lanes  # (1, Y)
        self._said: list[NDArray[Any] | None] = [None] * policy.lanes
        self._chunks = self._alarms = self._audit_alarms = 0
        self._statistic: list[float | None] = []
        self._flagged = [False] * policy.lanes  # by the audit of the chunk before
        self._audited: list[list[float | None]] = []
        self.alarms: list[bool] = []
        """Of the last call, by row."""

    def __getattr__(self, name: str) -> Any:
        if name == "policy" or name.startswith("__"):  # of one not made yet; of protocols
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
        guard: dict[str, Any] = {
            "chunks": self._chunks,
            "alarms": self._alarms,
            "statistic": self._statistic,
            "bound": float(self.bound.bound),
        }
        if self.bound.audit is not None:
            guard |= {
                "audit": self._audited,
                "audit_alarms": self._audit_alarms,
                "audit_bound": known(self.bound.audit),
            }
        return {**self.policy.stats, "guard": guard}

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        """As the policy's."""
        rows = self.policy._lanes(lanes)
        self.policy.reset(lanes=lanes, seed=seed)
        for lane in rows:
            self._seen[lane] = self._said[lane] = None
            self._flagged[lane] = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's policy knows of no audit yet."""
        self.__dict__.update(state)
        if self.bound.audit is not None:
            self.policy._set_audit(True)

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
        if self.bound.audit is not None:
            _check_audit(policy)
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
        late = [
            lane
            for lane, alarm in zip(rows, alarms, strict=True)
            if self.restart and (alarm or self._flagged[lane])
        ]
        begun = [self._seen[lane] is not None and lane not in late for lane in rows]
        actions = self._run(obs, late, options)
        said = _core._copy(actions, "actions").reshape(len(rows), -1, policy.action_dim)
        if return_horizon:
            begin = policy.n_obs_steps - 1
            said = said[:, begin : begin + policy.n_action_steps]
        for row, lane in enumerate(rows):
            self._seen[lane], self._said[lane] = seen[row][None], said[row][None]
        self._chunks += sum(value is not None for value in statistic)
        self._alarms += sum(alarms)
        self._statistic = statistic
        self.alarms = [
            flag or alarm for flag, alarm in zip(self._audit(rows, begun), alarms, strict=True)
        ]
        return actions

    def _audit(self, rows: list[int], begun: list[bool]) -> list[bool]:
        """Whether what each lane's chunk computed is out of bounds, of those that went on."""
        bounds = self.bound.audit
        if bounds is None:
            return [False] * len(rows)
        found = [audited(self.policy, lane) for lane in rows]
        for values, lane, goes_on in zip(found, rows, begun, strict=True):
            # what is NaN is not out of bounds
            out = ((values < bounds[:, 0]) | (values > bounds[:, 1])).any()
            self._flagged[lane] = bool(goes_on and out)
        self._audited = known(np.reshape(found, (-1, 2)))
        flags = [self._flagged[lane] for lane in rows]
        self._audit_alarms += sum(flags)
        return flags

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
