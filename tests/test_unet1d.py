"""The conditional UNet in the core: PyTorch's operators in float64 say what is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from policies import check_bits
from torch_unet import Shape, Weights, predict

from tsad import _core
from tsad.samplers import NOISE

BACKENDS = [*_core.backends(), "guarded"]  # csrc/cpu/guarded.c
# of the largest output
TOLERANCES = {"float32": 1e-5, "int16": 3e-3, "int8": 5e-2}
SHAPES = {
    "lerobot": Shape(),
    "horizon64": Shape(horizon=64),
    "bias_only": Shape(kernel_size=3, n_groups=4, scales=False, n_emb=4),
    "kernel7": Shape(kernel_size=7, horizon=24, n_obs_steps=1),
    "two_levels": Shape(down_dims=(24, 40), horizon=20, n_obs_steps=3),
    "one_level": Shape(down_dims=(16,), horizon=7),
    "four_levels": Shape(down_dims=(8, 16, 32, 64)),  # one channel a group
    "large": Shape(down_dims=(64, 128), kernel_size=7),  # matrices that int8 keeps in 8 bits
    "wide": Shape(down_dims=(128, 256), n_obs_steps=1),  # parts of several groups
    "odd": Shape(down_dims=(24, 48), n_groups=6, action_dim=7, kernel_size=1),
    "square": Shape(down_dims=(8, 16), action_dim=8),  # the first block needs no 1x1 convolution
}
Sources = npt.NDArray[np.uint8]


def sampler(K: int) -> npt.NDArray[np.float32]:
    """x0 = clip(1.1 x - 0.5 e, -1, 1); x = 0.4 x0 + 0.6 x + 0.1 e + 0.05 x0' + 0.1 z - 0.1 x0''."""
    table = np.tile(np.array([1.1, -0.5, 1, 0.4, 0.6, 0.1, 0.05, 0.1, -0.1], np.float32), (K, 1))
    table[-1, NOISE] = 0
    return table


