"""What every reuse does to the executed actions, to first order, from recorded dense chunks.

An executed action a is a function of all K x B branch outputs v[k, b] of its chunk. If one of them
is replaced, a changes by J[k, b] (value - v[k, b]) to first order. For a random u with independent
signs, E[(u . da)^2] = |da|^2; so one backward pass for u gives the squared effect of every
replacement at once, from the gradients u . J[k, b] and the recorded outputs.

The inputs of all steps are recorded (`tsad.sim.recording`), so the backward pass goes step by step
from the last to the first and keeps the graph of one step only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsad.config import PolicyConfig
from tsad.planners.bac import similarity
from tsad.planners.effects import Effects
from tsad.planners.rules import relative_l1
from tsad.reference import dit, dpt, sinusoid, unet1d
from tsad.reference.families import family_of
from tsad.reference.layers import dense
from tsad.samplers import COLUMNS, Sampler, advance
from tsad.training.traced import Traced

OLDEST = 4  # chunks back that reuse_rollout is measured for

Before = tuple[Tensor, Tensor]  # x0 of the last two steps


@dataclass(frozen=True)
class Window:
    """C consecutive chunks of one episode.

    ``obs`` (C, n_obs_steps, obs_dim) raw, ``inputs`` (C, K, horizon, action_dim) normalised.
    """

    obs: NDArray[Any]
    inputs: NDArray[Any]


class Twin:
    """The dense policy in torch, step by step, with its branch outputs: the reference, traced.

    ``tensors`` are those of ``model.safetensors``, ``sampler`` the loop to unroll.
    """

    def __init__(
        self,
        config: PolicyConfig,
        tensors: Mapping[str, NDArray[Any]],
        sampler: Sampler,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.sampler, self.dtype = config, sampler, dtype
        self.network = config.to_dict()["network"]
        self.family: Any = family_of(self.network)
        self.blocks = self.family.block_names(self.network)
        self.types = self.family.block_types(self.network)
        self._numpy = torch.empty(0, dtype=dtype).numpy().dtype
        self._w = {name: np.array(tensor, self._numpy) for name, tensor in tensors.items()}
        self._traced = {name: Traced(torch.from_numpy(w)) for name, w in self._w.items()}

    def weights(self) -> dict[str, Tensor]:
        """The tensors that steps run by, by name."""
        return {name: traced.tensor for name, traced in self._traced.items()}

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Let steps run by these; what conditions them is encoded by the policy's own."""
        self._traced = {name: Traced(weight) for name, weight in weights.items()}

    def condition(self, obs: NDArray[Any], k: int) -> NDArray[Any]:
        """What conditions step ``k``, (C, ...), of raw observations (C, n_obs_steps, obs_dim)."""
        normalised = self.config.normalizer.obs.normalise(obs, np.float64).astype(self._numpy)
        time = np.full(len(obs), self.sampler.timesteps[k])
        found: NDArray[Any] = self.family.encode(self._w, self.network, time, normalised)
        return found

    def executed(self, rows: int) -> Tensor:
        """1 where an action of the horizon is executed: (rows, horizon, action_dim)."""
        net = self.config.network
        mask = torch.zeros(rows, net.horizon, net.action_dim, dtype=self.dtype)
        mask[:, net.n_obs_steps - 1 : net.n_obs_steps - 1 + net.n_action_steps] = 1
        return mask

    def step(
        self, k: int, x: Tensor, before: Before, condition: NDArray[Any], value: Any = dense
    ) -> tuple[Tensor, Before, list[Tensor], Tensor]:
        """One denoising step without its noise: the next sample, `before` it, the blocks' values
        and the network's output.

        ``before`` is x0 of the last two steps, ``value`` the reference's: what a block gives.
        """
        values: list[Tensor] = []

        def kept(block: int, compute: Any) -> Any:
            given = value(block, compute)
            values.append(given.tensor)
            return given

        e = self.family.predict(self._traced, self.network, Traced(x), condition, kept).tensor
        return *advance(self.sampler.table[k].tolist(), x, e, before), values, e

    def first_input(self, k: int, x: NDArray[Any], condition: NDArray[Any]) -> NDArray[Any]:
        """What TeaCache looks at: the first block's input, where the time has reached it.

        The transformer's time comes as a token of its own; its embedding is added here.
        """
        if self.family is dpt:
            time = sinusoid(self.sampler.timesteps[k], self.network["n_emb"], x.dtype)
            return dpt.embed(self._w, x) + time
        if self.family is dit:
            return dit.modulated(self._w, 0, dit.embed(self._w, self.network, x), condition)
        across = np.swapaxes(x, -1, -2)
        return unet1d.modulated(self._w, self.network, self.blocks[0], across, condition)


