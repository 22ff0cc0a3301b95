"""Fitting a policy's own weights to a setting: it learns to end where its many steps end.

A distillation, of the policy into itself: gradients go through the chunk as the setting runs it, so
a single computed step learns what many would do from its start. What is fitted is everything but
what encodes observations and time. The result is another policy, for this setting alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig
from tsad.files import write_atomically
from tsad.sim.recording import Recorded
from tsad.training.card import CARD_FILE, fitted_card
from tsad.training.running import hardware, move_average
from tsad.training.targets import FitSettings, Floats, Numbers, SettingTraining, sparse_chunks

KEPT = ("task", "observation", "action", "data", "licence")  # of the policy's provenance


@dataclass(frozen=True)
class WeightSettings(FitSettings):
    """What is fitted and how. ``draws`` of noise for each start, ``ema`` of the weights."""

    least_draws: ClassVar[int] = 1

    terms: str = "none"
    chunks: int = 4096
    draws: int = 2
    batch: int = 64
    lr: float = 1e-4
    warmup: int = 50
    steps: int | None = 1000
    ema: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps == 0:
            raise ValueError("steps: expected at least 1 to fit weights, got 0")
        if self.terms != "none":
            raise ValueError(
                f"terms: got {self.terms!r}, expected none: weights are fitted in its place; give "
                "one of the two"
            )


class WeightTrainer(SettingTraining):
    """Fits the weights; arguments as of `SettingTraining`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        weights = self.twin.weights()
        self._names = list(weights)
        self._first = list(weights.values())
        self.parameters = tuple(weight.clone().requires_grad_() for weight in weights.values())
        self._average = [weight.detach().clone() for weight in weights.values()]
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            list(self.parameters), lr=s.lr, weight_decay=s.weight_decay
        )
        self.best = self._numbers()

    def _measure(
        self, episode: Recorded, part: slice, executed: Floats | None
    ) -> dict[str, NDArray[Any]]:
        """With further noise from the same starts, after the episode's own."""
        first = super()._measure(episode, part, executed)
        drawn = np.zeros_like(episode.noise(self.policy, part))[-len(first["obs"]) or None :]
        random = np.random.default_rng((self.settings.seed, episode.number, part.start or 0))
        found = [first]
        for _ in range(1, self.settings.draws if len(first["obs"]) else 1):
            noise = drawn.copy()
            given = noise[:, : noise.shape[1] if self.sampler.adds_noise else 1]
            given[:] = random.standard_normal(given.shape, np.float32)
            found.append({**first, **self._redrawn(first, noise)})
        return {name: np.concatenate([part[name] for part in found]) for name in first}

    def _redrawn(self, first: Mapping[str, NDArray[Any]], noise: Floats) -> dict[str, NDArray[Any]]:
        if self.warm:
            return self._from_starts(first["obs"], first["start"], noise)
        return {"noise": self._kept(noise), "right": self._dense(first["obs"], noise)}

    def _numbers(self) -> Numbers:
        return tuple(weight.clone() for weight in self._average)

    def _run(self, obs: NDArray[Any], noise: Tensor, numbers: Numbers) -> Tensor:
        self.twin.use(dict(zip(self._names, numbers, strict=True)))
        if not self.sampler.adds_noise:
            noise = noise.expand(-1, len(self.sources), -1, -1)
        return sparse_chunks(self.twin, self.base, obs, noise, self.sources)

    def _moved(self) -> None:
        # before the first hundreds of steps a long average would still be what it began with
        keep = min(self.settings.ema, self.step / (self.step + 10))
        move_average(self._average, [weight.detach() for weight in self.parameters], keep)

    def state(self) -> dict[str, Any]:
        """And the averaged weights."""
        return super().state() | {"average": self._average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same facts."""
        super().restore(state)
        self._average = list(state["average"])

    def write(self, folder: Path | None = None) -> PolicyConfig:
        """Write the tsad folder (default: ``out``): the best averaged weights, configuration, card.

        The configuration's ``provenance["fitted"]`` says what was fitted and measured.
        """
        folder = folder or self.out
        # the numbers that the policy itself is kept in; what is measured is what is kept
        half = all(torch.equal(w, w.half().float()) for w in self._first)
        if half:
            self.best = tuple(weight.half().float() for weight in self.best)
        config: PolicyConfig = self.twin.config
        old = config.provenance
        measured = self._measured() | {
            "torch": torch.__version__,
            "hardware": hardware(torch.device("cpu")),
        }
        scheduler = self.policy.config["scheduler"]
        setting = {
            "sampler": scheduler["type"],
            "num_inference_steps": scheduler["num_inference_steps"],
            "timestep_spacing": scheduler["timestep_spacing"],
            "warm_start": self.policy.warm_start,
            "precision": self.facts["precision"],
        }
        provenance = {name: old[name] for name in KEPT if name in old} | {
            "fitted": {"from": self.facts["model_sha256"], "setting": setting, **measured}
        }
        config = replace(config, pruner=None, provenance=provenance)
        weights = dict(zip(self._names, self.best, strict=True))
        dtype = "float16" if half else "float32"
        tensors = {name: weight.numpy() for name, weight in weights.items()}
        config = write_folder(folder, config, tensors, dtype=dtype)
        write_atomically(folder / CARD_FILE, fitted_card(folder.resolve().name, config).encode())
        return config