def time_emb(shape: Shape, K: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(99).uniform(-1, 1, (K, shape.n_emb)).astype(np.float32)


def make(
    shape: Shape,
    weights: Weights,
    *,
    K: int = 5,
    lanes: int = 1,
    threads: int = 1,
    **other: Any,
) -> _core.Policy:
    n_obs, A = shape.obs_dim, shape.action_dim
    model = _core.Model(**dict(
        family="unet1d", horizon=shape.horizon, n_obs_steps=shape.n_obs_steps, n_action_steps=1,
        obs_dim=n_obs, action_dim=A, n_emb=shape.n_emb, sampler=sampler(K),
        time_emb=time_emb(shape, K), obs_scale=np.ones(n_obs, np.float32),
        obs_offset=np.zeros(n_obs, np.float32), action_scale=np.ones(A, np.float32),
        action_offset=np.zeros(A, np.float32),
        block_cost=np.ones(len(shape.blocks()), np.int64), tensors=weights,
        down_dims=np.array(shape.down_dims, np.int32), kernel_size=shape.kernel_size,
        n_groups=shape.n_groups, use_film_scale_modulation=int(shape.scales),
    ) | other)  # fmt: skip
    return _core.Policy(model, lanes=lanes, threads=threads)


def inputs(shape: Shape, seed: int, lanes: int, K: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((lanes, shape.n_obs_steps, shape.obs_dim), np.float32)
    return obs, rng.standard_normal((K, lanes, shape.horizon, shape.action_dim), np.float32)


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


def test_registers_that_are_not_alive_together_share_memory() -> None:
    """One more thread takes what is alive at once, and little beside it."""
    shape, halo = Shape(down_dims=(64, 128, 256)), 4
    weights = shape.weights(1)
    one, two = (make(shape, weights, threads=threads)._bytes for threads in (1, 2))
    # a block's output and what is between its convolutions; in the middle a skip waits as well
    alive = {(c, T): 3 if c == 256 else 2 for _, _, c, T in shape.blocks()}
    floats = sum(n * (T + halo) * c for (c, T), n in alive.items())
    floats += (4 + halo) * 512 + (8 + halo) * 256  # with the skips beside them
    floats += 4 * max(T * c for c, T in alive)  # sums that are kept
    floats += max(T * (c + 5 * c_in // 2) for _, c_in, c, T in shape.blocks())  # rounded taps
    floats += 2 * sum(c for _, _, c, _ in shape.blocks())  # terms
    # arrays begin at boundaries, and between those of a sanitizer's build are red zones
    assert 4 * floats < two - one < 1.3 * 4 * floats


@pytest.mark.parametrize("precision", ["int16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_weights_are_the_same_on_every_path(backend: str, precision: str) -> None:
    """Products and sums are exact integers, so paths differ by what lies between them."""
    shape = SHAPES["large"]
    weights, (obs, z) = shape.weights(1), inputs(shape, 2, lanes=3, K=1)
    got, plain = (
        make(shape, weights, backend=name, precision=precision).predict_noise(z[0], 1, obs)
        for name in (backend, "ref")
    )
    assert np.abs(got - plain).max() < 2e-3 * np.abs(plain).max()


def block_types(shape: Shape) -> list[int]:
    """Branches of one shape are of one type, numbered as they come."""
    shapes = [(c, tokens) for _, _, c, tokens in shape.blocks()]
    return [list(dict.fromkeys(shapes)).index(s) for s in shapes]


def test_blocks_of_one_shape_are_of_one_type() -> None:
    for shape in SHAPES.values():
        assert make(shape, shape.weights(0)).model.block_type.tolist() == block_types(shape)


def random_plan(rng: np.random.Generator, types: list[int], K: int, filled: Any) -> Sources:
    """Any source that exists, for every cell."""
    plan = np.zeros((K, len(types)), np.uint8)
    of_type, of_block = set(), set()
    for k in range(K):
        for b, kind in enumerate(types):
            can = [0, 0, 4] + [1] * (kind in of_type) + [2] * (b in of_block)
            can += [3] * bool(filled is not None and filled[k, b])
            plan[k, b] = rng.choice(can)
            if plan[k, b] == 0:
                of_type.add(kind)
                of_block.add(b)
    return plan


@pytest.mark.parametrize("name", ["lerobot", "four_levels", "two_levels", "large"])
@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_threads_or_lanes(name: str, backend: str, precision: str) -> None:
    shape, K, lanes = SHAPES[name], 4, 7
    weights, rng, types = shape.weights(3), np.random.default_rng(4), block_types(shape)
    first = [random_plan(rng, types, K, None) for _ in range(lanes)]
    later = [random_plan(rng, types, K, plan == 0) for plan in first]
    calls = [inputs(shape, seed, lanes, K) for seed in range(3)]

    def made(threads: int) -> Any:
        return make(shape, weights, K=K, lanes=lanes, threads=threads, backend=backend,
                    precision=precision)  # fmt: skip

    check_bits(made, calls, first, later)


def test_a_plan_of_all_compute_is_dense_bit_for_bit() -> None:
    shape, K = SHAPES["lerobot"], 4
    weights = shape.weights(5)
    dense, planned = make(shape, weights, K=K), make(shape, weights, K=K, threads=2)
    plan = np.zeros((K, len(shape.blocks())), np.uint8)
    planned._set_plan(0, plan, plan)
    for seed in range(3):
        obs, z = inputs(shape, seed, 1, K)
        np.testing.assert_array_equal(planned(obs, noise=z), dense(obs, noise=z))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(horizon=18), "horizon: expected a multiple of 4"),
        (dict(kernel_size=4), "kernel_size: expected an odd number"),
        (dict(n_groups=5), "n_groups: expected a divisor of 16 channels, got 5"),
        (dict(down_dims=np.array([16, 0], np.int32)), r"down_dims\[1\]: expected 1 to 65536"),
        (dict(down_dims=np.zeros(0, np.int32)), "down_dims: expected 1 to 16 levels, got 0"),
        (dict(n_emb=6), "shape"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    shape = SHAPES["lerobot"]
    with pytest.raises(ValueError, match=message):
        make(shape, shape.weights(0), **change)


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    shape = SHAPES["lerobot"]
    weights = shape.weights(0)
    name = "up_modules.0.1.conv2.block.0.weight"
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing"):
        make(shape, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ValueError, match=rf"{name}': expected shape \(32, 32, 5\), got"):
        make(shape, weights | {name: weights[name][..., 0].copy()})


def test_a_sampler_that_adds_noise_at_its_end_is_refused() -> None:
    shape, table = SHAPES["lerobot"], sampler(5)
    table[-1, 7] = 0.1
    with pytest.raises(ValueError, match="sampler: its last row adds noise"):
        make(shape, shape.weights(0), sampler=table)
