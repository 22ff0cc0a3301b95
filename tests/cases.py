"""Named configurations with random weights, and the tolerances; shared by tests and benchmarks.

Six published shapes (Diffusion Policy's task configurations), one odd shape that no power of two
fits, and small ones for tests that run many chunks. Weights are drawn so that activations are of
the order of 1 and every bias, gain and position counts: a zero would hide a missing term.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.config import block_costs, network_shapes, pruner_shapes
from tsad.reference import encode, prune

Tensors = dict[str, NDArray[np.float32]]

# max|a - b| / max|b|, against PyTorch's own modules in float64
NETWORK_TOLERANCE = 1e-5  # float32 engine, one forward pass
CHUNK_TOLERANCE = 1e-4  # float32 engine, a whole chunk with the same noise
REWRITE_TOLERANCE = 1e-5  # an exact rewrite against its plain form
PLAN_TOLERANCE = 1e-5  # float32 engine against the reference, any plan
REFERENCE_TOLERANCE = 1e-12  # the reference in float64: same formulas, other order of sums


def _network(horizon: int, n_obs: int, obs_dim: int, action_dim: int, **other: Any) -> dict:
    network = {
        "type": "diffusion_policy_transformer",
        "horizon": horizon,
        "n_obs_steps": n_obs,
        "n_action_steps": min(8, horizon - n_obs + 1),
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "n_layer": 8,
        "n_head": 4,
        "n_emb": 256,
        "n_cond_layers": 0,
        "causal_attn": True,
        "time_as_cond": True,
        "obs_as_cond": True,
    }
    assert other.keys() <= network.keys()
    return network | other


def _tiny(**other: Any) -> dict:
    return _network(5, 3, 6, 2, **{"n_layer": 2, "n_head": 2, "n_emb": 16} | other)


NETWORKS: dict[str, dict] = {
    "tiny": _tiny(),
    "tiny_encoder": _tiny(n_cond_layers=2),
    "tiny_noncausal": _tiny(causal_attn=False),
    "tiny_long": _network(10, 2, 6, 2, n_layer=2, n_head=2, n_emb=16),
    "tiny_now": _network(5, 1, 6, 2, n_layer=2, n_head=2, n_emb=16),
    "can": _network(10, 2, 137, 10),
    "transport": _network(10, 2, 274, 20),
    "pusht": _network(16, 2, 20, 2),
    "kitchen": _network(16, 4, 60, 9, n_emb=768),
    "blockpush": _network(5, 3, 16, 2, n_action_steps=1),
    "odd": _network(7, 3, 11, 5, n_layer=3, n_head=3, n_emb=192, n_action_steps=4),
}
SHAPES = ("can", "transport", "pusht", "kitchen", "blockpush", "odd")  # one forward pass each
SMALL = ("tiny", "tiny_encoder", "tiny_noncausal")  # cheap enough for many chunks

SCHEDULER: dict[str, Any] = {
    "type": "ddpm",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "variance_type": "fixed_small",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "num_inference_steps": 100,
}
PRUNER = {"hidden_dim": 512, "n_head": 8, "dim_feedforward": 1024}
TINY_PRUNER = {"hidden_dim": 24, "n_head": 3, "dim_feedforward": 40}
MLP_PRUNER = {"type": "mlp", "hidden_dim": 128}
TINY_MLP_PRUNER = {"type": "mlp", "hidden_dim": 19}


def config(name: str, *, pruner: bool | str = False, **scheduler: Any) -> dict[str, Any]:
    """The ``config.json`` of a named case as a new dict; keywords replace ``scheduler`` keys."""
    network = NETWORKS[name]
    assert scheduler.keys() <= SCHEDULER.keys()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    result: dict[str, Any] = {
        "format": "tsad",
        "format_version": 1,
        "network": dict(network),
        "scheduler": SCHEDULER | scheduler,
        "normalizer": {
            key: {
                "scale": rng.uniform(0.5, 2.0, network[dim]).tolist(),
                "offset": rng.uniform(-0.5, 0.5, network[dim]).tolist(),
            }
            for key, dim in (("obs", "obs_dim"), ("action", "action_dim"))
        },
        "cost": {"version": 1, "unit": "MAC", "blocks": list(block_costs(network))},
    }
    if pruner == "mlp":
        result["pruner"] = dict(TINY_MLP_PRUNER if name in SMALL else MLP_PRUNER)
    elif pruner:
        result["pruner"] = dict(TINY_PRUNER if name in SMALL else PRUNER)
    return copy.deepcopy(result)


def random_tensors(network: Mapping[str, Any], seed: int) -> Tensors:
    """float32 weights of a network, with the names of ``model.safetensors``."""
    return _random(network_shapes(network), seed)


def random_pruner(
    pruner: Mapping[str, Any],
    network: Mapping[str, Any],
    seed: int,
    *,
    tensors: Tensors | None = None,
) -> Tensors:
    """float32 weights of a pruner with no favourite class.

    With the policy's own ``tensors`` its classes come out mixed for that policy; otherwise one or
    two of them may win everywhere.
    """
    w = _random(pruner_shapes(pruner, network), seed)
    # What differs between cells must outweigh what they share: sharpen attention, and subtract the
    # mean from the logits.
    layer, mlp = "transformer_decoder.layers.0", pruner.get("type") == "mlp"
    if not mlp:
        w[f"{layer}.multihead_attn.in_proj_weight"][: 2 * pruner["hidden_dim"]] *= np.float32(2)
        w[f"{layer}.linear1.weight"] *= np.float32(2)
        w["memory_proj.weight"] *= np.float32(0.5)
    rng = np.random.default_rng(seed)
    if tensors is None:
        memory = rng.standard_normal((16, 1 + network["n_obs_steps"], network["n_emb"]))
    else:
        obs = rng.standard_normal((16, network["n_obs_steps"], network["obs_dim"]))
        memory = encode(tensors, network, np.linspace(0, 99, 16).round(), obs)
    mean = prune(w, pruner, memory, 3 * network["n_layer"]).mean(0)
    w["2.bias" if mlp else "head.bias"] -= mean.ravel() if mlp else mean.mean(0)
    return w


_MODULES = (
    "pos_emb cond_pos_emb input_emb cond_obs_emb memory_proj encoder decoder transformer_decoder "
    "ln_f head self_attn multihead_attn in_proj_weight in_proj_bias out_proj linear1 linear2 norm1 "
    "norm2 norm3 weight bias"
).split()


def _order(name: str) -> list[int]:
    """Where a name stands: recorded results are of weights that were drawn in this order."""
    words = (word for word in name.split(".") if word != "layers")
    return [int(word) if word.isdigit() else _MODULES.index(word) for word in words]


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes, key=_order):
        shape = shapes[name]
        values = rng.standard_normal(shape, dtype=np.float32)
        if "norm" in name or "ln_f" in name:
            values = np.float32(name.endswith("weight")) + np.float32(0.2) * values
        elif name.endswith("bias"):
            values *= np.float32(0.2)
        elif "pos_emb" in name:
            values *= np.float32(0.5)
        else:
            values *= np.float32(shape[-1] ** -0.5)
        tensors[name] = values
    return tensors


def random_inputs(
    config: Mapping[str, Any], seed: int, *, lanes: int = 1, steps: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``obs`` (lanes, n_obs_steps, obs_dim), raw, and ``noise`` (K, lanes, horizon, action_dim)."""
    network, rng = config["network"], np.random.default_rng(seed)
    steps = steps or config["scheduler"]["num_inference_steps"]
    shape = (lanes, network["n_obs_steps"], network["obs_dim"])
    obs = rng.standard_normal(shape, dtype=np.float32)
    shape = (steps, lanes, network["horizon"], network["action_dim"])
    return obs, rng.standard_normal(shape, dtype=np.float32)


