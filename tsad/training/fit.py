"""Fitting what a setting loses: coefficients of its sampler, and the bias of its warm start.

Coefficients of the sampler's rows are fitted by gradient through the chunk along its plan, so that
it ends where many dense steps end from the same sample: an initial one, or a warm start's. What is
then left of a warm start's bias is taken back by least squares: for each action of the horizon a
gain of its move from the start, and a shift, such that the mean over draws is that of whole chunks
of many steps from noise, for the same observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsad.files import write_atomically
from tsad.fitted import FITTED_AT, Fitted, coefficients_of, rows_of
from tsad.samplers import COLUMNS
from tsad.setting import steady_sha256
from tsad.sim.recording import Recorded
from tsad.training.targets import FitSettings as FitSettings
from tsad.training.targets import Floats, Numbers, SettingTraining, sparse_chunks

FITTED_FILE = "fitted.json"
_CLIP = COLUMNS.index("r")
_LEAST_SCALE = 0.1  # a coefficient that is smaller moves as if it were this


class Bias:
    """What least squares make of a warm start's bias: gain and shift, (horizon, action_dim)."""

    def __init__(self, start: Floats, mean: Floats, right: Floats, terms: str) -> None:
        """``start``, ``mean`` of the warm chunks' draws, ``right`` (C, horizon, action_dim)."""
        move, wanted = (mean - start).astype(np.float64), (right - mean).astype(np.float64)
        self.gain = np.zeros(move.shape[1:])
        self.shift = np.zeros(move.shape[1:])
        if terms == "none":
            return
        centre = (1, 1) if terms == "affine" else (0, 0)
        x = move - centre[0] * move.mean(0)
        y = wanted - centre[1] * wanted.mean(0)
        # one gain for all elements of an action: they are of one motion
        square = (x * x).sum((0, 2))
        gain = np.where(square > 0, (x * y).sum((0, 2)) / np.where(square > 0, square, 1), 0.0)
        self.gain[:] = gain[:, None]
        if terms == "affine":
            self.shift = wanted.mean(0) - self.gain * move.mean(0)

    def __call__(self, start: Floats, chunk: Floats, clip: float) -> Floats:
        """Chunks without their bias."""
        found: Floats = np.clip(chunk + self.gain * (chunk - start) + self.shift, -clip, clip)
        return found


