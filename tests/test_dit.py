"""The DiT in the core: PyTorch's operators in float64 say what is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from policies import check_bits
from test_unet1d import BACKENDS, inputs, random_plan, sampler
from torch_dit import Shape, Weights, predict

from tsad import _core
from tsad.reference import dit as family
from tsad.reference.chunk import denoise
from tsad.reference.layers import rotation
from tsad.samplers import Sampler

# of the largest output
TOLERANCES = {"float32": 1e-5, "int16": 3e-3, "int8": 5e-2}
SHAPES = {
    "lerobot": Shape(),
    "mha": Shape(use_rope=False, positions=True),
    "both": Shape(positions=True, rope_base=100.0, horizon=5, num_heads=3, hidden_dim=30),
    "odd": Shape(use_rope=False, num_heads=1, hidden_dim=7, n_obs_steps=1, action_dim=1),
    "one_token": Shape(hidden_dim=6, num_heads=3, n_emb=4, horizon=1, n_obs_steps=1, num_layers=1),
    "horizon64": Shape(horizon=64, n_obs_steps=3),
    "large": Shape(hidden_dim=128, num_heads=8, num_layers=3),  # matrices that int8 keeps in 8 bits
}
TYPES = [0, 1]  # attention, MLP of each layer


def time_emb(shape: Shape, K: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(99).uniform(-1, 1, (K, shape.n_emb)).astype(np.float32)


def turns(shape: Shape) -> Any:
    head = shape.hidden_dim // shape.num_heads
    return rotation(shape.horizon, head, shape.rope_base) if shape.use_rope else None


def make(
    shape: Shape, weights: Weights, *, K: int = 5, lanes: int = 1, threads: int = 1, **other: Any
) -> _core.Policy:
    n_obs, A = shape.obs_dim, shape.action_dim
    model = _core.Model(**dict(
        family="dit", horizon=shape.horizon, n_obs_steps=shape.n_obs_steps, n_action_steps=1,
        obs_dim=n_obs, action_dim=A, n_emb=shape.n_emb, n_layers=shape.num_layers,
        n_heads=shape.num_heads, hidden_dim=shape.hidden_dim, rotation=turns(shape),
        use_positional_encoding=shape.positions,
        sampler=sampler(K), time_emb=time_emb(shape, K), obs_scale=np.ones(n_obs, np.float32),
        obs_offset=np.zeros(n_obs, np.float32), action_scale=np.ones(A, np.float32),
        action_offset=np.zeros(A, np.float32),
        block_cost=np.ones(2 * shape.num_layers, np.int64), tensors=weights,
    ) | other)  # fmt: skip
    return _core.Policy(model, lanes=lanes, threads=threads)


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_network_equals_pytorch(name: str, backend: str, precision: str) -> None:
    shape = SHAPES[name]
    weights = shape.weights(seed=1)
    policy = make(shape, weights, backend=backend, precision=precision)
    obs, z = inputs(shape, 2, lanes=3, K=1)
    for step in (0, 4):
        got = policy.predict_noise(z[0], step, obs)
        codes = np.repeat(time_emb(shape, 5)[step : step + 1], 3, 0)
        expected = predict(shape, weights, z[0], codes, obs).numpy()
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < TOLERANCES[precision]


def test_block_types_are_attention_and_mlp() -> None:
    shape = SHAPES["large"]
    assert make(shape, shape.weights(0)).model.block_type.tolist() == 3 * TYPES


def reference(shape: Shape, weights: Weights, K: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`denoise` of the specification with the core's inputs: (obs, noise, plan, rollout)."""
    codes = time_emb(shape, K).astype(np.float64)
    monkeypatch.setattr(family, "sinusoid", lambda t, *_, **__: codes[np.asarray(t)])
    network = family.check(shape.network())
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    steps = np.arange(K)
    loop = Sampler("own", steps, sampler(K).astype(np.float64), True, "epsilon", np.ones(K))

    def run(obs: Any, noise: Any, plan: Any, rollout: Any) -> Any:
        c = family.encode(w, network, steps, np.repeat(obs[None].astype(np.float64), K, 0))
        return denoise(w, network, loop, c, noise.astype(np.float64), plan, rollout)

    return run


