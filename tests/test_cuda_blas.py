"""Products of many rows through cuBLAS, on the emulated GPU, whose library has a stand-in for it.

With TSAD_CUDA_BLAS=1 all products that can go there do, whatever their rows.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cuda
import test_unet1d as unet
from cases import NETWORK_TOLERANCE, config, random_inputs, relative_error
from engine import make

from tsad import _core, device
from tsad.commands.info import build_facts


def load_blas(path: str) -> None:
    """The library's own stand-in, as `tsad.device.cublas` finds it."""
    load = ctypes.CDLL(path).tsad_plugin_blas
    load.restype = ctypes.c_char_p
    assert load(path.encode()) is None


def kernels(policy: Any, lanes: int = 1, K: int = 1) -> int:
    """Of a chunk."""
    shape = (lanes, policy.n_obs_steps, policy.obs_dim)
    noise = np.zeros((K, lanes, policy.horizon, policy.action_dim), np.float32)
    before = device.counts()
    policy(np.zeros(shape, np.float32), noise=noise)
    return device.counts().since(before).kernels


def check_blas(path: str) -> None:
    """A little of everything: what a planted fault must not pass (cuda_mutants.py)."""
    load_blas(path)
    with device.setting("TSAD_CUDA_BLAS", "1"):
        for family in ("transformer", "unet", "dit"):
            test_cuda.check_plans(family, rounds=1)
        test_cuda.check_plans("transformer", rounds=1, precision="float16")
        test_cuda.check_rows()
        test_cuda.check_pruner("tiny_encoder", "transformer")  # folds of layers go together
        check_captures()


def check_captures() -> None:
    """What cuBLAS has to load spoils a capture once, and the bits are those of launches."""
    found = []
    for graphs in "10":
        with device.setting("TSAD_CUDA_GRAPHS", graphs):
            policy = make("odd", backend="cuda", lanes=2, steps=2)
        chunks = []
        for seed in range(4):
            obs, noise = random_inputs(config("odd"), seed, lanes=2, steps=2)
            chunks.append(policy(obs, noise=noise))
        found.append(chunks)
    np.testing.assert_array_equal(*found)


def test_all_products_through_it_equal_the_cpu(blas: str) -> None:
    check_blas(blas)


def test_chunks_are_graphs_again_after_a_spoilt_capture(blas: str, tmp_path: Path) -> None:
    """A library of its own, which has loaded nothing yet."""
    own = shutil.copy(blas, tmp_path / "own.so")
    name, _ = _core._load_backend(str(own))
    load_blas(str(own))
    with device.setting("TSAD_CUDA_BLAS", "1"), device.setting("TSAD_CUDA_LIBRARY", str(own)):
        policy, graphs = make("tiny", backend="cuda", steps=2), []
        for seed in range(4):
            obs, noise = random_inputs(config("tiny"), seed, steps=2)
            before = device.counts()
            policy(obs, noise=noise)
            asked = device.counts().since(before)
            graphs.append(asked.graphs)
            assert asked.waits == 1
    # the first chunk's and the later ones' plans are two programs of the same products
    assert "emulated" in name and graphs[0] == 0 and graphs[-1] == 1


def test_from_so_many_rows_on(blas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches, or two, for one: inputs side by side, the product, what becomes of it."""
    shape, found = unet.SHAPES["two_levels"], {}
    weights = shape.weights(1)
    for rows in ("0", "1", "21", "40", "41", "auto"):
        monkeypatch.setenv("TSAD_CUDA_BLAS", rows)
        policies = {n: unet.make(shape, weights, K=1, lanes=n, backend="cuda") for n in (1, 2)}
        found[rows] = [kernels(policy, n) for n, policy in policies.items()]
    most, none = found["1"], found["0"]
    assert shape.horizon == 20 and none[0] == none[1] and found["41"] == found["auto"] == none
    assert none[0] == found["21"][0] == found["40"][0] < most[0]  # 20 rows are too few
    assert none[1] < found["40"][1] <= found["21"][1] < most[1]


def test_rows_enough_go_to_it_by_themselves(blas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 64 rows on, where our own kernel would read the matrix four times."""
    shape = unet.SHAPES["two_levels"]
    weights = shape.weights(1)
    found: dict[str, int] = {}
    obs, z = unet.inputs(shape, 3, lanes=4, K=2)
    expected = unet.make(shape, weights, K=2, lanes=4)(obs, noise=z)
    for rows in ("0", "auto"):
        monkeypatch.setenv("TSAD_CUDA_BLAS", rows)
        policy = unet.make(shape, weights, K=2, lanes=4, backend="cuda")
        assert relative_error(policy(obs, noise=z), expected) < NETWORK_TOLERANCE
        found[rows] = kernels(policy, 4, 2)
    assert found["0"] < found["auto"]


@pytest.mark.parametrize("given", ["-1", "many", "1.5", "2000000"])
def test_a_wrong_setting_is_said(blas: str, given: str) -> None:
    with device.setting("TSAD_CUDA_BLAS", given):
        with pytest.raises(ValueError, match=rf"TSAD_CUDA_BLAS: expected 'auto' .*got '{given}'"):
            make("tiny", backend="cuda")


def test_without_it_all_is_as_before(blas: str, tmp_path: Path) -> None:
    """A library that was asked for nothing; what it was asked for it says."""
    own = shutil.copy(blas, tmp_path / "own.so")
    _core._load_backend(str(own))
    test_cuda.check_rows()
    with device.setting("TSAD_CUDA_BLAS", "1"):
        with pytest.raises(ValueError, match="TSAD_CUDA_BLAS: '1' needs cuBLAS, which was not fo"):
            make("tiny", backend="cuda")


def test_what_was_found_is_said(blas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    libm = "libm.so.6"
    for named in ("", "/nowhere/libcublas.so", libm):
        monkeypatch.setenv("TSAD_CUBLAS_LIBRARY", named)
        said[named] = build_facts()["cublas"]
    assert said[""].startswith(f"found: 0.0.1, {blas}")
    assert said["/nowhere/libcublas.so"].startswith("not used: /nowhere/libcublas.so: cannot open")
    assert "pip install nvidia-cublas" in said["/nowhere/libcublas.so"]
    assert said[libm].startswith("not used: libm.so.6 has no cublasCreate_v2")
    monkeypatch.delenv("TSAD_CUBLAS_LIBRARY")
    assert "cuBLAS 0.0.1" in device.identity()
    monkeypatch.delenv("TSAD_CUDA_LIBRARY")
    if device.cuda().library is None:
        assert device.cublas().words() == "not used: this build has no CUDA backend"


def test_places_where_it_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel's, the system's, the toolkit's, and of the runtime's number first."""
    for part in ("cu13", "cublas"):
        folder = tmp_path / "nvidia" / part / "lib"
        folder.mkdir(parents=True)
        (folder / f"libcublas.so.{12 if part == 'cublas' else 13}").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    found = device._cublas_paths(13)
    mine = [path.removeprefix(f"{tmp_path}/") for path in found if "site-packages" not in path]
    assert mine == [
        *("nvidia/cu13/lib/libcublas.so.13", "libcublas.so.13", "/toolkit/lib64/libcublas.so.13"),
        *("nvidia/cublas/lib/libcublas.so.12", "libcublas.so.12", "/toolkit/lib64/libcublas.so.12"),
    ]
    assert device._cublas_paths(12)[0].endswith(".12")
