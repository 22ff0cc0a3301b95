"""A pruner that looks at each observation: how much a chunk needs, and of what.

It begins as a static table, one order of all cells for the whole dial (`tsad.planners.nested`),
around plans that were searched or the plan of least effect; what is trained is a term in the
observation beyond it, nothing at first. Three methods say what that term learns from:

* ``effects``: for each chunk, what computing each cell gains, to first order, as ``tsad plan
  measure`` has it. A cell's score is the logarithm of the gain per cost that it expects.
* ``levels``: for each chunk, its true error at several sparsities along the table. One number per
  observation moves all scores: how much is computed, not what.
* ``gates``: the sparse chunk itself, by straight-through gates (`tsad.training.gates`).

Of the first two, with a power of 1, the loss exp(lead) - gain x lead, in units of the table, has
its least where exp(lead) is the mean gain given what the pruner sees. Few chunks have most of all
gain, so by default their roots are learned. A plan for a budget computes the cells that gain most,
and the pruner's own choice spends more on chunks that need more. Kept are the averaged weights of
least true error on held-out episodes at the average cost asked for, the table being the first.

The pruner is the MLP of `tsad.config.PrunerConfig`, on the policy's own memory tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsad.arrays import read_npz
from tsad.checkpoint import STATE_FILE, Tensors, write_folder
from tsad.config import PolicyConfig, PrunerConfig
from tsad.families import as_transformer
from tsad.files import Lock, make_folder, write_atomically
from tsad.plan import COMPUTE, Plan
from tsad.planners.base import make_plan
from tsad.planners.effects import Effects
from tsad.planners.nested import nested_order
from tsad.samplers import make_sampler
from tsad.sim.recording import Recorded, denoising_inputs
from tsad.training import sensitivity
from tsad.training.gates import gate_loss, gated_chunks, gates_of
from tsad.training.pruner_net import (
    MOST,
    Memory,
    compute_scores,
    make_net,
    most_hidden,
    pruner_macs,
    pruner_rows,
    reachable,
    reused,
    set_table,
)
from tsad.training.running import (
    InterruptedTrainingError,
    SavedSettings,
    Training,
    budget_checks,
    caught_signals,
    check_settings,
    find_device,
    hardware,
    learning_rate,
    move_average,
)
from tsad.training.true_errors import TrueErrors

# gates move every cell by noisy gradients: at ten times this they forget where they began
RATES = {"effects": 1e-3, "levels": 1e-3, "gates": 1e-4}
METHODS = tuple(RATES)
EFFECTS_FILE, GAINS_FILE, ERRORS_FILE = "effects.npz", "gains.npz", "errors.npz"
COSTS = 2.0 ** np.arange(-1, 2.5, 0.5)  # levels, in units of what the asked sparsity costs
_EFFECT_CHUNKS = 64
_PROBE = 64  # chunks of the training that are looked at if no episode is held out

Windows = Sequence[tuple[Recorded, slice]]


@dataclass(frozen=True)
class PrunerSettings(SavedSettings):
    """What is trained and how. ``minutes`` or ``steps`` ends the fit; of both, the first."""

    method: str = METHODS[0]
    hidden: int = 0
    sparsity: float = 0.95
    chunks: int = 512
    projections: int = 2
    batch: int = 32
    lr: float = cast("float", None)  # that of the method
    weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.5
    ema: float = 0.99
    val_episodes: int | None = None  # a fifth
    power: float = 0.5  # of the gains
    keep_last: bool = False  # not the weights that did best on held-out episodes
    static: bool = False  # the observation is not looked at: a control
    seed: int = 0
    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", RATES.get(self.method, min(RATES.values())))
        checks = budget_checks(self) | {
            "method": (self.method in METHODS, f"one of {', '.join(METHODS)}"),
            "hidden": (self.hidden >= 0, "at least 1, or 0 for as many as fit, up to 256"),
            "sparsity": (0 < self.sparsity < 1, "a number in (0, 1)"),
            "chunks": (self.chunks >= 1, "at least 1"),
            "power": (0 < self.power <= 1, "a number in (0, 1]"),
            "projections": (self.projections >= 1, "at least 1"),
        }
        check_settings(self, checks)


@dataclass
class PrunerReport:
    """A line of the curve, of held-out episodes (else of some of the training's).

    ``val_error``: the root mean squared error of executed actions of the pruner's own choice, at
    the average cost asked for. ``val_loss``: what is trained, relative to the static table, which
    has 0: below, the observation says something. ``r2``: of the logarithm of a chunk's gains, the
    share of its variance that is foreseen. Of gates these are 0.
    """

    step: int
    seconds: float
    lr: float
    train_loss: float
    val_error: float
    val_loss: float
    r2: float

    def text(self) -> str:
        """For people."""
        return (
            f"loss {self.train_loss:.4f}, held out {self.val_loss:.4f}, R2 {self.r2:.2f}, "
            f"error {self.val_error:.4f}"
        )


class PrunerTrainer(Training[PrunerReport]):
    """A training in a folder: what was measured, network, average, optimiser, clock.

    Args:
        parts: configuration and tensors of the policy, as `tsad.load.read_policy` gives them.
        policy: the same, loaded with one lane, with its own sampler; for chunks to compare with.
        windows: consecutive recorded chunks, to train on.
        held_out: others; they may be none.
        facts: what the pruner is of, for its provenance and for resuming.
        effects: of the policy, if they were measured already.
        plans: searched ones, for `nested_order`.
    """

    def __init__(
        self,
        parts: tuple[PolicyConfig, Tensors],
        policy: Any,
        windows: Windows,
        held_out: Windows,
        out: str | os.PathLike[str],
        settings: PrunerSettings,
        *,
        facts: Mapping[str, Any],
        effects: Effects | None = None,
        plans: Sequence[Plan] = (),
        device: str = "auto",
    ) -> None:
        super().__init__(out, settings)
        self.settings, self.facts, self.effects = settings, dict(facts), effects
        (self.config, self.tensors), self.policy, self.plans = parts, policy, list(plans)
        self.windows, self.held_out = list(windows), list(held_out)
        self.device = find_device(device)
        sampler = make_sampler(policy.config["scheduler"])
        if as_transformer(self.config.network, "policy").n_cond_layers:
            raise ValueError(
                "policy: expected n_cond_layers 0, whose observation tokens are the same at all "
                "steps, got an encoder with attention; it takes static plans (tsad plan)"
            )
        self.twin = sensitivity.Twin(self.config, self.tensors, sampler)
        self.memory = Memory(self.twin)
        steps = self.memory.steps
        widest = most_hidden(self.config, steps)
        self.hidden = settings.hidden or min(256, widest)
        if not 1 <= self.hidden <= widest:
            raise ValueError(
                f"hidden: got {self.hidden}, expected 1 to {widest}: a pruner may cost {MOST:.1%} "
                "of the dense multiply-accumulates"
            )
        if settings.sparsity > 1 - 1 / steps:
            raise ValueError(
                f"sparsity: expected up to {1 - 1 / steps:.6g} (step 0 is computed), got "
                f"{settings.sparsity}; ask for less"
            )
        self.budget = (1 - settings.sparsity) * steps * sum(self.config.costs)
        self.errors = TrueErrors(policy, [*self.windows, *self.held_out])
        self.net = make_net(self.config, self.hidden).to(self.device)
        self.ema = make_net(self.config, self.hidden).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.ready, self.best_step = False, 0

    # ---- what is measured first

    @property
    def measured_chunks(self) -> int:
        """How many `prepare` runs, those that are there already included."""
        rows = [] if self.settings.method == "gates" else [*self.windows, *self.held_out]
        if self.effects is None and not (self.out / EFFECTS_FILE).exists():
            rows += self._effect_windows()
        return sum(len(episode.obs[part]) for episode, part in rows)

    def _effect_windows(self) -> list[tuple[Recorded, slice]]:
        total, found = 0, []
        for episode, part in self.windows:
            if total >= _EFFECT_CHUNKS:
                break
            found.append((episode, part))
            total += len(episode.obs[part])
        return found

    def _window(self, episode: Recorded, part: slice) -> sensitivity.Window:
        obs = episode.obs[part]
        return sensitivity.Window(
            obs, denoising_inputs(self.policy, obs, episode.noise(self.policy, part))
        )

    def prepare(self, progress: Callable[[int], None] = lambda chunks: None) -> None:
        """Measure, or read what was measured before; then the network is the static table.

        ``progress`` is called with the number of chunks just done. After SIGINT or SIGTERM what is
        done is kept and ``InterruptedTrainingError`` raised; the state of a training that has not
        begun is written first, so that the folder can be resumed.
        """
        n, method = sum(len(e.obs[part]) for e, part in self.windows), self.settings.method
        costs = self.config.costs
        gains = np.ones((len(self.errors), 1, 1), np.float32)
        with Lock(make_folder(self.out) / STATE_FILE), caught_signals() as received:
            if not (self.out / STATE_FILE).exists():
                self.save()
            effects = self._measure_effects(progress, received)
            self.order = nested_order(effects, self.policy, self.settings.sparsity, self.plans)
            if method == "effects":
                gains = self._measure_gains(progress, received)
            elif method == "levels":
                levels = self._measure_levels(progress, received)
                mean = np.maximum(levels[:n].mean(0), np.finfo(np.float64).tiny)
                self.order = self.order.calibrated(costs, self._level_costs(), mean)
                gains = (levels / mean).mean(1)[:, None, None]
        seen = self.memory.tokens(self.errors.obs).to(self.device)
        gains = gains**self.settings.power
        mean = gains[:n].mean(0)
        known = mean > 0
        relative = np.where(known, gains / np.where(known, mean, 1), 1.0).astype(np.float32)
        whole = (len(relative), self.memory.steps, len(costs))
        y = torch.from_numpy(relative).to(self.device).expand(whole)
        self.parts = (seen[:n], y[:n])
        few = slice(n, None) if self.held_out else slice(0, _PROBE)
        self.probe = (seen[few], y[few])
        self.probed = range(len(self.errors))[few]
        self.times = self.memory.times().to(self.device)
        self.table = torch.from_numpy(reachable(self.order, costs)).to(self.device)
        first = self.parts[0][:64]
        options: dict[str, Any] = {"timeless": method == "levels"}
        if method == "gates":  # near enough to the own value that a gate has a gradient
            options["of_type"] = -3.0
        self.fixed = set_table(
            self.net, self.times, first, self.table, self.settings.seed, **options
        )
        self.ema.load_state_dict(self.net.state_dict())
        self.ready = True
        self.best, self.best_error = self._weights(), self.evaluate().val_error
        self.table_error = self.best_error

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.ema.state_dict().items()}

    def _report(self, on_report: Callable[[PrunerReport], None] | None) -> None:
        super()._report(on_report)
        last = self.curve[-1]
        if last.val_error < self.best_error or self.settings.keep_last or not self.held_out:
            self.best, self.best_error, self.best_step = self._weights(), last.val_error, last.step

    def _measure_effects(self, progress: Callable[[int], None], received: list[int]) -> Effects:
        path = self.out / EFFECTS_FILE
        if self.effects is None and path.exists():
            self.effects = Effects.load(path)
        if self.effects is None:

            def stop(done: int) -> None:
                progress(done)
                if received:
                    raise InterruptedTrainingError

            self.effects = sensitivity.measure(
                self.twin,
                (self._window(*row) for row in self._effect_windows()),
                projections=self.settings.projections,
                seed=self.settings.seed,
                metadata=self.facts,
                progress=stop,
            )
        if not path.exists():
            self.effects.save(path)
        return self.effects

    def _made_of(self) -> str:
        """Hash of all that decides what is measured along the order of cells."""
        places = [(e.number, part.start, part.stop) for e, part in [*self.windows, *self.held_out]]
        own = [places, self.settings.seed, self.settings.projections, self.facts]
        said = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        for array in (self.order.scores, self.errors.obs):
            said.update(np.ascontiguousarray(array).tobytes())
        return said.hexdigest()

    def _measure(
        self,
        name: str,
        one: Callable[[int], NDArray[Any]],
        progress: Callable[[int], None],
        received: list[int],
    ) -> NDArray[Any]:
        """``one`` of every window, in the order of the table, side by side; kept in a file."""
        path, done = self.out / name, []
        rows = [*self.windows, *self.held_out]
        made_of = self._made_of()
        if path.exists():
            found = read_npz(path)
            if str(found.get("made_of")) != made_of:
                raise ValueError(
                    f"{path}: expected what was measured of the cells' order, chunks and seed of "
                    "this training, got another's; delete it, or train in another folder"
                )
            done = list(np.split(found["values"], np.cumsum(found["lengths"])[:-1]))
            progress(sum(len(part) for part in done))
        for number in range(len(done), len(rows)):
            done.append(one(number))
            lengths, values = [len(part) for part in done], np.concatenate(done)
            if received or number % 4 == 3 or number + 1 == len(rows):
                stream = BytesIO()
                np.savez(stream, values=values, lengths=lengths, made_of=made_of)
                write_atomically(path, stream.getvalue())
            progress(lengths[-1])
            if received:
                raise InterruptedTrainingError
        return np.concatenate(done)

    def _measure_gains(
        self, progress: Callable[[int], None], received: list[int]
    ) -> NDArray[np.float32]:
        """(chunks, K, B): what computing each cell gains, at its place in the order, >= 0."""
        rows = [*self.windows, *self.held_out]

        def one(number: int) -> NDArray[np.float32]:
            window = self._window(*rows[number])
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
            signs = sensitivity.random_signs(
                self.twin, len(window.obs), self.settings.projections, generator
            )
            segments = sensitivity.chunk_segments(self.twin, window, signs)
            return np.ascontiguousarray(self.order.gains(segments).clip(min=0), np.float32)

        return self._measure(GAINS_FILE, one, progress, received)

    def _level_costs(self) -> NDArray[np.float64]:
        """(L,): what the levels cost, ascending; step 0 at least, and less than everything."""
        row = sum(self.config.costs)
        return np.unique((COSTS * self.budget).clip(row, (self.memory.steps - 1) * row))

    def _measure_levels(
        self, progress: Callable[[int], None], received: list[int]
    ) -> NDArray[np.float64]:
        """(chunks, L): the true error of each chunk at each level."""
        lengths = [len(e.obs[part]) for e, part in [*self.windows, *self.held_out]]
        begins = np.cumsum([0, *lengths])
        plans = [self.order.within(self.policy, cost) for cost in self._level_costs()]

        def one(number: int) -> NDArray[np.float64]:
            chunks = range(begins[number], begins[number + 1])
            return np.array([[self.errors(i, plan) for plan in plans] for i in chunks])

        return self._measure(ERRORS_FILE, one, progress, received)

    # ---- the fit

    def _lead(self, net: nn.Module, tokens: Tensor) -> Tensor:
        """(N, K - 1, B): logarithm of the power of the gain, in units of the table's."""
        scores = compute_scores(net(pruner_rows(self.times, tokens)))
        return self.settings.power * (scores[:, 1:] - self.table[1:])

    def _loss(self, random: np.random.Generator) -> Tensor:
        s = self.settings
        tokens, gains = self.parts
        picked = random.integers(len(tokens), size=min(s.batch, len(tokens)))
        index = torch.from_numpy(picked).to(self.device)
        if s.method != "gates":
            return gain_loss(self._lead(self.net, tokens[index]), gains[index][:, 1:])
        logits = self.net(pruner_rows(self.times, tokens[index]))
        logits = logits.reshape(*logits.shape[:2], -1, 4).flip(1)
        spent = self.budget * COSTS[-1] ** random.uniform(-0.5, 1)  # half of it to four times
        gates = gates_of(logits, self.config.costs, min(spent, self._level_costs()[-1])).cpu()
        noise = torch.from_numpy(np.stack([self.errors.noise(i) for i in picked]))
        right = torch.from_numpy(np.stack([self.errors.dense(i) for i in picked])).float()
        return gate_loss(
            self.twin, gated_chunks(self.twin, self.errors.obs[picked], noise, gates), right
        )

    def train_step(self) -> float:
        """One optimiser step; the loss before it."""
        s = self.settings
        rate = learning_rate(s, self.step, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # what is drawn is a function of the step: resumable
        loss = self._loss(np.random.default_rng([s.seed, self.step]))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        first: Any = self.net[0]
        last: Any = self.net[2]
        with torch.no_grad():
            first.weight.grad[: self.fixed] = 0  # the units of the table stay
            first.bias.grad[: self.fixed] = 0
            if s.method == "levels":  # one number moves all cells of all steps
                first.weight.grad[:, : self.times.shape[1]] = 0
            last.weight.grad[:, : self.fixed] = 0
            for grad in (last.weight.grad, last.bias.grad) if s.method != "gates" else ():
                computed = grad[0::4].clone()
                grad.zero_()  # what is reused stays
                grad[0::4] = computed.mean(0) if s.method == "levels" else computed
            self.optimizer.step()
            last.weight[:, self.fixed :] *= 1 - rate * s.weight_decay  # towards the table
            if s.static:
                first.weight[:, self.times.shape[1] :] = 0
        value = self.note_loss(loss)
        keep = min(s.ema, self.step / (self.step + 10))
        move_average(self.ema.parameters(), self.net.parameters(), keep)
        return value

    @torch.no_grad()
    def evaluate(self) -> PrunerReport:
        """Of held-out episodes (else of some of the training's), with the averaged weights."""
        tokens, gains = self.probe
        total, foreseen = 0.0, []
        for begin in range(0, len(tokens), 64):
            part = slice(begin, begin + 64)
            lead = self._lead(self.ema, tokens[part])
            total += float(gain_loss(lead, gains[part][:, 1:])) * len(lead)
            foreseen.append(lead.exp().mean((1, 2)).log())
        x, y = torch.cat(foreseen), gains[:, 1:].mean((1, 2)).clamp(min=1e-6).log()
        rest, all_ = (y - y.mean() - x + x.mean()).square().sum(), (y - y.mean()).square().sum()
        r2, loss = float(1 - rest / all_) if float(all_) else 0.0, total / len(tokens)
        if self.settings.method == "gates":
            r2 = loss = 0.0
        rate = learning_rate(self.settings, self.step, self.fraction)
        error, seconds = self._true_error(self.ema), round(self.seconds, 1)
        return PrunerReport(self.step, seconds, rate, self.average_loss, error, loss, r2)

    @torch.no_grad()
    def _scores(
        self, net: nn.Module, tokens: Tensor
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """(N, K, B) of observations: the scores, and what is reused where none is computed."""
        scores, sources = [], []
        for begin in range(0, len(tokens), 64):
            output = net(pruner_rows(self.times, tokens[begin : begin + 64]))
            scores.append(compute_scores(output).cpu())
            sources.append(reused(output).to(torch.uint8).cpu())
        return torch.cat(scores).numpy(), torch.cat(sources).numpy()

    def _price(self, scores: NDArray[np.float32]) -> float:
        """The score from which on computing costs what was asked, on the mean of these chunks."""
        costs = np.asarray(self.config.costs, np.float64)
        later = scores[:, 1:]
        order = np.argsort(-later, axis=None, kind="stable")
        spent = np.cumsum(np.broadcast_to(costs, later.shape).ravel()[order])
        room = (self.budget - costs.sum()) * len(scores)
        last = min(int(np.searchsorted(spent, room, side="right")), len(order) - 1)
        return float(later.ravel()[order[last]])

    def _true_error(self, net: nn.Module) -> float:
        """Root of the mean squared error on the probe, every chunk along its own choice."""
        scores, sources = self._scores(net, self.probe[0])
        sources[scores > self._price(scores)] = COMPUTE
        sources[:, 0] = COMPUTE
        found = [
            self.errors(i, make_plan(self.policy, each, each, planner="pruner"))
            for i, each in zip(self.probed, sources, strict=True)
        ]
        return float(np.sqrt(np.mean(found)))

    # ---- state and result

    def state(self) -> dict[str, Any]:
        """Everything that a training goes on from; what was measured has files of its own."""
        begun = {}
        if self.ready:
            begun = {
                "net": self.net.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "best_error": self.best_error,
                "best_step": self.best_step,
            }
        facts = {"settings": asdict(self.settings), "facts": self.facts}
        return self.progress_state() | facts | begun

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same settings (budget aside) and data, after `prepare`."""
        if "net" not in state:
            return
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_error = dict(state["best"]), float(state["best_error"])
        self.best_step = int(state["best_step"])
        self.restore_progress(state, PrunerReport)

    def own_threshold(self) -> float:
        """The score from which on computing costs what was asked, on the mean of the training."""
        net = make_net(self.config, self.hidden).to(self.device)
        net.load_state_dict(self.best)
        return self._price(self._scores(net, self.parts[0])[0])

    def write(self, folder: Path | None = None) -> PolicyConfig:
        """Write the tsad folder (default: ``out``): the policy's weights, and the pruner."""
        folder = folder or self.out
        state = {name: value.cpu() for name, value in self.best.items()}
        # the sign of the scores is the pruner's own choice
        state["2.bias"] = state["2.bias"].clone()
        state["2.bias"][0::4] -= self.own_threshold()
        training = {
            **asdict(self.settings),
            "hidden": self.hidden,
            "step": self.step,
            "kept": {"step": self.best_step, "val_error": self.best_error},
            "table": {"val_error": self.table_error},
            "seconds": round(self.seconds, 1),
            "hardware": hardware(self.device),
            "torch": torch.__version__,
            "share_of_dense_macs": pruner_macs(self.config, self.memory.steps, self.hidden)
            / (self.memory.steps * sum(self.config.costs)),
        }
        last = asdict(self.curve[-1]) if self.curve else {}
        provenance = self.config.provenance | {
            "pruner": {"training": training, "of": self.facts, "result": last}
        }
        config = replace(
            self.config, pruner=PrunerConfig(self.hidden, 0, 0, "mlp"), provenance=provenance
        )
        pruner = {name: value.numpy() for name, value in state.items()}
        exact = all(np.array_equal(t, t.astype(np.float16)) for t in self.tensors.values())
        dtype = "float16" if exact else "float32"
        return write_folder(
            folder, config, self.tensors, pruner, dtype=dtype, pruner_dtype="float32"
        )


def gain_loss(lead: Tensor, gains: Tensor) -> Tensor:
    """The mean of exp(lead) - gains x lead - 1: a proper score of a mean, 0 for the table's own."""
    return (lead.exp() - gains * lead).mean() - 1