class FitTrainer(SettingTraining):
    """Fits the coefficients, then the bias; arguments as of `SettingTraining`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._first = torch.from_numpy(coefficients_of(self.sampler).astype(np.float32))
        self._scale = self._first.abs().clamp(min=_LEAST_SCALE)
        net = self.twin.config.network
        self.moved = nn.Parameter(torch.zeros_like(self._first))
        self.shift = nn.Parameter(torch.zeros(net.horizon, net.action_dim))
        self.parameters = (self.moved, self.shift)
        self.optimizer = torch.optim.Adam(list(self.parameters), lr=self.settings.lr)
        self.best = self._numbers()

    def _measure(
        self, episode: Recorded, part: slice, executed: Floats | None
    ) -> dict[str, NDArray[Any]]:
        """And ``mean``, of whole chunks for the observation, of a warm start."""
        found = super()._measure(episode, part, executed)
        if not self.warm:
            return found
        obs = np.asarray(found["obs"], np.float32)
        return {**found, "mean": self._mean(obs, episode.number) if len(obs) else found["start"]}

    def _mean(self, obs: Floats, number: int) -> Floats:
        """The mean of whole chunks of many steps from noise, over draws."""
        draws = self.settings.draws
        random = np.random.default_rng((self.settings.seed, number))
        steps = self.many.model.n_steps
        shape = (len(obs) * draws, steps, *self.twin.executed(1).shape[1:])
        noise = np.zeros(shape, np.float32)
        noise[:, : steps if self.sampler.adds_noise else 1] = random.standard_normal(
            (shape[0], steps if self.sampler.adds_noise else 1, *shape[2:]), np.float32
        )
        ends = self._dense(np.repeat(obs, draws, 0), noise)
        mean: Floats = ends.reshape(len(obs), draws, *ends.shape[1:]).mean(1)
        return mean

    # ---- the coefficients

    def _numbers(self) -> Numbers:
        return self.moved.detach().clone(), self.shift.detach().clone()

    def _table(self, moved: Tensor) -> Tensor:
        """(K, 9)"""
        table = self.base.clone()
        table[:, FITTED_AT] = self._first + self._scale * moved
        return table

    def _run(self, obs: NDArray[Any], noise: Tensor, numbers: Numbers) -> Tensor:
        moved, shift = numbers
        if not self.sampler.adds_noise:
            noise = noise.expand(-1, len(self.sources), -1, -1)
        chunks = sparse_chunks(self.twin, self._table(moved), obs, noise, self.sources)
        clip = float(self.sampler.table[-1, _CLIP])
        return (chunks + shift).clamp(-clip, clip)

    # ---- the bias of a warm start

    def _draw_means(self, data: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The mean of the setting's own chunks, over draws from the same starts."""
        random = np.random.default_rng((self.settings.seed, len(data["obs"])))
        total = np.zeros_like(data["start"], np.float64)
        for _ in range(self.settings.draws):
            z = random.standard_normal(data["start"].shape, np.float32)
            noise = random.standard_normal(data["noise"].shape, np.float32)
            noise[:, 0] = self._mixed(self.sampler, data["start"], z)
            total += self._chunks({"obs": data["obs"], "noise": noise}, self.best)
        mean: Floats = (total / self.settings.draws).astype(np.float32)
        return mean

    def _bias(self) -> tuple[Bias, dict[str, float]]:
        """Fitted, and what the means are off by on held-out chunks, before and after."""
        bias = Bias(
            self.data["start"], self._draw_means(self.data), self.data["mean"], self.settings.terms
        )
        start, right, mean = self.probe["start"], self.probe["mean"], self._draw_means(self.probe)
        clip = float(self.sampler.table[-1, _CLIP])
        facts = {}
        for name, chunks in (("before", mean), ("after", bias(start, mean, clip))):
            part = (slice(None), self._executed)
            move, wanted = (chunks - start)[part], (right - start)[part]
            facts[f"mean_off_{name}"] = float(np.sqrt(((move - wanted) ** 2).mean()))
            facts[f"move_{name}"] = float((move * wanted).sum() / (wanted**2).sum())
        return bias, facts

    # ---- the result

    @property
    def fraction(self) -> float:
        """Share of the budget that is used."""
        return 1.0 if self.settings.steps == 0 else super().fraction

    def write(self, folder: Path | None = None) -> Fitted:
        """Write the file (default: into ``out``)."""
        moved, shift = self.best
        coefficients = self._table(moved)[:, FITTED_AT].numpy()
        gain, extra = np.zeros(shift.shape), shift.numpy()
        measured = self._measured()
        if self.warm:
            bias, facts = self._bias()
            # of x + shift: gain (x + shift - start) + shift + the bias' own
            gain, extra = bias.gain, (1 + bias.gain) * extra + bias.shift
            measured |= facts
        scheduler = self.policy.config["scheduler"]
        sha256 = steady_sha256(self.policy)
        assert sha256 is not None
        fitted = Fitted(
            model_sha256=self.facts["model_sha256"],
            sampler=scheduler["type"],
            num_inference_steps=scheduler["num_inference_steps"],
            timestep_spacing=scheduler["timestep_spacing"],
            warm_start=self.policy.warm_start,
            plan_sha256=sha256,
            n_action_steps=self.policy.n_action_steps,
            coefficients=rows_of(coefficients),
            gain=rows_of(gain),
            shift=rows_of(extra),
            measured=measured,
        )
        write_atomically((folder or self.out) / FITTED_FILE, fitted.to_bytes())
        return fitted
