"""Fitting the diffusion transformer to demonstrations; the result is a tsad folder.

The loss is the squared error of the predicted noise, weighted by SNR(t)^-p. With p = 0 most of it
comes from the last, almost clean steps, where it can't fall; p = 1 is the squared error of the
clean actions. With sample prediction the same weighting is written in terms of the sample. Time
steps are stratified over a batch. Actions past the end of an episode, which nobody demonstrated,
don't count unless ``count_padding``. With ``warm_start`` a share of the windows begins with the
network's own chunk before (`tsad.training.warm`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsad.checkpoint import network_tensors, read_folder, write_folder
from tsad.config import NetworkConfig, NormalizerConfig, PolicyConfig, SchedulerConfig, block_costs
from tsad.files import write_atomically
from tsad.training.card import CARD_FILE, model_card
from tsad.training.data import (
    DataError,
    Demonstrations,
    fit_normalizer,
    load_demonstrations,
    windows,
)
from tsad.training.network import TransformerForDiffusion, from_config
from tsad.training.running import InterruptedTrainingError as InterruptedTrainingError
from tsad.training.running import (
    Training,
    budget_checks,
    check_settings,
    find_device,
    hardware,
    learning_rate,
    move_average,
)
from tsad.training.warm import STEPS, WarmStarts, before_windows, spread

NOISE_BINS = 5
PRECISIONS = ("auto", "float32", "bfloat16")
_PROBE_WINDOWS = 512
_MIN_WEIGHT, _MAX_WEIGHT = 0.02, 8.0
_EMA_POWER = 0.75


@dataclass(frozen=True)
class Settings:
    """What is trained and how. ``minutes`` or ``steps`` ends it; of both, the first."""

    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    n_layer: int = 8
    n_head: int = 4
    n_emb: int = 256
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 100
    dropout: float = 0.0
    batch: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.01
    warmup: int = 500
    decay: float = 0.5
    ema: float = 0.9995
    snr_power: float = 0.5
    count_padding: bool = False
    val_episodes: int = 6
    seed: int = 0
    minutes: float | None = None
    steps: int | None = None
    shares: tuple[float, ...] = ()
    coverage: tuple[tuple[float, float], ...] = ()
    precision: str = "auto"
    init: str = ""
    warm_start: int = 0  # none
    warm_share: float = 0.5  # of the windows

    def __post_init__(self) -> None:
        checks = budget_checks(self) | {
            "dropout": (0 <= self.dropout < 1, "a number in [0, 1)"),
            "shares": (all(s > 0 for s in self.shares), "numbers above 0"),
            "coverage": (all(0 <= a < b <= 1 for a, b in self.coverage), "pairs 0 <= a < b <= 1"),
            "precision": (self.precision in PRECISIONS, " or ".join(PRECISIONS)),
            "warm_start": (
                0 <= self.warm_start <= STEPS,
                f"an integer from 1 to {STEPS}, or 0: none",
            ),
            "warm_share": (0 < self.warm_share < 1, "a number in (0, 1)"),
            "prediction_type": (self.prediction_type in ("epsilon", "sample"), "epsilon or sample"),
        }
        check_settings(self, checks)
        if self.warm_share != Settings.warm_share and not self.warm_start:
            raise ValueError(
                f"warm_share: got {self.warm_share} without warm_start, expected both; say how "
                "many steps from the end, e.g. 8"
            )
        if self.warm_start and not self.init:
            raise ValueError(
                f"warm_start: got {self.warm_start} without init, expected both: the chunk before "
                "is the policy's own; train one, then fine-tune it"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """The settings that ``asdict`` gave."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: v for k, v in data.items() if k in known}
        values["shares"] = tuple(values.get("shares", ()))
        values["coverage"] = tuple((a, b) for a, b in values.get("coverage", ()))
        return cls(**values)

    def scheduler(self) -> SchedulerConfig:
        """The noise schedule, that of Diffusion Policy."""
        return SchedulerConfig(
            "ddpm",
            num_train_timesteps=self.num_train_timesteps,
            prediction_type=self.prediction_type,
            num_inference_steps=self.num_train_timesteps,
        )


def signal_shares(scheduler: SchedulerConfig) -> Tensor:
    """A of each time step, float32 ``(num_train_timesteps,)``: x = sqrt(A) x0 + sqrt(1 - A) z."""
    n = scheduler.num_train_timesteps

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = np.array([min(1 - level((i + 1) / n) / level(i / n), 0.999) for i in range(n)])
    return torch.from_numpy(np.cumprod(1 - betas.astype(np.float32), dtype=np.float32))


