"""The specification: a diffusion transformer with test-time sparsity, in plain NumPy.

Four stages give one chunk of actions: encode, prune, plan, denoise. Nothing here is rewritten for
speed; the C core and every backend must equal it. Source: "Test-time Sparsity for Extreme Fast
Action Diffusion", arXiv 2605.13316; network: Diffusion Policy's ``TransformerForDiffusion``.

Letters: K denoising steps in loop order, B = 3 x n_layer blocks, T horizon, S = 1 + n_obs_steps
memory tokens, d width. ``w`` is a dict of tensors by name; weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tsad.config import BLOCK_TYPES, NetworkConfig, block_names
from tsad.samplers import Sampler, make_sampler, tail

COMPUTE, REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT, SKIP = range(5)

Array = NDArray[np.float64]  # float32 where a policy is made with that dtype
Sources = NDArray[np.uint8]
Tensors = Mapping[str, Array]
Network = Mapping[str, Any]
Rollout = dict[tuple[int, int], Array]


# Layers


def linear(x: Array, w: Tensors, name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Array, w: Tensors, name: str) -> Array:
    centred: Array = x - x.mean(-1, keepdims=True)
    variance: Array = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax(x: Array) -> Array:
    e: Array = np.exp(x - x.max(-1, keepdims=True))
    total: Array = e.sum(-1, keepdims=True)
    return e / total


_erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x: Array) -> Array:
    erf: Array = np.asarray(_erf(x * math.sqrt(0.5)), x.dtype)
    return x * 0.5 * (1 + erf)


def mish(x: Array) -> Array:
    return x * np.tanh(np.logaddexp(0, x))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sinusoid(position: ArrayLike, dim: int, dtype: DTypeLike) -> Array:
    """Codes of positions (...): (..., dim), all sines first, then all cosines."""
    half = dim // 2
    frequency = np.exp(-math.log(10000) / (half - 1) * np.arange(half))
    angle = np.asarray(position, np.float64)[..., None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], -1).astype(dtype)


def attention(
    query: Array, source: Array, w: Tensors, name: str, n_head: int, mask: Array | float = 0.0
) -> Array:
    """Multi-head attention of ``query`` (..., Q, d) to ``source`` (..., N, d); ``mask`` (Q, N)."""
    weight, bias = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    w_q, w_k, w_v = np.split(weight, 3)
    b_q, b_k, b_v = np.split(bias, 3)

    def heads(x: Array) -> Array:  # (..., N, d) -> (..., n_head, N, d / n_head)
        return np.moveaxis(x.reshape(*x.shape[:-1], n_head, -1), -2, -3)

    q = heads(query @ w_q.T + b_q)
    k = heads(source @ w_k.T + b_k)
    v = heads(source @ w_v.T + b_v)
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]) + mask
    mixed = np.moveaxis(softmax(scores) @ v, -3, -2)
    return linear(mixed.reshape(query.shape), w, f"{name}.out_proj")


def causal_masks(network: Network, dtype: DTypeLike) -> tuple[Array, Array]:
    """Additive masks (T, T) and (T, S).

    Action token i sees action tokens up to i, and memory token s if i >= s - 1: the time (s = 0)
    and the oldest observation always, a newer observation from its own time on.
    """
    T, S = network["horizon"], 1 + network["n_obs_steps"]
    i = np.arange(T)[:, None]
    hidden = np.array(-np.inf, dtype) if network["causal_attn"] else np.array(0, dtype)
    action = np.where(i >= np.arange(T), np.array(0, dtype), hidden)
    memory = np.where(i >= np.arange(S) - 1, np.array(0, dtype), hidden)
    return action, memory


# Encode


def encode(w: Tensors, network: Network, timesteps: ArrayLike, obs: Array) -> Array:
    """Memory (..., S, d): a token of the time, then one per observation, oldest first.

    ``timesteps`` (...) are training timesteps, ``obs`` (..., n_obs_steps, obs_dim) is normalised.
    The encoder is an MLP on each token by itself, so observation tokens are the same at every
    timestep; with ``n_cond_layers`` it is a pre-norm transformer encoder and they are not.
    """
    tokens = linear(obs, w, "cond_obs_emb")
    time = sinusoid(timesteps, network["n_emb"], obs.dtype)[..., None, :]
    x: Array = np.concatenate([time, tokens], -2) + w["cond_pos_emb"][0]
    if network["n_cond_layers"] == 0:
        return linear(mish(linear(x, w, "encoder.0")), w, "encoder.2")
    for i in range(network["n_cond_layers"]):
        name = f"encoder.layers.{i}"
        y = layer_norm(x, w, f"{name}.norm1")
        x = x + attention(y, y, w, f"{name}.self_attn", network["n_head"])
        y = layer_norm(x, w, f"{name}.norm2")
        x = x + linear(gelu(linear(y, w, f"{name}.linear1")), w, f"{name}.linear2")
    return x


# Prune


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


# Plan


def plan(logits: Array) -> Sources:
    """Sources (K, B) of logits (K, B, 4): the likeliest class, the lowest index among equals.

    The published pruner is trained and run with its rows reversed in time: the sources of step k
    are the classes of row K - 1 - k. The first step is always computed.
    """
    sources: Sources = logits[::-1].argmax(-1).astype(np.uint8)
    sources[0] = COMPUTE
    return sources


# Denoise


def branch(w: Tensors, network: Network, block: int, h: Array, memory: Array) -> Array:
    """What block ``block`` adds to the residual stream ``h`` (..., T, d)."""
    name, n_head = f"decoder.layers.{block // 3}", network["n_head"]
    action_mask, memory_mask = causal_masks(network, h.dtype)
    kind = BLOCK_TYPES[block % 3]
    y = layer_norm(h, w, f"{name}.norm{block % 3 + 1}")
    if kind == "self_attn":
        return attention(y, y, w, f"{name}.self_attn", n_head, action_mask)
    if kind == "cross_attn":
        return attention(y, memory, w, f"{name}.multihead_attn", n_head, memory_mask)
    return linear(gelu(linear(y, w, f"{name}.linear1")), w, f"{name}.linear2")


def embed(w: Tensors, sample: Array) -> Array:
    position: Array = w["pos_emb"][0]
    return linear(sample, w, "input_emb") + position


def head(w: Tensors, h: Array) -> Array:
    return linear(layer_norm(h, w, "ln_f"), w, "head")


def predict(w: Tensors, network: Network, sample: Array, memory: Array) -> Array:
    """The dense network: its output (..., T, action_dim) for ``sample`` of that shape."""
    h = embed(w, sample)
    for block in range(3 * network["n_layer"]):
        h = h + branch(w, network, block, h, memory)
    return head(w, h)


def denoise(
    w: Tensors,
    network: Network,
    sampler: Sampler,
    memory: Array,
    noise: Array,
    sources: Sources,
    rollout: Rollout,
) -> Array:
    """One chunk: the final sample (T, action_dim), normalised.

    ``memory`` (K, S, d), ``noise`` (K, T, action_dim), ``sources`` (K, B). ``rollout[k, b]`` holds
    the value that cell had when it was last computed in this episode; it is read and written here.
    Only computing writes, and it writes all three caches.
    """
    last_of_type: dict[int, Array] = {}
    last_of_block: dict[int, Array] = {}
    x: Array = noise[0]
    x0_previous = np.zeros_like(x)
    for k in range(len(sources)):
        h = embed(w, x)
        for b in range(sources.shape[1]):
            source = sources[k, b]
            if source == COMPUTE:
                value = branch(w, network, b, h, memory[k])
                last_of_type[b % 3] = last_of_block[b] = rollout[k, b] = value
            elif source == REUSE_TYPE and b % 3 in last_of_type:
                value = last_of_type[b % 3]
            elif source == REUSE_STEP and b in last_of_block:
                value = last_of_block[b]
            elif source == REUSE_ROLLOUT and (k, b) in rollout:
                value = rollout[k, b]
            elif source == SKIP:
                continue
            else:
                raise ValueError(_unreadable(network, k, b, int(source)))
            h = h + value
        e = head(w, h)
        a, b_, r, c, d, f, g, s = sampler.table[k].tolist()
        x0 = np.clip(a * x + b_ * e, -r, r)
        x = c * x0 + d * x + f * e + g * x0_previous
        if k + 1 < len(sources):
            x = x + s * noise[k + 1]
        x0_previous = x0
    return x


def _unreadable(network: Network, k: int, b: int, source: int) -> str:
    reason = {
        REUSE_TYPE: f"reuse_type, but no {BLOCK_TYPES[b % 3]} block is computed before it",
        REUSE_STEP: "reuse_step, but the block is not computed at an earlier step",
        REUSE_ROLLOUT: "reuse_rollout, but no earlier rollout of this episode computed this cell",
    }.get(source, f"{source}, which is not one of 0 (compute) to 4 (skip)")
    return (
        f"plan: step {k}, block {b} ({block_names(network)[b]}): got {reason}; "
        "expected a source that exists: set this cell to compute (0)"
    )


# Policy


class ReferencePolicy:
    """The four stages behind the interface of ``tsad.load(...)``, lane by lane.

    ``config`` is a ``config.json``, ``tensors`` and ``pruner`` hold the weights by name. Noise is
    always given. All arithmetic is in ``dtype``.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, NDArray[Any]],
        pruner: Mapping[str, NDArray[Any]] | None = None,
        *,
        lanes: int = 1,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        dtype: DTypeLike = np.float64,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.network: Network = NetworkConfig.from_dict(config["network"]).to_dict()
        self.sampler = make_sampler(
            config["scheduler"], sampler=sampler, num_inference_steps=num_inference_steps
        )
        self.timesteps = self.sampler.timesteps
        self.num_inference_steps = len(self.timesteps)
        self.blocks = block_names(self.network)
        self.lanes = lanes
        self._w = {name: np.asarray(tensor, self.dtype) for name, tensor in tensors.items()}
        self._pruner_config = config.get("pruner")
        self._pruner = pruner and {k: np.asarray(v, self.dtype) for k, v in pruner.items()}
        self._affine = {
            key: [np.asarray(config["normalizer"][key][part], self.dtype) for part in parts]
            for key, parts in (("obs", ("scale", "offset")), ("action", ("scale", "offset")))
        }
        self._rollouts: list[Rollout] = [{} for _ in range(lanes)]
        self._first = [True] * lanes

    def reset(self, lanes: Sequence[int] | None = None) -> None:
        """Start of an episode for all lanes or the listed ones: earlier rollouts are forgotten."""
        for lane in range(self.lanes) if lanes is None else lanes:
            self._rollouts[lane] = {}
            self._first[lane] = True

    def encode(self, obs: ArrayLike) -> Array:
        """Memory (K, S, d) of every step from one raw observation (n_obs_steps, obs_dim)."""
        repeated = np.repeat(self._normalise(obs)[None], self.num_inference_steps, 0)
        return encode(self._w, self.network, self.timesteps, repeated)

    def prune(self, obs: ArrayLike) -> Array:
        """The pruner's logits (K, B, 4) for one raw observation, before the time reversal."""
        if not self._pruner or self._pruner_config is None:
            raise ValueError("pruner: this policy has none; pass pruner tensors, or a plan")
        return prune(self._pruner, self._pruner_config, self.encode(obs), len(self.blocks))

    def predict_noise(self, sample: ArrayLike, step: int, obs: ArrayLike) -> Array:
        """The dense network's output (N, T, action_dim) at loop index ``step``; no state changes.

        ``sample`` (N, T, action_dim) is normalised, ``obs`` (N, n_obs_steps, obs_dim) is raw.
        """
        timestep = np.full(len(np.asarray(sample)), self.timesteps[step])
        memory = encode(self._w, self.network, timestep, self._normalise(obs))
        return predict(self._w, self.network, np.asarray(sample, self.dtype), memory)

    def __call__(
        self,
        obs: ArrayLike,
        noise: ArrayLike,
        plan_sources: NDArray[Any] | Sequence[NDArray[Any]] | None = None,
        lanes: Sequence[int] | None = None,
        return_horizon: bool = False,
        *,
        first: NDArray[Any] | Sequence[NDArray[Any]] | None = None,
    ) -> Array:
        """Actions (L, n_action_steps, action_dim) in raw units, or the whole horizon.

        ``obs`` (L, n_obs_steps, obs_dim) raw; ``noise`` (K, L, T, action_dim): ``noise[0]`` is the
        initial sample, ``noise[k]`` what DDPM adds after step k - 1. ``plan_sources``: (K, B) for
        all lanes, or one per lane; None asks the pruner. ``first`` is used instead in a lane's
        first chunk after a reset; None is dense. ``lanes``: which lanes the L rows are; None is
        all. Raises ``ValueError`` for wrong shapes and for a plan that reads a value that does not
        exist; then no lane has changed.
        """
        rows = list(range(self.lanes)) if lanes is None else list(lanes)
        obs, noise = np.asarray(obs), np.asarray(noise, self.dtype)
        self._check("obs", obs, (len(rows), self.network["n_obs_steps"], self.network["obs_dim"]))
        sample_shape = (self.network["horizon"], self.network["action_dim"])
        self._check("noise", noise, (self.num_inference_steps, len(rows), *sample_shape))
        results, rollouts = [], []
        for i, lane in enumerate(rows):
            memory = self.encode(obs[i])
            if self._first[lane]:
                dense = np.zeros((self.num_inference_steps, len(self.blocks)), np.uint8)
                sources = dense if first is None else self._sources("first", first, i)
            elif plan_sources is None:
                sources = plan(self.prune(obs[i]))
            else:
                sources = self._sources("plan_sources", plan_sources, i)
            rollout = dict(self._rollouts[lane])
            x = denoise(self._w, self.network, self.sampler, memory, noise[:, i], sources, rollout)
            results.append(x)
            rollouts.append(rollout)
        for lane, rollout in zip(rows, rollouts, strict=True):
            self._rollouts[lane] = rollout
            self._first[lane] = False
        scale, offset = self._affine["action"]
        actions: Array = (np.stack(results) - offset) / scale
        start = self.network["n_obs_steps"] - 1
        executed = slice(start, start + self.network["n_action_steps"])
        return actions if return_horizon else actions[:, executed]

    def _normalise(self, obs: ArrayLike) -> Array:
        scale, offset = self._affine["obs"]
        normalised: Array = np.asarray(obs, self.dtype) * scale + offset
        return normalised

    def _sources(self, name: str, given: Any, row: int) -> Sources:
        shared = isinstance(given, np.ndarray) and given.ndim == 2
        sources = np.asarray(given if shared else given[row])
        self._check(name, sources, (self.num_inference_steps, len(self.blocks)))
        return sources

    @staticmethod
    def _check(name: str, value: NDArray[Any], shape: tuple[int, ...]) -> None:
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")


