"""precision="int16": 16-bit weights and activations, exact integer sums.

Every path against plain C and against the specification in float64, the bits against threads and
lanes, the sums against overflow, and what a row of zeros or without finite numbers becomes.
"""

from __future__ import annotations

import numpy as np
import pytest
from cases import SMALL, config, random_inputs, random_plan, relative_error
from engine import make, make_reference
from test_engine import OPEN
from test_nodes import FEED_FORWARD, LINEAR, RELU, make_policy, make_tensors
from test_nodes import K as NODE_STEPS

import tsad
from tsad import _core

BACKENDS = [*_core.backends(), "guarded"]  # csrc/cpu/guarded.c
NETWORK = 1e-3  # of the largest output; rounding to 16 bits costs 1 to 2e-4 a product
PATHS = 4e-4  # where scales differ in a last bit, numbers round to neighbours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*SMALL, "odd", "blockpush"])
def test_noise_prediction_is_near_the_reference_and_plain_c(name: str, backend: str) -> None:
    reference = make_reference(name)
    engine = make(name, backend=backend, precision="int16")
    plain = make(name, backend="ref", precision="int16")
    obs, noise = random_inputs(config(name), 1, lanes=3, steps=1)
    for step in (0, 50, 99):
        got = engine.predict_noise(noise[0], step, obs)
        error = relative_error(got, reference.predict_noise(noise[0], step, obs))
        assert 1e-6 < error < NETWORK  # not below: that would be float32
        assert relative_error(got, plain.predict_noise(noise[0], step, obs)) < PATHS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_bits_do_not_depend_on_threads_or_lanes(name: str, backend: str) -> None:
    steps, lanes = 4, 5
    B = len(make_reference(name).blocks)
    rng = np.random.default_rng(3)
    first = [random_plan(rng, steps, B, filled=False) for _ in range(lanes)]
    later = [random_plan(rng, steps, B, filled=plan == 0) for plan in first]
    inputs = [random_inputs(config(name), seed, lanes=lanes, steps=steps) for seed in range(3)]

    def run(threads: int, together: bool) -> np.ndarray:
        policy = make(name, lanes=lanes, threads=threads, backend=backend, steps=steps,
                      precision="int16", **OPEN)  # fmt: skip
        for lane in range(lanes):
            policy._set_plan(lane, later[lane], first[lane])
        rows = [list(range(lanes))] if together else [[i] for i in range(lanes)]
        return np.stack(
            [
                np.concatenate(
                    [policy(obs[r], noise=np.ascontiguousarray(noise[:, r]), lanes=r) for r in rows]
                )
                for obs, noise in inputs
            ]
        )

    expected = run(1, True)
    for threads in (1, 2, 4):
        for together in (True, False):
            np.testing.assert_array_equal(run(threads, together), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions_and_gates_round_too(backend: str) -> None:
    tensors = make_tensors(1)
    exact = make_policy(tensors, backend="ref")
    rounded = make_policy(tensors, backend=backend, precision="int16")
    rng = np.random.default_rng(0)
    obs, noise = rng.normal(size=(1, 1, 2)), rng.normal(size=(NODE_STEPS, 1, 8, 2))
    obs, noise = obs.astype(np.float32), noise.astype(np.float32)
    error = relative_error(rounded(obs, noise=noise), exact(obs, noise=noise))
    assert 1e-6 < error < 2e-3


def _one_block(width: int, hidden: int, up: np.ndarray, down: np.ndarray, **kwargs: object):
    """x -> x repeated over `width` channels, plus down @ relu(up @ x); the mean comes out."""
    nodes = np.array(
        [
            [LINEAR, 0, -1, 1, -1, 0, 0, 0, 1, 1],
            [FEED_FORWARD, 1, -1, 1, -1, 0, 0, RELU, 1, 1],
            [LINEAR, 1, -1, 2, -1, 0, 0, 0, 1, 1],
        ],
        np.int32,
    )
    registers = np.array([[8, 2], [8, width], [8, 2]], np.int32)
    spread = np.zeros((width, 2), np.float32)
    spread[:, 0] = 1
    gather = np.zeros((2, width), np.float32)
    gather[0] = 1 / width
    zero = {n: np.zeros(n, np.float32) for n in (2, width, hidden)}
    tensors = {
        "nodes.0.0.weight": spread, "nodes.0.0.bias": zero[width],
        "nodes.1.0.weight": up.astype(np.float32), "nodes.1.0.bias": zero[hidden],
        "nodes.1.1.weight": down.astype(np.float32), "nodes.1.1.bias": zero[width],
        "nodes.2.0.weight": gather, "nodes.2.0.bias": zero[2],
    }  # fmt: skip
    return make_policy(
        tensors, nodes=nodes, registers=registers, block_cost=np.ones(1, np.int64), **kwargs
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [64, 1023, 4096])
def test_the_largest_sums_do_not_overflow(width: int, backend: str) -> None:
    """Rows parallel to columns: the sum is as large as the two lengths allow, near 2^31.

    Equal numbers all round the same way, up to 1e-3 of them; an overflow would change the sign.
    """
    hidden = 32
    up, down = np.full((hidden, width), 0.01), np.full((width, hidden), 0.02)
    engine = _one_block(width, hidden, up, down, backend=backend, precision="int16")
    sample = np.full((1, 8, 2), 3.0, np.float32)
    got = engine.predict_noise(sample, 0, np.zeros((1, 1, 2), np.float32))[0, :, 0]
    np.testing.assert_allclose(got, 3 + 3 * 0.01 * width * 0.02 * hidden, rtol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_one_number_and_of_none(backend: str) -> None:
    """A single weight must not pass 16 bits; a column of zeros gives zero, not NaN."""
    up, down = np.zeros((32, 64)), np.zeros((64, 32))
    up[3, 17], down[:, 3] = 5.0, 0.5
    engine = _one_block(64, 32, up, down, backend=backend, precision="int16")
    sample = np.full((1, 8, 2), 2.0, np.float32)
    got = engine.predict_noise(sample, 0, np.zeros((1, 1, 2), np.float32))[0, :, 0]
    np.testing.assert_allclose(got, 2 + 2 * 5 * 0.5, rtol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_are_zero_and_rows_too_large_are_seen(backend: str) -> None:
    up, down = np.full((32, 64), 1e8), np.full((64, 32), 0.02)
    engine = _one_block(64, 32, up, down, backend=backend, precision="int16")
    sample, obs = np.zeros((1, 8, 2), np.float32), np.zeros((1, 1, 2), np.float32)
    assert (engine.predict_noise(sample, 0, obs)[..., 0] == 0).all()
    sample[0, 4:] = 1e12  # 6e21 between the matrices: its square is infinite in float32
    with pytest.raises(RuntimeError, match="row 0: the network overflowed"):
        engine.predict_noise(sample, 0, obs)


@pytest.mark.slow
def test_the_bundled_policy_in_16_bits() -> None:
    exact, rounded = (tsad.load("pusht", precision=p, lanes=2) for p in ("auto", "int16"))
    assert (exact.precision, rounded.precision) == ("float32", "int16")
    assert "int16" in repr(rounded)
    assert rounded.stats["weight_bytes"] < 0.6 * exact.stats["weight_bytes"]
    bound = rounded.stats["error_bound"]
    assert bound > exact.stats["error_bound"]
    scale = np.array(exact.config["normalizer"]["action"]["scale"])
    obs = np.random.default_rng(0).uniform(100, 400, (6, 2, 2, 20)).astype(np.float32)
    for seed, window in enumerate(obs):
        exact.reset(seed=seed)
        rounded.reset(seed=seed)
        difference = np.abs(exact(window) - rounded(window)) * scale
        assert 0 < difference.max() < bound