def step_weights(shares: Tensor, settings: Settings) -> Tensor:
    """Weight of the squared error of the output at each time step, mean 1 for the noise."""
    snr = shares / (1 - shares)
    weight = (snr**-settings.snr_power).clamp(_MIN_WEIGHT, _MAX_WEIGHT)
    weight = weight / weight.mean()
    # (noise error)^2 = SNR (sample error)^2: the same objective, whichever is predicted
    return weight if settings.prediction_type == "epsilon" else weight * snr


@dataclass
class _Data:
    """Windows of one or several files of demonstrations, on the training device."""

    obs: Tensor
    action: Tensor
    steps: Tensor
    counts: Tensor
    before: Tensor
    goes_on: Tensor
    edges: NDArrayF

    @classmethod
    def build(
        cls,
        parts: Sequence[Demonstrations],
        shares: Sequence[float],
        settings: Settings,
        normalizer: NormalizerConfig,
        device: torch.device,
    ) -> _Data:
        steps, inside = [], []
        before, goes_on = [], []
        weights, start = [], 0
        sizes = (settings.horizon, settings.n_obs_steps, settings.n_action_steps)
        bands = settings.coverage or [None] * len(parts)
        for part, share, band in zip(
            parts, shares or [0.0] * len(parts), bands[: len(parts)], strict=True
        ):
            index, within = windows(part.ends, *sizes)
            if band and part.coverage is not None:
                now = part.coverage[index[:, settings.n_obs_steps - 1]]
                chosen = (band[0] <= now) & (now <= band[1])
                index, within = index[chosen], within[chosen]
                if not len(index):
                    raise DataError(f"{part.name}: no window's coverage is in {band}; widen it")
            latest = index[:, settings.n_obs_steps - 1]
            earlier, there = before_windows(latest, part.ends, *sizes[1:])
            before.append(earlier + start)
            goes_on.append(there)
            steps.append(index + start)
            inside.append(within | settings.count_padding)
            weights.append(np.full(len(index), share / len(index) if share else 1.0))
            start += len(part.obs)
        obs = normalizer.obs.normalise(np.concatenate([p.obs for p in parts]))
        action = normalizer.action.normalise(np.concatenate([p.action for p in parts]))
        weight = np.concatenate(weights)
        return cls(
            torch.from_numpy(obs).to(device),
            torch.from_numpy(action).to(device),
            torch.from_numpy(np.concatenate(steps)).to(device),
            torch.from_numpy(np.concatenate(inside)).to(device, torch.float32),
            torch.from_numpy(np.concatenate(before)).to(device),
            torch.from_numpy(np.concatenate(goes_on)).to(device),
            np.cumsum(weight / weight.sum()),
        )

    def order(self, seed: int, epoch: int) -> Tensor:
        """Windows in the order of an epoch: each as often as its share says, once if equal."""
        rng = np.random.default_rng([seed, epoch])
        n = len(self.edges)
        points = (np.arange(n) + rng.uniform(0.01, 0.99)) / n
        drawn = np.minimum(np.searchsorted(self.edges, points), n - 1)
        return torch.from_numpy(rng.permutation(drawn))


NDArrayF = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Report:
    """A line of the curve. ``x0_error``: RMS of the clean actions by noise level, raw units.

    ``warm_error``: of those that one pass makes of the chunk before, if that is trained.
    """

    step: int
    seconds: float
    lr: float
    train_loss: float
    val_loss: float
    x0_error: list[float] = field(default_factory=list)
    warm_error: float | None = None

    def text(self) -> str:
        """For people."""
        errors = " ".join(f"{e:.3g}" for e in self.x0_error)
        warm = "" if self.warm_error is None else f", warm {self.warm_error:.3g}"
        return f"loss {self.train_loss:.4g}, held out {self.val_loss:.4g}, x0 error {errors}{warm}"


