"""The published pruner: from the policy's memory to a source for every cell.

Source: "Test-time Sparsity for Extreme Fast Action Diffusion", arXiv 2605.13316.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tsad.reference.chunk import COMPUTE, Sources
from tsad.reference.layers import (
    Array,
    Tensors,
    attention,
    layer_norm,
    linear,
    relu,
    sinusoid,
    softmax,
)


def prune(w: Tensors, pruner: Mapping[str, Any], memory: Array, n_blocks: int) -> Array:
    """Logits (K, B, 4) of the four classes, row k from ``memory[k]``; ``memory`` is (K, S, d).

    One pre-norm ReLU decoder layer: tokens that code the block index attend to each other, then to
    the policy's own memory. Or an MLP of all memory tokens of a step in a row.
    """
    if pruner.get("type") == "mlp":
        x = linear(relu(linear(memory.reshape(len(memory), -1), w, "0")), w, "2")
        return x.reshape(len(memory), n_blocks, 4)
    name, n_head = "transformer_decoder.layers.0", pruner["n_head"]
    source = linear(memory, w, "memory_proj")
    x = sinusoid(np.arange(n_blocks), pruner["hidden_dim"], memory.dtype)
    x = np.broadcast_to(x, (len(memory), *x.shape))
    y = layer_norm(x, w, f"{name}.norm1")
    x = x + attention(y, y, w, f"{name}.self_attn", n_head)
    y = layer_norm(x, w, f"{name}.norm2")
    x = x + attention(y, source, w, f"{name}.multihead_attn", n_head)
    y = layer_norm(x, w, f"{name}.norm3")
    x = x + linear(relu(linear(y, w, f"{name}.linear1")), w, f"{name}.linear2")
    return linear(x, w, "head")


class HoistedPruner:
    """The transformer pruner with everything computed once that depends on neither step nor
    observation.

    Equal to ``prune`` up to rounding, for a token-wise encoder (``n_cond_layers`` 0). Constants are
    the block tokens after self-attention, their queries, and what the time tokens score and output;
    what the observation tokens score and output is the same at all K steps.
    """

    def __init__(
        self, w: Tensors, pruner: Mapping[str, Any], time_memory: Array, n_blocks: int
    ) -> None:
        """``time_memory`` (K, d): the time tokens of the memory, ``memory[:, 0]``."""
        name, self.n_head = "transformer_decoder.layers.0", pruner["n_head"]
        self.w = w
        x = sinusoid(np.arange(n_blocks), pruner["hidden_dim"], time_memory.dtype)
        y = layer_norm(x, w, f"{name}.norm1")
        x = x + attention(y, y, w, f"{name}.self_attn", self.n_head)
        self.tokens = x + w[f"{name}.multihead_attn.out_proj.bias"]  # (B, D)

        w_q, w_k, w_v = np.split(w[f"{name}.multihead_attn.in_proj_weight"], 3)
        b_q, b_k, b_v = np.split(w[f"{name}.multihead_attn.in_proj_bias"], 3)
        query = layer_norm(x, w, f"{name}.norm2") @ w_q.T + b_q
        self.query = self._heads(query) / math.sqrt(query.shape[-1] // self.n_head)
        # memory token -> key and value: memory_proj and the two projections are one affine map
        proj, bias = w["memory_proj.weight"], w["memory_proj.bias"]
        self.to_key, self.key_bias = proj.T @ w_k.T, bias @ w_k.T + b_k
        self.to_value, self.value_bias = proj.T @ w_v.T, bias @ w_v.T + b_v
        self.out = self._heads(w[f"{name}.multihead_attn.out_proj.weight"])  # (H, D, D / H)
        self.time_scores, self.time_outputs = self._score_and_output(time_memory)

    def _heads(self, x: Array) -> Array:  # (N, D) -> (H, N, D / H)
        return np.moveaxis(x.reshape(len(x), self.n_head, -1), 1, 0)

    def _score_and_output(self, memory: Array) -> tuple[Array, Array]:
        """Of memory tokens (N, d): scores (H, B, N), and what each adds if attended (H, N, D)."""
        key = self._heads(memory @ self.to_key + self.key_bias)
        value = self._heads(memory @ self.to_value + self.value_bias)
        return self.query @ np.swapaxes(key, 1, 2), value @ np.swapaxes(self.out, 1, 2)

    def __call__(self, obs_memory: Array) -> Array:
        """Logits (K, B, 4) from the observation tokens of the memory (n_obs_steps, d)."""
        name = "transformer_decoder.layers.0"
        scores, outputs = self._score_and_output(obs_memory)
        rows = []
        for k in range(self.time_outputs.shape[1]):
            time = slice(k, k + 1)
            p = softmax(np.concatenate([self.time_scores[:, :, time], scores], 2))
            tokens = np.concatenate([self.time_outputs[:, time], outputs], 1)
            x = self.tokens + (p @ tokens).sum(0)
            y = layer_norm(x, self.w, f"{name}.norm3")
            x = x + linear(relu(linear(y, self.w, f"{name}.linear1")), self.w, f"{name}.linear2")
            rows.append(linear(x, self.w, "head"))
        return np.stack(rows)


def plan(logits: Array) -> Sources:
    """Sources (K, B) of logits (K, B, 4): the likeliest class, the lowest index among equals.

    The published pruner is trained and run with its rows reversed in time: the sources of step k
    are the classes of row K - 1 - k. The first step is always computed.
    """
    sources: Sources = logits[::-1].argmax(-1).astype(np.uint8)
    sources[0] = COMPUTE
    return sources
