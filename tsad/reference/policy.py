"""The four stages behind the interface of ``tsad.load(...)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tsad.fitted import Fitted
from tsad.reference.audit import Audit
from tsad.reference.chunk import Rollout, Sources, corrected, denoise
from tsad.reference.families import family_of
from tsad.reference.layers import Array, Network
from tsad.reference.pruner import plan, prune
from tsad.reference.rule import Rule
from tsad.samplers import COLUMNS, make_sampler

_MAP = ("shift", "scale", "offset")  # normalised = (raw - shift) * scale + offset


def lane_numbers(lanes: ArrayLike | None, n: int) -> list[int]:
    """Which of ``n`` lanes: all (None), the numbers given, or where a mask of n bools is true.

    An empty list is none. ``IndexError``, ``ValueError``: there is no such lane, or one twice.
    """
    given = np.arange(n) if lanes is None else np.asarray(lanes).ravel()
    numbers: list[int] = np.arange(n)[given if given.size else []].tolist()
    if len(set(numbers)) < len(numbers) or (given < 0).any():
        raise ValueError(f"lanes: expected distinct lanes from 0 to {n - 1}, got {lanes!r}")
    return numbers


class ReferencePolicy:
    """The four stages behind the interface of ``tsad.load(...)``, lane by lane.

    ``config`` is a ``config.json``, ``tensors`` and ``pruner`` hold the weights by name. Noise is
    always given. All arithmetic is in ``dtype``.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, NDArray[Any]],
        pruner: Mapping[str, NDArray[Any]] | None = None,
        *,
        lanes: int = 1,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        dtype: DTypeLike = np.float64,
        fitted: Fitted | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.family = family_of(config["network"])
        self.network: Network = self.family.check(config["network"])
        self.sampler = make_sampler(
            config["scheduler"],
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            coefficients=self.family.COEFFICIENTS,
        )
        self.fitted = fitted
        if fitted is not None:
            self.sampler = fitted.applied(self.sampler)
        self.timesteps = self.sampler.timesteps
        self.num_inference_steps = len(self.timesteps)
        self.blocks = self.family.block_names(self.network)
        self.lanes = lanes
        self._w = {name: np.asarray(tensor, self.dtype) for name, tensor in tensors.items()}
        self._pruner_config = config.get("pruner")
        self._pruner = pruner and {k: np.asarray(v, self.dtype) for k, v in pruner.items()}
        self._maps = {
            key: [np.asarray(numbers.get(part, 0), self.dtype) for part in _MAP]
            for key, numbers in config["normalizer"].items()
        }
        self._rollouts: list[Rollout] = [{} for _ in range(lanes)]
        self._first = [True] * lanes
        self.ruled: list[Sources] = []
        self.audits = [Audit() for _ in range(lanes)]

    def reset(self, lanes: ArrayLike | None = None) -> None:
        """Start of an episode for all lanes or the listed ones: earlier rollouts are forgotten."""
        for lane in lane_numbers(lanes, self.lanes):
            self._rollouts[lane] = {}
            self._first[lane] = True
            self.audits[lane] = Audit()

    def encode(self, obs: ArrayLike) -> Array:
        """What conditions every step, (K, ...), of one raw observation (n_obs_steps, obs_dim)."""
        repeated = np.repeat(self.normalise("obs", obs)[None], self.num_inference_steps, 0)
        return self.family.encode(self._w, self.network, self.timesteps, repeated)

    def prune(self, obs: ArrayLike) -> Array:
        """The pruner's logits (K, B, 4) for one raw observation, before the time reversal."""
        if not self._pruner or self._pruner_config is None:
            raise ValueError("pruner: this policy has none; pass pruner tensors, or a plan")
        return prune(self._pruner, self._pruner_config, self.encode(obs), len(self.blocks))

    def predict_noise(self, sample: ArrayLike, step: int, obs: ArrayLike) -> Array:
        """The dense network's output (N, T, action_dim) at loop index ``step``; no state changes.

        ``sample`` (N, T, action_dim) is normalised, ``obs`` (N, n_obs_steps, obs_dim) is raw.
        """
        timestep = np.full(len(np.asarray(sample)), self.timesteps[step])
        memory = self.family.encode(self._w, self.network, timestep, self.normalise("obs", obs))
        return self.family.predict(self._w, self.network, np.asarray(sample, self.dtype), memory)

    def __call__(
        self,
        obs: ArrayLike,
        noise: ArrayLike,
        plan_sources: NDArray[Any] | Sequence[NDArray[Any]] | None = None,
        lanes: ArrayLike | None = None,
        return_horizon: bool = False,
        *,
        first: NDArray[Any] | Sequence[NDArray[Any]] | None = None,
        starts: Array | None = None,
        rules: Sequence[Rule] | None = None,
    ) -> Array:
        """Actions (L, n_action_steps, action_dim) in raw units, or the whole horizon.

        ``obs`` (L, n_obs_steps, obs_dim) raw; ``noise`` (K, L, T, action_dim): ``noise[0]`` is the
        initial sample, ``noise[k]`` what DDPM adds after step k - 1. ``plan_sources``: (K, B) for
        all lanes, or one per lane; None asks the pruner. ``first`` is used instead in a lane's
        first chunk after a reset; None is dense. ``starts`` (L, T, action_dim), normalised, is what
        warm chunks start from, for what is fitted. ``rules``, new ones, one per row, decide instead
        of plans, in first chunks, too; what they come to is in ``ruled``, (K, B) each. ``lanes``:
        which lanes the L rows are; None is all. Afterwards ``audits`` by lane has what its computed
        cells differ by from the values they replace. Raises ``ValueError`` for wrong shapes and for
        a plan that reads a value that does not exist; then no lane has changed.
        """
        rows = lane_numbers(lanes, self.lanes)
        obs, noise = np.asarray(obs), np.asarray(noise, self.dtype)
        self._check("obs", obs, (len(rows), self.network["n_obs_steps"], self.network["obs_dim"]))
        sample_shape = (self.network["horizon"], self.network["action_dim"])
        self._check("noise", noise, (self.num_inference_steps, len(rows), *sample_shape))
        results, rollouts, ruled, audits = [], [], [], []
        for i, lane in enumerate(rows):
            memory = self.encode(obs[i])
            dense = np.zeros((self.num_inference_steps, len(self.blocks)), np.uint8)
            rule = None if rules is None else rules[i]
            if rule is not None:
                sources = dense
                ruled.append(sources)
            elif self._first[lane]:
                sources = dense if first is None else self._sources("first", first, i)
            elif plan_sources is None:
                sources = plan(self.prune(obs[i]))
            else:
                sources = self._sources("plan_sources", plan_sources, i)
            rollout = dict(self._rollouts[lane])
            about = self._w, self.network, self.sampler, memory, noise[:, i]
            audits.append(self.audits[lane].copy())
            x = denoise(*about, sources, rollout, rule, audits[-1])
            results.append(self._corrected(x, None if starts is None else starts[i]))
            rollouts.append(rollout if rule is None else {})
        for lane, rollout, audit in zip(rows, rollouts, audits, strict=True):
            self._rollouts[lane] = rollout
            self.audits[lane] = audit
            self._first[lane] = False
        self.ruled = ruled
        actions = self.raw_actions(np.reshape(results, (len(rows), *sample_shape)))
        start = self.network["n_obs_steps"] - 1
        executed = slice(start, start + self.network["n_action_steps"])
        return actions if return_horizon else actions[:, executed]

    def _corrected(self, chunk: Array, start: Array | None) -> Array:
        """A final sample with what is fitted."""
        if self.fitted is None:
            return chunk
        gain, shift = (np.asarray(x, self.dtype) for x in (self.fitted.gain, self.fitted.shift))
        clip = float(self.sampler.table[-1, COLUMNS.index("r")])
        return corrected(chunk, start, gain, shift, clip)

    def normalise(self, key: str, raw: ArrayLike) -> Array:
        """``"obs"`` or ``"action"`` in the network's units."""
        shift, scale, offset = self._maps[key]
        normalised: Array = (np.asarray(raw, self.dtype) - shift) * scale + offset
        return normalised

    def raw_actions(self, normalised: Array) -> Array:
        """Actions in raw units."""
        shift, scale, offset = self._maps["action"]
        raw: Array = (normalised - offset) / scale + shift
        return raw

    def _sources(self, name: str, given: Any, row: int) -> Sources:
        shared = isinstance(given, np.ndarray) and given.ndim == 2
        sources = np.asarray(given if shared else given[row])
        self._check(name, sources, (self.num_inference_steps, len(self.blocks)))
        return sources

    @staticmethod
    def _check(name: str, value: NDArray[Any], shape: tuple[int, ...]) -> None:
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