class WarmReference:
    """Warm start: `ReferencePolicy` whose later chunks start from the one before.

    The first chunk after a reset is dense, K steps from noise. The next ones run the last
    ``warm_start`` steps, N, and begin with the previous chunk moved by the actions executed since,
    its last action repeated, with the noise of that row.
    """

    def __init__(self, *args: Any, warm_start: int, **options: Any) -> None:
        """As `ReferencePolicy`."""
        self.cold, self.warm = ReferencePolicy(*args, **options), ReferencePolicy(*args, **options)
        self.warm.sampler = tail(self.cold.sampler, warm_start)
        self.warm.timesteps = self.warm.sampler.timesteps
        self.warm.num_inference_steps = warm_start
        self._previous: list[Array | None] = [None] * self.cold.lanes  # (T, action_dim), normalised

    def reset(self, lanes: Sequence[int] | None = None) -> None:
        """Start of an episode for all lanes or the listed ones."""
        for lane in range(self.cold.lanes) if lanes is None else lanes:
            self._previous[lane] = None
            self.warm.reset([lane])

    def __call__(
        self,
        obs: ArrayLike,
        noise: ArrayLike,
        executed: Sequence[int],
        plan_sources: NDArray[Any] | None = None,
        lanes: Sequence[int] | None = None,
        *,
        first: NDArray[Any] | None = None,
    ) -> Array:
        """All actions (L, T, action_dim) in raw units.

        ``obs`` (L, n_obs_steps, obs_dim) raw; ``noise`` (K, L, T, action_dim), of which a warm
        chunk takes the last N rows; ``executed`` (L,) actions of each lane since its previous
        chunk. ``plan_sources`` (N, B) is followed by warm chunks, ``first`` by the first warm one;
        None is dense.
        """
        scale, offset = self.cold._affine["action"]
        N, sampler = self.warm.num_inference_steps, self.warm.sampler
        signal = sampler.alphas_cumprod[0]
        dense = np.zeros((N, len(self.warm.blocks)), np.uint8)
        sources = dense if plan_sources is None else plan_sources
        results = []
        for i, lane in enumerate(range(self.cold.lanes) if lanes is None else lanes):
            z, before = np.array(noise, self.cold.dtype)[:, i : i + 1], self._previous[lane]
            own = np.asarray(obs)[i : i + 1]
            if before is None:
                self.cold.reset([lane])
                actions = self.cold(own, z, lanes=[lane], return_horizon=True)
            else:
                moved = np.concatenate([before, np.repeat(before[-1:], executed[i], 0)])
                z = z[-N:]
                z[0] = np.sqrt(signal) * moved[executed[i] :] + np.sqrt(1 - signal) * z[0]
                actions = self.warm(own, z, sources, [lane], return_horizon=True, first=first)
            self._previous[lane] = actions[0] * scale + offset
            results.append(actions[0])
        return np.stack(results)
