"""What a setting is fitted to: where many steps end, from what the setting begins with.

A start is what the setting's own chunk before has. Where it is recorded which actions were executed
in between, it is moved to where these led. `tsad.training.fit` fits coefficients of the sampler to
this, `tsad.training.weights` the policy's own weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsad.arrays import read_npz
from tsad.checkpoint import STATE_FILE, Tensors
from tsad.config import PolicyConfig
from tsad.files import Lock, make_folder, write_atomically
from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE
from tsad.samplers import COLUMNS, NOISE, Sampler, advance, make_sampler, tail
from tsad.sim.recording import Recorded
from tsad.sim.results import differences
from tsad.training.running import (
    InterruptedTrainingError,
    SavedSettings,
    Training,
    budget_checks,
    caught_signals,
    check_settings,
    learning_rate,
    load_state,
)
from tsad.training.sensitivity import Twin
from tsad.training.traced import Traced

TARGETS_FILE = "targets.npz"
WINDOW = 8  # consecutive chunks
TERMS = ("affine", "gain", "none")
_CLIP = COLUMNS.index("r")

Floats = NDArray[np.float32]
Windows = Sequence[tuple[Recorded, slice, Floats | None]]  # and the actions executed, raw units
Numbers = tuple[Tensor, ...]  # what is fitted


@dataclass(frozen=True)
class FitSettings(SavedSettings):
    """What is fitted and how. ``steps`` are of the gradient; 0: the sampler stays as it is."""

    least_draws: ClassVar[int] = 2  # to average

    terms: str = "affine"  # of a warm start's bias
    chunks: int = 256
    draws: int = 8
    batch: int = 32
    lr: float = 1e-2
    warmup: int = 10
    decay: float = 0.5
    val_episodes: int | None = None  # a fifth
    seed: int = 0
    minutes: float | None = None
    steps: int | None = 300
    ema: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        checks = budget_checks(self) | {
            "steps": (self.steps is None or self.steps >= 0, "at least 0"),
            "terms": (self.terms in TERMS, f"one of {', '.join(TERMS)}"),
            "chunks": (self.chunks >= 2, "at least 2"),
            "draws": (self.draws >= self.least_draws, f"at least {self.least_draws}"),
        }
        check_settings(self, checks)


@dataclass
class FitReport:
    """A line of the curve: errors of executed actions on held-out chunks, normalised.

    ``mean_rms`` is the mean over chunks of their root mean squares, ``rms`` the root of all.
    """

    step: int
    seconds: float
    lr: float
    train_loss: float
    mean_rms: float
    rms: float

    def text(self) -> str:
        """For people."""
        return f"error {self.mean_rms:.4f}"


def sparse_chunks(
    twin: Twin, table: Tensor, obs: NDArray[Any], noise: Tensor, sources: NDArray[np.uint8]
) -> Tensor:
    """Final samples (C, horizon, action_dim) of chunks along a plan (K, B), without rollouts.

    ``table`` (K, 9) in place of the twin's sampler's, ``obs`` (C, n_obs_steps, obs_dim) raw,
    ``noise`` (C, K, horizon, action_dim), the initial samples first.
    """
    own: dict[int, Tensor] = {}
    of_type: dict[str, Tensor] = {}
    x, nothing = noise[:, 0], torch.zeros_like(noise[:, 0])
    before = (nothing, nothing)
    for k in range(len(sources)):

        def value(b: int, compute: Any, k: int = k) -> Any:
            source, kind = sources[k, b], twin.types[b]
            if source == COMPUTE:
                own[b] = of_type[kind] = compute().tensor
                return Traced(own[b])
            if source == REUSE_STEP:
                return Traced(own[b])
            if source == REUSE_TYPE:
                return Traced(of_type[kind])
            return Traced(noise.new_zeros(1))  # skip

        _, _, _, e = twin.step(k, x, before, twin.condition(obs, k), value)
        x, before = advance(table[k], x, e, before)
        if k + 1 < len(sources):
            x = x + table[k, NOISE] * noise[:, k + 1]
    return x


class SettingTraining(Training[FitReport]):
    """A fit in a folder: what many steps make of recorded chunks, what is fitted, clock.

    A subclass sets ``parameters`` and ``optimizer``, and says how chunks run by them.

    Args:
        parts: configuration and tensors of the policy, as `tsad.load.read_policy` gives them.
        policy: of one lane, set as it is to run; without anything fitted, lead or smoothing.
        many: what counts as right: dense, many steps from noise; its lanes are used.
        windows: recorded chunks to fit on, with what was executed, where that is known.
        held_out: others; they may be none.
        facts: what it is made of, to compare when it is gone on with.
    """

    parameters: Numbers
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        parts: tuple[PolicyConfig, Tensors],
        policy: Any,
        many: Any,
        windows: Windows,
        held_out: Windows,
        out: Path,
        settings: Any,
        *,
        facts: Mapping[str, Any],
    ) -> None:
        super().__init__(out, settings)
        self.settings, self.facts, self.policy, self.many = settings, dict(facts), policy, many
        self.windows, self.held_out = list(windows), list(held_out)
        sampler = make_sampler(policy.config["scheduler"])
        self.warm = policy.warm_start is not None
        self.sampler = tail(sampler, policy.warm_start) if self.warm else sampler
        self.twin = Twin(*parts, self.sampler)
        if policy._plans is None:
            raise ValueError("plan: expected one that is fixed, got a pruner, which makes its own")
        self.sources = policy._plans[0].sources
        if (self.sources == REUSE_ROLLOUT).any():
            raise ValueError("plan: expected one that reads no rollouts, got one that does")
        self.base = torch.from_numpy(np.array(self.sampler.table, np.float32))
        net = parts[0].network
        self._executed = slice(net.n_obs_steps - 1, net.n_obs_steps - 1 + net.n_action_steps)
        self._ahead = slice(net.n_obs_steps - 1, None)
        self.ready, self.best_error, self.best_step = False, math.inf, 0
        self.best: Numbers = ()

    @property
    def state_there(self) -> bool:
        """Whether it was begun before."""
        return (self.out / STATE_FILE).exists()

    def check(self) -> None:
        """``ValueError`` if the folder holds something else, or another fit."""
        if not self.state_there:
            if self.out.exists() and any(self.out.iterdir()):
                raise ValueError(f"{self.out} is not empty and holds no fit; name another folder")
            return
        state = load_state(self.out)
        if "facts" not in state:
            raise ValueError(f"{self.out} holds another training, no fit; name another folder")
        if "parameters" not in state:
            raise ValueError(
                f"{self.out} holds a fit of an earlier version of tsad; name another folder"
            )
        free = {"steps": None, "minutes": None}
        before, now = (
            {**facts, "settings": {**dict(settings), **free}}
            for facts, settings in (
                (state["facts"], state["settings"]),
                (self.facts, asdict(self.settings)),
            )
        )
        changed = differences(before, now)
        if changed:
            raise ValueError(
                f"{self.out} holds another fit; {'; '.join(changed)}; name another folder, or "
                "give the same"
            )

    def resume(self) -> None:
        """Go on from what is there, after `prepare`."""
        self.restore(load_state(self.out))

    @abstractmethod
    def _run(self, obs: NDArray[Any], noise: Tensor, numbers: Numbers) -> Tensor:
        """Chunks (C, horizon, action_dim) by these numbers; ``noise`` (C, K or 1, ...)."""

    @abstractmethod
    def _numbers(self) -> Numbers:
        """A copy of those that count now."""

    def _moved(self) -> None:
        """The parameters have taken a step."""

    # ---- what many steps make of it

    @property
    def measured_chunks(self) -> int:
        """How many `prepare` runs, those that are there already included."""
        return sum(len(e.obs[part]) for e, part, _ in [*self.windows, *self.held_out])

    def prepare(self, progress: Callable[[int], None] = lambda chunks: None) -> None:
        """Run many steps, or read what was run before. ``progress`` gets the chunks just done.

        After SIGINT or SIGTERM what is done is kept and ``InterruptedTrainingError`` raised.
        """
        path, rows = self.out / TARGETS_FILE, [*self.windows, *self.held_out]
        with Lock(make_folder(self.out) / STATE_FILE), caught_signals() as received:
            if not (self.out / STATE_FILE).exists():
                self.save()
            found: dict[str, list[NDArray[Any]]] = {}
            counts: list[int] = []
            if path.exists():
                arrays = dict(read_npz(path))
                counts = arrays.pop("counts").tolist()
                found = {k: np.split(v, np.cumsum(counts)[:-1]) for k, v in arrays.items()}
                progress(sum(len(e.obs[part]) for e, part, _ in rows[: len(counts)]))
            for number in range(len(counts), len(rows)):
                part = self._measure(*rows[number])
                for name, value in part.items():
                    found.setdefault(name, []).append(value)
                counts.append(len(part["obs"]))
                if received or number % 4 == 3 or number + 1 == len(rows):
                    stream = BytesIO()
                    kept: dict[str, Any] = {k: np.concatenate(v) for k, v in found.items()}
                    np.savez(stream, counts=counts, **kept)
                    write_atomically(path, stream.getvalue())
                progress(len(rows[number][0].obs[rows[number][1]]))
                if received:
                    raise InterruptedTrainingError
        data = {name: np.concatenate(parts) for name, parts in found.items()}
        n = sum(counts[: len(self.windows)])
        if not n:
            raise ValueError(
                "data: expected successive chunks, as a warm start goes on from the one before, "
                "got single ones; record episodes"
            )
        self.data = {name: value[:n] for name, value in data.items()}
        rest = {name: value[n:] for name, value in data.items()}
        self.probe_is_held_out = len(rest["obs"]) > 0
        self.probe = rest if self.probe_is_held_out else {k: v[:64] for k, v in self.data.items()}
        self.ready = True
        self.begun = self._errors(self.probe, self._numbers())

    def _measure(
        self, episode: Recorded, part: slice, executed: Floats | None
    ) -> dict[str, NDArray[Any]]:
        """Of the chunks of a window, of a warm start those with one before.

        ``obs``; ``noise`` (C, K or 1, horizon, action_dim), what the setting begins with; where
        many steps end from there, ``right``; ``start``, of a warm start.
        """
        obs = np.ascontiguousarray(episode.obs[part], np.float32)
        drawn = episode.noise(self.policy, part)
        if not self.warm:
            return {"obs": obs, "noise": self._kept(drawn), "right": self._dense(obs, drawn)}
        start = self._starts(obs, drawn, executed)
        obs, drawn = obs[1:], drawn[1:]
        return {"obs": obs, "start": start, **self._from_starts(obs, start, drawn)}

    def _from_starts(self, obs: Floats, start: Floats, drawn: Floats) -> dict[str, NDArray[Any]]:
        """Of warm starts with the noise of whole chunks (C, K, horizon, action_dim)."""
        if not len(obs):
            return {"noise": self._kept(drawn), "right": start}
        steps = len(self.sampler.timesteps)
        z = drawn[:, -steps] if self.sampler.adds_noise else drawn[:, 0]
        noise = np.array(drawn[:, -steps:])
        noise[:, 0] = self._mixed(self.sampler, start, z)
        return {"noise": self._kept(noise), "right": self._dense_tail(obs, start, z, noise)}

    def _kept(self, noise: Floats) -> Floats:
        return noise if self.sampler.adds_noise else noise[:, :1]

    @staticmethod
    def _mixed(sampler: Sampler, start: Floats, z: Floats) -> Floats:
        signal, level = sampler.mixture(0)
        return np.asarray(signal * start + level * z, np.float32)

    def _normalised(self, actions: NDArray[Any]) -> Floats:
        affine = self.twin.config.normalizer.action
        return affine.normalise(np.asarray(actions), np.float64).astype(np.float32)

    def _starts(self, obs: Floats, drawn: Floats, executed: Floats | None) -> Floats:
        """(C - 1, horizon, action_dim): what chunks 1 to C - 1 start from."""
        policy, n = self.policy, self.policy.n_action_steps
        policy.reset()
        noisy, starts = make_sampler(policy.config["scheduler"]).adds_noise, []
        for i in range(len(obs)):
            z = drawn[i][:, None] if noisy else drawn[i][:1]
            chunk = policy(obs[i], noise=np.ascontiguousarray(z), return_horizon=True, executed=n)
            if i + 1 < len(obs):
                before = self._normalised(chunk)
                if executed is not None:  # to where what was executed led
                    last = self._executed.start + n - 1
                    led = self._normalised(executed[i][n - 1])
                    before = before + (led - before[last])
                starts.append(np.concatenate([before, np.repeat(before[-1:], n, 0)])[n:])
        return np.asarray(starts, np.float32).reshape(-1, *drawn.shape[2:])

    def _dense(self, obs: Floats, drawn: Floats) -> Floats:
        """Where many steps end from these initial samples."""
        many, ends = self.many, []
        for at in range(0, len(obs), many.lanes):
            rows = slice(at, at + many.lanes)
            lanes = list(range(len(obs[rows])))
            z = np.moveaxis(drawn[rows], 1, 0) if self.sampler.adds_noise else drawn[rows, 0]
            many.reset(lanes=lanes)
            options = {"noise": np.ascontiguousarray(z), "lanes": lanes, "return_horizon": True}
            ends.append(self._normalised(many(obs[rows], **options)))
        return np.concatenate(ends)

    def _dense_tail(self, obs: Floats, start: Floats, z: Floats, noise: Floats) -> Floats:
        """Where many steps end from warm starts of the nearest noise level that they have."""
        whole = make_sampler(self.many.config["scheduler"])
        level = self.sampler.alphas_cumprod[0]
        first = int(np.abs(whole.alphas_cumprod - level).argmin())
        last = tail(whole, len(whole.timesteps) - first)
        x = self._mixed(last, start, z)
        before = (np.zeros_like(x), np.zeros_like(x))
        for k, row in enumerate(last.table.astype(np.float32)):
            e = self.many.predict_noise(np.ascontiguousarray(x), first + k, obs)
            x, before = advance(row, x, e, before)
            if row[NOISE] and k + 1 < len(last.table):
                x = x + row[NOISE] * noise[:, k + 1]
        return x

    # ---- training

    def train_step(self) -> float:
        """One optimiser step; the loss before it."""
        s = self.settings
        rate = learning_rate(s, self.step, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        random = np.random.default_rng((s.seed, self.step))
        rows = random.choice(len(self.data["obs"]), min(s.batch, len(self.data["obs"])), False)
        noise = torch.from_numpy(self.data["noise"][rows])
        right = torch.from_numpy(self.data["right"][rows])
        found = self._run(self.data["obs"][rows], noise, self.parameters)
        loss = ((found - right)[:, self._ahead] ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._moved()
        return self.note_loss(loss)

    @torch.no_grad()
    def _chunks(self, data: Mapping[str, NDArray[Any]], numbers: Numbers) -> NDArray[np.float32]:
        found = [
            self._run(
                data["obs"][at : at + 64], torch.from_numpy(data["noise"][at : at + 64]), numbers
            )
            for at in range(0, len(data["obs"]), 64)
        ]
        return torch.cat(found).numpy()

    def _errors(self, data: Mapping[str, NDArray[Any]], numbers: Numbers) -> tuple[float, float]:
        """Mean over chunks of the root mean squares of executed actions, and root of all."""
        apart = (self._chunks(data, numbers) - data["right"])[:, self._executed]
        squares = (apart.astype(np.float64) ** 2).mean((1, 2))
        return float(np.sqrt(squares).mean()), float(np.sqrt(squares.mean()))

    def evaluate(self) -> FitReport:
        """The errors, now."""
        mean_rms, rms = self._errors(self.probe, self._numbers())
        rate = self.optimizer.param_groups[0]["lr"]
        return FitReport(self.step, self.seconds, rate, self.average_loss, mean_rms, rms)

    def _report(self, on_report: Callable[[FitReport], None] | None) -> None:
        super()._report(on_report)
        if self.curve[-1].mean_rms < min(self.best_error, self.begun[0]):
            self.best, self.best_error = self._numbers(), self.curve[-1].mean_rms
            self.best_step = self.step

    def state(self) -> dict[str, Any]:
        """Everything that a fit goes on from; what many steps make has a file of its own."""
        return self.progress_state() | {
            "settings": asdict(self.settings),
            "facts": self.facts,
            "parameters": [value.detach() for value in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "best": list(self.best),
            "best_error": self.best_error,
            "best_step": self.best_step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same facts."""
        with torch.no_grad():
            for mine, its in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(its)
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_error = tuple(state["best"]), float(state["best_error"])
        self.best_step = int(state["best_step"])
        self.restore_progress(state, FitReport)

    def _measured(self) -> dict[str, Any]:
        """What the result says of how it came about, by the best numbers."""
        after = self._errors(self.probe, self.best)
        return {
            "chunks": [len(self.data["obs"]), len(self.probe["obs"])],
            "held_out": self.probe_is_held_out,
            "mean_rms": [self.begun[0], after[0]],
            "rms": [self.begun[1], after[1]],
            "step": self.best_step,
            "seconds": round(self.seconds, 1),
            "against": self.many.model.n_steps,
            "settings": asdict(self.settings),
        }