@dataclass(frozen=True)
class Gradients:
    """Of the chunks of a window; B blocks, whose values have D numbers each, P directions.

    ``values``    B of (K, C, D)
    ``slopes``    B of (P, K, C, D): the projections' gradients
    ``inputs``    (K, C, ...), `Twin.first_input`
    ``outputs``   (K, C, ...), the network's
    """

    values: list[Tensor]
    slopes: list[Tensor]
    inputs: NDArray[Any]
    outputs: Tensor


def gradients(twin: Twin, window: Window, directions: Sequence[Tensor]) -> Gradients:
    """Blocks' values, and what moves the projections of the final samples on ``directions``.

    They are P tensors (C, horizon, action_dim).
    """
    recorded = torch.from_numpy(window.inputs).to(twin.dtype)
    K = recorded.shape[1]
    values: list[list[Tensor]] = []
    slopes: list[list[list[Tensor]]] = []
    inputs, outputs = [], []
    # of the projection, with respect to the sample and the x0 that leave a step
    to_x = list(directions)
    to_x0 = [torch.zeros_like(u) for u in directions]
    older = to_x0.copy()  # the part of two steps before
    nothing = torch.zeros_like(recorded[:, 0])
    for k in reversed(range(K)):
        x, condition = recorded[:, k].clone().requires_grad_(), twin.condition(window.obs, k)
        # x0 of the step before enters by a constant factor; its value does not matter here
        after, (x0, _), branches, e = twin.step(k, x, (nothing, nothing), condition)
        inputs.append(twin.first_input(k, x.detach().numpy(), condition))
        outputs.append(e.detach())
        values.append([value.detach().flatten(1) for value in branches])
        slopes.append([])
        carried = dict(zip(COLUMNS, twin.sampler.table[k].tolist(), strict=True))
        for p in range(len(directions)):
            projection = (to_x[p] * after).sum() + (to_x0[p] * x0).sum()
            found = torch.autograd.grad(
                projection, [x, *branches], retain_graph=p + 1 < len(directions)
            )
            to_x0[p] = carried["g"] * to_x[p] + older[p]
            older[p] = carried["q"] * to_x[p]
            to_x[p] = found[0]
            slopes[-1].append([slope.flatten(1) for slope in found[1:]])
    B = len(twin.types)
    return Gradients(
        [torch.stack([step[b] for step in values[::-1]]) for b in range(B)],
        [
            torch.stack([torch.stack([u[b] for u in step]) for step in slopes[::-1]], 1)
            for b in range(B)
        ],
        np.stack(inputs[::-1]),
        torch.stack(outputs[::-1]),
    )


