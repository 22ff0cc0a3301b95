"""Warm start: a chunk is denoised from the one before it, in the last few steps alone.

The first chunk after a reset runs all K steps from pure noise. Every later one of ``warm_start`` N
starts at row K - N of the loop with

    x = sqrt(alphas_cumprod) shifted + sqrt(1 - alphas_cumprod) noise

at the noise level of that row (of flow matching, at time t: t shifted + (1 - t) noise).
``shifted`` is the lane's previous chunk, all of its horizon, in normalised units, moved by the
actions executed since: index j is what index j + executed was, and the last action fills the end.
So the past of the chunk is what was executed, and the fewer actions are executed the more of it is
known: of a horizon of 10 with 2 observations, 8 executed leave one action of the future, 4 leave
five. ``WarmReference`` in ``tsad.reference`` is the specification.
Sources: RTI-DP (arXiv 2508.05396), Falcon (2503.00339), here without its candidates.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from tsad import _core
from tsad.plan import REUSE_ROLLOUT, Plan
from tsad.policy import Choice, SparsePolicy
from tsad.section import MAX_MAGNITUDE

if TYPE_CHECKING:
    from tsad.samplers import Sampler

Floats = NDArray[np.float32]


class WarmPolicy(SparsePolicy):
    """A `SparsePolicy` of the last N steps, which start from the previous chunk. Made by `load`.

    Plans, the dial, ``num_inference_steps``, ``predict_noise`` and ``stats`` are those of the warm
    chunks, N steps; ``config`` and ``cold`` are those of the first chunk of an episode. ``cold`` is
    a policy of its own: dense, unless you set its dial or plan. A plan that reads no rollout is
    followed from the first warm chunk on; one that does begins with its ``first``, as ever. There
    is no planner "pruner": a pruner is trained for all the steps.

    ``noise`` (K, lanes, horizon, action_dim), K being all steps, has in row K - N what a warm chunk
    begins with; without the first axis, it is what any chunk begins with. Without ``noise`` a lane
    draws standard_normal((its steps, horizon, action_dim), float32), or the first row alone where
    the sampler adds none, from the stream that `reset` describes: first chunks are those of the
    policy without warm start, bit for bit.

    The two policies share one set of weights. A call takes and makes a few small arrays in Python,
    and ``out`` must be a NumPy array.
    """

    __slots__ = (
        "_cold",
        "_is_warm",
        "_lock",
        "_noise",
        "_normalise",
        "_previous",
        "_signal",
        "_spent",
        "_streams",
    )

    def __init__(self, cold: SparsePolicy, model: _core.Model, sampler: Sampler) -> None:
        """``model`` is that of ``cold`` with ``sampler``, a `tail` of its steps, and no pruner."""
        self._lock = threading.Lock()
        self._cold = cold
        super().__init__(
            model,
            config=cold._config,
            sampler=sampler,
            lanes=cold.lanes,
            threads=cold.threads,
            device=cold.device,
            precision=cold.precision,
        )
        self._signal, self._noise = (np.float32(part) for part in sampler.mixture(0))
        affine = cold._config.normalizer.action
        self._normalise = affine.normalise
        self._previous = np.zeros((self.lanes, self.horizon, self.action_dim), np.float32)
        self._is_warm = np.zeros(self.lanes, bool)
        entropy = SeedSequence().entropy
        seeds = [SeedSequence(entropy, spawn_key=(lane,)) for lane in range(self.lanes)]
        self._streams = [Generator(PCG64(seed)) for seed in seeds]
        self._spent = cold.timings

    # ---- chunks

    def __call__(
        self,
        obs: Any,
        *,
        out: Floats | None = None,
        noise: Any = None,
        lanes: Any = None,
        return_horizon: bool = False,
        executed: int | Sequence[int] | None = None,
    ) -> Any:
        """As `SparsePolicy`'s. ``executed``: how many actions each lane listed has executed since
        its previous chunk, 0 to horizon; one number for all, or one per row; None: all that a
        chunk returns.
        """
        with self._alone():
            rows = self._cold._lanes(lanes)
            n, one, given = len(rows), (self.n_obs_steps, self.obs_dim), obs
            obs = _array("obs", obs, [(n, *one), *([one] if self.lanes == n == 1 else [])])
            drop = obs.ndim == 2
            _check_magnitude("obs", self._config.normalizer.obs.normalise(obs, float))
            sample = (n, self.horizon, self.action_dim)
            if noise is not None:
                noise = _array("noise", noise, [(self._cold.num_inference_steps, *sample), sample])
                _check_magnitude("noise", noise)
            moved = self._moved(executed, n)
            start = 0 if return_horizon else self.n_obs_steps - 1
            stop = self.horizon if return_horizon else start + self.n_action_steps
            if out is not None:
                shape = (n, stop - start, self.action_dim)
                _check_out(out, shape[1:] if drop else shape)

            try:
                chunks = self._run(obs.reshape(n, *one), noise, rows, moved)
            except BaseException:  # nobody sees these chunks, so nothing may go on from them
                self._forget(rows)
                raise
            actions = chunks[:, start:stop].copy()[0 if drop else slice(None)]
            if out is None:
                return _core._hand(actions, given)
            out[...] = actions
            return out

    def _run(
        self, obs: Floats, noise: Floats | None, rows: list[int], moved: NDArray[np.int64]
    ) -> Floats:
        """All actions (n, horizon, action_dim), raw units: lanes that are cold, then the others."""
        chunks = np.empty((len(rows), self.horizon, self.action_dim), np.float32)
        is_warm = self._is_warm[rows]
        spent = dict.fromkeys(self._spent, 0.0)
        for policy in (self._cold, self):
            part = np.flatnonzero(is_warm == (policy is self))
            if not part.size:
                continue
            lanes = [rows[i] for i in part]
            z = self._draw(policy, lanes, None if noise is None else noise[..., part, :, :])
            if policy is self:
                z[0] = self._signal * self._shifted(lanes, moved[part]) + self._noise * z[0]
            given = z if len(z) == policy.num_inference_steps else z[0]
            call = super().__call__ if policy is self else policy.__call__
            chunks[part] = call(obs[part], noise=given, lanes=lanes, return_horizon=True)
            for stage, milliseconds in policy._timings().items():
                spent[stage] += milliseconds
        self._previous[rows] = self._normalise(chunks)
        self._is_warm[rows] = True
        self._spent = spent if rows else self._spent
        return chunks

    def _draw(self, policy: SparsePolicy, lanes: list[int], given: Floats | None) -> Floats:
        """Noise (steps, n, horizon, action_dim), or its first row alone where no more is added."""
        steps = policy.num_inference_steps
        if given is not None and given.ndim == 4:
            return given[-steps:].copy()
        shape = (steps if policy.adds_noise else 1, self.horizon, self.action_dim)
        if given is not None and not policy.adds_noise:
            return given[None].copy()
        drawn = [self._streams[lane].standard_normal(shape, np.float32) for lane in lanes]
        z = np.stack(drawn, axis=1)
        if given is not None:
            z[0] = given
        return z

    def _shifted(self, lanes: list[int], moved: NDArray[np.int64]) -> Floats:
        """The lanes' previous chunks, normalised, as they look after ``moved`` actions."""
        later = np.minimum(np.arange(self.horizon) + moved[:, None], self.horizon - 1)
        shifted: Floats = self._previous[np.array(lanes)[:, None], later]
        return shifted

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        """As `SparsePolicy`'s; the next chunk of these lanes starts from pure noise."""
        with self._alone():
            rows, seed = self._cold._lanes(lanes), _core._plain(seed, "seed")
            self._cold.reset(rows, seed)  # refuses what is wrong with the seed
            self._forget(rows)
            if seed is None:
                return
            for row, lane in enumerate(rows):
                one = np.ndim(seed) == 0
                own = (
                    SeedSequence(index(seed), spawn_key=(lane,))
                    if one
                    else SeedSequence(index(seed[row]))
                )
                self._streams[lane] = Generator(PCG64(own))

    def _forget(self, rows: list[int]) -> None:
        self._cold.reset(rows)
        super().reset(rows)
        self._is_warm[rows] = False

    # ---- one thread at a time

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "policy is busy: the policy is running a chunk in another thread; a policy is used "
                "by one thread at a time"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _set_plans(self, plans: Any, /) -> None:
        with self._alone():
            super()._set_plans(plans)

    @staticmethod
    def _arrays(plan: Plan) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        sources, first = SparsePolicy._arrays(plan)
        # an episode has begun densely already, in the cold chunk
        follow = plan.first is None and not (sources == REUSE_ROLLOUT).any()
        return sources, sources if follow else first

    # ---- copies

    def _be_twin_of(self, other: Any) -> None:
        WarmPolicy.__init__(self, copy.copy(other._cold), other.model, other._sampler)

    def _choices(self) -> list[Choice]:
        return [*super()._choices(), *self._cold._choices()]

    def _adopt_all(self, choices: list[Choice]) -> None:
        self._adopt(choices[0])
        self._cold._adopt_all(choices[1:])

    # ---- what is given

    def _moved(self, executed: Any, n: int) -> NDArray[np.int64]:
        """(n,) actions executed by each row since its previous chunk."""
        if executed is None:
            return np.full(n, self.n_action_steps)
        moved = np.asarray(_core._plain(executed, "executed"))
        whole = np.issubdtype(moved.dtype, np.integer) or not moved.size
        fits = whole and moved.shape in ((), (n,))
        if not fits or ((moved < 0) | (moved > self.horizon)).any():
            raise ValueError(
                f"executed: expected an int from 0 to {self.horizon} (horizon), or {n}, one per "
                f"row, got {executed!r}; pass how many actions were executed since the last chunk"
            )
        return np.broadcast_to(moved, n).astype(np.int64)

    # ---- facts

    @property
    def cold(self) -> SparsePolicy:
        """The policy of all K steps that makes the first chunk of an episode."""
        return self._cold

    @property
    def config(self) -> dict[str, Any]:
        """That of all K steps, a copy."""
        return self._cold.config

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call by stage, first and warm chunks together."""
        return dict(self._spent)

    @property
    def stats(self) -> dict[str, Any]:
        """Of the warm chunks; ``bytes`` is of both policies, whose weights are the same."""
        stats = super().stats
        return stats | {"bytes": stats["bytes"] + self._cold.stats["bytes"]}

    def __repr__(self) -> str:
        steps = f"the last {self.num_inference_steps} of {self._cold.num_inference_steps} steps"
        return f"{super().__repr__()[:-1]}, warm start: {steps})"


def _array(name: str, value: Any, shapes: list[tuple[int, ...]]) -> Floats:
    array = _core._copy(value, name)
    if array.shape not in shapes:
        expected = f"{name}: expected float32 {' or '.join(map(str, shapes))}"
        raise ValueError(f"{expected}, got {array.shape}; a row is a lane, lanes=[...] lists some")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got nan or inf; check where it is from")
    return array


def _check_magnitude(name: str, value: NDArray[Any]) -> None:
    """As the core, but before any noise is drawn."""
    good = np.abs(value) <= MAX_MAGNITUDE
    if not good.all():
        index = [int(i) for i in np.argwhere(~good)[0]]
        raise ValueError(
            f"{name}: expected magnitudes up to {MAX_MAGNITUDE:g}, observations normalised, got "
            f"{value[tuple(index)]:g} at {name}{index}; the network can't represent that, check "
            "where it is from"
        )


def _check_out(out: Any, shape: tuple[int, ...]) -> None:
    fits = isinstance(out, np.ndarray) and out.dtype == np.float32 and out.shape == shape
    if not fits or not out.flags.writeable:
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(
            f"out: expected a writable NumPy array, float32 {shape}, got {got}; make it with "
            "np.empty(shape, np.float32)"
        )
