"""precision="tf32" on the emulated GPU: products that cuBLAS has round what they multiply to TF32,
10 of 23 bits of mantissa, where the matrix is a large one; nothing else does.

What is right is NumPy's or PyTorch's own arithmetic in float64, of inputs rounded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_nodes as nodes
import test_unet1d as unet
import torch_unet
from cases import NETWORK_TOLERANCE, relative_error
from policies import noises, observations, save_policy
from test_cuda_blas import load_blas

import tsad
from tsad import _core, device, trust
from tsad.gpu_check.conformance import TRANSFORMER, UNET, tf32_differs
from tsad.precision import FLOAT32_BOUND, TF32_MARGIN

SEEN = 1e-4
"""What rounding does to these networks, at least, of the largest output."""
FLIPS = 3e-5
"""An activation that is near the middle of two numbers of TF32 may be rounded to either."""


def rounded(values: Any) -> Any:
    """To 11 significant bits, the nearest, ties to even."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent)


class Rounding(nodes.Oracle):
    """Blocks' matrices are large; what lies between blocks is not."""

    def linear(self, name: str, x: Any) -> Any:
        if int(name.split(".")[1]) not in nodes.HIDDEN:
            return super().linear(name, x)
        weight = rounded(self.tensors[f"{name}.weight"])
        return rounded(x) @ weight.T + self.tensors[f"{name}.bias"].astype(float)


def check_modes() -> None:
    """The network of nodes: blocks' products in TF32, and those between them, which cuBLAS has as
    well, in float32. A block's matrices hold a LayerNorm's scale, so networks have none here."""
    tensors = {name: t for name, t in nodes.make_tensors(3).items() if ".norm." not in name}
    x = np.random.default_rng(1).standard_normal((1, nodes.T, nodes.A), np.float32)
    obs, found = np.zeros((1, 1, nodes.A), np.float32), {}
    with device.setting("TSAD_CUDA_BLAS", "1"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "NORMED", set())
        for precision in ("float32", "tf32"):
            policy = nodes.make_policy(tensors, backend="cuda", precision=precision)
            found[precision] = policy.predict_noise(x, 2, obs)[0]
        dense = np.zeros(nodes.B, np.uint8)
        exact, right = (
            oracle(tensors).network(2, x[0].astype(float), dense, {}, {})
            for oracle in (nodes.Oracle, Rounding)
        )
    assert relative_error(found["float32"], exact) < NETWORK_TOLERANCE
    assert relative_error(found["tf32"], right) < FLIPS
    assert relative_error(right, exact) > 10 * FLIPS


def check_tf32(path: str) -> None:
    """What a planted fault must not pass (cuda_mutants.py)."""
    load_blas(path)
    check_modes()


def test_large_matrices_round_and_no_others(blas: str) -> None:
    check_tf32(blas)


