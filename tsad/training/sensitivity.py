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
from torch import Tensor, nn

from tsad.config import PolicyConfig
from tsad.families import as_transformer
from tsad.planners.bac import similarity
from tsad.planners.effects import Effects
from tsad.planners.rules import relative_l1
from tsad.samplers import Sampler
from tsad.training.network import from_config

OLDEST = 4  # chunks back that reuse_rollout is measured for


@dataclass(frozen=True)
class Window:
    """C consecutive chunks of one episode.

    ``obs`` (C, n_obs_steps, obs_dim) raw, ``inputs`` (C, K, horizon, action_dim) normalised.
    """

    obs: NDArray[Any]
    inputs: NDArray[Any]


class Twin:
    """The dense policy in torch, step by step, with its branch outputs.

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
        self.settings = as_transformer(config.network, "policy")
        self.network = from_config(config.to_dict()["network"])
        state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        self.network.load_state_dict(state)
        self.network.to(dtype).eval().requires_grad_(False)
        self.types = [b % 3 for b in range(3 * self.settings.n_layer)]

    def condition(self, obs: NDArray[Any]) -> Tensor:
        """Normalised observations."""
        affine = self.config.normalizer.obs
        scaled = affine.normalise(obs, np.float64)
        return torch.from_numpy(scaled).to(self.dtype)

    def executed(self, rows: int) -> Tensor:
        """1 where an action of the horizon is executed: (rows, horizon, action_dim)."""
        net = self.config.network
        mask = torch.zeros(rows, net.horizon, net.action_dim, dtype=self.dtype)
        mask[:, net.n_obs_steps - 1 : net.n_obs_steps - 1 + net.n_action_steps] = 1
        return mask

    def branch(self, block: int, hidden: Tensor, memory: Tensor) -> Tensor:
        """What a block adds to ``hidden`` (N, horizon, n_emb)."""
        layer: Any = self.network.decoder.layers[block // 3]
        if block % 3 == 0:
            y, mask = layer.norm1(hidden), self.network.mask
            value = layer.self_attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        elif block % 3 == 1:
            y, mask = layer.norm2(hidden), self.network.memory_mask
            value = layer.multihead_attn(y, memory, memory, attn_mask=mask, need_weights=False)[0]
        else:
            value = layer.linear2(nn.functional.gelu(layer.linear1(layer.norm3(hidden))))
        return torch.as_tensor(value)

    def step(
        self, k: int, x: Tensor, x0_previous: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """One denoising step without its noise: the next sample, x0, the branch outputs, input.

        The last is what enters the first block.
        """
        memory = self.network.encode(int(self.sampler.timesteps[k]), condition)
        hidden = begin = self.network.input_emb(x) + self.network.pos_emb
        values = []
        for block in range(len(self.types)):
            values.append(self.branch(block, hidden, memory))
            hidden = hidden + values[-1]
        e = self.network.head(self.network.ln_f(hidden))
        a, b, r, c, d, f, g, _ = self.sampler.table[k].tolist()
        x0 = (a * x + b * e).clamp(-r, r)
        return c * x0 + d * x + f * e + g * x0_previous, x0, values, begin


def gradients(
    twin: Twin, window: Window, directions: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Branch outputs, gradients, and the first block's inputs, of the chunks of a window.

    ``directions``: P tensors (C, horizon, action_dim), what the final samples are projected on.
    Returns values (B, K, C, D), gradients (P, B, K, C, D) of the projections, inputs (K, C, D);
    D = horizon x n_emb.
    """
    condition = twin.condition(window.obs)
    recorded = torch.from_numpy(window.inputs).to(twin.dtype)
    C, K = recorded.shape[:2]
    B, P = len(twin.types), len(directions)
    D = twin.settings.horizon * twin.settings.n_emb
    values = torch.empty(B, K, C, D, dtype=twin.dtype)
    slopes = torch.empty(P, B, K, C, D, dtype=twin.dtype)
    inputs = torch.empty(K, C, D, dtype=twin.dtype)
    # of the projection, with respect to the sample and the x0 that leave a step
    to_x = list(directions)
    to_x0 = [torch.zeros_like(u) for u in directions]
    nothing = torch.zeros_like(recorded[:, 0])
    for k in reversed(range(K)):
        x = recorded[:, k].clone().requires_grad_()
        # x0 of the step before enters by a constant factor; its value does not matter here
        after, x0, branches, begin = twin.step(k, x, nothing, condition)
        inputs[k] = begin.detach().reshape(C, D)
        for b, value in enumerate(branches):
            values[b, k] = value.detach().reshape(C, D)
        carried = float(twin.sampler.table[k, 6])
        for p in range(P):
            projection = (to_x[p] * after).sum() + (to_x0[p] * x0).sum()
            found = torch.autograd.grad(projection, [x, *branches], retain_graph=p + 1 < P)
            to_x0[p] = carried * to_x[p]
            to_x[p] = found[0]
            for b, slope in enumerate(found[1:]):
                slopes[p, b, k] = slope.reshape(C, D)
    return values, slopes, inputs


