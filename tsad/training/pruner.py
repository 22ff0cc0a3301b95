"""A pruner by regression: it foresees, per observation, what computing each cell gains.

The effects of `tsad plan measure`, averaged over recorded chunks, order the cells
(`tsad.planners.nested`): a static table that serves the whole dial. What a single chunk's effects
say beyond it is learned from the observation. The pruner's score of a cell is the logarithm of the
gain per cost that it expects; with a power of 1, the loss exp(score) - gain x score, in units of
the table, has its least where exp(score) is the mean gain given what the pruner sees. Few chunks
have most of all gain, so by default their roots are learned. A plan for a budget computes the cells
that gain most, and the pruner's own choice spends more on chunks that need more. Kept are the
averaged weights that did best on held-out episodes, the table being the first.

The pruner is the MLP of `tsad.config.PrunerConfig`, on the policy's own memory tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsad.arrays import read_npz
from tsad.checkpoint import Tensors, write_folder
from tsad.config import PolicyConfig, PrunerConfig
from tsad.families import as_transformer
from tsad.files import Lock, make_folder, write_atomically
from tsad.planners.effects import Effects
from tsad.planners.nested import NestedOrder, nested_order
from tsad.samplers import make_sampler
from tsad.sim.recording import Recorded, denoising_inputs
from tsad.training import sensitivity
from tsad.training.running import (
    STATE_FILE,
    InterruptedTrainingError,
    Training,
    budget_checks,
    caught_signals,
    check_settings,
    find_device,
    hardware,
    learning_rate,
    move_average,
)

EFFECTS_FILE, GAINS_FILE = "effects.npz", "gains.npz"
MOST = 0.002  # of the dense multiply-accumulates, for the pruner's own
_EFFECT_CHUNKS = 64
_NEVER = -100.0  # a score below all others

Windows = Sequence[tuple[Recorded, slice]]


@dataclass(frozen=True)
class PrunerSettings:
    """What is trained and how. ``minutes`` or ``steps`` ends the fit; of both, the first."""

    hidden: int = 0
    sparsity: float = 0.95
    chunks: int = 512
    projections: int = 2
    batch: int = 32
    lr: float = 1e-3
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
        checks = budget_checks(self) | {
            "hidden": (self.hidden >= 0, "at least 1, or 0 for as many as fit, up to 256"),
            "sparsity": (0 < self.sparsity < 1, "a number in (0, 1)"),
            "chunks": (self.chunks >= 1, "at least 1"),
            "power": (0 < self.power <= 1, "a number in (0, 1]"),
            "projections": (self.projections >= 1, "at least 1"),
        }
        check_settings(self, checks)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrunerSettings:
        """The settings that ``asdict`` gave."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


@dataclass
class PrunerReport:
    """A line of the curve.

    ``val_loss`` of held-out episodes (else of the training's), relative to the static table, which
    has 0: below, the observation says something. ``r2``: of the logarithm of a chunk's gains, the
    share of its variance that is foreseen.
    """

    step: int
    seconds: float
    lr: float
    train_loss: float
    val_loss: float
    r2: float

    def text(self) -> str:
        """For people."""
        return f"loss {self.train_loss:.4f}, held out {self.val_loss:.4f}, R2 {self.r2:.2f}"


def pruner_macs(config: PolicyConfig, steps: int, hidden: int) -> int:
    """Multiply-accumulates of an MLP pruner a chunk, as the engine runs it."""
    net = as_transformer(config.network, "policy")
    return hidden * (net.n_obs_steps * net.n_emb + steps * 4 * len(config.costs))


def most_hidden(config: PolicyConfig, steps: int) -> int:
    """The widest pruner that costs at most `MOST` of the dense chunk."""
    return int(MOST * steps * sum(config.costs) / pruner_macs(config, steps, 1))