def _changes(values: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Of one block, what the actions change by if step k takes its value of step i < k.

    (P, C, i, k), and if it adds nothing, (P, C, k).
    """
    v, g = values.transpose(0, 1), slopes.transpose(1, 2)  # (C, K, D), (P, C, K, D)
    products = g @ v.transpose(1, 2)  # (P, C, step k, step i of the value)
    right = products.diagonal(dim1=2, dim2=3)
    return torch.triu((products - right[..., None]).transpose(2, 3), 1), right


def _own(values: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block, sums over chunks and directions: pair (K, K), segment (K, K + 1), skip (K)."""
    later, right = _changes(values, slopes)
    K = later.shape[2]
    segment = torch.zeros(K, K + 1, dtype=values.dtype)
    segment[:, 1:] = (torch.cumsum(later, 3) ** 2).sum((0, 1))
    return (later**2).sum((0, 1)), torch.triu(segment, 1), (right**2).sum((0, 1))


def chunk_segments(twin: Twin, window: Window, directions: Sequence[Tensor]) -> NDArray[np.float32]:
    """`Effects.segment` of each chunk of a window by itself, (C, B, K, K + 1)."""
    found = gradients(twin, window, directions)
    numbers = float(twin.executed(1).sum())
    tables = []
    for values, slopes in zip(found.values, found.slopes, strict=True):
        later, _ = _changes(values, slopes)
        tables.append(((torch.cumsum(later, 3) ** 2).mean(0) / numbers).numpy())
    table = np.stack(tables, 1).astype(np.float32)
    return np.triu(np.pad(table, ((0, 0), (0, 0), (0, 0), (1, 0))), 1)


def random_signs(twin: Twin, rows: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """Directions to project the executed actions on: independent signs, 0 where not executed."""
    executed = twin.executed(rows)
    return [
        (torch.randint(0, 2, executed.shape, generator=generator) * 2 - 1).to(twin.dtype) * executed
        for _ in range(count)
    ]


def _kinds(types: Sequence[str], values: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """(K, B, B) sums: block b takes the value of block c of its type, see `Effects.kind`."""
    B, K = len(values), len(values[0])
    table = torch.full((K, B, B), float("nan"), dtype=values[0].dtype)
    for b in range(B):
        for c in range(B):
            if types[b] != types[c] or b == c:
                continue
            taken = values[c] if c < b else torch.roll(values[c], 1, 0)
            change = (slopes[b] * (taken - values[b])).sum(-1)  # (P, K, C)
            table[:, b, c] = (change**2).sum((0, 2))
            if c > b:
                table[0, b, c] = float("nan")  # nothing is before the first step
    return table


def _rollouts(values: Tensor, slopes: Tensor) -> Tensor:
    """(A, K) of one block, means over what a window has of each age; NaN where it has none."""
    K, C, _ = values.shape
    table = torch.full((OLDEST, K), float("nan"))
    for age in range(1, min(OLDEST, C - 1) + 1):
        change = (slopes[:, :, age:] * (values[:, :-age] - values[:, age:])).sum(-1)
        table[age - 1] = (change**2).mean((0, 2))
    return table


def _rivals(twin: Twin, found: Gradients) -> dict[str, NDArray[Any]]:
    """Of the first chunk: what the published rules look at."""
    values = [value[:, None, 0].double().numpy() for value in found.values]  # (K, 1, D)
    apart = -np.concatenate([similarity(value, "l1") for value in values])
    K = len(values[0])
    layer = twin.blocks[0].rpartition(".")[0]
    first = [v for name, v in zip(twin.blocks, values, strict=True) if name.startswith(f"{layer}.")]
    return {
        "alike": np.concatenate([similarity(value) for value in values]),
        "changes": apart.sum((1, 2)) / max(K * (K - 1), 1),
        "first_layer": relative_l1(np.sum(first, axis=0)),
        "inputs": _to_the_step_before(found.inputs[:, 0]),
        "outputs": _to_the_step_before(found.outputs[:, 0].double().numpy()),
    }


def _to_the_step_before(x: NDArray[Any]) -> NDArray[Any]:
    return np.append(0.0, np.diagonal(relative_l1(x), 1))


def measure(
    twin: Twin,
    windows: Iterable[Window],
    *,
    projections: int = 2,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda chunks: None,
) -> Effects:
    """The tables of `Effects`, means over all chunks of the windows.

    ``projections``: random directions per chunk; chunks say more than directions do. ``progress``
    is called with the number of chunks just done. About 2 GB of memory for windows of 16 chunks of
    the standard transformer.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Any] = {}
    rollouts, rivals, done = [], [], 0

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0) + value.double()

    for window in windows:
        C = len(window.obs)
        signs = random_signs(twin, C, projections, generator)
        found = gradients(twin, window, signs)
        blocks = list(zip(found.values, found.slopes, strict=True))
        own = [_own(*block) for block in blocks]
        add("pair", torch.stack([pair for pair, _, _ in own]))
        add("segment", torch.stack([segment for _, segment, _ in own]))
        add("skip", torch.stack([skip for _, _, skip in own], 1))
        add("kind", _kinds(twin.types, found.values, found.slopes))
        rollouts.append(torch.stack([_rollouts(*block) for block in blocks], 2).double().numpy())
        rivals.append(_rivals(twin, found))
        done += C
        progress(C)
    if not done:
        raise ValueError("windows: expected at least one, got none; record some chunks")
    numbers = float(twin.executed(1).sum())
    scale = 1 / (done * projections * numbers)
    tables = {name: (total * scale).numpy().astype(np.float32) for name, total in sums.items()}
    tables["rollout"] = _mean(rollouts) / np.float32(numbers)
    for name in rivals[0]:
        tables[name] = np.mean([found[name] for found in rivals], axis=0).astype(np.float32)
    facts = {**(metadata or {}), "chunks": done, "projections": projections}
    return Effects(**tables, metadata=facts)


def _mean(tables: list[NDArray[Any]]) -> NDArray[np.float32]:
    stacked = np.stack(tables)
    known = ~np.isnan(stacked)
    total, count = np.where(known, stacked, 0).sum(0), known.sum(0)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return np.asarray(mean, np.float32)