def _own(values: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block, sums over chunks and directions: pair (K, K), segment (K, K + 1), skip (K)."""
    v, g = values.transpose(0, 1), slopes.transpose(1, 2)  # (C, K, D), (P, C, K, D)
    products = g @ v.transpose(1, 2)  # (P, C, step k, step i of the value)
    right = products.diagonal(dim1=2, dim2=3)
    change = (products - right[..., None]).transpose(2, 3)  # (P, C, i, k)
    K = change.shape[2]
    later = torch.triu(change, 1)
    segment = torch.zeros(K, K + 1, dtype=values.dtype)
    segment[:, 1:] = (torch.cumsum(later, 3) ** 2).sum((0, 1))
    return (later**2).sum((0, 1)), torch.triu(segment, 1), (right**2).sum((0, 1))


def _kinds(types: Sequence[int], values: Tensor, slopes: Tensor) -> Tensor:
    """(K, B, B) sums: block b takes the value of block c of its type, see `Effects.kind`."""
    B, K = values.shape[:2]
    table = torch.full((K, B, B), float("nan"), dtype=values.dtype)
    for b in range(B):
        for c in range(B):
            if types[b] != types[c] or b == c:
                continue
            taken = values[c] if c < b else torch.roll(values[c], 1, 0)
            change = (slopes[:, b] * (taken - values[b])).sum(-1)  # (P, K, C)
            table[:, b, c] = (change**2).sum((0, 2))
            if c > b:
                table[0, b, c] = float("nan")  # nothing is before the first step
    return table


def _rollouts(values: Tensor, slopes: Tensor) -> Tensor:
    """(A, K, B) means over what a window has of each age; NaN where it has none."""
    C = values.shape[2]
    table = torch.full((OLDEST, values.shape[1], values.shape[0]), float("nan"))
    for age in range(1, min(OLDEST, C - 1) + 1):
        change = (slopes[..., age:, :] * (values[..., :-age, :] - values[..., age:, :])).sum(-1)
        table[age - 1] = (change**2).mean((0, 3)).T
    return table


def _rivals(values: Tensor, inputs: Tensor) -> dict[str, NDArray[Any]]:
    """Of one chunk, values (B, K, D) and inputs (K, D): what the published rules look at."""
    outputs = values.double().numpy().swapaxes(0, 1)
    first = relative_l1(outputs[:, :3].sum(1))
    apart = -similarity(outputs, "l1")
    K = len(outputs)
    pairs = max(K * (K - 1), 1)
    return {
        "alike": similarity(outputs),
        "changes": apart.sum((1, 2)) / pairs,
        "first_layer": first,
        "inputs": _to_the_step_before(inputs.double().numpy()),
        "outputs": _to_the_step_before(outputs.sum(1)),
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
        executed = twin.executed(C)
        signs = [
            (torch.randint(0, 2, executed.shape, generator=generator) * 2 - 1).to(twin.dtype)
            for _ in range(projections)
        ]
        values, slopes, inputs = gradients(twin, window, [sign * executed for sign in signs])
        own = [_own(values[b], slopes[:, b]) for b in range(len(values))]
        add("pair", torch.stack([pair for pair, _, _ in own]))
        add("segment", torch.stack([segment for _, segment, _ in own]))
        add("skip", torch.stack([skip for _, _, skip in own], 1))
        add("kind", _kinds(twin.types, values, slopes))
        rollouts.append(_rollouts(values, slopes).double().numpy())
        rivals.append(_rivals(values[:, :, 0], _timed(twin, inputs[:, 0])))
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


def _timed(twin: Twin, inputs: Tensor) -> Tensor:
    """Inputs (K, D) of the first block plus the time's embedding: TeaCache's input has both."""
    from tsad.reference import sinusoid

    horizon = twin.settings.horizon
    time = sinusoid(twin.sampler.timesteps, twin.settings.n_emb, np.float64)
    return inputs + torch.from_numpy(np.tile(time, (1, horizon))).to(inputs.dtype)