class Memory:
    """What a pruner sees: the policy's memory tokens, one of the step and those of observations."""

    def __init__(self, twin: sensitivity.Twin) -> None:
        self.twin = twin
        self.steps = len(twin.sampler.timesteps)

    def tokens(self, obs: NDArray[Any]) -> Tensor:
        """(N, n_obs_steps, n_emb) of raw observations; they are the same at all steps."""
        return torch.from_numpy(self.twin.condition(obs, 0)[:, 1:].copy())

    def times(self) -> Tensor:
        """(K, n_emb): the time tokens, the same for all observations."""
        net = self.twin.config.network
        nothing = np.zeros((1, net.n_obs_steps, net.obs_dim))
        rows = [self.twin.condition(nothing, k)[:, 0] for k in range(self.steps)]
        return torch.from_numpy(np.concatenate(rows))


def pruner_rows(times: Tensor, tokens: Tensor) -> Tensor:
    """(N, K, (1 + n_obs_steps) x n_emb), a pruner's input, of what `Memory` gives."""
    n, steps = len(tokens), len(times)
    seen = tokens.flatten(1)[:, None].expand(n, steps, -1)
    return torch.cat([times.expand(n, *times.shape), seen], 2)


def make_net(config: PolicyConfig, hidden: int) -> nn.Sequential:
    """The pruner in torch; its names are those of ``pruner.safetensors``."""
    net = as_transformer(config.network, "policy")
    inputs = (1 + net.n_obs_steps) * net.n_emb
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 4 * len(config.costs))
    )


def compute_scores(output: Tensor) -> Tensor:
    """(..., K, B) in the order of the loop, from a pruner's output (..., K, 4 B).

    What a cell's first class leads the best of its others by; row k is that of step K - 1 - k.
    """
    logits = output.reshape(*output.shape[:-1], -1, 4).flip(-3)
    return logits[..., 0] - logits[..., 1:].amax(-1)


@torch.no_grad()
def set_table(net: nn.Sequential, times: Tensor, tokens: Tensor, table: Tensor, seed: int) -> int:
    """Make the pruner a static table: whatever the observation, it says ``table`` (K, B).

    Three in four of its units see the time token ``times`` (K, n_emb) alone: random features, and
    by ridge regression what they add up to. The others see the observation ``tokens`` (N,
    n_obs_steps, n_emb) too and add nothing yet. Own values (`reuse_step`) are what is reused.
    Returns how many units the table has.
    """
    first: Any = net[0]
    last: Any = net[2]
    units, d = len(first.bias), times.shape[1]
    count = units - units // 4
    random = torch.Generator().manual_seed(seed)
    rows = pruner_rows(times, tokens).cpu().double()
    flat = rows.flatten(0, 1)
    centre = flat.mean(0)

    def spread(part: slice) -> Tensor:
        return (flat[:, part] - centre[part]).square().sum(1).mean().sqrt().clamp(min=1e-6)

    weight = torch.randn(units, rows.shape[2], generator=random, dtype=torch.float64)
    weight[:, :d] /= spread(slice(d))
    weight[:, d:] /= spread(slice(d, None))
    weight[:count, d:] = 0
    offset = torch.rand(units, generator=random, dtype=torch.float64) * 2 - 1
    first.weight.copy_(weight)
    first.bias.copy_(offset - weight @ centre)
    hidden = net[1](first(rows[0].to(times)))[:, :count].double().cpu()
    wanted = table.flip(0).double().cpu()
    middle = wanted.mean(0)
    gram = hidden @ hidden.T
    ridge = 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    last.weight.zero_()
    solved = hidden.T @ torch.linalg.solve(gram + ridge, wanted - middle)
    last.weight[0::4, :count] = solved.T.to(last.weight)
    last.bias.copy_(last.bias.new_tensor([0.0, _NEVER, 0.0, _NEVER]).repeat(table.shape[1]))
    last.bias[0::4] += middle.to(last.bias)
    return count


