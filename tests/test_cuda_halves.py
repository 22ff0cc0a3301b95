"""Weights in 16 bits on a GPU: float16 and bfloat16.

NumPy and PyTorch say how they are rounded, on the CPU, bit for bit; the CPU says what a GPU (here
an emulated one) makes of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_dit as dit
import test_unet1d as unet
from cases import (
    NETWORK_TOLERANCE,
    config,
    random_tensors,
    relative_error,
)
from engine import make
from policies import noises, observations, save_policy
from test_cuda import check_plans
from test_engine import OPEN

import tsad
from tsad import _core
from tsad.precision import FLOAT32_BOUND

HALVES = ["float16", "bfloat16"]


def rounded(values: Any, precision: str) -> Any:
    """As NumPy and PyTorch round."""
    if precision == "float16":
        return values.astype(np.float16).astype(np.float32)
    torch = pytest.importorskip("torch")
    return torch.from_numpy(values).bfloat16().float().numpy()


@pytest.fixture
def cuda(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", emulated_cuda)
    _core._load_backend(emulated_cuda)  # the last one loaded is the one that runs
    return emulated_cuda


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("backend", _core.backends())
def test_weights_are_rounded_as_numpy_and_pytorch_round(backend: str, precision: str) -> None:
    """A UNet's convolutions lie in the core as they are in the file; biases and norms stay."""
    shape = unet.SHAPES["two_levels"]
    weights, rng = shape.weights(1), np.random.default_rng(0)
    obs, z = unet.inputs(shape, 2, lanes=2, K=1)
    for name in [name for name, w in weights.items() if w.ndim == 3]:
        flat = weights[name].reshape(-1)
        flat *= np.exp2(rng.integers(-20, 1, flat.size)).astype(np.float32)
        flat[:5] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 3e-6, 2.0**-25  # ties, tiny
        flat[5:] *= np.float32(16)
    plain = {name: rounded(w, precision) if w.ndim == 3 else w for name, w in weights.items()}
    got = unet.make(shape, weights, backend=backend, precision=precision)
    expected = unet.make(shape, plain, backend=backend)
    exact = unet.make(shape, weights, backend=backend).predict_noise(z[0], 1, obs)
    right = expected.predict_noise(z[0], 1, obs)
    np.testing.assert_array_equal(got.predict_noise(z[0], 1, obs), right)
    assert relative_error(right, exact) > 1e-4


def two(family: str, precision: str) -> list[Any]:
    """A policy of a family on the emulated GPU and on the CPU."""
    found = []
    for backend in ("cuda", None):
        if family in ("tiny", "tiny_encoder", "tiny_long"):
            options: Any = {"steps": 3, "precision": precision, **OPEN}
            found.append(make(family, backend=backend, **options))
        else:
            kind, name = family.split()
            test: Any = {"unet": unet, "dit": dit}[kind]
            shape = test.SHAPES[name]
            weights = shape.weights(3)
            found.append(test.make(shape, weights, backend=backend, precision=precision))
    return found


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(
    "family", ["tiny", "tiny_encoder", "unet bias_only", "unet odd", "dit both"]
)
def test_a_network_equals_the_cpu(cuda: str, family: str, precision: str) -> None:
    got, expected = two(family, precision)
    sample = noises(got, 0, 2)[0]
    obs = observations(got, 1, 2)
    outputs = [policy.predict_noise(sample, 2, obs) for policy in (got, expected)]
    assert relative_error(*outputs) < NETWORK_TOLERANCE
    exact = two(family, "float32")[1].predict_noise(sample, 2, obs)
    assert relative_error(outputs[1], exact) > 10 * NETWORK_TOLERANCE  # it rounds
    assert got.model.weight_bytes < two(family, "float32")[0].model.weight_bytes


@pytest.mark.parametrize("family", ["transformer", "unet", "dit"])
def test_random_plans_equal_the_cpu(cuda: str, family: str) -> None:
    check_plans(family, rounds=1, precision="float16")


def test_large_networks_take_half_the_bytes(cuda: str) -> None:
    shape = unet.SHAPES["large"]
    half, whole = (
        unet.make(shape, shape.weights(1), backend="cuda", precision=precision).model.weight_bytes
        for precision in ("bfloat16", "float32")
    )
    assert 0.5 < half / whole < 0.62


@pytest.mark.parametrize("precision", HALVES)
def test_load_takes_them_on_a_gpu_alone(
    cuda: str, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsad.precision.MOST_CHUNKS", 4)
    folder = save_policy(tmp_path)
    options: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 2}
    got = tsad.load(folder, device="cuda", precision=precision, **options)
    exact = tsad.load(folder, **options)
    noise, obs = noises(exact, 1), observations(exact, 2)
    scale = np.array(exact.config["normalizer"]["action"]["scale"])
    both = [policy(obs, noise=noise, return_horizon=True) for policy in (got, exact)]
    error, bound = np.abs((both[0] - both[1]) * scale).max(), got.stats["error_bound"]
    assert FLOAT32_BOUND < bound and 1e-5 < error < bound
    assert got.precision == precision and precision in repr(got)
    said = rf"precision: expected .*'int16', 'int8' on device 'cpu', got '{precision}'; choose"
    with pytest.raises(ValueError, match=said):
        tsad.load(folder, precision=precision)
    with pytest.raises(ValueError, match="'float16', 'bfloat16' on device 'cuda', got 'int8'"):
        tsad.load(folder, device="cuda", precision="int8")
    with pytest.raises(ValueError, match="precision: expected .* on device 'cuda', got a CPU's"):
        make("tiny", backend="cuda", precision="int16")


def test_a_weight_that_float16_has_not_is_refused(cuda: str) -> None:
    tensors = random_tensors(config("tiny")["network"], 0)
    tensors["decoder.layers.1.linear2.weight"][0, 0] = 70000
    for backend in ("cuda", None):
        with pytest.raises(ValueError, match="up to 65504, as 'float16' has, got 70000; use 'bf"):
            make("tiny", backend=backend, precision="float16", tensors=tensors)
        make("tiny", backend=backend, precision="bfloat16", tensors=tensors)
