"""`python -m tsad.gpu_check`, on the emulated GPU and without any."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsad import _core, cli
from tsad.gpu_check import conformance
from tsad.gpu_check.__main__ import build_parser
from tsad.gpu_check.benchmark import cases


def check(capsys: Any, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(argv), build_parser())
    except SystemExit as leave:
        code = int(leave.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the checks: all of them take a minute in emulation."""
    chosen = [
        c for c in conformance.checks() if c.name in ("unet, random plans", "pruner mlp, scores")
    ]
    assert len(chosen) == 2
    monkeypatch.setattr(conformance, "checks", lambda: iter(chosen))


@pytest.fixture
def cuda(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", emulated_cuda)
    _core._load_backend(emulated_cuda)  # the last one loaded is the one that runs
    return emulated_cuda


def test_what_was_found_is_said_and_kept(capsys: Any, cuda: str, few: None, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    code, said, _ = check(capsys, "--out", str(out))
    assert code == 0 and "emulated on the CPU: this says nothing of a GPU" in said
    found = json.loads(out.read_text())
    assert found["emulated"] and "emulated" in found["gpu"] and found["driver"] is None
    parts = found["parts"]
    assert [row["passed"] for row in parts["conformance"]] == [True, True]
    assert 0 < parts["conformance"][0]["error"] <= 1e-5
    assert "watches itself" in parts["sanitizer"][0]["skipped"]
    assert "no times" in parts["peers"][0]["skipped"]
    row, rounded, one = parts["benchmark"]
    assert one["kernels"] == 1 < one["listed"] and row["listed"] == 0
    assert row["case"] == "tiny, dense" and row["kernels"] > 0 and row["graphs"] == 1
    assert not any("_ms" in key for key in row) and "error" not in row
    assert rounded["precision"] == "tf32" and 1e-5 < rounded["error"] < 1e-2
    code, _, error = check(capsys, "--out", str(out), "--only", "conformance")
    assert code == 1 and "--overwrite" in error  # nothing is lost


def test_settings_of_the_environment_are_followed_and_said(
    capsys: Any, cuda: str, few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TSAD_CUDA_GRAPHS", "0")
    out = tmp_path / "found.json"
    code, said, _ = check(capsys, "--out", str(out), "--only", "benchmark")
    assert code == 0 and "TSAD_CUDA_GRAPHS=0: what is checked" in said
    found = json.loads(out.read_text())
    row = found["parts"]["benchmark"][0]
    assert row["graphs"] == 0 and row["launches"] == row["kernels"] > 1
    assert found["settings"]["TSAD_CUDA_GRAPHS"] == "0"


def test_what_differs_is_a_failure(
    capsys: Any, cuda: str, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "FEW_STEPS", 1e-5)
    right = conformance.random_tensors

    def wrong(shapes: Any, seed: int) -> Any:
        tensors = right(shapes, seed)
        wrong.calls += 1  # type: ignore[attr-defined]
        first = next(iter(tensors))
        tensors[first] = tensors[first] * np.float32(1 + 1e-3 * (wrong.calls % 2))  # type: ignore[attr-defined]
        return tensors

    wrong.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(conformance, "random_tensors", wrong)
    code, said, _ = check(capsys, "--only", "conformance")
    assert code == 1 and "DIFFERS" in said


def test_a_failure_is_a_failure() -> None:
    def fails() -> float:
        raise RuntimeError("cuda: a launch: out of luck")

    facts = conformance.Check("it", fails, 1e-5).facts()
    assert not facts["passed"] and "out of luck" in facts["problem"]
    assert not conformance.Check("nan", lambda: float("nan"), 1e-5).facts()["passed"]


def test_parts_and_time_can_be_chosen(capsys: Any, cuda: str, few: None) -> None:
    code, said, _ = check(capsys, "--skip", "benchmark", "sanitizer", "--minutes", "1e-9")
    assert code == 0 and "no time left" in said and "benchmark" not in said
    assert check(capsys, "--minutes", "0")[0] == 2
    assert check(capsys, "--only", "speed")[0] == 2


def test_without_a_gpu_it_says_why(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", str(Path(_core.__file__)))
    code, said, error = check(capsys)
    assert (code, said) == (1, "") and "there is no GPU to check: " in error
    assert "tsad_plugin" in error


def test_names_are_distinct() -> None:
    names = [check.name for check in conformance.checks()] + [case.name for case in cases()]
    assert len(set(names)) == len(names) > 20


def test_ctrl_c_keeps_what_was_found(cuda: str, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tsad.gpu_check", "--out", str(out)]
    run = subprocess.Popen(
        [*command, "--skip", "peers", "benchmark"],
        env={**os.environ, "TSAD_CUDA_LIBRARY": cuda},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(2.5)
    run.send_signal(signal.SIGINT)
    said, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in error
    if out.exists():  # it may have been at its imports still
        assert "conformance" in json.loads(out.read_text())["parts"] and "conformance" in said


def test_peers_run_the_same_policy() -> None:
    """PyTorch's loop on the CPU gives the bundled policy's own actions."""
    pytest.importorskip("torch")
    import tsad
    from tsad.gpu_check.peers import PEERS, make, run

    loop, config, sampler = make("torch eager", "cpu", sampler="ddim", num_inference_steps=4)
    policy = tsad.load("pusht", sampler="ddim", num_inference_steps=4)
    network, rng = config.network, np.random.default_rng(0)
    obs = rng.uniform(100, 400, (network.n_obs_steps, network.obs_dim)).astype(np.float32)
    shape = (len(sampler.timesteps), network.horizon, network.action_dim)
    noise = rng.standard_normal(shape, np.float32)
    expected = policy(obs, noise=noise[:, None], return_horizon=True)
    np.testing.assert_allclose(loop(obs, noise), expected, atol=1e-3)
    said = run("ONNX Runtime", "cuda", seconds=0.01)
    assert "skipped" in said and len(PEERS) == 3


def test_the_model_counts_the_weights_once_per_computed_cell() -> None:
    import tsad
    from tsad.device import Counts
    from tsad.gpu_check.model import find_gpu, floor_ms, work_of
    from tsad.load import read_policy

    policy = tsad.load("pusht")
    dense = work_of(policy, policy.plan)  # type: ignore[arg-type]
    _, tensors, _ = read_policy("pusht")
    parts = ("self_attn", "linear")
    own = sum(
        w.nbytes
        for name, w in tensors.items()
        if "decoder.layers" in name and any(p in name for p in parts)
    )
    assert own < dense.weights < 1.05 * own and dense.bytes == pytest.approx(100 * dense.weights)
    policy.sparsity = 0.95
    sparse = work_of(policy, policy.plan)  # type: ignore[arg-type]
    slots = 4 * 10 * 256 * int((policy.plan.sources != tsad.COMPUTE).sum())  # type: ignore[union-attr]
    assert sparse.bytes == pytest.approx(0.05 * dense.bytes + slots, rel=0.02)
    gpu = find_gpu("NVIDIA H200 NVL")
    assert gpu is not None and find_gpu("no GPU: emulated on the CPU, for tests") is None
    launched, captured = Counts(10, 0, 10, *[0] * 7), Counts(0, 1, 10, *[0] * 7)
    assert floor_ms(dense, launched, gpu) == pytest.approx(10 * 2.5e-3 + dense.bytes / 10e9)
    assert floor_ms(dense, captured, gpu) == pytest.approx(10 * 1.36e-3 + dense.bytes / 10e9)
    # as one kernel: what a few multiprocessors read and multiply, the longer of the two
    listed, ada = Counts(0, 1, 1, 100, *[0] * 6), find_gpu("NVIDIA GeForce RTX 4090")
    assert dense.multiply_adds == 100 * policy.block_costs.sum()
    multiplies = dense.multiply_adds / (8 * 253e9)
    assert multiplies > dense.bytes / (8 * 127e9)
    expected = 1e3 * (1.36e-6 + 100 * 0.65e-6 + multiplies)
    assert floor_ms(dense, listed, gpu, 8) == pytest.approx(expected)
    assert ada is not None and floor_ms(dense, listed, ada, 8) is None
    reads = sparse._replace(multiply_adds=1).bytes / 161e9
    expected = 1e3 * (1.0e-6 + 100 * 0.111e-6 + reads)
    assert floor_ms(sparse._replace(multiply_adds=1), listed, ada, 1) == pytest.approx(expected)