def reachable(order: NestedOrder, costs: Sequence[int]) -> NDArray[np.float32]:
    """The order's scores, with those of cells that no sparsity above 0.5 computes drawn together.

    What they differ by then takes no precision from the others'.
    """
    scores = order.scores.copy()
    cells = np.argsort(-scores, axis=None, kind="stable")
    spent = np.cumsum(np.broadcast_to(np.asarray(costs, np.float64), scores.shape).ravel()[cells])
    least = scores.ravel()[cells[np.searchsorted(spent, 0.5 * spent[-1])]]
    low = scores < least
    scores[low] = least - 0.05 * (least - scores[low])
    return scores.astype(np.float32)


class PrunerTrainer(Training[PrunerReport]):
    """A training in a folder: what was measured, network, average, optimiser, clock.

    Args:
        parts: configuration and tensors of the policy, as `tsad.load.read_policy` gives them.
        policy: the same, loaded, with its own sampler; for the dense chunks.
        windows: consecutive recorded chunks, to train on.
        held_out: others; they may be none.
        facts: what the pruner is of, for its provenance and for resuming.
        effects: of the policy, if they were measured already.
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
        device: str = "auto",
    ) -> None:
        super().__init__(out, settings)
        self.settings, self.facts, self.effects = settings, dict(facts), effects
        (self.config, self.tensors), self.policy = parts, policy
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
        rows = [*self.windows, *self.held_out]
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
        with Lock(make_folder(self.out) / STATE_FILE), caught_signals() as received:
            if not (self.out / STATE_FILE).exists():
                self.save()
            effects = self._measure_effects(progress, received)
            self.order = nested_order(effects, self.policy, self.settings.sparsity)
            gains = self._measure_gains(progress, received)
        counts = len(self.windows)
        obs = [episode.obs[part] for episode, part in [*self.windows, *self.held_out]]
        n = sum(len(o) for o in obs[:counts])
        seen = self.memory.tokens(np.concatenate(obs)).to(self.device)
        gains = gains**self.settings.power
        mean = gains[:n].mean(0)
        known = mean > 0
        relative = np.where(known, gains / np.where(known, mean, 1), 1.0)
        y = torch.from_numpy(relative.astype(np.float32)).to(self.device)
        self.parts = (seen[:n], y[:n])
        self.probe = (seen[n:], y[n:]) if len(seen) > n else self.parts
        self.times = self.memory.times().to(self.device)
        self.table = torch.from_numpy(reachable(self.order, self.config.costs)).to(self.device)
        few = self.parts[0][:64]
        self.fixed = set_table(self.net, self.times, few, self.table, self.settings.seed)
        self.ema.load_state_dict(self.net.state_dict())
        self.ready = True
        self.best, self.best_loss = self._weights(), self.evaluate().val_loss

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.ema.state_dict().items()}

    def _report(self, on_report: Callable[[PrunerReport], None] | None) -> None:
        super()._report(on_report)
        last = self.curve[-1]
        if last.val_loss < self.best_loss or self.settings.keep_last or not self.held_out:
            self.best, self.best_loss, self.best_step = self._weights(), last.val_loss, last.step

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

    def _measure_gains(
        self, progress: Callable[[int], None], received: list[int]
    ) -> NDArray[np.float32]:
        """(chunks, K, B): what computing each cell gains, at its place in the order, >= 0."""
        path, done = self.out / GAINS_FILE, []
        rows = [*self.windows, *self.held_out]
        made_of = hashlib.sha256(self.order.scores.tobytes()).hexdigest()
        if path.exists():
            found = read_npz(path)
            if str(found["order"]) != made_of:
                raise ValueError(
                    f"{path}: expected gains in the order of this training, got another's; "
                    "delete it, or train in another folder"
                )
            done = list(np.split(found["gains"], np.cumsum(found["lengths"])[:-1]))
            progress(sum(len(part) for part in done))
        for number in range(len(done), len(rows)):
            window = self._window(*rows[number])
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
            signs = sensitivity.random_signs(
                self.twin, len(window.obs), self.settings.projections, generator
            )
            segments = sensitivity.chunk_segments(self.twin, window, signs)
            gained = self.order.gains(segments).clip(min=0)
            done.append(np.ascontiguousarray(gained, np.float32))
            lengths, gains = [len(part) for part in done], np.concatenate(done)
            if received or number % 4 == 3 or number + 1 == len(rows):
                stream = BytesIO()
                np.savez(stream, gains=gains, lengths=lengths, order=made_of)
                write_atomically(path, stream.getvalue())
            progress(len(window.obs))
            if received:
                raise InterruptedTrainingError
        return np.concatenate(done)

    # ---- the fit

    def _lead(self, net: nn.Module, tokens: Tensor) -> Tensor:
        """(N, K - 1, B): logarithm of the power of the gain, in units of the table's."""
        scores = compute_scores(net(pruner_rows(self.times, tokens)))
        return self.settings.power * (scores[:, 1:] - self.table[1:])

    def train_step(self) -> float:
        """One optimiser step; the loss before it."""
        s = self.settings
        rate = learning_rate(s, self.step, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, gains = self.parts
        random = np.random.default_rng([s.seed, self.step])  # a function of the step: resumable
        index = torch.from_numpy(random.integers(len(tokens), size=min(s.batch, len(tokens))))
        index = index.to(self.device)
        lead = self._lead(self.net, tokens[index])
        loss = gain_loss(lead, gains[index][:, 1:])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        first: Any = self.net[0]
        last: Any = self.net[2]
        with torch.no_grad():
            first.weight.grad[: self.fixed] = 0  # the units of the table stay
            first.bias.grad[: self.fixed] = 0
            last.weight.grad[:, : self.fixed] = 0
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
        """Of held-out episodes (else of the training's), with the averaged weights."""
        tokens, gains = self.probe
        total, foreseen = 0.0, []
        for begin in range(0, len(tokens), 64):
            part = slice(begin, begin + 64)
            lead = self._lead(self.ema, tokens[part])
            total += float(gain_loss(lead, gains[part][:, 1:])) * len(lead)
            foreseen.append(lead.exp().mean((1, 2)).log())
        x, y = torch.cat(foreseen), gains[:, 1:].mean((1, 2)).clamp(min=1e-6).log()
        rest, all_ = (y - y.mean() - x + x.mean()).square().sum(), (y - y.mean()).square().sum()
        r2 = float(1 - rest / all_) if float(all_) else 0.0
        rate = learning_rate(self.settings, self.step, self.fraction)
        loss = total / len(tokens)
        return PrunerReport(self.step, round(self.seconds, 1), rate, self.average_loss, loss, r2)

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
                "best_loss": self.best_loss,
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
        self.best, self.best_loss = dict(state["best"]), float(state["best_loss"])
        self.best_step = int(state["best_step"])
        self.restore_progress(state, PrunerReport)

    @torch.no_grad()
    def own_threshold(self) -> float:
        """The score from which on computing costs what was asked, on the mean of the training."""
        net = make_net(self.config, self.hidden).to(self.device)
        net.load_state_dict(self.best)
        tokens, _ = self.parts
        K, costs = self.memory.steps, np.asarray(self.config.costs, np.float64)
        found = []
        for begin in range(0, len(tokens), 64):
            seen = tokens[begin : begin + 64]
            found.append(compute_scores(net(pruner_rows(self.times, seen)))[:, 1:].cpu())
        scores = torch.cat(found).numpy()
        weights = np.broadcast_to(costs, scores.shape).ravel()
        order = np.argsort(-scores, axis=None, kind="stable")
        room = (1 - self.settings.sparsity) * K * costs.sum() - costs.sum()
        spent = np.cumsum(weights[order])
        last = int(np.searchsorted(spent, room * len(scores), side="right"))
        last = min(last, len(order) - 1)
        return float(scores.ravel()[order[last]])

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
            "kept": {"step": self.best_step, "val_loss": self.best_loss},
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