@pytest.mark.parametrize("name", ["one_token", "both", "mha", "lerobot"])
def test_250_random_plans_equal_the_specification(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """125 episodes of two chunks: 1,000 plans of the four networks."""
    shape, K = SHAPES[name], 4
    weights, rng = shape.weights(3), np.random.default_rng(4)
    run = reference(shape, weights, K, monkeypatch)
    policies = [
        make(shape, weights, K=K, threads=threads, backend=backend)
        for threads, backend in ((1, None), (2, None), (1, "guarded"))
    ]
    types = TYPES * shape.num_layers
    for i in range(125):
        first = random_plan(rng, types, K, None)
        later = random_plan(rng, types, K, first == 0)
        rollout: dict[tuple[int, int], Any] = {}
        for policy in policies:
            policy.reset()
            policy._set_plan(0, later, first)
        for j, plan in enumerate((first, later)):
            obs, z = inputs(shape, 1000 + 2 * i + j, 1, K)
            expected = run(obs[0], z[:, 0], plan, rollout)
            for policy in policies:
                got = policy(obs, noise=z, return_horizon=True)[0]
                assert np.abs(got - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", ["lerobot", "both", "mha", "large"])
@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_threads_or_lanes(name: str, backend: str, precision: str) -> None:
    shape, K, lanes = SHAPES[name], 4, 7
    weights, rng = shape.weights(3), np.random.default_rng(4)
    types = TYPES * shape.num_layers
    first = [random_plan(rng, types, K, None) for _ in range(lanes)]
    later = [random_plan(rng, types, K, plan == 0) for plan in first]
    calls = [inputs(shape, seed, lanes, K) for seed in range(3)]

    def made(threads: int) -> Any:
        return make(shape, weights, K=K, lanes=lanes, threads=threads, backend=backend,
                    precision=precision)  # fmt: skip

    check_bits(made, calls, first, later)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(n_heads=5, rotation=None),
            r"multiple of n_heads \(5\).*got 32",
        ),
        (dict(n_heads=0, rotation=None), r"hidden_dim: expected a multiple of n_heads \(0\)"),
        (dict(n_heads=32, rotation=np.ones((16, 1), np.float32)), "with rotation an even one"),
        (dict(rotation=np.ones((16, 6), np.float32)), r"rotation: expected shape \(16, 8\)"),
        (dict(rotation=np.ones((15, 8), np.float32)), r"rotation: expected shape \(16, 8\)"),
        (dict(rotation=np.full((16, 8), np.nan, np.float32)), "rotation: expected numbers"),
        (dict(n_layers=0), "n_layers, hidden_dim: expected 1 to 8192"),
        (dict(hidden_dim=0, rotation=None), "n_layers, hidden_dim: expected"),
        (dict(n_emb=7, time_emb=np.ones((5, 7), np.float32)), "n_emb: expected an even number"),
        (dict(rotation=None), "multihead_attn.in_proj_weight' is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    shape = SHAPES["lerobot"]
    with pytest.raises(ValueError, match=message):
        make(shape, shape.weights(0), **change)


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    shape = SHAPES["lerobot"]
    weights = shape.weights(0)
    for name in weights:
        with pytest.raises(ValueError, match=f"tensor '{name}' is missing"):
            make(shape, {k: v for k, v in weights.items() if k != name})
        with pytest.raises(ValueError, match=f"{name}': expected shape"):
            make(shape, weights | {name: weights[name][1:].copy()})


def test_what_overflows_is_an_error() -> None:
    shape = SHAPES["lerobot"]
    weights = shape.weights(0)
    name = "transformer_blocks.1.mlp.2.weight"
    weights[name] = np.full_like(weights[name], 1e12)
    weights["output_proj.weight"] = np.full_like(weights["output_proj.weight"], 1e12)
    weights["transformer_blocks.1.adaLN_modulation.1.bias"] *= np.float32(1e12)
    policy = make(shape, weights)
    obs, z = inputs(shape, 2, 1, 5)
    with pytest.raises(RuntimeError, match="overflowed"):
        policy(obs, noise=z)