def random_plan(
    rng: np.random.Generator, K: int, B: int, *, filled: NDArray[np.bool_] | bool = True
) -> NDArray[np.uint8]:
    """Valid sources uint8 (K, B), all five of them; the share of computed cells varies.

    ``filled`` (K, B): which cells an earlier rollout of the episode has computed. True: all, as
    after a dense first rollout; False: none, as right after a reset.
    """
    compute, reuse_type, reuse_step, reuse_rollout, _skip = range(5)
    share = rng.uniform(0.05, 0.9)
    weights = [share] + [(1 - share) / 4] * 4
    plan = rng.choice(5, size=(K, B), p=weights).astype(np.uint8)
    plan[(plan == reuse_rollout) & ~np.broadcast_to(filled, plan.shape)] = compute
    seen_types: set[int] = set()
    seen_blocks: set[int] = set()
    for k in range(K):
        for b in range(B):
            source = plan[k, b]
            missing = (source == reuse_type and b % 3 not in seen_types) or (
                source == reuse_step and b not in seen_blocks
            )
            if missing:
                plan[k, b] = source = compute
            if source == compute:
                seen_types.add(b % 3)
                seen_blocks.add(b)
    return plan


def relative_error(got: Any, expected: Any) -> float:
    """max|got - expected| / max|expected|; infinite if shapes differ or anything is not finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape or not (np.isfinite(got).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(got - expected).max() / np.abs(expected).max())
