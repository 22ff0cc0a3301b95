"""Fitting what a setting loses: coefficients of its sampler, and the bias of its warm start.

Coefficients of the sampler's rows are fitted by gradient through the chunk along its plan, so that
it ends where many dense steps end from the same sample: an initial one, or a warm start's. What is
then left of a warm start's bias is taken back by least squares: for each action of the horizon a
gain of its move from the start, and a shift, such that the mean over draws is that of whole chunks
of many steps from noise, for the same observation.

A start is what the setting's own chunk before has. Where it is recorded which actions were executed
in between, it is moved to where these led.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsad.arrays import read_npz
from tsad.checkpoint import STATE_FILE, Tensors
from tsad.config import PolicyConfig
from tsad.files import Lock, make_folder, write_atomically
from tsad.fitted import FITTED_AT, Fitted, coefficients_of, rows_of
from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE
from tsad.samplers import COLUMNS, NOISE, Sampler, advance, make_sampler, tail
from tsad.setting import steady_sha256
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

FITTED_FILE, TARGETS_FILE = "fitted.json", "targets.npz"
WINDOW = 8  # consecutive chunks
_CLIP = COLUMNS.index("r")
_LEAST_SCALE = 0.1  # a coefficient that is smaller moves as if it were this
TERMS = ("affine", "gain", "none")

Floats = NDArray[np.float32]
Windows = Sequence[tuple[Recorded, slice, Floats | None]]  # and the actions executed, raw units


@dataclass(frozen=True)
class FitSettings(SavedSettings):
    """What is fitted and how. ``steps`` are of the gradient; 0: the sampler stays as it is."""

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
            "draws": (self.draws >= 2, "at least 2"),
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


class FitTrainer(Training[FitReport]):
    """A fit in a folder: what many steps make of recorded chunks, coefficients, clock.

    Args:
        parts: configuration and tensors of the policy, as `tsad.load.read_policy` gives them.
        policy: of one lane, set as it is to run; without anything fitted, lead or smoothing.
        many: what counts as right: dense, many steps from noise; its lanes are used.
        windows: recorded chunks to fit on, with what was executed, where that is known.
        held_out: others; they may be none.
        facts: what it is made of, to compare when it is gone on with.
    """

    def __init__(
        self,
        parts: tuple[PolicyConfig, Tensors],
        policy: Any,
        many: Any,
        windows: Windows,
        held_out: Windows,
        out: Path,
        settings: FitSettings,
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
        self._first = torch.from_numpy(coefficients_of(self.sampler).astype(np.float32))
        self._scale = self._first.abs().clamp(min=_LEAST_SCALE)
        net = parts[0].network
        self._executed = slice(net.n_obs_steps - 1, net.n_obs_steps - 1 + net.n_action_steps)
        self._ahead = slice(net.n_obs_steps - 1, None)
        self.moved = nn.Parameter(torch.zeros_like(self._first))
        self.shift = nn.Parameter(torch.zeros(net.horizon, net.action_dim))
        self.optimizer = torch.optim.Adam([self.moved, self.shift], lr=settings.lr)
        self.ready, self.best_error, self.best_step = False, math.inf, 0
        self.best = self._numbers()

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
        free = {"steps": None, "minutes": None}
        before, now = (
            {**facts, "settings": {**dict(settings), **free}}
            for facts, settings in (
                (state.get("facts", {}), state["settings"]),
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
        self.probe = rest if len(rest["obs"]) else {k: v[:64] for k, v in self.data.items()}
        self.ready = True
        self.begun = self._errors(self.probe, self._numbers())

    def _measure(
        self, episode: Recorded, part: slice, executed: Floats | None
    ) -> dict[str, NDArray[Any]]:
        """Of the chunks of a window, of a warm start those with one before.

        ``obs``; ``noise`` (C, N or 1, horizon, action_dim), what the setting begins with; where
        many steps end from there, ``right``; ``start`` and ``mean``, of a warm start.
        """
        obs = np.ascontiguousarray(episode.obs[part], np.float32)
        drawn = episode.noise(self.policy, part)
        if not self.warm:
            return {"obs": obs, "noise": self._kept(drawn), "right": self._dense(obs, drawn)}
        start = self._starts(obs, drawn, executed)
        obs, drawn = obs[1:], drawn[1:]
        if not len(obs):
            empty = drawn[:, 0]
            return {"obs": obs, "noise": self._kept(drawn)} | dict.fromkeys(
                ("right", "start", "mean"), empty
            )
        z = drawn[:, 0] if not self.sampler.adds_noise else drawn[:, -len(self.sampler.timesteps)]
        noise = np.array(drawn[:, -len(self.sampler.timesteps) :])
        noise[:, 0] = self._mixed(self.sampler, start, z)
        right = self._dense_tail(obs, start, z, noise)
        return {
            "obs": obs,
            "noise": self._kept(noise),
            "right": right,
            "start": start,
            "mean": self._mean(obs, episode.number),
        }

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

    def _numbers(self) -> tuple[Tensor, Tensor]:
        return self.moved.detach().clone(), self.shift.detach().clone()

    def _table(self, moved: Tensor) -> Tensor:
        """(K, 9)"""
        table = self.base.clone()
        table[:, FITTED_AT] = self._first + self._scale * moved
        return table

    def _run(self, obs: NDArray[Any], noise: Tensor, numbers: tuple[Tensor, Tensor]) -> Tensor:
        moved, shift = numbers
        if not self.sampler.adds_noise:
            noise = noise.expand(-1, len(self.sources), -1, -1)
        chunks = sparse_chunks(self.twin, self._table(moved), obs, noise, self.sources)
        clip = float(self.sampler.table[-1, _CLIP])
        return (chunks + shift).clamp(-clip, clip)

    def train_step(self) -> float:
        """One optimiser step; the loss before it."""
        s = self.settings
        rate = learning_rate(s, self.step, self.fraction)
        self.optimizer.param_groups[0]["lr"] = rate
        random = np.random.default_rng((s.seed, self.step))
        rows = random.choice(len(self.data["obs"]), min(s.batch, len(self.data["obs"])), False)
        noise = torch.from_numpy(self.data["noise"][rows])
        right = torch.from_numpy(self.data["right"][rows])
        found = self._run(self.data["obs"][rows], noise, (self.moved, self.shift))
        loss = ((found - right)[:, self._ahead] ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return self.note_loss(loss)

    @torch.no_grad()
    def _chunks(
        self, data: Mapping[str, NDArray[Any]], numbers: tuple[Tensor, Tensor]
    ) -> NDArray[np.float32]:
        found = [
            self._run(
                data["obs"][at : at + 64], torch.from_numpy(data["noise"][at : at + 64]), numbers
            )
            for at in range(0, len(data["obs"]), 64)
        ]
        return torch.cat(found).numpy()

    def _errors(
        self, data: Mapping[str, NDArray[Any]], numbers: tuple[Tensor, Tensor]
    ) -> tuple[float, float]:
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
        return (total / self.settings.draws).astype(np.float32)

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

    # ---- state and result

    def state(self) -> dict[str, Any]:
        """Everything that a fit goes on from; what many steps make has a file of its own."""
        return self.progress_state() | {
            "settings": asdict(self.settings),
            "facts": self.facts,
            "moved": self.moved.detach(),
            "shift": self.shift.detach(),
            "optimizer": self.optimizer.state_dict(),
            "best": list(self.best),
            "best_error": self.best_error,
            "best_step": self.best_step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same facts."""
        with torch.no_grad():
            self.moved.copy_(state["moved"])
            self.shift.copy_(state["shift"])
        self.optimizer.load_state_dict(state["optimizer"])
        moved, shift = state["best"]
        self.best, self.best_error = (moved, shift), float(state["best_error"])
        self.best_step = int(state["best_step"])
        self.restore_progress(state, FitReport)

    @property
    def fraction(self) -> float:
        """Share of the budget that is used."""
        return 1.0 if self.settings.steps == 0 else super().fraction

    def write(self, folder: Path | None = None) -> Fitted:
        """Write the file (default: into ``out``)."""
        moved, shift = self.best
        coefficients = self._table(moved)[:, FITTED_AT].numpy()
        gain, extra = np.zeros(shift.shape), shift.numpy()
        after = self._errors(self.probe, self.best)
        measured: dict[str, Any] = {
            "chunks": [len(self.data["obs"]), len(self.probe["obs"])],
            "mean_rms": [self.begun[0], after[0]],
            "rms": [self.begun[1], after[1]],
            "step": self.best_step,
            "seconds": round(self.seconds, 1),
            "against": self.many.model.n_steps,
            "settings": asdict(self.settings),
        }
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
