"""Straight-through gates, as the pruner of arXiv 2605.13316 is trained, with what that lacks.

A cell's value is a sum over sources, gated: g0 computed + g1 last of its type + g2 its own last.
Forwards the gates are 0 or 1, backwards they are the softmax's. Here teacher and student draw the
same noise, only executed actions count, normalised, and instead of a term that pulls the sparsity
towards a target every chunk keeps a budget: the score of computing is shifted so that what leads
costs as much. Earlier chunks are not a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tsad.plan import COMPUTE, REUSE_STEP, REUSE_TYPE
from tsad.samplers import NOISE
from tsad.training.sensitivity import Twin
from tsad.training.traced import Traced

SOURCES = (COMPUTE, REUSE_TYPE, REUSE_STEP)


def gates_of(logits: Tensor, costs: Sequence[int], budget: float) -> Tensor:
    """(C, K, B, 3) of a pruner's logits (C, K, B, 4) in the order of the loop, step 0 all computed.

    Of each chunk those cells are computed that lead by most and cost at most ``budget`` together,
    step 0 included.
    """
    C, K, B, _ = logits.shape
    known = logits[..., : len(SOURCES)]
    lead = (known[..., 0] - known[..., 1:].amax(-1)).detach()[:, 1:].flatten(1)
    each = torch.as_tensor(costs, dtype=torch.float64)
    order = lead.argsort(1, descending=True)
    spent = each.repeat(K - 1)[order.cpu()].cumsum(1)
    count = (spent <= budget - float(each.sum()) + 0.5).sum(1).to(order.device)
    ranked = lead.gather(1, order)
    last = ranked.gather(1, (count - 1).clamp(min=0)[:, None])
    after = ranked.gather(1, count.clamp(max=ranked.shape[1] - 1)[:, None])
    border = (last + after) / 2  # between what is computed and what is not
    border = torch.where(count[:, None] == 0, after + 1, border)
    border = torch.where(count[:, None] == ranked.shape[1], last - 1, border)
    shift = torch.zeros_like(known)
    shift[..., 0] = border[:, :, None].expand(C, K, B)
    p = torch.softmax(known - shift, -1)
    hard = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
    gates = hard - p.detach() + p
    first = torch.zeros_like(gates[:, :1])
    first[..., 0] = 1.0
    return torch.cat([first, gates[:, 1:]], 1)


def gated_chunks(twin: Twin, obs: NDArray[Any], noise: Tensor, gates: Tensor) -> Tensor:
    """The final samples (C, horizon, action_dim) of chunks run along gates (C, K, B, 3).

    ``obs`` (C, n_obs_steps, obs_dim) raw, ``noise`` (C, K, horizon, action_dim). Everything is
    computed, as the gradient of a gate asks for what it would have let through; what is kept of
    earlier steps has no gradient.
    """
    steps = noise.shape[1]
    computes = gates.detach()[..., 0] > 0.5
    x, nothing = noise[:, 0], torch.zeros_like(noise[:, 0])
    before = (nothing, nothing)
    own: dict[int, Tensor] = {}
    of_type: dict[str, Tensor] = {}
    for k in range(steps):

        def value(b: int, compute: Any, k: int = k) -> Traced:
            on = computes[:, k, b]
            if bool(on.any()):
                computed = compute().tensor
            else:
                with torch.no_grad():
                    computed = compute().tensor
            shape = (len(on), *(1 for _ in computed.shape[1:]))
            given, kept = computed, computed.detach()
            if k:
                g = [gates[:, k, b, c].reshape(shape) for c in range(len(SOURCES))]
                given = g[0] * computed + g[1] * of_type[twin.types[b]] + g[2] * own[b]
                kept = torch.where(on.reshape(shape), kept, own[b])
                last = torch.where(on.reshape(shape), kept, of_type[twin.types[b]])
            else:
                last = kept
            own[b], of_type[twin.types[b]] = kept, last
            return Traced(given)

        x, before, _, _ = twin.step(k, x, before, twin.condition(obs, k), value)
        if k + 1 < steps:
            x = x + float(twin.sampler.table[k, NOISE]) * noise[:, k + 1]
    return x


def gate_loss(twin: Twin, chunks: Tensor, right: Tensor) -> Tensor:
    """Mean absolute error of executed actions, normalised: ``right`` (C, n_action_steps, ...)."""
    net = twin.config.network
    first = net.n_obs_steps - 1
    executed = chunks[:, first : first + net.n_action_steps]
    return (executed - right).abs().mean()