class Trainer(Training[Report]):
    """A training in a folder: network, average, optimiser, random state, clock; saved as one."""

    def __init__(
        self,
        data: Sequence[str | os.PathLike[str]],
        out: str | os.PathLike[str],
        settings: Settings,
        *,
        keypoints: str | os.PathLike[str] | None = None,
        device: str = "auto",
        compile: bool = True,
        licence: str = "",
    ) -> None:
        super().__init__(out, settings)
        self.settings = settings
        self.licence = licence
        self.sources = [
            load_demonstrations(path, keypoints=keypoints, coverage=bool(settings.coverage))
            for path in data
        ]
        self.paths = [str(path) for path in data]
        self._check_sources()
        self.device = find_device(device)
        fast = "bfloat16" if self.device.type == "cuda" else "float32"
        self.precision = fast if settings.precision == "auto" else settings.precision
        torch.manual_seed(settings.seed)
        self._make_network()
        self._make_data()
        self.optimizer = _optimizer(self.net, settings)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.signal = signal_shares(settings.scheduler()).to(self.device)
        self.weights = step_weights(self.signal.cpu(), settings).to(self.device)
        self.warm = (
            WarmStarts(settings.scheduler(), settings.warm_start, settings.n_action_steps)
            if settings.warm_start
            else None
        )
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.compiled = self.device.type == "cuda" and compile
        self._forward: Callable[..., Tensor] = (
            torch.compile(self.net) if self.compiled else self.net
        )

    def _check_sources(self) -> None:
        first = self.sources[0]
        for source, path in zip(self.sources, self.paths, strict=True):
            for key in ("obs", "action"):
                got, want = getattr(source, key).shape[1], getattr(first, key).shape[1]
                if got != want:
                    raise DataError(
                        f"{path}: {key}: expected {want} numbers per step, as in {self.paths[0]}, "
                        f"got {got}; train on files of one kind"
                    )
        for name in ("shares", "coverage"):
            given = getattr(self.settings, name)
            if given and len(given) != len(self.sources):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.sources)} files of "
                    f"demonstrations, got {len(given)}"
                )

    def _make_network(self) -> None:
        s, first = self.settings, self.sources[0]
        obs_dim, action_dim = first.obs.shape[1], first.action.shape[1]
        shape = {k: getattr(s, k) for k in ("horizon", "n_obs_steps", "n_action_steps")}
        shape |= {k: getattr(s, k) for k in ("n_layer", "n_head", "n_emb")}
        network = NetworkConfig.from_dict(
            {**shape, "obs_dim": obs_dim, "action_dim": action_dim}, file="settings"
        )
        normalizer = fit_normalizer(first)
        tensors = None
        if s.init:
            config, tensors, _ = read_folder(s.init)
            windows: dict[str, Any] = {"horizon": s.horizon, "n_action_steps": s.n_action_steps}
            if replace(config.network, **windows) != network or config.network.horizon > s.horizon:
                raise ValueError(
                    f"init: expected a network like {network.to_dict()}, got "
                    f"{config.network.to_dict()} in {s.init}; give the same sizes (the horizon may "
                    "grow)"
                )
            tensors = network_tensors(tensors)
            tensors = {**tensors, "pos_emb": longer(tensors["pos_emb"], s.horizon)}
            if config.scheduler.prediction_type != s.prediction_type:
                raise ValueError(
                    f"init: {s.init} predicts {config.scheduler.prediction_type!r}, expected "
                    f"{s.prediction_type!r}; give the same prediction"
                )
            normalizer = config.normalizer  # the weights were fitted to these units
        self.config = PolicyConfig(network, s.scheduler(), normalizer, block_costs(network))
        parts = network.to_dict()
        self.net = from_config(parts, p_drop_emb=s.dropout, p_drop_attn=s.dropout).to(self.device)
        if tensors is not None:
            self.net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
        self.ema = from_config(parts).to(self.device).eval()
        self.ema.load_state_dict(self.net.state_dict())

    def _make_data(self) -> None:
        first, held_out = self.sources[0].split(self.settings.val_episodes)
        parts = [first, *self.sources[1:]]
        normalizer = self.config.normalizer
        build = _Data.build
        self.data = build(parts, self.settings.shares, self.settings, normalizer, self.device)
        probe = held_out or first
        if self.settings.warm_start and not self.data.goes_on.any():
            raise ValueError(
                f"warm_start: no episode of {first.name} goes on for the "
                f"{self.settings.n_action_steps} steps of a chunk; expected longer ones"
            )
        self.probe_is_held_out = held_out is not None
        every = replace(self.settings, coverage=())
        self.probe = build([probe], (), every, normalizer, self.device)

    def _batch(self) -> Tensor:
        """Windows of the next batch: a pure function of the step, so that resuming is simple."""
        n, batch = len(self.data.edges), self.settings.batch
        at, end = self.step * batch, (self.step + 1) * batch
        parts: list[Tensor] = []
        while at < end:
            epoch = at // n
            if self._order[0] != epoch:
                self._order = (epoch, self.data.order(self.settings.seed, epoch))
            parts.append(self._order[1][at % n :][: end - at])
            at += len(parts[-1])
        return torch.cat(parts)

    def _run(
        self,
        net: Callable[..., Tensor],
        data: _Data,
        index: Tensor,
        t: Tensor,
        noise: Tensor,
        starts: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, noisy actions and clean actions of windows, (batch, horizon, action_dim) each.

        ``starts``: what rows have noise added to in place of the clean actions, and which rows.
        """
        steps = data.steps[index.to(self.device)]
        t, noise = t.to(self.device), noise.to(self.device)
        clean, obs = data.action[steps], data.obs[steps[:, : self.settings.n_obs_steps]]
        share, base = self.signal[t][:, None, None], clean
        if starts is not None:
            base = clean.clone()
            base[starts[1]] = starts[0]
        noisy = share.sqrt() * base + (1 - share).sqrt() * noise
        with self._reduced():
            output = net(noisy, t, obs)
        return output.float(), noisy, clean

    def _starts(self, data: _Data, index: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
        """Of the windows that ``rows`` picks; ``noise`` is what the chunks before begin with."""
        assert self.warm is not None
        obs = data.obs[data.before[index.to(self.device)[rows]]]
        with self._reduced():
            return self.warm(self.ema, obs, noise.to(self.device)[rows])

    @contextmanager
    def _reduced(self) -> Iterator[None]:
        """bfloat16 autocast where the precision says so; weights and loss stay float32."""
        with ExitStack() as stack:
            if self.precision == "bfloat16":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
                if self.device.type == "cpu":
                    # The backward pass of the CPU's fused attention takes a third of a step in
                    # bfloat16 (Zen 4, torch 2.13, batch 64: 350 ms a step, so 280).
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def _loss(self, output: Tensor, target: Tensor, counts: Tensor, t: Tensor) -> Tensor:
        squares = (output - target.to(self.device)).square().mean(2)
        errors = (squares * counts).sum(1) / self.settings.horizon
        return (self.weights[t.to(self.device)] * errors).mean()

    def train_step(self) -> float:
        """One optimiser step; the loss before it."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s, self.step, self.fraction)
        index, k = self._batch(), s.num_train_timesteps
        shift = torch.rand((), generator=self.random)
        t = ((torch.arange(s.batch) + shift) / s.batch * k).long() % k
        shape = (s.batch, s.horizon, self.config.network.action_dim)
        noise = torch.randn(shape, generator=self.random)
        starts = None
        if self.warm is not None:
            rows = spread(s.batch, s.warm_share).to(self.device)
            rows &= self.data.goes_on[index.to(self.device)]
            t = torch.where(rows.cpu(), self.warm.timestep, t)
            first = torch.randn(shape, generator=self.random)
            starts = self._starts(self.data, index, rows, first), rows
        self.net.train()
        output, noisy, clean = self._run(self._forward, self.data, index, t, noise, starts)
        target = self._target(noisy, clean, noise, t, starts is not None)
        loss = self._loss(output, target, self.data.counts[index.to(self.device)], t)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        value = self.note_loss(loss)
        keep = min(s.ema, 1 - (1 + self.step) ** -_EMA_POWER)
        move_average(self.ema.parameters(), self.net.parameters(), keep)
        return value

    def _target(
        self, noisy: Tensor, clean: Tensor, noise: Tensor, t: Tensor, started: bool
    ) -> Tensor:
        """What the network should say: the clean actions, or the noise that leads to them."""
        if self.settings.prediction_type != "epsilon":
            return clean
        if not started:
            return noise
        share = self.signal[t.to(self.device)][:, None, None]
        return (noisy - share.sqrt() * clean) / (1 - share).sqrt()

    @torch.no_grad()
    def evaluate(self) -> Report:
        """Errors of the averaged weights on held-out episodes (else training ones), fixed noise."""
        s, k = self.settings, self.settings.num_train_timesteps
        n = len(self.probe.steps)
        index = torch.arange(_PROBE_WINDOWS) * n // _PROBE_WINDOWS
        t = torch.arange(len(index)) * 7 % k
        fixed = torch.Generator().manual_seed(1)
        shape = (len(index), s.horizon, self.config.network.action_dim)
        noise = torch.randn(shape, generator=fixed)
        output, noisy, clean = self._run(self.ema, self.probe, index, t, noise)
        counts = self.probe.counts[index.to(self.device)]
        squares = self._squares(output, noisy, clean, t) * counts
        level = (t * NOISE_BINS // k).to(self.device)
        rms = [_root(squares[level == b], counts[level == b]) for b in range(NOISE_BINS)]
        target = self._target(noisy, clean, noise, t, False)
        loss = float(self._loss(output, target, counts, t))
        rate = learning_rate(s, self.step, self.fraction)
        report = Report(self.step, round(self.seconds, 1), rate, self.average_loss, loss, rms)
        if self.warm is not None:
            rows = self.probe.goes_on[index.to(self.device)]
            first, t = torch.randn(shape, generator=fixed), torch.full_like(t, self.warm.timestep)
            starts = self._starts(self.probe, index, rows, first), rows
            output, noisy, clean = self._run(self.ema, self.probe, index, t, noise, starts)
            squares = self._squares(output, noisy, clean, t) * counts
            report.warm_error = _root(squares[rows], counts[rows])
        return report

    def _squares(self, output: Tensor, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """(batch, horizon): of the errors of the clean actions that an output says, raw units."""
        guess = output
        if self.settings.prediction_type == "epsilon":
            share = self.signal[t.to(self.device)][:, None, None]
            guess = (noisy - (1 - share).sqrt() * output) / share.sqrt()
        scale = torch.tensor(self.config.normalizer.action.scale, device=self.device)
        # clipped as the sampler clips it: else the noisiest steps, divided by almost 0, say nothing
        return ((guess.clamp(-1, 1) - clean) / scale).square().mean(2)

    def state(self) -> dict[str, Any]:
        """Everything that a training goes on from."""
        return self.progress_state() | {
            "settings": asdict(self.settings),
            "data": [s.sha256 for s in self.sources],
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same settings (budget aside) and data."""
        hashes = [s.sha256 for s in self.sources]
        if list(state["data"]) != hashes:
            raise DataError(
                f"data: expected the files that the training in {self.out} began with (sha256 "
                f"{', '.join(h[:12] for h in state['data'])}), got "
                f"{', '.join(h[:12] for h in hashes)}; give the same files in the same order"
            )
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_random"])
        self.restore_progress(state, Report)

    def write(self, folder: Path | None = None) -> PolicyConfig:
        """Write the tsad folder (default: ``out``): averaged weights, configuration, card."""
        folder = folder or self.out
        provenance: dict[str, Any] = {
            "data": [
                {"file": s.name, "sha256": s.sha256, "episodes": len(s.ends), "steps": len(s.obs)}
                for s in self.sources
            ],
            "licence": self.licence,
            "training": {
                **asdict(self.settings),
                "step": self.step,
                "epochs": round(self.step * self.settings.batch / len(self.data.edges), 2),
                "seconds": round(self.seconds, 1),
                "hardware": hardware(self.device),
                "torch": torch.__version__,
            },
            "curve": [asdict(r) for r in thin(self.curve)],
        }
        provenance["training"]["shares"] = list(self.settings.shares)
        config = PolicyConfig.from_dict(self.config.to_dict() | {"provenance": provenance})
        tensors = {k: v.detach().cpu().numpy() for k, v in self.ema.state_dict().items()}
        config = write_folder(folder, config, tensors)
        name = os.fsencode(folder.resolve().name).decode(errors="replace")
        card = model_card(name, config, held_out=self.probe_is_held_out)
        write_atomically(folder / CARD_FILE, card.encode())
        return config


def longer(positions: np.ndarray[Any, Any], horizon: int) -> np.ndarray[Any, Any]:
    """Position embeddings (1, T, n_emb) for ``horizon`` >= T tokens: the last one stands in.

    Under the causal mask the first T outputs then stay as they were.
    """
    missing = horizon - positions.shape[1]
    return np.concatenate([positions, np.repeat(positions[:, -1:], missing, axis=1)], axis=1)


def _root(squares: Tensor, counts: Tensor) -> float:
    """Of their mean, of those that count."""
    return float((squares.sum() / counts.sum().clamp(min=1)).sqrt())


def thin(curve: Sequence[Report], most: int = 25) -> list[Report]:
    """At most that many points of a curve, the last among them."""
    if len(curve) <= most:
        return list(curve)
    picked = np.unique(np.linspace(0, len(curve) - 1, most).round().astype(int))
    return [curve[i] for i in picked]


def _optimizer(net: TransformerForDiffusion, settings: Settings) -> torch.optim.AdamW:
    """AdamW; biases, norms and position embeddings are not decayed."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, value in net.named_parameters():
        keep = value.ndim < 2 or name.endswith("pos_emb")
        (plain if keep else decayed).append(value)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