def test_a_unet_rounds_as_pytorch_would(blas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions, and not the matrices of its terms; of one level, as what is rounded to another
    number makes later layers round others to other numbers."""
    torch = pytest.importorskip("torch")
    shape = unet.SHAPES["one_level"]
    weights = shape.weights(1)
    obs, z = unet.inputs(shape, 2, lanes=1, K=1)
    codes = unet.time_emb(shape, 5)[4:5]
    exact = torch_unet.predict(shape, weights, z[0], codes, obs).numpy()
    for name in ("conv1d", "conv_transpose1d"):

        def convolution(x: Any, w: Any, *rest: Any, right: Any, **options: Any) -> Any:
            return right(*(torch.from_numpy(rounded(t.numpy())) for t in (x, w)), *rest, **options)

        right = getattr(torch.nn.functional, name)
        wrapped = lambda *a, right=right, **o: convolution(*a, right=right, **o)  # noqa: E731
        monkeypatch.setattr(torch_unet.F, name, wrapped)
    expected = torch_unet.predict(shape, weights, z[0], codes, obs).numpy()
    found = {}
    for rows in ("0", "1"):
        for precision in ("float32", "tf32"):
            with device.setting("TSAD_CUDA_BLAS", rows):
                policy = unet.make(shape, weights, backend="cuda", precision=precision)
            found[rows, precision] = policy.predict_noise(z[0], 4, obs)
    assert relative_error(expected, exact) > SEEN
    assert relative_error(found["1", "tf32"], exact) > SEEN
    assert relative_error(found["1", "tf32"], expected) < 0.3 * relative_error(expected, exact)
    assert relative_error(found["1", "float32"], exact) < NETWORK_TOLERANCE
    np.testing.assert_array_equal(found["0", "tf32"], found["0", "float32"])


def test_a_cpu_rounds_the_weights_as_numpy() -> None:
    """What a GPU's rounding is measured by."""
    shape = unet.SHAPES["two_levels"]
    weights = shape.weights(1)
    for name in [name for name, w in weights.items() if w.ndim == 3]:
        weights[name].reshape(-1)[:3] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, 3e-6  # ties
    plain = {
        name: rounded(w).astype(np.float32) if w.ndim == 3 else w for name, w in weights.items()
    }
    obs, z = unet.inputs(shape, 2, lanes=2, K=1)
    for backend in _core.backends():
        got = unet.make(shape, weights, backend=backend, precision="tf32")
        expected = unet.make(shape, plain, backend=backend)
        outputs = [policy.predict_noise(z[0], 1, obs) for policy in (got, expected)]
        np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("network", [TRANSFORMER, UNET], ids=["transformer", "unet"])
def test_the_check_of_a_gpu_knows_what_it_may_cost(
    blas: str, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = tf32_differs(network)
    assert 1 / TF32_MARGIN / 4 < share < 0.6  # it rounds, and the bound is no accident


def test_load_takes_it_on_a_gpu_alone(
    blas: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsad.precision.MOST_CHUNKS", 4)
    for variable in ("TSAD_TRUST", "TSAD_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_policy(tmp_path / "policy")
    options: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 2}
    exact = tsad.load(folder, **options)
    noise, obs = noises(exact, 1), observations(exact, 2)
    scale = np.array(exact.config["normalizer"]["action"]["scale"])

    def error(precision: str) -> tuple[Any, float]:
        got = tsad.load(folder, device="cuda", precision=precision, **options)
        both = [policy(obs, noise=noise, return_horizon=True) for policy in (got, exact)]
        return got, float(np.abs((both[0] - both[1]) * scale).max())

    assert error("tf32")[1] < 2e-5  # of one lane, whose rows are too few for cuBLAS
    monkeypatch.setenv("TSAD_CUDA_BLAS", "1")
    got, apart = error("tf32")
    bound = got.stats["error_bound"]
    assert got.precision == "tf32" and "tf32" in repr(got)
    assert 5e-5 < apart < bound and FLOAT32_BOUND < bound < 0.1
    assert error("auto")[1] < 2e-5 > error("float32")[1]
    said = "precision: expected one of 'auto', 'float32', 'int16', 'int8' on device 'cpu', got 'tf3"
    with pytest.raises(ValueError, match=said):
        tsad.load(folder, precision="tf32")
    with pytest.raises(ValueError, match="'float32', 'tf32', 'float16', .* 'cuda', got 'tf16'"):
        tsad.load(folder, device="cuda", precision="tf16")


def test_what_rounds_too_much_is_not_trusted(
    blas: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of float32's own rounding it is refused: those products are asked, too."""
    for variable in ("TSAD_TRUST", "TSAD_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_policy(tmp_path / "policy")
    options: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 2}
    monkeypatch.setattr(trust, "_allowed", lambda *of: 2e-5)
    with pytest.raises(RuntimeError, match="with cuBLAS 0.0.1: TSAD_CUDA_BLAS=0 does without it"):
        tsad.load(folder, device="cuda", precision="tf32", **options)
    tsad.load(folder, device="cuda", precision="float32", **options)
