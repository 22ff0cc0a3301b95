"""The pruner's network in torch, and the static table that it begins as.

An MLP on the policy's memory tokens (`tsad.config.PrunerConfig`): three in four of its hidden units
see the time alone and hold the table, the others see the observation too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsad.config import PolicyConfig
from tsad.families import as_transformer
from tsad.planners.nested import NestedOrder
from tsad.training import sensitivity

MOST = 0.002  # of the dense multiply-accumulates, for the pruner's own
_NEVER = -100.0  # a score below all others


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


def reused(output: Tensor) -> Tensor:
    """(..., K, B): where each cell takes its value from if it is not computed; as above."""
    logits = output.reshape(*output.shape[:-1], -1, 4).flip(-3)
    return 1 + logits[..., 1:].argmax(-1)


@torch.no_grad()
def set_table(
    net: nn.Sequential,
    times: Tensor,
    tokens: Tensor,
    table: Tensor,
    seed: int,
    *,
    of_type: float = _NEVER,
    timeless: bool = False,
) -> int:
    """Make the pruner a static table: whatever the observation, it says ``table`` (K, B).

    Three in four of its units see the time token ``times`` (K, n_emb) alone: random features, and
    by ridge regression what they add up to. The others see the observation ``tokens`` (N,
    n_obs_steps, n_emb) too, or alone if ``timeless``, and add nothing yet. Own values
    (`reuse_step`) are what is reused; `reuse_type` stands at ``of_type`` beside their 0. Returns
    how many units the table has.
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
    if timeless:
        weight[count:, :d] = 0
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
    last.bias.copy_(last.bias.new_tensor([0.0, of_type, 0.0, _NEVER]).repeat(table.shape[1]))
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
